"""Imports go protocols <- actors <- cluster <- methods <- launch.py, and nowhere else."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.contracts.sources import ROOMS, Module, modules

MAY_IMPORT = {
    "protocols": {"protocols"},
    "actors": {"actors", "protocols"},
    "cluster": {"cluster", "actors", "protocols"},
    "methods": {"methods", "cluster", "protocols"},
    "launch": set(ROOMS),
}
ONLY_IN = {
    "ray": ("cluster.",),
    "grpc": ("cluster.", "protocols.client"),
}
"""Libraries that only some modules may know."""
NOT_IN_PROTOCOLS = {"torch", "transformers", "ray", "vllm", "deepspeed", "peft", "wandb"}


@dataclass(frozen=True)
class Import:
    """One imported module, where, and whether the importer cannot be loaded without it."""

    target: str
    line: int
    at_module_level: bool


def imports(tree: ast.AST, at_module_level: bool = True) -> Iterator[Import]:
    """All imports of a syntax tree, also those inside of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_module_level)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative imports hide where they lead"
            yield Import(node.module or "", node.lineno, at_module_level)
        else:
            deeper = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            later = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from imports(node, at_module_level and not deeper and not later)


def offences(module: Module) -> Iterator[str]:
    for found in imports(module.tree):
        library = found.target.split(".")[0]
        where = f"{module.name}:{found.line} imports {found.target}"
        if library in ROOMS and library not in MAY_IMPORT[module.room]:
            yield f"{where}: {module.room} may import {', '.join(sorted(MAY_IMPORT[module.room]))} only"
        if library in ONLY_IN and not module.name.startswith(ONLY_IN[library]):
            yield f"{where}: only {' and '.join(ONLY_IN[library])} may"
        if module.room == "protocols" and library in NOT_IN_PROTOCOLS:
            if found.at_module_level:
                yield f"{where}: protocols must load without it"
            elif (module.name, library) != ("protocols.tensor", "torch"):
                yield f"{where}: of the protocols only Tensor knows torch, and nothing else is known"


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_imports_follow_the_arrows(module: Module) -> None:
    assert list(offences(module)) == []


def test_all_rooms_are_there() -> None:
    assert {module.room for module in modules()} == set(ROOMS)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("protocols/x.py", "import actors.actor", "protocols may import protocols only"),
        ("protocols/x.py", "import torch", "protocols must load without it"),
        ("protocols/x.py", "try:\n    import ray\nexcept ImportError:\n    pass", "protocols must load without it"),
        ("protocols/x.py", "def f():\n    import torch", "only Tensor knows torch"),
        ("protocols/x.py", "import grpc", "only cluster. and protocols.client may"),
        ("actors/x.py", "def f():\n    from cluster import cluster", "actors may import actors, protocols only"),
        ("actors/x.py", "class A:\n    def f(self):\n        from ray.util import state", "only cluster. may"),
        ("cluster/x.py", "from methods.spell import run", "cluster may import actors, cluster, protocols only"),
        ("methods/x.py", "from actors.rules import normalize", "methods may import cluster, methods, protocols only"),
        ("methods/x.py", "if True:\n    import launch", "methods may import cluster, methods, protocols only"),
        ("launch.py", "import ray", "only cluster. may"),
    ],
)
def test_the_walk_sees_what_must_not_be(name: str, text: str, expected: str) -> None:
    from tests.contracts.sources import ROOT

    module = Module(ROOT / name)
    module.__dict__["text"], module.__dict__["tree"] = text, ast.parse(text)
    assert any(expected in offence for offence in offences(module))


def test_types_may_be_named_without_loading_them() -> None:
    tree = ast.parse("if TYPE_CHECKING:\n    from torch import Tensor")
    assert [found.at_module_level for found in imports(tree)] == [False]
