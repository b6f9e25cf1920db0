"""Measures prompts with a policy that was not taught the task: python benchmarks/phenotyping_prompts.py MODEL.

MODEL is the folder of any chat model. It reads the wards' patients (100 per seed, an invented disease) by `launch.py
phenotyping`, once with each form of the prompt, and once with all notes of a patient in one prompt of at most 512
tokens (stuffing). Nothing is trained, and no threshold is chosen but on other patients. Runs that are there already
are not repeated. Prints Markdown tables, and writes their values to prompts.json.
"""

import argparse
import csv
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from phenotyping_claims import ROOT, cell, decisions, run, system, table

from methods.phenotyping_eval import FOLDS, score_of
from methods.phenotyping_evidence import Group
from methods.phenotyping_measures import bootstrap_gain, counts, cross_fitted
from methods.phenotyping_prompts import ANSWERS, PromptConfig, messages_of
from methods.phenotyping_reduce import ReduceConfig, Reducer
from methods.phenotyping_scan import Finding, Scanned
from methods.phenotyping_source import CODE, DRUG, ward_definition
from methods.worlds import wards

PATIENTS, CONTEXT = 100, 512
VARIANTS = ("plain", "not_counting", "examples", "reasoning")
STUFFED = ["window.characters=100000", "window.max_characters=100000"]
REDUCERS: tuple[Reducer, ...] = ("max", "log_odds")
SYSTEMS = ("MapReduce, max", "MapReduce, log_odds", "MapReduce, max, threshold of other patients")


def files(folder: Path, seed: int, room: "Room | None") -> list[str]:
    """The world of a seed as files, notes of a patient put together where there is `room` for so many tokens; returns
    the words of a command that reads them."""
    disease = wards.disease_of(seed)
    patients = list(wards.patients_of(wards.WardsConfig(patients=PATIENTS), disease, seed))
    definition = ward_definition(disease)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ward.yaml").write_text(yaml.safe_dump(definition.model_dump(mode="json", exclude_defaults=True)))
    with open(folder / "notes.jsonl", "w") as out:
        for one in patients:
            notes = [{k: v for k, v in vars(note).items() if k != "said"} for note in one.notes]
            if room is not None:
                notes = [notes[-1] | {"text": room.cut("\n".join(note["text"] for note in notes))}]
            out.writelines(json.dumps(note) + "\n" for note in notes)
    with open(folder / "labels.csv", "w", newline="") as out:
        rows = [[one.id, definition.phenotype_id, int(one.ill)] for one in patients]
        csv.writer(out).writerows([["patient_id", "phenotype", "label"], *rows])
    with open(folder / "facts.csv", "w", newline="") as out:
        facts = [[one.id, "code", CODE] for one in patients if one.code]
        facts += [[one.id, "drug", DRUG] for one in patients if one.drug]
        csv.writer(out).writerows([["patient_id", "kind", "code"], *facts])
    return [
        f"notes=[{folder}/notes.jsonl]",
        f"definitions=[{folder}/ward.yaml]",
        f"labels={folder}/labels.csv",
        f"facts=[{folder}/facts.csv]",
    ]


