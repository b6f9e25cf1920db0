"""Small files and small, annotated, documented functions (CONTRIBUTING.md, Style)."""

import ast
import statistics
from collections.abc import Iterator

import pytest

from tests.contracts.sources import Module, modules

MOST_LINES = 500
MEDIAN, MOST, LONGEST = 10, 45, 80
"""Lines of a function: half of them have at most the first, 95 % at most the second, all at most the third."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
MODULES = pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)


def functions(module: Module) -> list[Function]:
    return [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def public(tree: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Public functions and classes, and what is public in those classes."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def test_functions_are_short() -> None:
    lengths = {f"{module.name}.{f.name}": length(f) for module in modules() for f in functions(module)}
    assert statistics.median(lengths.values()) <= MEDIAN
    long = [name for name, lines in lengths.items() if lines > MOST]
    assert len(long) <= 0.05 * len(lengths), long
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


@MODULES
def test_files_are_short(module: Module) -> None:
    assert len(module.text.splitlines()) <= MOST_LINES


@MODULES
def test_what_is_public_is_documented(module: Module) -> None:
    assert ast.get_docstring(module.tree), module.name
    assert [node.name for node in public(module.tree) if not ast.get_docstring(node)] == []


@MODULES
def test_what_is_public_is_annotated(module: Module) -> None:
    found = [node for node in public(module.tree) if not isinstance(node, ast.ClassDef)]
    assert [node.name for node in found if not is_annotated(node)] == []


def is_annotated(function: Function) -> bool:
    """Whether result and arguments have types; that of a method's own object needs none."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    named = [argument for argument in arguments if argument is not None and argument.arg not in ("self", "cls")]
    return function.returns is not None and all(argument.annotation for argument in named)


@MODULES
def test_broad_excepts_raise_again_or_say_why_not(module: Module) -> None:
    lines = module.text.splitlines()
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ExceptHandler) or not is_broad(node):
            continue
        raises = any(isinstance(inner, ast.Raise) for statement in node.body for inner in ast.walk(statement))
        where = f"{module.name}:{node.lineno}"
        if not raises:
            assert "noqa: BLE001" in lines[node.lineno - 1], f"{where}: catches everything and goes on"
            reasons = lines[node.lineno - 2].strip(), lines[node.lineno - 1].split("BLE001")[1].strip()
            assert reasons[0].startswith("#") or reasons[1], f"{where}: says not why it may catch everything"


def is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)
