"""SEFT's stage A: from replies of known order to what a reviser learns, label and target (specification 2.2)."""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field
from rapidfuzz.distance import Levenshtein

from methods.chat_data import Candidate, Judged
from protocols.errors import BadInput
from protocols.messages import ChatMessage
from protocols.reviser import Label
from protocols.service import Message

LAYOUT = re.compile(r"```|\t|^(?: {2,}|\|)", re.MULTILINE)
"""What tells code and tables, where blanks mean something."""


class Triple(Message):
    """One example for the reviser."""

    id: str
    """Its name."""
    source_id: str
    """The prompt that it is of; examples of one prompt stay on one side of a split."""
    messages: list[ChatMessage]
    """The conversation."""
    reply: str
    """What is to be revised."""
    label: Label
    """How much it has to be."""
    target: str
    """What becomes of it: the reply itself where the label is `no`."""
    gap: float | None = None
    """By how much the best reply scores more, where there are scores."""


class LabelRule(Message):
    """How labels follow from the order of replies (our design: the paper's rule could not be read)."""

    noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """t0: up to this gap to the best reply a score counts as equal; ranks have no noise."""
    minor_max_rank: int | None = Field(default=None, ge=1)
    """Ranks 2 to this one need a minor revision, in pairs too; null: to half of the replies, rounded up, and pairs by
    their distance."""
    major_distance: float = 0.5
    """Of pairs: above this normalised edit distance to the better reply the worse one needs a major revision."""


@dataclass
class Triples:
    """Examples, the threshold t1 that was found, and replies and prompts that were left out."""

    kept: list[Triple] = field(default_factory=list)
    threshold: float | None = None
    """t1, the gap above which a revision is major; none where nothing has scores."""
    dropped: Counter[str] = field(default_factory=Counter)


def triples_of(items: Iterable[Judged], rule: LabelRule, threshold: float | None = None) -> Triples:
    """One example for each reply; `threshold` is a t1 that was found before.

    Left out and counted: prompts with one reply or whose best is empty, texts that stand at different places of the
    order, repetitions, and of prompts whose replies are all equally good all but one.
    """
    found, usable = Triples(), []
    for item in items:
        replies = _distinct(item.replies, found.dropped)
        if len(replies) < 2:
            found.dropped["prompts with less than two replies"] += 1
        else:
            scored = all(reply.score is not None for reply in replies)
            usable.append((item, scored, replies))
    gaps = [gap for _, scored, replies in usable if scored for gap in gaps_of(replies)]
    found.threshold = threshold
    if gaps and threshold is None:
        found.threshold = major_above(gaps, rule.noise)
    for item, scored, replies in usable:
        if scored:
            labels = labels_by_score(gaps_of(replies), rule.noise, found.threshold or 0.0)
        else:
            labels = labels_by_rank(replies, rule)
        _add(found, item, replies, labels, rule.noise)
    return found


def _distinct(replies: Sequence[Candidate], dropped: Counter[str]) -> list[Candidate]:
    """Each text once; none of a text that stands at different places of the order."""
    places: dict[str, set[tuple[float | None, float | None]]] = defaultdict(set)
    for reply in replies:
        places[reply.text].add((reply.score, reply.rank))
    kept: dict[str, Candidate] = {}
    for reply in replies:
        if len(places[reply.text]) > 1:
            dropped["equal texts at different places"] += 1
        elif reply.text in kept:
            dropped["repeated"] += 1
        else:
            kept[reply.text] = reply
    return list(kept.values())


def gaps_of(replies: Sequence[Candidate]) -> list[float]:
    """By how much the best reply scores more than each."""
    scores = [reply.score or 0.0 for reply in replies]
    return [max(scores) - score for score in scores]


def major_above(gaps: Sequence[float], noise: float) -> float:
    """t1: the median of the gaps above the noise, so that minor and major are equally frequent."""
    above = [gap for gap in gaps if gap > noise]
    return statistics.median(above) if above else noise


