"""The modules of the five rooms as syntax trees."""

import ast
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("protocols", "actors", "cluster", "methods", "launch")


@dataclass(frozen=True)
class Module:
    """One file of a room."""

    path: Path

    @property
    def name(self) -> str:
        return ".".join(self.path.relative_to(ROOT).with_suffix("").parts)

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


@cache
def modules() -> list[Module]:
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    return [Module(file) for file in sorted([*files, ROOT / "launch.py"])]
