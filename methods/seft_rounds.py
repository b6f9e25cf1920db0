"""What the policy learns in a round: its own replies, chosen or revised; on disk call by call (specification 2.4)."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from cluster.run_directory import write_atomically
from cluster.seeds import derive_seed
from methods.chat_data import Conversation
from methods.seft_config import Config
from methods.seft_targets import best_own, own_score, problem_of
from protocols.errors import Corrupt
from protocols.messages import ChatMessage, Completion, FinishReason, Prompt
from protocols.policy import PolicyService, SampleRequest
from protocols.reviser import LabelProbs, ReviseItem, ReviseRequest, ReviserService, Revision
from protocols.reward_model import Reply, RewardModelService, RewardRequest
from protocols.service import Message
from protocols.verifier import VerifierService

Source = Literal["kept", "revised", "own", "own_best", "stronger"]


@dataclass(frozen=True)
class Cast:
    """The actors of a run."""

    policy: PolicyService
    end: int
    """The policy's end token."""
    context: int
    """Its longest sequence, in tokens."""
    reviser: ReviserService | None
    reviser_policy: PolicyService | None
    """The reviser's model."""
    reward: RewardModelService | None
    stronger: PolicyService | None
    judge: VerifierService | None
    reference: PolicyService | None
    """The policy before it is trained."""


class PseudoLabel(Message):
    """What became of one prompt in a round."""

    uid: str
    """Digest of prompt, round and sample."""
    id: str
    """The prompt's name."""
    messages: list[ChatMessage]
    """The conversation."""
    reply: str
    """What the policy replied, or the stronger model."""
    target: str
    """What the policy is to learn."""
    source: Source
    """Where the target is from."""
    problem: str = ""
    """Why it must not be learnt; empty if it may."""
    label_probs: LabelProbs | None = None
    """What the reviser thought of the reply."""
    gain: float | None = None
    """By how much the reward model likes the target better than the reply."""
    sampled_tokens: int
    """Tokens that were sampled for the replies."""
    decoded_tokens: int = 0
    """Tokens that were sampled for the revision."""
    policy_version: int
    """Weight version that replied."""
    reviser_version: int = 0
    """Weight version that revised."""


async def collected(
    cast: Cast, config: Config, prompts: Sequence[Conversation], turn: int, file: Path, show: Callable[[str], None]
) -> list[PseudoLabel]:
    """A round's pseudo-labels. Calls that are in the file already are not asked again."""
    found = read_round(file, prompts, config.prompts_per_call)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(line_of(one) for one in found))
    for start in range(len(found), len(prompts), config.prompts_per_call):
        show(f"round {turn}: {start} of {len(prompts)} prompts answered")
        batch = prompts[start : start + config.prompts_per_call]
        made = await pseudo_labels(cast, config, batch, turn)
        with open(file, "a", encoding="utf-8", errors="backslashreplace") as lines:
            lines.write("".join(line_of(one) for one in made))
            lines.flush()
            os.fsync(lines.fileno())
        found += made
    return found


def line_of(one: PseudoLabel) -> str:
    """Its line in the file."""
    return json.dumps(one.model_dump(mode="json"), ensure_ascii=False) + "\n"


def read_round(file: Path, prompts: Sequence[Conversation], per_call: int) -> list[PseudoLabel]:
    """Whole calls only: what was cut off, and the call that it is of, is asked again. Raises Corrupt."""
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    whole = len(lines) if len(lines) == len(prompts) else len(lines) // per_call * per_call
    found: list[PseudoLabel] = []
    for number, (line, prompt) in enumerate(zip(lines[:whole], prompts, strict=False), start=1):
        try:
            one = PseudoLabel.model_validate_json(line)
        except ValidationError as error:
            raise Corrupt(f"{file} line {number} is no pseudo-label: {error}") from error
        if one.id != prompt.id:
            raise Corrupt(
                f"{file} line {number} is of the prompt {one.id!r}, expected {prompt.id!r}; remove the file"
            )
        found.append(one)
    return found


