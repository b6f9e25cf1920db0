"""Many notes through phenotyping: python benchmarks/phenotyping_scale.py --notes 1000000.

Writes synthetic notes of about 3 KB, runs `launch.py phenotyping` over them as a whole, and again with a SIGKILL of
all its processes at a random moment, after which the same command goes on. Prints notes per second, the highest
memory of the run's processes in each tenth of the time, and whether both runs left the same files.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cluster.seeds import derive_seed  # noqa: E402
from methods.worlds import wards  # noqa: E402

BLOCKS = 400
FILES = 4
DEFINITION = """phenotype_id: ward
version: 1
name: {d}
description: The patient has, or has had, {d}.
terms: [{d}]
reduce: {{by: log_odds}}
"""


def write_notes(folder: Path, count: int, characters: int, seed: int) -> str:
    """JSON lines in several files; each note is a ward's note among sentences about something else."""
    disease = wards.disease_of(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ward.yaml").write_text(DEFINITION.format(d=disease))
    files = [folder / f"notes-{i}.jsonl" for i in range(FILES)]
    if all(file.is_file() for file in files):
        return disease
    rng = np.random.default_rng(derive_seed(seed, "blocks"))
    blocks = [block(rng, characters) for _ in range(BLOCKS)]
    written = 0
    streams = [open(file.with_suffix(".tmp"), "w") for file in files]  # noqa: SIM115
    for patient in wards.patients_of(wards.WardsConfig(filler=3), disease, seed, count=count):
        for one in patient.notes:
            if written == count:
                break
            # Copies of one note are told apart by what stands around them.
            text = f"{blocks[int(rng.integers(BLOCKS))]}\n{one.text}\n{blocks[int(rng.integers(BLOCKS))]}"
            row = {k: v for k, v in vars(one).items() if k != "said"} | {"text": text}
            streams[written * FILES // count].write(json.dumps(row) + "\n")
            written += 1
    for stream, file in zip(streams, files, strict=True):
        stream.close()
        os.replace(file.with_suffix(".tmp"), file)
    return disease


def block(rng: np.random.Generator, characters: int) -> str:
    """Sentences of half a note."""
    text = "OTHER:\n"
    while len(text) < characters / 2:
        text += wards.FILLERS[int(rng.integers(len(wards.FILLERS)))] + " "
    return text


def command(folder: Path, model: str, run: str, words: Sequence[str]) -> list[str]:
    given = [
        f"notes=[{folder / 'notes'}]",
        f"definitions=[{folder / 'notes' / 'ward.yaml'}]",
        f"policy.model={model}",
    ]
    given += ["prompt.variant=bare", "prompt.mask=true", "policy.threads=1", "questions_per_call=256", "steps=100"]
    given += ["window.characters=100", f"runs_dir={folder / 'runs'}", f"run={run}", "wandb=disabled"]
    return [sys.executable, "launch.py", "phenotyping", *given, *words]


def watched(process: subprocess.Popen[bytes], until: float) -> Iterator[tuple[float, int]]:
    """Seconds and bytes of memory (proportional share) of a process and its children, until it ends or `until`."""
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < until:
        total = 0
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                total += one.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        yield time.monotonic() - begun, total
        time.sleep(2)


def played(words: list[str], kill_after: float = float("inf")) -> tuple[float, list[tuple[float, int]], bool]:
    """Seconds, memory over time, and whether it was killed."""
    begun = time.monotonic()
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    seen = []
    try:
        seen += list(watched(process, kill_after))
        killed = process.poll() is None
        if killed:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    except BaseException:  # raised again: nothing must go on behind a benchmark that is stopped
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if not killed and code:
        raise SystemExit(f"{' '.join(words)} ended with {code}")
    return time.monotonic() - begun, seen, killed


def digest(folder: Path, run: str) -> str:
    """Of what a run left, its name apart."""
    found = hashlib.sha256()
    for name in ("decisions.jsonl", "note_nlp.csv", "rejects.jsonl", "metrics.jsonl"):
        with open(folder / "runs" / run / name, "rb") as stream:
            for line in stream:
                found.update(line.replace(f'"run":"{run}"'.encode(), b""))
    return found.hexdigest()


def tenths(seen: Sequence[tuple[float, int]], seconds: float) -> str:
    """Highest memory in each tenth of the time, in MB."""
    parts = [[size for at, size in seen if i <= 10 * at / seconds < i + 1] for i in range(10)]
    return " ".join(f"{max(part) / 1e6:.0f}" if part else "-" for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=100_000)
    parser.add_argument("--characters", type=int, default=3000)
    parser.add_argument("--model", required=True, help="folder of the wards' policy: RUNS/bases/wards-...")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "phenotyping-scale")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*", help="more keys, such as transport=ray parallel=2")
    options = parser.parse_args()
    folder, model = options.folder.resolve(), str(Path(options.model).resolve())
    write_notes(folder / "notes", options.notes, options.characters, options.seed)
    size = sum(file.stat().st_size for file in (folder / "notes").glob("*.jsonl"))
    seconds, seen, _ = played(command(folder, model, "whole", options.words))
    print(f"{options.notes:,} notes, {size / 1e9:.2f} GB: {seconds:.0f} s, {options.notes / seconds:.0f} notes/s")
    print(f"memory in tenths of the time, MB: {tenths(seen, seconds)}", flush=True)
    moment = random.Random(options.seed).uniform(0.1, 0.9) * seconds
    first, _, killed = played(command(folder, model, "killed", options.words), moment)
    rest, _, _ = played(command(folder, model, "killed", options.words))
    same = digest(folder, "whole") == digest(folder, "killed")
    print(f"killed: {killed}, after {first:.0f} s; went on for {rest:.0f} s ({first + rest - seconds:+.0f} s in all)")
    print(f"the same files: {same}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
