"""The reviser: labels replies by the probabilities of a policy, lets it write what needs revision, and teaches it."""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import permutations
from typing import cast

import numpy as np
from numpy.typing import NDArray

from actors.actor import Actor
from actors.in_turn import InTurn
from actors.policy.chat import spoken
from protocols.endings import ending_logprobs
from protocols.errors import BadInput
from protocols.losses import SFTLoss
from protocols.messages import ChatMessage, Prompt
from protocols.policy import PolicyService, SampleDelta, SampleRequest, TokenizeRequest
from protocols.reviser import (
    LABELS,
    Label,
    LabelProbs,
    ReviseItem,
    ReviserConfig,
    ReviseRequest,
    ReviseResponse,
    ReviserExample,
    ReviserService,
    ReviserTrainRequest,
    ReviserTrainResponse,
    Revision,
    RevisionDelta,
)
from protocols.service import Empty, Message
from protocols.tensor import Tensor
from protocols.training import ForwardBackwardRequest, OptimStepRequest, TrainRow

TERM = "revise"
Ids = NDArray[np.int32]
NOTHING: Ids = np.empty(0, np.int32)


class Taught(Message):
    """What a reviser's weights were trained for."""

    prompt: str
    """Digest of prompt, names and way of use."""


@dataclass(frozen=True)
class Labelled:
    """A reply after the first pass: what the policy is to continue, None where it is to write nothing."""

    revision: Revision
    prompt: Prompt | None


