"""SEFT's stage C: what the policy is to learn from its own replies and their revisions (specification 2.4)."""

from collections import Counter
from collections.abc import Collection, Sequence

from methods.seft_triples import words_of
from protocols.messages import FinishReason
from protocols.reviser import Label, LabelProbs, Revision

LENGTHS: dict[Label, float] = {"minor": 2.0, "major": 4.0}
"""How many times longer or shorter a revision may be."""
REPEATED = 8
"""How often four words may follow each other in one text."""


def own_score(probs: LabelProbs) -> float:
    """How good the reviser finds a reply: p(no) + p(minor) / 2."""
    return probs.no + 0.5 * probs.minor


def best_own(probs: Sequence[LabelProbs], least: float = 0.5) -> int | None:
    """Internal evolution: which of the policy's replies to one prompt to keep; None if none scores `least`."""
    best = max(range(len(probs)), key=lambda i: own_score(probs[i]))
    return best if own_score(probs[best]) >= least else None


def problem_of(reply: str, revision: Revision, names: Collection[str]) -> str | None:
    """Why a revision must not be taught; None if it may. What needed none is the reply itself, and may.

    `names` are what the reviser writes for its labels, on lines of their own.
    """
    if revision.too_long:
        return "too long to be revised"
    if revision.label == "no":
        return None if reply.strip() else "empty"
    text = revision.text
    if not text.strip():
        return "empty"
    if revision.finish_reason not in (FinishReason.STOP, FinishReason.STOP_TEXT):
        return "not finished"
    if any(line.strip() in names for line in text.splitlines()):
        return "label in the text"
    if revision.label is not None and text == reply:
        return "unchanged"
    if revision.label is not None and reply.strip():
        ratio = len(words_of(text)) / len(words_of(reply))
        if not 1 / LENGTHS[revision.label] <= ratio <= LENGTHS[revision.label]:
            return "length"
    return "repetition" if most_repeated(words_of(text)) > REPEATED else None


def most_repeated(words: Sequence[str], n: int = 4) -> int:
    """How often the most frequent run of `n` words occurs."""
    runs = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    return max(runs.values(), default=0)
