"""Decisions against labels: every reducer, the rules and the simplest baselines side by side, per phenotype."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from methods.phenotyping_decide import Cited, Decided
from methods.phenotyping_definition import Definition
from methods.phenotyping_measures import (
    Drawn,
    average_precision,
    bootstrap_f1,
    bootstrap_gain,
    calibration_error,
    counts,
    cross_fitted,
    mcnemar,
)
from methods.phenotyping_reduce import ReduceConfig, Reducer, decide, patient_score
from methods.phenotyping_rules import Fact, any_code, cue

FORMULAS: tuple[Reducer, ...] = ("max", "count", "mean", "noisy_or", "log_odds", "recency")
FOLDS = 5
LONG = (3, 6)
"""Chart lengths, in snippets that were asked about, at which patients are parted."""
MANY = 6
"""Healthy patients with so many questions or more are one entry of the false alarms."""


@dataclass(frozen=True)
class Labelled:
    """Patients with a label that says yes or no, in the order of their ids."""

    truth: list[bool]
    lengths: list[int]
    """Snippets that were asked about."""
    sample: list[Drawn]
    """How they were chosen."""

    @property
    def weights(self) -> list[float]:
        """How many patients each one stands for."""
        return [one.weight for one in self.sample]


@dataclass
class Measured:
    """One way to decide, measured. Of labels that are a sample per stratum all is weighted but `p`."""

    name: str
    tp: float
    fp: float
    fn: float
    tn: float
    precision: float
    recall: float
    f1: float
    low: float
    """Lower end of the 95 % bootstrap interval of F1 over patients."""
    high: float
    gain_low: float = math.nan
    """Lower end of that of F1 less F1 of the baseline: the rules, or without facts any mention."""
    gain_high: float = math.nan
    p: float = math.nan
    """McNemar's test against the baseline, over the labelled patients as they are."""
    auprc: float = math.nan
    calibration_error: float = math.nan
    threshold: list[float] = field(default_factory=list)
    """Thresholds that were chosen on other patients, where they were."""
    by_length: dict[str, float] = field(default_factory=dict)
    """Precision and F1 of patients with few, more and many snippets, and how many of them have a label."""


@dataclass
class Alarms:
    """Share of the healthy patients with so many questions who would be called ill, weighted as `Measured` is."""

    questions: int
    """So many, or at least so many in the last entry."""
    patients: int
    """With a label."""
    max: float
    """By `max`: one snippet is enough."""
    count: float
    """By `count`: it takes `reduce.count` of them."""
    expected: float
    """1 - (1 - f)^n, which `max` comes to if snippets err apart from each other, each with probability f."""


@dataclass
class Evaluation:
    """Of one phenotype. Whole numbers are of labelled patients, whatever these stand for."""

    phenotype_id: str
    patients: int
    """With a label that says yes or no."""
    positive: int
    unlabelled: int
    """With a label that says nobody can tell; left out."""
    uncertain: int
    """Decisions that are uncertain, which count as no."""
    no_evidence: int
    failed: int
    baseline: str
    measured: list[Measured]
    snippet_alarms: float
    """f: share of the snippets about healthy patients whose score reaches the threshold."""
    alarms: list[Alarms]
    """By number of questions."""
    flagged: bool = False
    """Whether there are labels of decisions that were flagged for review, and none of the others with the weights
    that tell what both stand for; they say nothing about recall and F1."""


def evaluate(
    definition: Definition,
    reduce: ReduceConfig | None,
    decisions: Mapping[str, Decided],
    labels: Mapping[str, bool | None],
    facts: Mapping[str, Sequence[Fact]] | None,
    seed: int,
    *,
    sample: Mapping[str, Drawn] | None = None,
    flagged: bool = False,
) -> Evaluation:
    """`decisions` and `labels` by patient, of this phenotype. A labelled patient without notes has no evidence.
    Scores in the band count as no, save where a threshold is chosen on other patients. `facts`: None where there are
    none of anybody. `sample`: how patients were drawn, where labels are of a sample per stratum (specification 2.9).
    `flagged`: as in Evaluation."""
    known = sorted(patient for patient, label in labels.items() if label is not None)
    rows = [decisions.get(patient) for patient in known]
    cited = [row.evidence if row else [] for row in rows]
    patients = Labelled(
        truth=[bool(labels[patient]) for patient in known],
        lengths=[len(own) for own in cited],
        sample=[(sample or {}).get(patient, Drawn()) for patient in known],
    )
    systems: dict[str, list[bool]] = {"any mention": [bool(row and row.n_found) for row in rows]}
    systems["cue words"] = [any(says_so(one) for one in own) for own in cited]
    baseline = "any mention"
    if definition.rules is not None and facts is not None:
        systems["any code"] = [any_code(definition.rules, facts.get(patient, [])) for patient in known]
        systems["rules"] = [definition.rules.holds(facts.get(patient, [])) for patient in known]
        baseline = "rules"
    scores: dict[str, list[float]] = {}
    rule = reduce or definition.reduce
    for formula in FORMULAS:
        config = rule.model_copy(update={"by": formula})
        own = scores[f"MapReduce, {formula}"] = [score_of(some, config) for some in cited]
        pairs = zip(own, cited, strict=True)
        systems[f"MapReduce, {formula}"] = [decide(score, len(some), config) == "yes" for score, some in pairs]
    systems["as decided"] = [row is not None and row.decision == "yes" for row in rows]
    folds = [zlib.crc32(patient.encode("utf-8", "surrogatepass")) % FOLDS for patient in known]
    thresholds: dict[str, list[float]] = {}
    for name, own in list(scores.items()):
        if name.endswith("count"):
            continue
        try:
            found, chosen = cross_fitted(patients.truth, own, folds, patients.weights)
        except ValueError:
            # Nobody in the other folds is ill.
            continue
        systems[f"{name}, threshold of other patients"] = found
        thresholds[f"{name}, threshold of other patients"] = list(chosen.values())
    measured = [
        measure(name, patients, found, systems[baseline], scores.get(name), seed) for name, found in systems.items()
    ]
    for one in measured:
        one.threshold = thresholds.get(one.name, [])
    decided = [row.decision if row else "no_evidence" for row in rows]
    healthy = [i for i, ill in enumerate(patients.truth) if not ill]
    rate, by_questions = alarms([cited[i] for i in healthy], rule, [patients.sample[i].weight for i in healthy])
    return Evaluation(
        phenotype_id=definition.phenotype_id,
        patients=len(known),
        positive=sum(patients.truth),
        unlabelled=len(labels) - len(known),
        uncertain=decided.count("uncertain"),
        no_evidence=decided.count("no_evidence"),
        failed=decided.count("failed"),
        baseline=baseline,
        measured=measured,
        snippet_alarms=rate,
        alarms=by_questions,
        flagged=flagged,
    )


