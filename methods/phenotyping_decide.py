"""The reduce: a bucket of patients becomes decisions, each with the snippets that led to it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import Field

from methods.phenotyping_answers import Question, Said
from methods.phenotyping_definition import Definition
from methods.phenotyping_evidence import Evidence, EvidenceConfig, Group, current, evidence_of
from methods.phenotyping_prompts import PromptConfig, key_of, messages_of, shown
from methods.phenotyping_reduce import Decision, ReduceConfig, decide, patient_score
from methods.phenotyping_sample import in_note
from methods.phenotyping_scan import Finding, Scanned
from protocols.service import Message

NEAR = 1e-3
"""Scores so near to the threshold may fall to the other side on another machine."""
DIGITS = 6
UNDECIDED = 0.5


class Place(Message):
    """Where a copy of a snippet stands."""

    note_id: str
    start: int
    end: int
    date: str = ""


class Cited(Message):
    """One snippet that a decision rests on: `note.text[start:end] == quote`; of a note that is de-identified that is
    the text after it."""

    note_id: str
    """The note, the earliest that has it."""
    start: int
    """First character, counted in Unicode code points of the note's text."""
    end: int
    """Behind its last."""
    quote: str
    """What stands there."""
    matches: list[tuple[int, int]]
    """First character and the place behind the last of each match, in the note."""
    p: float | None
    """p(yes), of written answers 1, 0.5 or 0; unset where the snippet was too long for the policy."""
    answer: str
    """Yes, no or uncertain, whichever is most likely or was written; failed without one."""
    status: str = ""
    """Of a written answer: present, history, negated, family, possible, risk_or_prophylaxis or other_sense."""
    evidence: tuple[int, int] | None = None
    """Of a written answer: first character and the place behind the last, in the note, of what it quotes."""
    date: str = ""
    """Of the note."""
    note_type: str = ""
    """Of the note."""
    section: str = ""
    """Header above the snippet."""
    also_in: list[Place] = []
    """Copies, in later notes or elsewhere in the same one."""
    raw: tuple[int, int] | None = None
    """Its place in the raw document, where that may be another: of a note in HTML, and of a de-identified one."""
    note_digest: str = ""
    """Of the note's text, set where another text has the same id."""


class Decided(Message):
    """What was decided about one patient and phenotype."""

    patient_id: str
    phenotype_id: str
    version: str
    """Of the definition."""
    definition: str
    """Digest of the definition."""
    decision: Decision
    score: float
    reducer: str
    n_notes: int
    """Notes of the patient, repeated and replaced ones apart."""
    n_found: int
    """Snippets that patterns found."""
    n_groups: int
    """Of these, different ones that no filter left out."""
    n_sent: int
    """Of these, asked about."""
    n_read: int = 0
    """Of reduce by llm: questions about several verdicts at once."""
    near_threshold: bool = False
    """Whether the score is within 0.001 of the threshold."""
    dropped: dict[str, int] = {}
    """Snippets that were left out, by reason."""
    evidence: list[Cited]
    """Oldest first."""
    asked: int = 0
    """Questions that were asked for this patient first; others had been asked before."""
    tokens: int = 0
    """Tokens of their prompts."""
    decoded: int = 0
    """Tokens that were sampled for them."""
    seconds: float = Field(default=0.0, exclude=True)
    """Their share of the time of their calls. It differs between equal runs, so it is in costs.csv alone."""
    model: str
    """Digest of the policy."""
    prompt: str
    """Digest of the template."""
    run: str


@dataclass(frozen=True)
class Case:
    """One patient and phenotype, and what is asked about them."""

    patient_id: str
    definition: Definition
    notes: int
    doubled: set[str]
    """Ids of notes that stand for several texts."""
    evidence: Evidence
    questions: list[Question]
    """Of each group."""


@dataclass(frozen=True)
class Reading:
    """What a policy made of a patient's verdicts."""

    probs: tuple[float, float, float] | None = None
    """Of yes, no and uncertain; None: nothing, for there was no room."""
    asked: Mapping[str, Said] = field(default_factory=dict)
    """Each question that led to it."""


@dataclass(frozen=True)
class Origin:
    """What every decision of a run rests on."""

    model: str
    prompt: PromptConfig
    run: str
    deidentified: Mapping[str, str] = field(default_factory=dict)
    """Digests of what notes are de-identified with; empty: they are not."""


