"""What scripts and actors may rely on changes on purpose only."""

import ast
import difflib
import os
from collections.abc import Iterator

import pytest

from tests.contracts.sources import ROOT, Module

GOLDEN = ROOT / "tests" / "contracts" / "golden" / "signatures.txt"
PUBLIC = {
    "protocols/service.py": None,
    "protocols/errors.py": None,
    "protocols/model.py": None,
    "protocols/policy.py": ["PolicyService"],
    "protocols/questioner.py": ["QuestionerService"],
    "protocols/retriever.py": ["RetrieverService"],
    "protocols/reviser.py": ["ReviserService"],
    "protocols/reward_model.py": ["RewardModelService"],
    "protocols/router.py": ["RouterService"],
    "protocols/verifier.py": ["VerifierService"],
    "protocols/tensor.py": ["Tensor"],
    "protocols/placement.py": None,
    "actors/actor.py": ["Actor", "start"],
    "cluster/cluster.py": ["Cluster"],
    "cluster/config.py": None,
    "cluster/configure.py": ["configure", "run_name", "describe"],
    "protocols/handle.py": ["make_handle", "with_deadline", "call_times", "transport_of"],
    "cluster/pipeline.py": None,
    "cluster/seeds.py": None,
    "cluster/steps.py": ["LoopState", "Step"],
    "cluster/summary.py": None,
    "launch.py": ["main"],
}
"""Files and their names that are public; None: all that have no underscore."""
RENEW = "REPERTORY_RENEW=1 python -m pytest tests/contracts/test_signatures.py"


def signatures() -> Iterator[str]:
    for path, names in PUBLIC.items():
        tree = Module(ROOT / path).tree
        yield f"# {path}"
        known = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | Function)}
        for name in [name for name in known if not name.startswith("_")] if names is None else names:
            yield from described(known[name])
        yield ""


Function = ast.FunctionDef | ast.AsyncFunctionDef


def described(node: ast.ClassDef | Function, prefix: str = "") -> Iterator[str]:
    """A function's signature; a class's bases, fields and public methods."""
    if not isinstance(node, ast.ClassDef):
        marks = [f"@{ast.unparse(mark)} " for mark in node.decorator_list if "abstract" not in ast.unparse(mark)]
        kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield f"{''.join(marks)}{kind} {prefix}{node.name}({ast.unparse(node.args)}){returns}"
        return
    yield f"class {node.name}({', '.join(map(ast.unparse, node.bases))})"
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and not ast.unparse(part.target).startswith("_"):
            yield f"{node.name}.{ast.unparse(part)}"
        elif isinstance(part, Function) and (not part.name.startswith("_") or part.name == "__init__"):
            yield from described(part, f"{node.name}.")


def test_public_signatures_are_the_published_ones() -> None:
    now = "\n".join(signatures()).strip() + "\n"
    if os.environ.get("REPERTORY_RENEW"):
        GOLDEN.write_text(now, encoding="utf-8")
    published = GOLDEN.read_text(encoding="utf-8")
    changes = list(
        difflib.unified_diff(published.splitlines(), now.splitlines(), "published", "now", lineterm="", n=0)
    )
    if changes:
        pytest.fail(
            "Public signatures changed. If that is meant, say so in CHANGELOG.md and renew the list:\n"
            f"    {RENEW}\n\n" + "\n".join(changes),
            pytrace=False,
        )
