"""What questions would take, counted by the policy's tokenizer before any is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from methods.phenotyping_answers import AnswerStore, Asker, Question, Said, tokens_of
from methods.phenotyping_decide import Case


@dataclass(frozen=True)
class Cost:
    """Of a bucket's questions that have not been asked for another one."""

    lengths: Mapping[str, int]
    """Tokens of each prompt."""
    room: int
    """Most that the policy can read."""

    @property
    def tokens(self) -> int:
        """Of all prompts."""
        return sum(self.lengths.values())


async def cost_of(asker: Asker, questions: Sequence[Question], stores: Sequence[AnswerStore], asked_for: str) -> Cost:
    """What a bucket takes. What a store holds is left out, save what was asked for this bucket before the run was
    stopped: the same is counted however often that happens."""
    distinct = {one.key: one for one in questions}
    known = {key: said for store in stores for key, said in store.known(list(distinct)).items()}
    mine = [one for key, one in distinct.items() if key not in known or known[key].asked_for == asked_for]
    lengths: dict[str, int] = {}
    for start in range(0, len(mine), asker.per_call):
        piece = mine[start : start + asker.per_call]
        told = await tokens_of(asker, piece)
        lengths |= {one.key: len(ids) for one, ids in zip(piece, told, strict=True)}
    return Cost(lengths, asker.room)


def note_down(cost: Cost, counted: AnswerStore, asked_for: str) -> None:
    """Keep what was counted, so that a dry run counts a question of several buckets once."""
    counted.add({key: Said(None, tokens, 0, asked_for) for key, tokens in cost.lengths.items()})


def plan_of(cases: Sequence[Case], patients: int, cost: Cost) -> dict[str, float]:
    """One bucket of a dry run in numbers."""
    found = {
        "patients": patients,
        "snippets": sum(case.evidence.found for case in cases),
        "different": sum(case.evidence.different for case in cases),
        "questions": sum(len(case.questions) for case in cases),
        "asked": len(cost.lengths),
        "tokens": cost.tokens,
        "longest": max(cost.lengths.values(), default=0),
        "too_long": sum(tokens > cost.room for tokens in cost.lengths.values()),
    }
    return {name: float(value) for name, value in found.items()}
