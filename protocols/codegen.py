"""Write protocols/proto/*.proto and docs/rpcs.md from the services: `python -m protocols.codegen [--check]`.

The pydantic models are the source, except for numbers: those are read from the files that are there.

- A field, enum value or union member keeps its number by name, wherever its class moves.
- A new one gets the number after the highest that was ever used.
- A removed one leaves its number and its name reserved. If the name comes back, it gets a new number. A
  removed message or enum stays as an empty one with everything reserved.
- A field that changes its type, or becomes or stops being repeated, is an error: give it another name.
  Becoming or no longer being optional is the same on the wire, and is allowed.

What was never released may be freed by deleting its line from the .proto file by hand.
"""

import argparse
import difflib
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import protocols
from protocols.proto_schema import Block, Entry, Rpc, ServiceBlock, build, camel
from protocols.service import Service

FOLDER = Path(__file__).parent / "proto"
TABLE = Path(__file__).parents[1] / "docs" / "rpcs.md"
WIDTH = 100
# Of the wire, or of the inside of a cluster: workers move weights, which never leave it.
_NOT_PUBLISHED = ("client", "descriptors", "handle", "wire", "workers")

_OPEN = re.compile(r"(message|enum|service) (\w+) \{\}?")
_ENTRY = re.compile(r" +(?:(optional|repeated) )?(?:(\w+|map<string, \w+>) )?(\w+) = (\d+);")
_RESERVED = re.compile(r" +reserved (.+);")
_OTHER = re.compile(r"|(syntax|package|import) .*;| *//.*|  rpc .*;|  oneof \w+ \{|(  )?\}")


def services() -> list[type[Service]]:
    """Every service class with a kind that a module of protocols/ defines, but for those inside of an actor."""
    names = [info.name for info in pkgutil.iter_modules(protocols.__path__) if info.name not in _NOT_PUBLISHED]
    modules = [importlib.import_module(f"protocols.{name}") for name in names]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Service) and value.__module__ == module.__name__
        if hasattr(value, "kind")
    ]


def generate(services: Iterable[type[Service]], published: Mapping[str, str]) -> dict[str, str]:
    """The .proto files of the services, by name, with the numbers of the published ones.

    Raises TypeError for a type without counterpart and for a published field of another type, and
    ValueError for a published file that this module has not written.
    """
    service_blocks, blocks = build(services)
    old = {name: block for file, text in published.items() for name, block in parse(file, text).items()}
    blocks = [number(block, old.pop(block.name, None)) for block in blocks]
    blocks += [_retired(block) for block in old.values() if block.entries or block.reserved_numbers]
    files = {block.file for block in blocks} | {service.file for service in service_blocks}
    return {file: _render(file, service_blocks, blocks) for file in sorted(files)}


def parse(file: str, text: str) -> dict[str, Block]:
    """The messages and enums of a file that `generate` wrote, by name and without comments."""
    blocks: dict[str, Block] = {}
    name = ""
    for line_number, line in enumerate(text.splitlines(), 1):
        if match := _OPEN.fullmatch(line):
            name = match[2]
            if match[1] != "service":
                blocks[name] = Block(match[1], name, file)
        elif name in blocks and (match := _ENTRY.fullmatch(line)):
            entry = Entry(match[3], match[2] or "", match[1] or "", number=int(match[4]))
            blocks[name] = replace(blocks[name], entries=(*blocks[name].entries, entry))
        elif name in blocks and (match := _RESERVED.fullmatch(line)):
            blocks[name] = _with_reserved(blocks[name], match[1].split(", "))
        elif not _OTHER.fullmatch(line):
            raise ValueError(f"{file}:{line_number}: expected a line as codegen writes it, got {line!r}")
    return blocks


def _with_reserved(block: Block, items: Sequence[str]) -> Block:
    names = {item.strip('"') for item in items if item.startswith('"')}
    numbers = {int(item) for item in items if not item.startswith('"')}
    return replace(
        block,
        reserved_names=block.reserved_names | names,
        reserved_numbers=block.reserved_numbers | numbers,
    )


def number(block: Block, old: Block | None) -> Block:
    """Give every entry the number of its namesake in the published block, or a new one.

    Raises TypeError if a published entry changes its type.
    """
    old = old or Block(block.kind, block.name, block.file)
    if old.kind != block.kind:
        raise TypeError(f"{block.name}: published as {old.kind}, cannot become {block.kind}; choose another name")
    known = {entry.name: entry for entry in old.entries}
    names = {entry.name for entry in block.entries}
    first = 0 if block.kind == "enum" else 1
    used = {entry.number for entry in old.entries} | old.reserved_numbers
    fresh = iter(range(max(used, default=first - 1) + 1, sys.maxsize))
    return replace(
        block,
        entries=tuple(_numbered(block, entry, known.get(entry.name), fresh) for entry in block.entries),
        reserved_numbers=frozenset(used) - {entry.number for entry in old.entries if entry.name in names},
        reserved_names=(old.reserved_names | known.keys()) - names,
    )


def _numbered(block: Block, entry: Entry, old: Entry | None, fresh: Iterator[int]) -> Entry:
    if old is None:
        return replace(entry, number=next(fresh))
    if old.type != entry.type or (old.label == "repeated") != (entry.label == "repeated"):
        raise TypeError(
            f"{block.name}.{entry.name}: published as `{old.declared} = {old.number}`, cannot become"
            f" `{entry.declared}` under the same number; give the field another name"
        )
    return replace(entry, number=old.number)