async def pseudo_labels(cast: Cast, config: Config, prompts: Sequence[Conversation], turn: int) -> list[PseudoLabel]:
    """One call's worth: the policy replies, the reviser chooses or revises, the reward model has a veto."""
    if config.algorithm == "best_of_n" or (config.revises and config.internal(turn)):
        return await chosen(cast, config, prompts, turn)
    replies = await replied(cast, config, prompts, turn)
    if not config.revises:
        return [judged_alone(one) for one in replies]
    return await revised(cast, config, replies)


async def replied(cast: Cast, config: Config, prompts: Sequence[Conversation], turn: int) -> list[PseudoLabel]:
    """One reply to each prompt, of the policy, or at some of the stronger model."""
    strong = [cast.stronger is not None and by_stronger(config, one, turn) for one in prompts]
    found: dict[int, PseudoLabel] = {}
    for policy, taken in ((cast.policy, False), (cast.stronger, True)):
        places = [i for i, is_strong in enumerate(strong) if is_strong == taken]
        if policy is None or not places:
            continue
        samples = await sampled(policy, config, [prompts[i] for i in places], turn, 1)
        for i, (one,) in zip(places, samples, strict=True):
            found[i] = pseudo_label(prompts[i], turn, 0, one, source="stronger" if taken else "own")
    return [found[i] for i in range(len(prompts))]


def by_stronger(config: Config, prompt: Conversation, turn: int) -> bool:
    """Whether the stronger model replies to a prompt: by the prompt and the round alone."""
    return derive_seed(config.seed, "stronger", turn, prompt.id) % 2**32 < config.stronger_share * 2**32


async def sampled(
    policy: PolicyService, config: Config, prompts: Sequence[Conversation], turn: int, count: int
) -> list[list[Completion]]:
    """Replies to each prompt. Seeds depend on the prompt and the round alone."""
    asked = [
        Prompt(messages=one.messages, uid=one.id, seed=derive_seed(config.seed, "reply", turn, one.id))
        for one in prompts
    ]
    answer = await policy.sample(SampleRequest(prompts=asked, n=count, params=config.sampling))
    return [list(result.completions) for result in answer.results]


def pseudo_label(
    prompt: Conversation, turn: int, place: int, one: Completion, *, source: Source, tokens: int | None = None
) -> PseudoLabel:
    """A reply that is its own target, before anything else is known."""
    told = json.dumps([[turn.model_dump() for turn in prompt.messages], turn, place])
    return PseudoLabel(
        uid=hashlib.sha256(told.encode()).hexdigest()[:16],
        id=prompt.id,
        messages=prompt.messages,
        reply=one.text,
        target=one.text,
        source=source,
        problem="" if one.finish_reason in (FinishReason.STOP, FinishReason.STOP_TEXT) else "not finished",
        sampled_tokens=len(one.tokens) if tokens is None else tokens,
        policy_version=int(one.versions.array[0]) if len(one.tokens) else 0,
    )


def judged_alone(one: PseudoLabel) -> PseudoLabel:
    """A reply that is learnt as it is, if there is one."""
    return one if one.reply.strip() else one.model_copy(update={"problem": "empty"})


async def chosen(cast: Cast, config: Config, prompts: Sequence[Conversation], turn: int) -> list[PseudoLabel]:
    """Internal evolution, and best-of-n: one of the policy's own replies to each prompt."""
    samples = await sampled(cast.policy, config, prompts, turn, config.own_samples)
    rows = [
        pseudo_label(prompt, turn, i, one, source="own_best", tokens=sum(len(other.tokens) for other in of_prompt))
        for prompt, of_prompt in zip(prompts, samples, strict=True)
        for i, one in enumerate(of_prompt)
    ]
    if cast.reviser is not None:
        revisions = await asked(cast.reviser, config, rows, labels_only=True)
        rows = [
            one.model_copy(
                update={
                    "label_probs": said.label_probs,
                    "reviser_version": said.version,
                    "problem": one.problem or ("too long to be revised" if said.too_long else ""),
                }
            )
            for one, said in zip(rows, revisions, strict=True)
        ]
        usable = [not one.problem and bool(one.reply.strip()) for one in rows]
        scores = [own_score(one.label_probs) if one.label_probs is not None else 0.0 for one in rows]
    else:
        usable = [not one.problem and bool(one.reply.strip()) for one in rows]
        scores = await rewards(cast, rows, [one.reply for one in rows])
    found = []
    for start in range(0, len(rows), config.own_samples):
        places = range(start, start + config.own_samples)
        able = [i for i in places if usable[i]]
        best = max(able or places, key=lambda i: scores[i])
        problem = "" if able else rows[best].problem or "empty"
        if able and cast.reviser is not None:
            probs = [one for i in able if (one := rows[i].label_probs) is not None]
            problem = "" if best_own(probs, config.least_own_score) is not None else "no reply good enough"
        found.append(rows[best].model_copy(update={"problem": problem}))
    return found


