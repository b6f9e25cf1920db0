"""Every setting of phenotyping: notes, definitions, the policy and how it is asked."""

import codecs
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from cluster.config import MethodConfig, merged
from methods.phenotyping_deidentify import DeidentifyConfig
from methods.phenotyping_evidence import EvidenceConfig
from methods.phenotyping_notes import FIELDS
from methods.phenotyping_prompts import PromptConfig
from methods.phenotyping_reduce import ReduceConfig
from methods.worlds.wards import WardsConfig
from protocols.placement import Resources
from protocols.policy import PolicyConfig
from protocols.retriever import RetrieverConfig, Window

PRESETS = Path(__file__).parent / "presets"
LABEL_FIELDS = ("patient_id", "phenotype", "label")
"""Of the table of labels."""


def preset(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of a built-in world, and of the embedded model taught on labelled mentions; others win over them."""
    name = "wards" if given.get("world") == "wards" else "mentions" if given.get("mentions") else ""
    if not name:
        return {}
    values: Mapping[str, Any] = yaml.safe_load((PRESETS / f"phenotyping-{name}.yaml").read_text(encoding="utf-8"))
    return values


def known(given: dict[str, str], fields: Sequence[str]) -> dict[str, str]:
    """Names of columns of these fields. Raises ValueError for another field."""
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise ValueError(f"{unknown[0]}: unknown field; expected one of {', '.join(fields)}")
    return given


class Config(MethodConfig):
    """Settings of a run."""

    MAY_CHANGE: ClassVar[frozenset[str]] = (MethodConfig.MAY_CHANGE - {"steps"}) | {
        "parallel",
        "retriever.resources",
        "calls_at_once",
        "labels",
        "label_columns",
        "review",
        "review_others",
        "recorded",
        # Their content is checked by digests.
        "deidentify.secret",
        "deidentify.names",
    }
    SHORTCUTS: ClassVar[dict[str, str]] = {"answer": "prompt.answer"}

    steps: int = Field(default=16, ge=1)
    """Buckets over which patients are spread by a hash of their ids. Each is read, asked and decided in one step, and
    has to fit into memory without its notes' texts: for a million notes take about a hundred."""
    checkpoint_every: int = Field(default=1, ge=1)
    """Buckets between commits."""
    world: Literal["", "wards"] = ""
    """`wards`: invented patients whose truth is known, and a small policy that learns on another invented disease."""
    wards: WardsConfig = WardsConfig()
    """Size of that world."""
    notes: list[str] = []
    """Files or folders: .jsonl, .ndjson, .csv, .tsv (also .gz), .parquet, FHIR .json, .txt. Rows need patient_id,
    note_id and text, or are of OMOP's NOTE table, or FHIR resources."""
    columns: dict[str, str] = {}
    """Names of columns where they are others, such as columns.patient_id=mrn."""
    encoding: str = "utf-8"
    """Of lines and tables."""
    deidentify: DeidentifyConfig | None = None
    """Take identifiers out of the notes before anything is cut from them, e.g. deidentify.secret=FILE; null: no."""
    part_bytes: int = Field(default=32 << 20, ge=1)
    """Files are read in parts of about this size, each of which is read again if the run is killed in it. Small texts
    and FHIR files of a folder make up one together, at most 4,096 of them."""
    parallel: int = Field(default=1, ge=1)
    """Parts that are read at once. Needs transport=ray for more than one."""
    definitions: list[str] = []
    """Files of phenotypes (YAML), or folders of them; all are looked for in one pass."""
    facts: list[str] = []
    """Structured facts for the rules: .jsonl or .csv with patient_id, kind (code, drug, measurement), code, and
    perhaps day and value."""
    labels: str = ""
    """.csv or .jsonl with patient_id, phenotype and label (1, 0, or empty where nobody can say): decisions are
    compared with them. With `sampled` (flagged or other) and `of` (how many there are of these), as the review page
    exports them, each label counts for as many patients as it stands for."""
    label_columns: dict[str, str] = {}
    """Names of its columns where they are others."""
    retriever: RetrieverConfig = RetrieverConfig(kind="pattern", resources=Resources(cpus=1))
    """Cuts the snippets."""
    window: Window = Window()
    """How much text around matches is cut out."""
    evidence: EvidenceConfig = EvidenceConfig()
    """Which snippets are asked about."""
    policy: PolicyConfig = PolicyConfig(trainer=None)
    """Answers the questions; it does not learn."""
    mentions: list[str] = []
    """.tsv of labelled mentions (concept, sentence, negation, temporality, experiencer), from which the policy is
    taught first, those left out that name a disease of the definitions: a way to try the method without a large
    model."""
    mention_steps: int = Field(default=400, ge=1)
    """Optimiser steps of that."""
    mention_rate: float = Field(default=1e-3, gt=0)
    """Its learning rate."""
    prompt: PromptConfig = PromptConfig()
    """How it is asked."""
    questions_per_call: int = Field(default=64, ge=1)
    """Snippets in one call to the policy."""
    calls_at_once: int = Field(default=2, ge=1)
    """Calls under way at once."""
    answers: str = ""
    """File that keeps answers; runs that share one do not ask the same question again. Empty: one of the run."""
    reduce: ReduceConfig | None = None
    """How snippets become a decision, for all phenotypes; null: as each definition says."""
    budget_tokens: int = Field(default=0, ge=0)
    """The run ends itself before the bucket whose questions would bring its prompts above so many tokens; 0: no
    limit. What reduce.by=llm and revisions of written answers read is known afterwards, and counts from the next
    bucket on. Such a run is over; another one with `answers=RUN/answers.sqlite` asks nothing again."""
    dry_run: bool = False
    """Read the notes, and count the questions that `answers` does not hold and their tokens; nothing is asked or
    decided."""
    review: int = Field(default=200, ge=0)
    """Most decisions of each phenotype on the review page among those that are flagged, which is all but a plain no
    and no evidence. Where there are more they are drawn by a hash of the seed, patient and phenotype; 0: an empty
    page."""
    review_others: int = Field(default=50, ge=0)
    """As many at most among the others, without whose labels recall cannot be told; 0: none of them. Where no snippet
    was found a reviewer needs the chart."""
    recorded: str = ""
    """Time that the Provenance of FHIR groups tells, as 2024-05-01T12:00:00Z; empty: unknown, for equal runs write
    equal files."""

    @field_validator("columns")
    @classmethod
    def _known(cls, given: dict[str, str]) -> dict[str, str]:
        return known(given, FIELDS)

    @field_validator("label_columns")
    @classmethod
    def _known_of_labels(cls, given: dict[str, str]) -> dict[str, str]:
        return known(given, LABEL_FIELDS)

    @field_validator("encoding")
    @classmethod
    def _decodes(cls, given: str) -> str:
        try:
            codecs.lookup(given)
            # Refuses those that are not of text, such as hex.
            "a".encode(given)
        except (LookupError, ValueError) as error:
            raise ValueError(f"got {given[:40]!r}, expected the name of a text encoding such as utf-8") from error
        return given

    @field_validator("recorded")
    @classmethod
    def _instant(cls, given: str) -> str:
        try:
            whole = len(given) >= len("2024-05-01T12:00:00Z") and given[10] == "T"
            whole = whole and datetime.fromisoformat(given).tzinfo is not None
        except ValueError:
            whole = False
        if given and not whole:
            raise ValueError("expected a time with its zone, such as 2024-05-01T12:00:00Z")
        return given

    @model_validator(mode="after")
    def _has_its_parts(self) -> Self:
        if self.world and (self.notes or self.definitions or self.mentions or self.facts or self.labels):
            raise ValueError("world: it has notes, definitions, facts and labels of its own; expected none beside it")
        if not self.world and not self.notes:
            raise ValueError("notes: expected a file or folder, or world=wards")
        if not self.world and not self.definitions:
            raise ValueError("definitions: expected a file or folder of phenotypes (docs/methods/phenotyping.md)")
        if self.mentions and (self.prompt.variant != "bare" or not self.prompt.mask):
            raise ValueError(
                "mentions: a policy that is taught on them reads prompt.variant=bare and prompt.mask=true only"
            )
        if self.policy.trainer is not None:
            raise ValueError("policy.trainer: the policy does not learn here; expected null")
        if self.retriever.kind != "pattern":
            raise ValueError(f"retriever.kind: got {self.retriever.kind!r}; notes are searched by patterns alone")
        if self.parallel > 1 and self.transport != "ray":
            raise ValueError("parallel: more than one part at once needs transport=ray")
        if (self.reduce is not None and self.reduce.by == "llm") and self.prompt.variant == "bare":
            raise ValueError(
                "reduce.by: llm needs a policy that reads text; prompt.variant=bare is for one that does not"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _frozen(cls, given: Any) -> Any:
        """The policy has no trainer unless one is asked for, which is refused above."""
        return merged({"policy": {"trainer": None}}, given) if isinstance(given, Mapping) else given
