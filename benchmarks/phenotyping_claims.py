"""Measures the claims about phenotyping in the wards: python benchmarks/phenotyping_claims.py PART.

Each arm is one `launch.py phenotyping world=wards` run per seed, 600 patients, a disease, patients and a small policy
per seed; the policy is taught on another disease, with the window and the prompt of its arm. Runs that are there
already are not repeated. Prints Markdown tables, and writes their values to <part>.json.

claims     all reducers beside rules, codes and any mention, and what the specification demands of them
ablations  windows, the section's header, de-duplication
alarms     healthy patients who are called ill, and precision, by number of questions
phrases    the small policy's answers to snippets with phrases that it has learnt from, and that it has not
stuffing   all notes of a patient in one question of at most 512 tokens, by a policy taught to read such ones
same       snippets, and such charts, by one policy that has learnt from snippets
long       both kinds of stuffing with notes so long that most patients' do not fit
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from methods.phenotyping_decide import Decided  # noqa: E402
from methods.phenotyping_measures import bootstrap_gain, counts, mcnemar  # noqa: E402
from methods.worlds import wards  # noqa: E402

QUIET = ["wandb=disabled"]
PLAIN = "as preset"
BARE = ["window.snap=0", "evidence.letters=1"]
"""Edges that move to the ends of sentences would hide what the window alone does, and a name has few letters."""
CHARTS = ["wards.context=512", "prompt.section=false", "window.characters=100000", "window.max_characters=100000"]
TAUGHT, ASKED = [*CHARTS, "wards.stuffed=taught"], [*CHARTS, "wards.stuffed=asked"]
LONG = ["wards.filler=20"]
ARMS = {
    # Notes are shorter than its window of 250 characters, so that edges do not move.
    PLAIN: [],
    "no section": ["prompt.section=false"],
    "window 0": [*BARE, "window.characters=0"],
    "window 40": [*BARE, "window.characters=40"],
    "window 40, no section": [*BARE, "window.characters=40", "prompt.section=false"],
    "copies asked": ["evidence.jaccard=2"],
    "stuffing": TAUGHT,
    # Of the same lessons, and so with the same policy, once snippets and once charts are asked about.
    "snippets": ["wards.context=512", "prompt.section=false"],
    "stuffing, taught on snippets": ASKED,
    "long notes": LONG,
    "long notes, stuffing": [*LONG, *TAUGHT],
    "long notes, stuffing, taught on snippets": [*LONG, *ASKED],
}
PARTS = {
    "claims": [PLAIN],
    "ablations": [PLAIN, "no section", "window 0", "window 40", "window 40, no section", "copies asked"],
    "alarms": [PLAIN],
    "phrases": [PLAIN],
    "stuffing": [PLAIN, "stuffing"],
    "same": ["snippets", "stuffing, taught on snippets"],
    "long": ["long notes", "long notes, stuffing", "long notes, stuffing, taught on snippets"],
}
SEEDS = {"claims": 5, "ablations": 3, "alarms": 5, "phrases": 5, "stuffing": 3, "same": 5, "long": 3}
SHARED = [set(wards.PHRASES["assert"][i]) & set(wards.PHRASES["family"][i]) for i in (0, 1)]
"""Phrases that are said of patients and of relatives alike."""
Found = Mapping[str, Sequence[Path]]
"""Folders of runs by arm, in order of seeds."""
Values = dict[str, Any]


def run(name: str, words: Sequence[str], runs: Path) -> Path:
    """Folder of a run; it is made now if needed."""
    command = [sys.executable, "launch.py", "phenotyping", *QUIET, f"runs_dir={runs}", f"run={name}", *words]
    if not (runs / name / "evaluation.json").is_file():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        print(f"{name} done", file=sys.stderr, flush=True)
    return runs / name


def played(arms: Sequence[str], seeds: Sequence[int], runs: Path, parallel: int) -> Found:
    """All arms with all seeds, the preset first: other arms may ask the policy that it taught."""
    jobs = [(arm, seed) for arm in arms for seed in seeds]
    with ThreadPoolExecutor(parallel) as pool:
        made = pool.map(
            lambda job: run(f"{slug(job[0])}-{job[1]}", ["world=wards", f"seed={job[1]}", *ARMS[job[0]]], runs), jobs
        )
        found = dict(zip(jobs, made, strict=True))
    return {arm: [found[arm, seed] for seed in seeds] for arm in arms}


def slug(name: str) -> str:
    """As the name of a run."""
    return name.replace(",", "").replace(" ", "-")


def evaluation(folder: Path) -> dict[str, Any]:
    """What a run came to."""
    (found,) = json.loads((folder / "evaluation.json").read_text())
    return dict(found)


def system(folder: Path, name: str) -> dict[str, Any]:
    """One way to decide."""
    return dict(next(one for one in evaluation(folder)["measured"] if one["name"] == name))


def decisions(folder: Path) -> dict[str, Decided]:
    """Of a run, by patient."""
    lines = (folder / "decisions.jsonl").read_text(encoding="utf-8").splitlines()
    return {one.patient_id: one for one in map(Decided.model_validate_json, lines)}


def world(seed: int) -> list[wards.Patient]:
    """The patients of a seed, each note apart."""
    return list(wards.patients_of(wards.WardsConfig(), wards.disease_of(seed), seed))


def cell(values: Sequence[float | None]) -> str:
    """Mean, deviation, and each seed's value; where nobody is called ill, precision and F1 are 0."""
    known = [value or 0.0 for value in values]
    spread = f" ({statistics.stdev(known):.3f})" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.3f}{spread}: {' '.join(f'{value:.3f}' for value in known)}"