def cases_of(
    patients: Mapping[str, Sequence[Scanned]],
    definitions: Sequence[Definition],
    config: EvidenceConfig,
    origin: Origin,
) -> list[Case]:
    """All patients of a bucket with all phenotypes, in order of ids, so that the order of notes does not matter."""
    cases = []
    for patient in sorted(patients):
        notes, doubled = current(patients[patient])
        for definition in definitions:
            evidence = evidence_of(notes, definition, config)
            parts = [definition.digest, origin.prompt.digest, origin.model]
            asked = [messages_of(group, definition, origin.prompt) for group in evidence.groups]
            questions = [
                Question(
                    key_of(parts, messages),
                    messages,
                    shown(group.finding, mask=origin.prompt.mask),
                    definition.phenotype_id,
                )
                for group, messages in zip(evidence.groups, asked, strict=True)
            ]
            cases.append(Case(patient, definition, len(notes), doubled, evidence, questions))
    return cases


def rule_of(reduce: ReduceConfig | None, definition: Definition, prompt: PromptConfig) -> ReduceConfig:
    """How a phenotype is decided. A written uncertain scores 0.5, which must not pass for a yes at a threshold of
    0.5: scores of just that are uncertain."""
    rule = reduce or definition.reduce
    if prompt.answer != "sample" or rule.threshold != UNDECIDED:
        return rule
    band = rule.band or (UNDECIDED, UNDECIDED)
    return rule.model_copy(update={"threshold": math.nextafter(UNDECIDED, 1), "band": band})


def decided(
    cases: Sequence[Case],
    said: Mapping[str, Said],
    asked_for: str,
    reduce: ReduceConfig | None,
    origin: Origin,
    readings: Mapping[int, Reading],
) -> list[Decided]:
    """Decisions in the order of the cases. A question counts for the first case of its bucket that asks it.

    `readings`: by the place of a case, what a policy made of its verdicts where that is how it is reduced.
    """
    seen: set[str] = set()
    found = []
    for place, case in enumerate(cases):
        reading = readings.get(place, Reading())
        asked = {**{question.key: said[question.key] for question in case.questions}, **reading.asked}
        mine = [one for key, one in asked.items() if key not in seen and one.asked_for == asked_for]
        seen.update(asked)
        found.append(decision_of(case, said, mine, rule_of(reduce, case.definition, origin.prompt), origin, reading))
    return found


def decision_of(
    case: Case, said: Mapping[str, Said], mine: Sequence[Said], rule: ReduceConfig, origin: Origin, reading: Reading
) -> Decided:
    """One case. `mine`: answers that were asked for it first."""
    groups, answers = case.evidence.groups, [said[question.key] for question in case.questions]
    score = score_of(groups, answers, rule, reading)
    decision = decide(score or 0.0, len(groups), rule)
    if groups and score is None:
        decision = "failed"
    return Decided(
        patient_id=case.patient_id,
        phenotype_id=case.definition.phenotype_id,
        version=case.definition.version,
        definition=case.definition.digest,
        decision=decision,
        score=round(score or 0.0, DIGITS),
        reducer=rule.by,
        n_notes=case.notes,
        n_found=case.evidence.found,
        n_groups=case.evidence.different,
        n_sent=len(groups),
        n_read=len(reading.asked),
        near_threshold=score is not None and abs(score - rule.threshold) < NEAR,
        dropped=case.evidence.dropped,
        evidence=[
            cited(group, answer, case.doubled, mask=origin.prompt.mask)
            for group, answer in zip(groups, answers, strict=True)
        ],
        asked=len(mine),
        tokens=sum(one.tokens for one in mine),
        decoded=sum(one.decoded for one in mine),
        seconds=sum(one.seconds for one in mine),
        model=origin.model,
        prompt=origin.prompt.digest,
        run=origin.run,
    )


def score_of(groups: Sequence[Group], answers: Sequence[Said], rule: ReduceConfig, reading: Reading) -> float | None:
    """A patient's score; None where no snippet, or no prompt of all verdicts, was short enough."""
    usable = [(one.probs[0], group.day) for group, one in zip(groups, answers, strict=True) if one.probs is not None]
    if not usable:
        return None
    if rule.by != "llm":
        return patient_score([p for p, _ in usable], rule, [day for _, day in usable])
    if len(usable) == 1:
        return usable[0][0]
    return None if reading.probs is None else reading.probs[0]


def cited(group: Group, said: Said, doubled: set[str], *, mask: bool) -> Cited:
    """A snippet with its answer."""
    note, finding = group.note, group.finding
    return Cited(
        note_id=note.note_id,
        start=finding.start,
        end=finding.end,
        quote=finding.text,
        matches=finding.matches,
        p=None if said.probs is None else round(said.probs[0], DIGITS),
        answer=said.answer,
        status=said.status,
        evidence=said.quote and in_note(finding, said.quote, mask=mask),
        date=note.date,
        note_type=note.note_type,
        section=finding.section,
        also_in=[place_of(*one) for one in group.also_in],
        raw=finding.raw,
        note_digest=note.digest if note.note_id in doubled else "",
    )


def place_of(note: Scanned, finding: Finding) -> Place:
    """Where a copy stands."""
    return Place(note_id=note.note_id, start=finding.start, end=finding.end, date=note.date)