def labels_by_score(gaps: Sequence[float], noise: float, threshold: float) -> list[Label]:
    """`no` up to t0, `minor` up to t1, `major` above."""
    return ["no" if gap <= noise else "minor" if gap <= threshold else "major" for gap in gaps]


def labels_by_rank(replies: Sequence[Candidate], rule: LabelRule) -> list[Label]:
    """Rank 1 needs `no` revision, the next a `minor`, the others a `major` one; of a pair their distance decides."""
    ranks = [reply.rank or 1.0 for reply in replies]
    best = min(ranks)
    if len(replies) == 2 and rule.minor_max_rank is None:
        apart: Label = "major" if edit_distance(*(one.text for one in replies))[1] > rule.major_distance else "minor"
        return ["no" if rank == best else apart for rank in ranks]
    minor = rule.minor_max_rank or (len(replies) + 1) // 2
    return ["no" if rank == best else "minor" if rank <= minor else "major" for rank in ranks]


def _add(found: Triples, item: Judged, replies: Sequence[Candidate], labels: Sequence[Label], noise: float) -> None:
    has_scores = all(reply.score is not None for reply in replies)
    goodness = [(reply.score or 0.0) if has_scores else -(reply.rank or 1.0) for reply in replies]
    best = max(range(len(replies)), key=lambda i: (goodness[i], bool(replies[i].text.strip())))
    if not replies[best].text.strip():
        found.dropped["prompts whose best reply is empty"] += 1
        return
    tied = all(label == "no" for reply, label in zip(replies, labels, strict=True) if reply.text.strip())
    for i, (reply, label) in enumerate(zip(replies, labels, strict=True)):
        # An empty reply has nothing to keep, whatever it scores.
        label = label if reply.text.strip() else "major"
        if tied and label == "no" and i != best:
            found.dropped["equally good"] += 1
            continue
        target = reply.text if label == "no" else replies[best].text
        if label == "minor":
            least = noise if has_scores else 0.0
            better = [o.text for o, good in zip(replies, goodness, strict=True) if good - goodness[i] > least]
            target = min(filter(str.strip, better), key=lambda text: edit_distance(reply.text, text)[0])
        found.kept.append(
            Triple(
                id=f"{item.id}/{i}",
                source_id=item.id,
                messages=item.messages,
                reply=reply.text,
                label=label,
                target=target,
                gap=goodness[best] - goodness[i] if has_scores else None,
            )
        )


def balanced(triples: Sequence[Triple], rng: np.random.Generator) -> list[Triple]:
    """As many as there may be with no label more than twice as frequent as another, in the given order.

    Labels that do not occur do not count, but for `no`: a reviser that has not seen it rewrites everything. Raises
    BadInput where there is none.
    """
    places: dict[Label, list[int]] = defaultdict(list)
    for i, triple in enumerate(triples):
        places[triple.label].append(i)
    if "no" not in places:
        raise BadInput("preferences: no reply is labelled `no`; expected some that are best, or near it")
    most = 2 * min(map(len, places.values()))
    kept = [rng.choice(at, most, replace=False) if len(at) > most else np.array(at) for at in places.values()]
    return [triples[i] for i in sorted(np.concatenate(kept).tolist())]


def words_of(text: str, *, keep_blanks: bool = False) -> list[str]:
    """The words of a text, and if wanted the blanks between them."""
    return re.findall(r"\s+|\S+", text) if keep_blanks else text.split()


def edit_distance(one: str, other: str) -> tuple[int, float]:
    """Fewest insertions, deletions and replacements of words, and their share of the longer text's words.

    Where one of them is code or a table, blanks count as words.
    """
    keep = bool(LAYOUT.search(one) or LAYOUT.search(other))
    words = [words_of(text, keep_blanks=keep) for text in (one, other)]
    distance = Levenshtein.distance(*words)
    return distance, distance / max(*map(len, words), 1)