def alarms(
    healthy: Sequence[Sequence[Cited]], rule: ReduceConfig, weights: Sequence[float] | None = None
) -> tuple[float, list[Alarms]]:
    """f of all snippets, and the false alarms by number of questions, of healthy patients' evidence. `weights`: how
    many patients each of them stands for."""
    hits = [[one.p is not None and one.p >= rule.threshold for one in own] for own in healthy]
    weighted = list(zip(hits, weights or [1.0] * len(hits), strict=True))
    total = math.fsum(w * len(own) for own, w in weighted)
    rate = math.fsum(w * sum(own) for own, w in weighted) / total if total else math.nan
    found = []
    for n in range(1, MANY + 1):
        some = [(own, w) for own, w in weighted if (len(own) == n if n < MANY else len(own) >= n)]
        if not some:
            continue
        size = math.fsum(w for _, w in some)
        by_max = math.fsum(w * any(own) for own, w in some) / size
        by_count = math.fsum(w * (sum(own) >= rule.count) for own, w in some) / size
        expected = math.fsum(w * (1 - (1 - rate) ** len(own)) for own, w in some) / size
        found.append(Alarms(n, len(some), by_max, by_count, expected))
    return rate, found


def says_so(one: Cited) -> bool:
    """By cue words, whether a mention in a snippet is present."""
    return any(cue(one.quote, a - one.start, b - one.start) == "present" for a, b in one.matches)


def score_of(evidence: Sequence[Cited], config: ReduceConfig) -> float:
    """A patient's score by a formula."""
    usable = [(one.p, one.date) for one in evidence if one.p is not None]
    return patient_score([p for p, _ in usable], config, [day for _, day in usable])


def measure(
    name: str,
    patients: Labelled,
    found: Sequence[bool],
    baseline: Sequence[bool],
    scores: Sequence[float] | None,
    seed: int,
) -> Measured:
    """All figures of one way to decide."""
    truth, weights = patients.truth, patients.weights
    own = counts(truth, found, weights)
    low, high = bootstrap_f1(truth, found, seed=seed, sample=patients.sample)
    gain_low, gain_high = bootstrap_gain(truth, found, baseline, seed=seed, sample=patients.sample)
    parted: dict[str, float] = {}
    for label, places in lengths_parted(patients.lengths).items():
        some = counts([truth[i] for i in places], [found[i] for i in places], [weights[i] for i in places])
        parted |= {f"precision, {label}": some.precision, f"f1, {label}": some.f1, f"patients, {label}": len(places)}
    return Measured(
        name=name,
        **asdict(own),
        precision=own.precision,
        recall=own.recall,
        f1=own.f1,
        low=low,
        high=high,
        gain_low=gain_low,
        gain_high=gain_high,
        p=mcnemar(truth, found, baseline),
        auprc=math.nan if scores is None else average_precision(truth, scores, weights),
        calibration_error=math.nan if scores is None else calibration_error(truth, scores, weights),
        by_length=parted,
    )


def lengths_parted(lengths: Sequence[int]) -> dict[str, list[int]]:
    """Places of patients with few, more and many snippets."""
    few, many = LONG
    return {
        f"1 to {few - 1}": [i for i, n in enumerate(lengths) if 0 < n < few],
        f"{few} to {many - 1}": [i for i, n in enumerate(lengths) if few <= n < many],
        f"{many} or more": [i for i, n in enumerate(lengths) if n >= many],
    }
