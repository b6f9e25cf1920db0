"""The input of a run in parts: large tables are cut, small texts and FHIR files are put together."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

from protocols.errors import BadInput
from protocols.service import Message

Format = Literal["rows", "csv", "parquet", "fhir", "text"]
SUFFIXES: dict[str, Format] = {
    ".jsonl": "rows",
    ".ndjson": "rows",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".json": "fhir",
    ".txt": "text",
}
WHOLE = ("fhir", "text")
"""Formats of which many files may be one part."""
FILES = 4096
"""Most files of a part."""
CHUNK = 1 << 20


class Part(Message):
    """A piece of the input, read on its own."""

    index: int
    """Its place."""
    file: str
    """The file; of several the first."""
    others: list[str] = []
    """Of FHIR and texts: files that are read after it, by their places below the root."""
    root: str = ""
    """The folder that was named."""
    format: Format
    """How to read it."""
    start: int = 0
    """First byte of JSON lines, first row group of Parquet."""
    end: int = -1
    """Behind the last one; -1: to the end."""
    first_line: int = 1
    """Number of the first line or row."""


def parts_of(paths: Sequence[str], size: int) -> list[Part]:
    """The input in parts of about `size` bytes, in order of files. Raises BadInput that names the path."""
    found = (part for path in paths for part in parts_in(Path(path).expanduser(), size))
    return [part.model_copy(update={"index": i}) for i, part in enumerate(found)]


def parts_in(path: Path, size: int) -> Iterator[Part]:
    """The parts of a file or folder."""
    root = str(path if path.is_dir() else path.parent)
    for whole, files in groupby(files_of(path), lambda file: format_of(file) in WHOLE):
        if whole:
            yield from together(files, root, size)
            continue
        for file in files:
            yield from cuts(file, root, size)


def files_of(path: Path) -> Iterator[Path]:
    """Files of a path that can be read. Raises BadInput that names it."""
    if path.is_dir():
        found = below(path)
        if (first := next(found, None)) is None:
            raise BadInput(f"notes: no {', '.join(SUFFIXES)} in {path}")
        yield first
        yield from found
    elif not path.is_file():
        raise BadInput(f"notes: {path} is not there")
    else:
        format_of(path)
        yield path


def below(folder: Path) -> Iterator[Path]:
    """Notes in a folder and in those in it, in order of their names. Folders behind links are left alone, and those
    that may not be read."""
    try:
        names = sorted(os.listdir(folder))
    except PermissionError:
        return
    for name in names:
        path = folder / name
        if path.is_dir():
            yield from () if path.is_symlink() else below(path)
        elif suffix_of(path) in SUFFIXES and path.is_file():
            yield path


def together(files: Iterable[Path], root: str, size: int) -> Iterator[Part]:
    """Small files in parts of at most `size` bytes; a larger one is a part of its own."""
    few: list[Path] = []
    held = 0
    for file in files:
        own = file.stat().st_size
        if few and (held + own > size or len(few) == FILES):
            yield part_of(few, root)
            few, held = [], 0
        few.append(file)
        held += own
    if few:
        yield part_of(few, root)


def part_of(files: Sequence[Path], root: str) -> Part:
    """Files as one part."""
    others = [file.relative_to(root).as_posix() for file in files[1:]]
    return Part(index=0, file=str(files[0]), others=others, root=root, format=format_of(files[0]))


def files_in(part: Part) -> Iterator[Part]:
    """Each file of a part as one of its own."""
    yield part
    for name in part.others:
        file = Path(part.root) / name
        yield part.model_copy(update={"file": str(file), "others": [], "format": format_of(file)})


def suffix_of(file: Path) -> str:
    """Its suffix, `.gz` apart."""
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


def format_of(file: Path) -> Format:
    """By the suffix. Raises BadInput for an unknown one."""
    suffix = suffix_of(file)
    if suffix not in SUFFIXES or (suffix == ".parquet" and file.name.lower().endswith(".gz")):
        raise BadInput(f"notes: {file}: expected one of {', '.join(SUFFIXES)}, perhaps with .gz")
    return SUFFIXES[suffix]


def cuts(file: Path, root: str, size: int) -> Iterator[Part]:
    """The parts of a table; only plain JSON lines and Parquet can be cut."""
    form = format_of(file)
    places: Iterable[tuple[int, int, int]] = [(0, -1, 1)]
    if form == "parquet":
        places = row_groups(file, size)
    elif form == "rows" and file.suffix != ".gz":
        places = line_cuts(file, size)
    for start, end, line in places:
        yield Part(index=0, file=str(file), root=root, format=form, start=start, end=end, first_line=line)


def line_cuts(file: Path, size: int) -> Iterator[tuple[int, int, int]]:
    """Start, end and first line of parts that begin and end with lines."""
    start, line, place, lines = 0, 1, 0, 0
    with open(file, "rb") as stream:
        while chunk := stream.read(min(CHUNK, size)):
            if place + len(chunk) - start >= size and (at := chunk.rfind(b"\n")) >= 0:
                end = place + at + 1
                lines += chunk.count(b"\n", 0, at + 1)
                yield start, end, line
                start, line, lines = end, line + lines, chunk.count(b"\n", at + 1)
            else:
                lines += chunk.count(b"\n")
            place += len(chunk)
    if place > start:
        yield start, place, line


def row_groups(file: Path, size: int) -> Iterator[tuple[int, int, int]]:
    """First row group, the one behind the last, and first row of parts."""
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise BadInput(f"notes: {file} is not Parquet: {error}") from error
    start, row, rows, bytes_ = 0, 1, 0, 0
    for group in range(table.num_row_groups):
        meta = table.metadata.row_group(group)
        rows, bytes_ = rows + meta.num_rows, bytes_ + meta.total_byte_size
        if bytes_ >= size or group == table.num_row_groups - 1:
            yield start, group + 1, row
            start, row, rows, bytes_ = group + 1, row + rows, 0, 0