class ReviserActor(Actor, ReviserService):
    """The reviser's role over a policy handle."""

    def __init__(self, config: ReviserConfig, policy: PolicyService) -> None:
        super().__init__()
        self._config = config
        self._policy = policy
        self._heads: dict[Label, Ids] = {}
        self._end = 0
        self._context = 0
        self._behind = False
        """Whether samplers have yet to see what was learnt."""
        self._catching_up = asyncio.Lock()
        self._in_turn = InTurn()

    async def setup(self) -> None:
        """Raises BadInput when the policy has no end token, or its tokenizer does not tell the labels apart."""
        info = await self._policy.info(Empty())
        if not info.eos_token_ids:
            raise BadInput(f"reviser: the policy's model {info.model!r} has no end token, so a text would not end")
        self._end, self._context = info.eos_token_ids[0], info.context_length
        # What a label is followed by belongs to it: tokenizers may join a line's end with what is before it.
        names = self._config.names
        prompts = [
            Prompt(text=names[label] if label == "no" else f"{names[label]}\n", uid=f"reviser.names[{label}]")
            for label in LABELS
        ]
        no, minor, major = await self._continuations(prompts)
        self._heads = {"no": np.append(no, self._end).astype(np.int32), "minor": minor, "major": major}
        told = [tuple(head.tolist()) for head in (no, minor, major)]
        if any(other[: len(one)] == one for one, other in permutations(told, 2)):
            raise BadInput(
                f"reviser.names: got {names}, of whose tokens some begin others in the policy's model; expected words"
                " that its tokenizer knows"
            )

    def state(self) -> Taught:
        """What the weights belong to; they themselves are the policy's."""
        return Taught(prompt=digest(self._config))

    def load_state(self, text: str) -> None:
        """Raises ValueError when the weights were trained for another prompt."""
        if Taught.model_validate_json(text) != self.state():
            raise ValueError("it was trained with another `prompt`, `names` or `adaptive`; give it the same ones")

    async def revise(self, request: ReviseRequest) -> ReviseResponse:
        """Two passes: labels without decoding, then the texts of all replies that need one."""
        labelled = await self._label(request)
        revisions = [one.revision for one in labelled]
        asked = {i: one.prompt for i, one in enumerate(labelled) if one.prompt is not None}
        if asked:
            sampled = await self._policy.sample(SampleRequest(prompts=list(asked.values()), params=request.params))
            for i, result in zip(asked, sampled.results, strict=True):
                (completion,) = result.completions
                revisions[i] = revisions[i].model_copy(
                    update={
                        "text": completion.text,
                        "finish_reason": completion.finish_reason,
                        "decoded_tokens": len(completion.tokens),
                        "version": int(completion.versions.array[0]),
                    }
                )
        return ReviseResponse(revisions=revisions)

    async def stream(self, request: ReviseRequest) -> AsyncGenerator[RevisionDelta, None]:
        """Labels at once, then the texts token by token."""
        labelled = await self._label(request)
        for index, one in enumerate(labelled):
            text = "" if one.prompt else one.revision.text
            known = one.revision.model_dump(include={"label", "label_probs", "too_long"})
            yield RevisionDelta.model_validate({"index": index, "text": text} | known)
        asked = {i: one.prompt for i, one in enumerate(labelled) if one.prompt is not None}
        if not asked:
            return
        places = list(asked)
        written = self._policy.stream(SampleRequest(prompts=list(asked.values()), params=request.params))
        async with aclosing(cast(AsyncGenerator[SampleDelta], written)) as deltas:
            async for delta in deltas:
                place = places[delta.prompt_index]
                yield RevisionDelta(index=place, text=delta.text, finish_reason=delta.finish_reason)

    async def _label(self, request: ReviseRequest) -> list[Labelled]:
        await self._catch_up()
        prompts = await self._prompts(request.items)
        # At least one token of text.
        room = self._context - max(map(len, self._heads.values())) - 1
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
        labels_BL, version = await self._probabilities([prompts[i] for i in fitting])
        found = [Labelled(Revision(uid=item.uid, text=item.reply, too_long=True), None) for item in request.items]
        for row, i in enumerate(fitting):
            item, ids = request.items[i], prompts[i]
            revision = Revision(uid=item.uid, text=item.reply, version=version)
            label: Label | None = None
            if labels_BL is not None:
                label = LABELS[int(labels_BL[row].argmax())]
                shares = LabelProbs.model_validate(dict(zip(LABELS, labels_BL[row].tolist(), strict=True)))
                revision = revision.model_copy(update={"label": label, "label_probs": shares})
            if label == "no" or request.labels_only:
                found[i] = Labelled(revision, None)
            else:
                start = ids if label is None else np.concatenate([ids, self._heads[label]])
                found[i] = Labelled(revision, Prompt(tokens=Tensor(start), seed=item.seed, uid=item.uid))
        return found

    async def _catch_up(self) -> None:
        """Let the samplers have what was learnt. Whoever asks meanwhile waits for it, too."""
        async with self._catching_up:
            if not self._behind:
                return
            # Before the call: what is learnt during it has to be published again.
            self._behind = False
            try:
                await self._policy.publish(Empty())
            except BaseException:  # raised again: whoever leaves here leaves samplers behind
                self._behind = True
                raise

    async def _probabilities(self, prompts: Sequence[Ids]) -> tuple[NDArray[np.float64] | None, int]:
        """Of each label after each prompt, among the three, float64[B, 3], and the weight version behind them."""
        if not prompts or not self._config.adaptive:
            return None, 0
        heads = [self._heads[label] for label in LABELS]
        logits_BL, version = await ending_logprobs(self._policy, prompts, heads)
        shares_BL = np.exp(logits_BL - logits_BL.max(-1, keepdims=True))
        return shares_BL / shares_BL.sum(-1, keepdims=True), version

    async def train(self, request: ReviserTrainRequest) -> ReviserTrainResponse:
        """Weighted cross entropy of labels and texts (SEFT, stage B)."""
        rows = [row for row in await self._rows(request.examples) if len(row.tokens) <= self._context]
        too_long = len(request.examples) - len(rows)
        if not rows:
            raise BadInput(f"examples: none of {too_long} fits the policy's context of {self._context} tokens")
        return await self._in_turn(lambda: self._learn(rows, too_long, request.learning_rate))

    async def _learn(self, rows: Sequence[TrainRow], too_long: int, rate: float | None) -> ReviserTrainResponse:
        weight = sum(float(row.terms[TERM].array.sum()) for row in rows)
        report = await self._policy.forward_backward(
            ForwardBackwardRequest(rows=list(rows), losses={TERM: SFTLoss()}, counts={TERM: weight})
        )
        update = await self._policy.optim_step(OptimStepRequest(learning_rate=rate))
        self._behind = True
        return ReviserTrainResponse(
            loss=report.loss,
            learnt=len(rows),
            too_long=too_long,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            version=update.version,
        )

    async def _rows(self, examples: Sequence[ReviserExample]) -> list[TrainRow]:
        prompts = await self._prompts(examples)
        written = {i: self._text(one) for i, one in enumerate(examples)}
        written = {i: text for i, text in written.items() if text}
        prompts_of = [Prompt(text=text, uid=examples[i].uid) for i, text in written.items()]
        texts = dict(zip(written, await self._continuations(prompts_of), strict=True))
        return [
            self._row(one, prompts[i], np.append(texts[i], self._end).astype(np.int32) if i in texts else NOTHING)
            for i, one in enumerate(examples)
        ]

    def _text(self, example: ReviserExample) -> str:
        """What is to be written after the label, if anything; without labels a good reply is written out."""
        if example.label == "no":
            return "" if self._config.adaptive else example.reply
        return example.target

    def _row(self, example: ReviserExample, prompt_P: Ids, text_S: Ids) -> TrainRow:
        head_H = self._heads[example.label] if self._config.adaptive else NOTHING
        # The end of `no` is an end as any other.
        named, ended = (len(head_H) - 1, 1) if example.label == "no" and len(head_H) else (len(head_H), 0)
        of_name = self._config.label_weight / max(named, 1)
        weights_T = np.repeat([0.0, of_name, 1.0], [len(prompt_P), named, ended + len(text_S)])
        tokens_T = np.concatenate([prompt_P, head_H, text_S])
        return TrainRow(row_id=example.uid, tokens=tokens_T, terms={TERM: weights_T})

    async def _prompts(self, items: Sequence[ReviseItem | ReviserExample]) -> list[Ids]:
        prompts = [
            Prompt(messages=[ChatMessage(role="user", content=question(self._config, one))], uid=one.uid)
            for one in items
        ]
        response = await self._policy.tokenize(TokenizeRequest(prompts=prompts))
        return [tokens.array for tokens in response.tokens]

    async def _continuations(self, texts: Sequence[Prompt]) -> list[Ids]:
        if not texts:
            return []
        request = TokenizeRequest(prompts=list(texts), continues=True)
        return [tokens.array for tokens in (await self._policy.tokenize(request)).tokens]


def question(config: ReviserConfig, one: ReviseItem | ReviserExample) -> str:
    """The question about one reply."""
    names = [config.names[label] for label in LABELS]
    places = {"labels": f"{names[0]}, {names[1]} or {names[2]}", "no": names[0]}
    return config.asks.format(prompt=spoken(one.messages), reply=one.reply, **places)


def digest(config: ReviserConfig) -> str:
    """Names what a reviser is asked and how it answers."""
    told = json.dumps([config.asks, [config.names[label] for label in LABELS], config.adaptive])
    return hashlib.sha256(told.encode()).hexdigest()[:16]