async def revised(cast: Cast, config: Config, replies: Sequence[PseudoLabel]) -> list[PseudoLabel]:
    """External evolution: replies as they are where they need no revision, else their revisions."""
    assert cast.reviser is not None
    revisions = await asked(cast.reviser, config, replies)
    found = [after(one, said, config) for one, said in zip(replies, revisions, strict=True)]
    if config.choose:
        again = [one.model_copy(update={"reply": one.target}) for one in found]
        second = await asked(cast.reviser, config, again, labels_only=True)
        found = [better_liked(*three) for three in zip(replies, found, second, strict=True)]
    if cast.reward is not None:
        before = await rewards(cast, found, [one.reply for one in found])
        behind = await rewards(cast, found, [one.target for one in found])
        gains = [new - old for old, new in zip(before, behind, strict=True)]
        # Equal texts may differ by rounding where they are scored beside others.
        gains = [0.0 if one.target == one.reply else gain for one, gain in zip(found, gains, strict=True)]
        found = [vetoed(one, gain) for one, gain in zip(found, gains, strict=True)]
    return found


async def asked(
    reviser: ReviserService, config: Config, rows: Sequence[PseudoLabel], *, labels_only: bool = False
) -> list[Revision]:
    """What the reviser says of replies; it writes its most likely text."""
    items = [ReviseItem(uid=one.uid, messages=one.messages, reply=one.reply) for one in rows]
    answer = await reviser.revise(ReviseRequest(items=items, params=config.greedy, labels_only=labels_only))
    return answer.revisions


def after(one: PseudoLabel, revision: Revision, config: Config) -> PseudoLabel:
    """A reply with its revision, and what is wrong with that."""
    problem = problem_of(one.reply, revision, config.reviser.names.values()) or ""
    # A reply that was cut off can be revised, but not kept.
    if revision.label == "no" and one.problem:
        problem = one.problem
    return one.model_copy(
        update={
            "target": revision.text,
            "source": "kept" if revision.label == "no" else "revised",
            "problem": problem,
            "label_probs": revision.label_probs,
            "decoded_tokens": revision.decoded_tokens,
            "reviser_version": revision.version,
        }
    )


def better_liked(reply: PseudoLabel, one: PseudoLabel, second: Revision) -> PseudoLabel:
    """The reply instead of its revision where the reviser likes that less, and the reply may be learnt."""
    if one.source != "revised" or one.label_probs is None or second.label_probs is None:
        return one
    if one.problem or reply.problem or not reply.reply.strip():
        return one
    if own_score(second.label_probs) >= own_score(one.label_probs):
        return one
    return one.model_copy(update={"target": one.reply, "source": "kept"})


def vetoed(one: PseudoLabel, gain: float) -> PseudoLabel:
    """A target that the reward model likes less than the reply must not be learnt."""
    worse = gain < 0 and not one.problem
    return one.model_copy(update={"gain": gain} | ({"problem": "worse by the reward model"} if worse else {}))


async def rewards(cast: Cast, rows: Sequence[PseudoLabel], texts: Sequence[str]) -> list[float]:
    """What the reward model thinks of texts in the place of the rows' replies."""
    assert cast.reward is not None
    replies = [
        Reply(uid=one.uid, prompt=Prompt(messages=one.messages), text=text, ended=True)
        for one, text in zip(rows, texts, strict=True)
    ]
    return [one.score for one in (await cast.reward.score(RewardRequest(replies=replies))).scores]
