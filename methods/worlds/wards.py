"""A world whose truth is known, the wards: notes that assert, deny or question an invented disease of their patients.

The numbers are those of the phenotyping specification, section 5. Names of diseases are invented, so that no model
has heard of them; the small policy that answers learns on another one, from half of the phrases, and sees the
disease's name as a placeholder.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from cluster.cluster import Cluster
from cluster.seeds import derive_seed
from methods.worlds.bases import base_of
from methods.worlds.teaching import lesson, teach
from methods.worlds.tiny import write_tiny
from protocols.policy import PolicyConfig
from protocols.service import Message

Kind = Literal["assert", "deny", "question", "family"]
LABELS: dict[Kind, Literal["yes", "no", "uncertain"]] = {
    "assert": "yes",
    "deny": "no",
    "question": "uncertain",
    "family": "no",
}
"""What a small policy learns to answer."""
PHRASES: dict[Kind, tuple[list[str], list[str]]] = {
    "assert": (
        [
            "{d} was confirmed by biopsy .",
            "treated for {d} since last year .",
            "known {d} , stable on therapy .",
            "was diagnosed with {d} .",
            "flare of {d} this week .",
        ],
        [
            "biopsy confirmed {d} .",
            "{d} , diagnosed last year , is stable .",
            "on therapy for known {d} .",
            "{d} was treated this week .",
        ],
    ),
    "deny": (
        [
            "no evidence of {d} .",
            "{d} was ruled out .",
            "denies any {d} .",
            "without signs of {d} .",
            "biopsy was negative for {d} .",
        ],
        ["no signs of {d} this week .", "ruled out {d} by biopsy .", "negative for any {d} .", "without {d} ."],
    ),
    "question": (
        [
            "possible {d} .",
            "{d} is suspected .",
            "concern for {d} , biopsy planned .",
            "rule out {d} .",
        ],
        ["{d} is possible .", "suspected {d} , biopsy planned .", "biopsy to rule out {d} ."],
    ),
    "family": (
        ["mother had {d} .", "{d} in a brother .", "sister with {d} .", "{d} since childhood ."],
        ["brother had {d} .", "{d} in mother and sister .", "known {d} since childhood ."],
    ),
}
"""What notes say: phrases that the small policy learns from, and those that it has not seen. The last one of either
list of `family` is told from an assertion by its header alone."""
FILLERS = [
    "no fever .",
    "denies pain .",
    "cough was treated this week .",
    "possible infection .",
    "blood pressure stable .",
    "mother had a stroke .",
    "no evidence of infection .",
    "therapy planned for the knee .",
    "known asthma since childhood .",
    "stroke was ruled out .",
    "sleeps well .",
    "eats and drinks well .",
    "biopsy of the skin planned .",
    "was seen last year .",
    "walks without pain .",
    "concern for a fall .",
]
SECTIONS = ("HISTORY:", "FAMILY:", "PLAN:")
SYLLABLES = ("vel", "tor", "mig", "lan", "sep", "dru", "kol", "pra", "zin", "obe")
NOTE_TYPES = ("clinic", "ward")
WIDTH, LAYERS, SPREAD, CONTEXT = 96, 3, 0.1, 256
STEPS, ROWS, LEARNING_RATE, NOISE = 500, 64, 2e-3, 0.05
TAUGHT = "morbolosis"
"""The disease that the small policy learns on."""


class WardsConfig(Message):
    """Size of the world."""

    patients: int = Field(default=600, ge=1)
    """How many."""
    prevalence: float = Field(default=0.2, ge=0, le=1)
    """Share who are ill."""
    filler: int = Field(default=6, ge=0)
    """Sentences about something else in each note."""
    copied: float = Field(default=0.35, ge=0, le=1)
    """Share of notes that repeat what the one before says."""
    lessons: int = Field(default=4000, ge=1)
    """Snippets that the small policy learns from."""


@dataclass(frozen=True)
class Told:
    """A note, and what it says of the disease."""

    patient_id: str
    note_id: str
    date: str
    note_type: str
    text: str
    said: Kind | None


@dataclass(frozen=True)
class Patient:
    """A patient, the truth, and what is coded."""

    id: str
    ill: bool
    notes: list[Told]
    code: bool
    drug: bool


def disease_of(seed: int) -> str:
    """An invented name."""
    rng = np.random.default_rng(derive_seed(seed, "disease"))
    return "".join(SYLLABLES[i] for i in rng.choice(len(SYLLABLES), 3, replace=False)) + "osis"


def patients_of(
    config: WardsConfig, disease: str, seed: int, *, unseen: bool = True, first: int = 0, count: int | None = None
) -> Iterator[Patient]:
    """Patients, each drawn by its number alone. `unseen`: whether phrases that are held back occur as well."""
    for number in range(first, first + (config.patients if count is None else count)):
        yield patient_of(config, disease, np.random.default_rng(derive_seed(seed, "patient", number)), number, unseen)


def patient_of(config: WardsConfig, disease: str, rng: np.random.Generator, number: int, unseen: bool) -> Patient:
    """One patient."""
    ill = bool(rng.random() < config.prevalence)
    notes: list[Told] = []
    day = date(2015, 1, 1) + timedelta(days=int(rng.integers(1000)))
    before: tuple[str, Kind] | None = None
    for place in range(int(rng.poisson(6)) + 1):
        said = saying(rng, ill)
        phrase = (phrase_of(rng, said, disease, unseen), said) if said else None
        if phrase is None and before is not None and rng.random() < config.copied:
            phrase = before
        before = phrase or before
        day += timedelta(days=int(rng.integers(1, 200)))
        text = note_text(rng, config.filler, phrase)
        kind = NOTE_TYPES[int(rng.integers(2))]
        notes.append(Told(f"p{number}", f"p{number}-{place}", day.isoformat(), kind, text, phrase and phrase[1]))
    code = bool(rng.random() < (0.62 if ill else 0.07))
    drug = bool(rng.random() < (0.45 if ill else 0.05))
    return Patient(f"p{number}", ill, notes, code, drug)


def saying(rng: np.random.Generator, ill: bool) -> Kind | None:
    """What a note says of the disease, if anything."""
    draw = rng.random()
    odds: list[tuple[Kind, float]]
    odds = [("assert", 0.45), ("deny", 0.05), ("question", 0.05)]
    if not ill:
        odds = [("deny", 0.10), ("family", 0.04), ("question", 0.06)]
    for kind, share in odds:
        if draw < share:
            return kind
        draw -= share
    return None


def phrase_of(rng: np.random.Generator, kind: Kind, disease: str, unseen: bool) -> str:
    """A sentence."""
    seen, held_back = PHRASES[kind]
    phrases = [*seen, *held_back] if unseen else seen
    return phrases[int(rng.integers(len(phrases)))].format(d=disease)


def note_text(rng: np.random.Generator, filler: int, phrase: tuple[str, Kind] | None) -> str:
    """Three sections of sentences; the family's are under their own header."""
    lines: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for _ in range(filler):
        lines[SECTIONS[0 if rng.random() < 0.6 else 2]].append(FILLERS[int(rng.integers(len(FILLERS)))])
    if phrase is not None:
        own = lines[SECTIONS[1 if phrase[1] == "family" else 0 if rng.random() < 0.7 else 2]]
        own.insert(int(rng.integers(len(own) + 1)), phrase[0])
    return "\n".join(f"{section}\n{' '.join(said)}" for section, said in lines.items() if said)