class Room:
    """How much of a chart fits into a prompt of CONTEXT tokens beside what is asked."""

    def __init__(self, model: Path, seed: int) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        note = Scanned(patient_id="p", note_id="n", note_type="clinic", digest="")
        finding = Finding(set="ward", start=0, end=0, text="", matches=[], section="HISTORY:")
        definition = ward_definition(wards.disease_of(seed))
        (asked,) = messages_of(Group(note, finding, days_before=0), definition, PromptConfig())
        turns = [asked.model_dump(include={"role", "content"})]
        told = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        self.tokens = CONTEXT - self.length(told) - max(map(self.length, ANSWERS))

    def length(self, text: str) -> int:
        """Its tokens."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def cut(self, text: str) -> str:
        """The chart up to its last token that fits."""
        places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text[: places[: self.tokens][-1][1]]


def shown(arms: dict[str, list[Path]]) -> dict[str, Any]:
    """F1 and the ranking by each arm, and the tokens that it read."""
    rows, values = [], {}
    for arm, folders in arms.items():
        own = {name: [system(folder, name) for folder in folders] for name in SYSTEMS}
        tokens = [sum(one.tokens + one.decoded for one in decisions(folder).values()) for folder in folders]
        values[arm] = own | {"tokens": tokens}
        f1 = [cell([one["f1"] for one in own[name]]) for name in SYSTEMS]
        rows.append([arm, *f1, cell([one["auprc"] for one in own[SYSTEMS[0]]]), " ".join(map(str, tokens))])
    table("prompt | F1, max | F1, log_odds | F1, threshold of other patients | AUPRC, max | tokens", rows)
    rows = [
        [name, cell([system(folder, name)["f1"] for folder in arms["plain"]])] for name in ("rules", "any mention")
    ]
    table("beside | F1", rows)
    return values


def chosen(folder: Path, by: Reducer | Literal["number"], seed: int) -> tuple[list[bool], list[bool]]:
    """Truth and decisions of a run by a reducer, or by the number of snippets alone; each patient's by the threshold
    that is best on others."""
    patients = list(wards.patients_of(wards.WardsConfig(patients=PATIENTS), wards.disease_of(seed), seed))
    decided, truth = decisions(folder), [one.ill for one in patients]
    evidence = [decided[one.id].evidence for one in patients]
    scores = [float(len(own)) if by == "number" else score_of(own, ReduceConfig(by=by)) for own in evidence]
    folds = [zlib.crc32(one.id.encode()) % FOLDS for one in patients]
    return truth, cross_fitted(truth, scores, folds)[0]


def gains(arms: dict[str, list[Path]], seeds: Sequence[int]) -> dict[str, Any]:
    """F1 with each prompt less that of stuffing on the same patients, both with thresholds of other patients."""
    rows, values = [], {}
    for arm in VARIANTS:
        for by in REDUCERS:
            own = []
            for folder, other, seed in zip(arms[arm], arms["stuffing"], seeds, strict=True):
                truth, mine = chosen(folder, by, seed)
                theirs = chosen(other, "max", seed)[1]
                gain = counts(truth, mine).f1 - counts(truth, theirs).f1
                own.append([gain, *bootstrap_gain(truth, mine, theirs, seed=seed)])
            values[f"{arm}, {by}"] = own
            intervals = " ".join(f"[{low:.3f}, {high:.3f}]" for _, low, high in own)
            rows.append([arm, by, cell([gain for gain, _, _ in own]), intervals])
    table("prompt | reducer | F1 above that of stuffing | 95 % per seed", rows)
    told = [chosen(folder, "number", seed) for folder, seed in zip(arms["plain"], seeds, strict=True)]
    values["number"] = [counts(truth, found).f1 for truth, found in told]
    print(f"\nF1 by the number of snippets alone: {cell(values['number'])}")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "phenotyping-prompts")
    options = parser.parse_args()
    runs, model = options.runs.resolve(), options.model.resolve()
    arms: dict[str, list[Path]] = {arm: [] for arm in (*VARIANTS, "stuffing")}
    for seed in options.seeds:
        apart = files(runs / f"world-{seed}", seed, None)
        whole = files(runs / f"charts-{seed}", seed, Room(model, seed))
        for arm, folders in arms.items():
            words = [*whole, *STUFFED] if arm == "stuffing" else [*apart, f"prompt.variant={arm}"]
            own = [
                f"policy.model={model}",
                "policy.threads=1",
                "prompt.reasoning_tokens=32",
                "steps=4",
                "reduce.by=max",
                f"seed={seed}",
                *words,
            ]
            folders.append(run(f"{arm}-{seed}", own, runs))
    values = {"arms": shown(arms), "gains": gains(arms, options.seeds)}
    (runs / "prompts.json").write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
