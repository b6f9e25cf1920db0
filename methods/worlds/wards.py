"""A world whose truth is known, the wards: notes that assert, deny or question an invented disease of their patients.

The numbers are those of the phenotyping specification, section 5. Names of diseases are invented, so that no model
has heard of them; the small policy that answers learns on another one, from half of the phrases, and sees the
disease's name as a placeholder.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from cluster.cluster import Cluster
from cluster.seeds import derive_seed
from methods.phenotyping_prompts import ANSWERS, PLACEHOLDER, Answer
from methods.worlds.bases import base_of
from methods.worlds.teaching import lesson, teach
from methods.worlds.tiny import write_tiny
from protocols.policy import PolicyConfig
from protocols.service import Message

Kind = Literal["assert", "deny", "question", "family"]
LABELS: dict[Kind, Answer] = {
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
            "{d} since childhood .",
        ],
        [
            "biopsy confirmed {d} .",
            "{d} , diagnosed last year , is stable .",
            "on therapy for known {d} .",
            "{d} was treated this week .",
            "known {d} since childhood .",
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
list of `family` is told from the same assertion by its header alone."""
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
FAMILY_FILLERS = [
    "mother had a stroke .",
    "brother has asthma .",
    "father is well .",
    "stroke in a sister .",
    "known asthma since childhood .",
]
SECTIONS = ("HISTORY:", "FAMILY:", "PLAN:")
SHARES = (0.5, 0.2, 0.3)
"""Of the sentences about something else, by section."""
SYLLABLES = ("vel", "tor", "mig", "lan", "sep", "dru", "kol", "pra", "zin", "obe")
NOTE_TYPES = ("clinic", "ward")
WIDTH, LAYERS, SPREAD = 96, 3, 0.1
STEPS, ROWS, LEARNING_RATE, NOISE = 500, 64, 2e-3, 0.05
FRAME = 6
"""Words of a prompt that are not the text's, and the answer."""
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
    """Share of the notes without news of the disease that are the one before, word by word."""
    lessons: int = Field(default=16000, ge=1)
    """Snippets that the small policy learns from."""
    context: int = Field(default=256, ge=16)
    """Longest prompt of the small policy, in words."""
    stuffed: Literal["no", "asked", "taught"] = "no"
    """Put each patient's notes together as one, oldest first, until the context is full: a baseline that reads whole
    notes. `asked`: the small policy has learnt from snippets all the same; `taught`: it learns from such ones, too,
    and from what is true of their patients. The window has to be as wide as they are."""


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
        rng = np.random.default_rng(derive_seed(seed, "patient", number))
        patient = patient_of(config, disease, rng, number, unseen)
        yield stuffed(patient, disease, config.context) if config.stuffed != "no" else patient


def patient_of(config: WardsConfig, disease: str, rng: np.random.Generator, number: int, unseen: bool) -> Patient:
    """One patient."""
    ill = bool(rng.random() < config.prevalence)
    notes: list[Told] = []
    day = date(2015, 1, 1) + timedelta(days=int(rng.integers(1000)))
    for place in range(int(rng.poisson(6)) + 1):
        said = saying(rng, ill)
        phrase = (phrase_of(rng, said, disease, unseen), said) if said else None
        text = note_text(rng, config.filler, phrase)
        if said is None and notes and rng.random() < config.copied:
            text, said = notes[-1].text, notes[-1].said
        day += timedelta(days=int(rng.integers(1, 200)))
        kind = NOTE_TYPES[int(rng.integers(2))]
        notes.append(Told(f"p{number}", f"p{number}-{place}", day.isoformat(), kind, text, said))
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
        place = int(rng.choice(len(SECTIONS), p=SHARES))
        fillers = FAMILY_FILLERS if place == 1 else FILLERS
        lines[SECTIONS[place]].append(fillers[int(rng.integers(len(fillers)))])
    if phrase is not None:
        own = lines[SECTIONS[1 if phrase[1] == "family" else 0 if rng.random() < 0.7 else 2]]
        own.insert(int(rng.integers(len(own) + 1)), phrase[0])
    return "\n".join(f"{section}\n{' '.join(said)}" for section, said in lines.items() if said)


def stuffed(patient: Patient, disease: str, context: int) -> Patient:
    """A patient whose notes are one. It says what is true of the patient, if it names the disease at all."""
    text = "\n".join(one.text for one in patient.notes)
    words = list(re.finditer(r"\S+", text))[: context - FRAME]
    text = text[: words[-1].end()]
    said: Kind | None = None if disease not in text else "assert" if patient.ill else "deny"
    first = patient.notes[0]
    return replace(patient, notes=[replace(first, date=patient.notes[-1].date, text=text, said=said)])


def vocabulary() -> list[str]:
    """All words of the small policy."""
    phrases = [phrase.replace("{d}", PLACEHOLDER) for both in PHRASES.values() for some in both for phrase in some]
    words = {word for text in [*phrases, *FILLERS, *FAMILY_FILLERS] for word in text.split()}
    headers = [*SECTIONS, *(section.rstrip(":") for section in SECTIONS), "[SECTION]", "[TEXT]"]
    # An answer may be a word of the notes.
    return list(dict.fromkeys([*sorted(words), *headers, *ANSWERS]))


async def ward_base(
    company: Cluster, policy: PolicyConfig, lessons: Sequence[tuple[str, str]], context: int, seed: int
) -> str:
    """Folder of the small policy that has learnt from prompts with answers, trained now if it is not there yet."""
    sizes = [STEPS, ROWS, LEARNING_RATE, WIDTH, LAYERS, SPREAD, context, vocabulary()]
    recipe = json.dumps([sizes, lessons, seed])
    return await base_of(company, "wards", recipe, partial(_train, company, policy, lessons, context, seed))


async def _train(
    company: Cluster, policy: PolicyConfig, lessons: Sequence[tuple[str, str]], context: int, seed: int, staging: Path
) -> None:
    words = vocabulary()
    write_tiny(staging / "skeleton", words, width=WIDTH, masked=False, spread=SPREAD, layers=LAYERS, context=context)
    rng = np.random.default_rng(derive_seed(seed, "wards"))
    batches = (
        [lesson(words, *lessons[i], name=f"{i}") for i in rng.integers(len(lessons), size=ROWS)] for _ in range(STEPS)
    )
    title = "policy that reads snippets of another disease"
    await teach(company, policy, staging, "base", title, batches, steps=STEPS, rate=LEARNING_RATE, seed=seed)
