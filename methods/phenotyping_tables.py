"""Tables beside the notes: rows of facts, labels and names."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from methods.phenotyping_parts import suffix_of
from methods.worlds.documents import read_lines
from protocols.errors import BadInput


def rows_of(path: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of .jsonl or .csv, perhaps with .gz, with their places. Raises BadInput, which shows no row."""
    lines = read_lines(Path(path).expanduser(), what)
    if suffix_of(Path(path)) == ".csv":
        reader = csv.DictReader(lines)
        for row in reader:
            yield f"{path}:{reader.line_num}", row
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{what}: {path}:{number}: neither a row of JSON nor, by its name, of CSV") from error
            if not isinstance(value, dict):
                raise BadInput(f"{what}: {path}:{number}: expected an object")
            yield f"{path}:{number}", value