def _retired(block: Block) -> Block:
    """What stays of a removed message or enum; an enum must keep its zero."""
    kept = block.entries[:1] if block.kind == "enum" else ()
    return number(replace(block, comment="Removed.", entries=kept), block)


def _render(file: str, services: Sequence[ServiceBlock], blocks: Sequence[Block]) -> str:
    services = [service for service in services if service.file == file]
    files = {block.name: block.file for block in blocks}
    blocks = [block for block in blocks if block.file == file]
    types = [entry.type for block in blocks for entry in block.entries]
    types += [name for service in services for rpc in service.rpcs for name in (rpc.request, rpc.response)]
    bases = {name.removeprefix("map<string, ").removesuffix(">") for name in types}
    imports = sorted({files[base] for base in bases & files.keys()} - {file})
    source = f"protocols/{file.removesuffix('.proto')}.py"
    parts = [
        f'// Written by `python -m protocols.codegen` from {source}. Do not edit.\nsyntax = "proto3";',
        "package repertory.v1;",
        "\n".join(f'import "{name}";' for name in imports),
    ]
    parts += ["\n".join(_service_lines(service)) for service in services]
    parts += ["\n".join(_block_lines(block)) for block in blocks]
    return "\n\n".join(filter(None, parts)) + "\n"


def _service_lines(service: ServiceBlock) -> Iterator[str]:
    yield from _comment(service.comment, "")
    yield f"service {service.name} {{"
    for rpc in service.rpcs:
        yield from _comment(rpc.comment, "  ")
        yield _rpc_line(rpc)
    yield "}"


def _rpc_line(rpc: Rpc) -> str:
    stream = "stream " if rpc.streaming else ""
    return f"  rpc {rpc.name}({rpc.request}) returns ({stream}{rpc.response});"


def _block_lines(block: Block) -> Iterator[str]:
    yield from _comment(block.comment, "")
    if not (block.entries or block.reserved_numbers):
        yield f"{block.kind} {block.name} {{}}"
        return
    yield f"{block.kind} {block.name} {{"
    if block.reserved_numbers:
        yield f"  reserved {', '.join(map(str, sorted(block.reserved_numbers)))};"
    if block.reserved_names:
        yield "  reserved " + ", ".join(f'"{name}"' for name in sorted(block.reserved_names)) + ";"
    indent = "    " if block.oneof else "  "
    if block.oneof:
        yield f"  oneof {block.oneof} {{"
    for entry in block.entries:
        yield from _comment(entry.comment, indent)
        yield f"{indent}{entry.declared} = {entry.number};"
    if block.oneof:
        yield "  }"
    yield "}"


def _comment(text: str, indent: str) -> list[str]:
    """The text as comment lines; each of its paragraphs is wrapped, blank lines stay."""
    lines = [
        line
        for paragraph in re.split(r"\n\s*\n", text.strip())
        for line in ("", *textwrap.wrap(paragraph, WIDTH - len(indent) - 3, break_on_hyphens=False))
    ]
    return [f"{indent}// {line}".rstrip() for line in lines[1:]]


def table(services: Iterable[type[Service]]) -> str:
    """Every remote method, as Markdown."""
    lines = [
        "# All calls",
        "",
        "Written by `python -m protocols.codegen`. Do not edit. Package `repertory.v1`; roles and retries are of",
        "[the gateway](gateway.md).",
        "",
        "| call | takes | gives | role | tried again | |",
        "|---|---|---|---|---|---|",
    ]
    for service in services:
        for name, method in service.methods().items():
            gives = f"{'stream of ' if method.streaming else ''}{method.response.__name__}"
            what = " ".join((inspect.getdoc(getattr(service, name)) or "").split())
            cells = (f"{service.__name__}/{camel(name)}", method.request.__name__, gives, method.role)
            lines.append(f"| {' | '.join(cells)} | {'yes' if method.safe else 'no'} | {what} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files and say what changed; with --check write nothing, print a diff, and return 1 if any."""
    parser = argparse.ArgumentParser(prog="python -m protocols.codegen", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args(arguments).check
    published = {path.name: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.proto"))}
    files = generate(services(), published)
    if TABLE.is_file():  # not in an installed package
        published[TABLE.name], files[TABLE.name] = TABLE.read_text("utf-8"), table(services())
    changed = [name for name in sorted(published | files) if published.get(name) != files.get(name)]
    for name in changed:
        before, after = published.get(name, ""), files.get(name, "")
        if check:
            print(_diff(name, before, after), end="")
        else:
            _write(name, after)
            print(f"{name}: {_summary(before, after)}")
    return int(check and bool(changed))


def _write(name: str, text: str) -> None:
    path = TABLE if name == TABLE.name else FOLDER / name
    if text:
        path.write_text(text, "utf-8")
    else:
        path.unlink()


def _diff(name: str, before: str, after: str) -> str:
    lines = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return "".join(difflib.unified_diff(*lines, f"checked in: {name}", f"generated: {name}"))


def _summary(before: str, after: str) -> str:
    signs = [line[0] for line in _diff("", before, after).splitlines()[2:]]
    return f"{signs.count('+')} lines added, {signs.count('-')} removed"


if __name__ == "__main__":
    sys.exit(main())
