"""What must hold of the networks whatever they have learnt (specification section 5.4)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors.router.layout import NOTHING, Layout, Packed, causal_layout
from actors.router.learnt import LearntChooser
from actors.router.nets import CausalLookahead, MaskedLookahead
from protocols.router import RouterConfig
from tests.actors.router.conftest import Configure, world_rows

VARIANTS = pytest.mark.parametrize("variant", ["masked", "causal"])


def chooser(config: RouterConfig) -> LearntChooser:
    made = LearntChooser(config, None)
    # Fresh heads are small: with larger ones a difference would be seen.
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.net.named_parameters():
            if name.startswith(("head", "out", "slots")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def laid_out(made: LearntChooser, count: int, *, answers: bool, rate: float = 1.0, seed: int = 0) -> list[Layout]:
    layouts = []
    for row in world_rows(count, seed):
        query, _ = made._backbone.query(row.prompt.text or "", made.limit)
        layouts.append(made.net.layout(query, made._answers(row, len(query)) if answers else None, rate))
    return layouts


@torch.no_grad()
def logits(made: LearntChooser, layouts: Sequence[Layout]) -> torch.Tensor:
    output = made.net(layouts)
    assert isinstance(output.logits_BT, torch.Tensor)
    return output.logits_BT


@VARIANTS
def test_no_answer_can_change_a_choice(configure: Configure, variant: str) -> None:
    """In service there is no answer, and to learn, with all of it masked, it is where the choice cannot see it."""
    made = chooser(configure(variant))
    blind = logits(made, laid_out(made, 5, answers=False))
    layouts = laid_out(made, 5, answers=True)
    others = [replace(row, tokens=np.where(row.labels == NOTHING, row.tokens, row.tokens[::-1])) for row in layouts]
    if variant == "causal":  # where the tokens of answers are read after the choice was made
        assert any((row.tokens != other.tokens).any() for row, other in zip(layouts, others, strict=True))
    assert torch.equal(logits(made, layouts), logits(made, others))
    torch.testing.assert_close(logits(made, layouts), blind, rtol=1e-5, atol=1e-5)
    assert blind.std() > 0.01


def test_answers_that_are_visible_do_change_it(configure: Configure) -> None:
    made = chooser(configure("masked"))
    half, whole = (logits(made, laid_out(made, 5, answers=True, rate=rate)) for rate in (0.5, 1.0))
    assert (half - whole).abs().max() > 1e-3


def test_one_packed_row_says_what_a_row_per_candidate_does(configure: Configure) -> None:
    """Section 2.4: block mask and shared positions, against the model's own causal attention over one candidate."""
    made = chooser(configure("causal"))
    net, model = made.net, made._backbone.model
    assert isinstance(net, CausalLookahead)
    for row in world_rows(4):
        query, _ = made._backbone.query(row.prompt.text or "", made.limit)
        answers = made._answers(row, len(query))
        answers[1] = answers[1][:2]  # of different lengths
        with torch.no_grad():
            packed = net([causal_layout(query, answers, 4)])
            served = net([causal_layout(query, None, 4)])
            own, loss = [], 0.0
            for t, answer in enumerate(answers):
                tokens = torch.tensor([[*query, 0, *answer[:-1]]])
                embeds = model.get_input_embeddings()(tokens)
                embeds[0, len(query)] = net.slots[t]
                states = model.base_model(inputs_embeds=embeds).last_hidden_state
                own.append(net.out(states[0, len(query)]).item())
                predicted = torch.log_softmax(model.lm_head(states)[0, len(query) :], -1)
                loss -= sum(predicted[i, token].item() for i, token in enumerate(answer))
        np.testing.assert_allclose(packed.logits_BT[0].numpy(), own, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(served.logits_BT[0].numpy(), own, rtol=1e-6, atol=1e-6)
        assert packed.response_loss is not None
        assert packed.response_loss.item() == pytest.approx(loss, rel=1e-5)


@VARIANTS
@pytest.mark.parametrize("blocks", ["joint", "apart"])
def test_candidates_may_change_places(configure: Configure, variant: str, blocks: str) -> None:
    made = chooser(configure(variant, blocks=blocks))
    before = logits(made, laid_out(made, 5, answers=False))
    order = [2, 0, 3, 1]
    with torch.no_grad():
        for name in made.net.per_candidate:
            parameter = made.net.get_parameter(name)
            parameter.copy_(parameter[order].clone())
    after = logits(made, laid_out(made, 5, answers=False))
    torch.testing.assert_close(after, before[:, order], rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-2


@VARIANTS
def test_rows_do_not_see_their_padding(configure: Configure, variant: str) -> None:
    made = chooser(configure(variant))
    layouts = laid_out(made, 3, answers=False)
    longer = np.concatenate([layouts[0].tokens[:9]] * 3)
    layouts.append(made.net.layout(longer, None, 1.0))
    together = logits(made, layouts)
    alone = torch.cat([logits(made, [layout]) for layout in layouts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_blocks_apart_do_not_see_each_other(configure: Configure) -> None:
    """What a block predicts does not depend on another candidate's embedding, unless blocks are joint."""
    gaps = {}
    for blocks in ("joint", "apart"):
        made = chooser(configure("masked", blocks=blocks, init="random"))
        net = made.net
        assert isinstance(net, MaskedLookahead)
        layouts = laid_out(made, 2, answers=True)
        first = predicted(net, layouts)
        with torch.no_grad():
            net.slots[3].add_(torch.randn(net.slots.shape[1]))
        second = predicted(net, layouts)
        places = [place for place, block in enumerate(blocks_predicted(layouts)) if block == 0]
        gaps[blocks] = (first[places] - second[places]).abs().max().item()
    # The first place sees all blocks and is seen by all, so a little gets through.
    assert 0 < gaps["apart"] < gaps["joint"] / 2


@torch.no_grad()
def predicted(net: MaskedLookahead, layouts: Sequence[Layout]) -> torch.Tensor:
    from actors.router.layout import apart_mask

    packed = Packed.of(layouts, net.backbone.device)
    mask = apart_mask(packed) if net._apart else None
    _, found = net.backbone(packed, net.slots, mask, predict=True)
    assert found is not None
    return found  # type: ignore[no-any-return]


def blocks_predicted(layouts: Sequence[Layout]) -> list[int]:
    return [int(b) for layout in layouts for b in layout.blocks[layout.labels >= 0]]


def test_the_choice_needs_no_output_layer(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    made = chooser(configure("masked"))

    def refuse(*given: Any, **more: Any) -> Any:
        raise AssertionError("the output layer was used")

    monkeypatch.setattr(type(made._backbone.model), "forward", refuse)
    assert made.score(["1 2 3"]).scores_BT.shape == (1, 4)