def vocabulary() -> list[str]:
    """All words of the small policy."""
    phrases = [phrase.replace("{d}", "[it]") for both in PHRASES.values() for some in both for phrase in some]
    words = {word for text in [*phrases, *FILLERS] for word in text.split()}
    return [
        *sorted(words),
        *SECTIONS,
        *(section.rstrip(":") for section in SECTIONS),
        "[SECTION]",
        "[TEXT]",
        *ANSWERS,
    ]


ANSWERS = ("yes", "no", "uncertain")


async def ward_base(company: Cluster, policy: PolicyConfig, lessons: Sequence[tuple[str, str]], seed: int) -> str:
    """Folder of the small policy that has learnt from prompts with answers, trained now if it is not there yet."""
    sizes = [STEPS, ROWS, LEARNING_RATE, WIDTH, LAYERS, SPREAD, CONTEXT, vocabulary()]
    recipe = json.dumps([sizes, lessons, seed])
    return await base_of(company, "wards", recipe, partial(_train, company, policy, lessons, seed))


async def _train(
    company: Cluster, policy: PolicyConfig, lessons: Sequence[tuple[str, str]], seed: int, staging: Path
) -> None:
    words = vocabulary()
    write_tiny(staging / "skeleton", words, width=WIDTH, masked=False, spread=SPREAD, layers=LAYERS, context=CONTEXT)
    rng = np.random.default_rng(derive_seed(seed, "wards"))
    batches = (
        [lesson(words, *lessons[i], name=f"{i}") for i in rng.integers(len(lessons), size=ROWS)] for _ in range(STEPS)
    )
    title = "policy that reads snippets of another disease"
    await teach(company, policy, staging, "base", title, batches, steps=STEPS, rate=LEARNING_RATE, seed=seed)