def table(head: str, rows: Sequence[Sequence[str]]) -> None:
    columns = head.split("|")
    print(f"\n| {' | '.join(map(str.strip, columns))} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def claims(found: Found, seeds: Sequence[int]) -> Values:
    folders = found[PLAIN]
    names = [one["name"] for one in evaluation(folders[0])["measured"]]
    values: Values = {}
    rows = []
    for name in names:
        made = [system(folder, name) for folder in folders]
        values[name] = made
        gains = " ".join(f"[{one['gain_low']:.3f}, {one['gain_high']:.3f}]" for one in made)
        tests = " ".join(f"{one['p']:.1g}" for one in made)
        quality = [cell([one[what] for one in made]) for what in ("f1", "precision", "recall")]
        rows.append([name, *quality, gains, tests])
    table("decided by | F1 | precision | recall | gain over the rules, 95 % per seed | McNemar p", rows)
    for name in ("MapReduce, max", "MapReduce, log_odds"):
        demands(name, values, over_mention(folders, seeds) if name.endswith("max") else None)
    saved = [1 - sum(one.n_groups for one in d) / sum(one.n_found for one in d) for d in map(listed, folders)]
    print(f"\nmap calls saved by de-duplication: {cell(saved)}")
    return values | {"saved": saved}


def listed(folder: Path) -> list[Decided]:
    return list(decisions(folder).values())


def over_mention(folders: Sequence[Path], seeds: Sequence[int]) -> list[tuple[float, float]]:
    """95 % interval per seed of what the decisions gain over any mention."""
    found = []
    for folder, seed in zip(folders, seeds, strict=True):
        patients, decided = world(seed), decisions(folder)
        truth = [one.ill for one in patients]
        mine = [decided[one.id].decision == "yes" for one in patients]
        mention = [decided[one.id].n_found > 0 for one in patients]
        found.append(bootstrap_gain(truth, mine, mention, seed=seed))
    return found


def demands(name: str, values: Values, intervals: Sequence[tuple[float, float]] | None) -> None:
    """Section 5 of the specification."""

    def gains(other: str) -> list[float]:
        return [one["f1"] - two["f1"] for one, two in zip(values[name], values[other], strict=True)]

    above = sum(one["gain_low"] > 0 for one in values[name])
    rules, mention = gains("rules"), gains("any mention")
    print(f"\n{name}: F1 above the rules' by {cell(rules)}; at least .08 in {sum(g >= 0.08 for g in rules)} of")
    print(f"{len(rules)} seeds, the interval above 0 in {above}; above any mention's by {cell(mention)},")
    print(f"at least .25 in {sum(g >= 0.25 for g in mention)} of {len(mention)}")
    if intervals:
        print(f"its intervals over any mention: {' '.join(f'[{low:.3f}, {high:.3f}]' for low, high in intervals)}")


def ablations(found: Found, seeds: Sequence[int]) -> Values:
    rows = []
    values: Values = {}
    for arm, folders in found.items():
        for by in ("max", "count", "log_odds"):
            made = [system(folder, f"MapReduce, {by}") for folder in folders]
            values[f"{arm}, {by}"] = made
            quality = [cell([one[what] for one in made]) for what in ("f1", "precision", "recall")]
            rows.append([arm, by, *quality])
    table("arm | reducer | F1 | precision | recall", rows)
    calls = {arm: [sum(one.n_sent for one in listed(folder)) for folder in folders] for arm, folders in found.items()}
    table("arm | map calls per seed", [[arm, " ".join(map(str, sums))] for arm, sums in calls.items()])
    told = {arm: by_header(folders, seeds) for arm, folders in found.items()}
    rows = []
    for arm, own in told.items():
        rows += [[arm, *key, f"{one['wrong']} of {one['all']}"] for key, one in sorted(own.items())]
    table("arm | the note | header | on the wrong side of 0.5, all seeds", rows)
    return values | {
        "calls": calls,
        "headers": {f"{arm}, {', '.join(key)}": own[key] for arm, own in told.items() for key in own},
    }


def by_header(folders: Sequence[Path], seeds: Sequence[int]) -> dict[tuple[str, str], Counter[str]]:
    """Of snippets whose words are the same for patients and relatives, by whether a header stands in them."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for folder, seed in zip(folders, seeds, strict=True):
        disease = wards.disease_of(seed)
        cited = {one.note_id: one for decided in listed(folder) for one in decided.evidence}
        for note in (note for patient in world(seed) for note in patient.notes):
            own = cited.get(note.note_id)
            if own is None or own.p is None or note.said is None:
                continue
            if any(phrase_in(note.text, note.said, disease)[0] in some for some in SHARED):
                above = own.quote.partition(disease)[0]
                where = "in the text" if any(header in above for header in wards.SECTIONS) else "lost"
                told = found.setdefault((note.said, where), Counter())
                told.update({"all": 1, "wrong": (own.p >= 0.5) != (note.said == "assert")})
    return found


def alarms(found: Found, seeds: Sequence[int]) -> Values:
    """Of healthy patients, all seeds together; and of all patients precision."""
    folders = found[PLAIN]
    f = statistics.fmean(evaluation(folder)["snippet_alarms"] for folder in folders)
    own = [one for folder in folders for one in evaluation(folder)["alarms"]]
    rows, values = [], {}
    for n in sorted({one["questions"] for one in own}):
        some = [one for one in own if one["questions"] == n]
        total = sum(one["patients"] for one in some)
        sums = {what: sum(one[what] * one["patients"] for one in some) for what in ("max", "expected", "count")}
        values[n] = {"patients": total, **{what: value / total for what, value in sums.items()}}
        rows.append([str(n), str(total), *(f"{value / total:.4f}" for value in sums.values())])
    print(f"\nf, false alarms per snippet about a healthy patient: {f:.4f}")
    table("questions | healthy patients | called ill by max | 1-(1-f)^n | by count_2", rows)
    lengths = [name.split(", ")[1] for name in system(folders[0], "MapReduce, max")["by_length"] if "prec" in name]
    rows = []
    for by in ("max", "count"):
        parts = [system(folder, f"MapReduce, {by}")["by_length"] for folder in folders]
        rows += [
            [by, one, *(cell([p[f"{what}, {one}"] for p in parts]) for what in ("precision", "f1"))]
            for one in lengths
        ]
    table("reducer | questions | precision | F1", rows)
    return {"f": f, "by_questions": values}


def phrases(found: Found, seeds: Sequence[int]) -> Values:
    """Of each snippet that was asked about: is the likeliest answer right, and is it a yes where it should be."""
    per_seed = [answers(folder, seed) for folder, seed in zip(found[PLAIN], seeds, strict=True)]
    rows = []
    for kind in [*wards.PHRASES, "all"]:
        for group in ("seen", "unseen"):
            pairs = [one[kind, group] for one in per_seed]
            rows.append(
                [
                    kind,
                    group,
                    str(sum(p["all"] for p in pairs)),
                    *(cell([p[w] / p["all"] for p in pairs]) for w in ("right", "yes or not")),
                ]
            )
    table("the note | phrases | snippets | of three answers right | of yes or not right", rows)
    worst: Counter[str] = Counter()
    for one in per_seed:
        worst.update(one["wrong", "phrases"])
    table("phrase | on the wrong side of 0.5", [[text, str(count)] for text, count in worst.most_common(12)])
    return {f"{kind}, {group}": [one[kind, group] for one in per_seed] for kind, group in per_seed[0]}


def answers(folder: Path, seed: int) -> dict[tuple[str, str], Counter[str]]:
    """Counts of one run, by kind of note and whether its phrase had been learnt from."""
    cited = {one.note_id: one for decided in listed(folder) for one in decided.evidence}
    found: dict[tuple[str, str], Counter[str]] = {("wrong", "phrases"): Counter()}
    for patient in world(seed):
        for note in patient.notes:
            own = cited.get(note.note_id)
            if own is None or note.said is None or own.p is None:
                continue
            phrase, group = phrase_in(note.text, note.said, wards.disease_of(seed))
            expected = wards.LABELS[note.said]
            side = (own.p >= 0.5) == (expected == "yes")
            for kind in (note.said, "all"):
                told = found.setdefault((kind, group), Counter())
                told.update({"all": 1, "right": own.answer == expected, "yes or not": side})
            if not side:
                found["wrong", "phrases"][f"{phrase} ({note.said}, {group})"] += 1
    return found


def phrase_in(text: str, kind: wards.Kind, disease: str) -> tuple[str, str]:
    """The phrase of a note, and whether the small policy has learnt from it."""
    groups = zip(("seen", "unseen"), wards.PHRASES[kind], strict=True)
    options = [(one, group) for group, some in groups for one in some if one.format(d=disease) in text]
    return max(options, key=lambda option: len(option[0]))


def stuffing(found: Found, seeds: Sequence[int]) -> Values:
    """The first arm beside each other one, on the same patients."""
    (_, first), *others = found.items()
    values: Values = {"arms": {arm: [system(one, "as decided") for one in some] for arm, some in found.items()}}
    rows = []
    for arm, folders in others:
        values[arm] = []
        for folder, other, seed in zip(first, folders, seeds, strict=True):
            patients = world(seed)
            mine, theirs = decisions(folder), decisions(other)
            truth = [one.ill for one in patients]
            yes = [[own[one.id].decision == "yes" for one in patients] for own in (mine, theirs)]
            f1 = [counts(truth, some).f1 for some in yes]
            low, high = bootstrap_gain(truth, yes[0], yes[1], seed=seed)
            tokens = [sum(one.tokens for one in own.values()) for own in (mine, theirs)]
            values[arm].append({"f1": f1, "low": low, "high": high, "tokens": tokens, "p": mcnemar(truth, *yes)})
            told = [*(f"{one:.3f}" for one in f1), f"{f1[0] - f1[1]:.3f} [{low:.3f}, {high:.3f}]"]
            rows.append([arm, str(seed), *told, f"{values[arm][-1]['p']:.1g}", *map(str, tokens)])
    table("beside | seed | F1, max | F1 of it | gain | McNemar p | tokens | tokens of it", rows)
    for arm, _ in others:
        print(f"\ngain over {arm}: {cell([one['f1'][0] - one['f1'][1] for one in values[arm]])}")
    return values


SHOW = {
    "claims": claims,
    "ablations": ablations,
    "alarms": alarms,
    "phrases": phrases,
    "stuffing": stuffing,
    "same": stuffing,
    "long": stuffing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "phenotyping-claims")
    parser.add_argument("--parallel", type=int, default=2)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    seeds = options.seeds or list(range(SEEDS[options.part]))
    found = played(PARTS[options.part], seeds, options.runs.resolve(), options.parallel)
    values = SHOW[options.part](found, seeds)
    (options.runs / f"{options.part}.json").write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
