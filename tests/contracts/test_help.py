"""Asking for help loads no library that takes seconds."""

import json
import re
import subprocess
import sys

import pytest

from cluster.configure import describe
from cluster.run_directory import flatten
from methods.spell_config import Config
from tests.contracts.sources import ROOT

HEAVY = ("torch", "ray", "transformers", "peft", "matplotlib", "wandb", "sklearn", "scipy", "pandas")


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python, and say on standard error which heavy libraries it loaded."""
    check = f"import sys; print('loaded:', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    return subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], cwd=ROOT, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize(
    "code",
    [
        "import methods.spell",
        "import launch; launch.main(['spell', '--help'])",
        "import launch; launch.main(['methods'])",
        "import launch; launch.main(['lookahead', '--help'])",
        "import launch; launch.main(['--help'])",
        "import launch; launch.main(['spell', 'world=ledger', 'stps=3'])",
        "import cluster.cluster",
        "import protocols.policy, protocols.questioner, protocols.verifier",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert run(code).stderr.endswith("loaded: []\n")


def test_help_lists_every_key_with_type_default_and_meaning() -> None:
    shown = run("import launch; launch.main(['spell', '--help'])").stdout
    keys = list(describe(Config))
    assert len(keys) > 100
    for key, kind, default, meaning in keys:
        assert f"\n{key}  {kind}  = {default}\n    {meaning}\n" in shown
        assert kind and default and re.search(r"\w\w", meaning), key
    for key in ("documents", "model", "steps", "seed", "run", "runs_dir", "transport"):
        assert f"\n{key}  " in shown


def test_help_tells_the_defaults_that_a_run_has() -> None:
    shown = {key: default for key, _, default, _ in describe(Config)}
    values = flatten(Config(text={"documents": "x"}).model_dump(mode="json"))  # type: ignore[arg-type]
    for key in ("answer_sampling.max_tokens", "answer_sampling.top_p", "loss.temperature", "policy.threads"):
        assert json.loads(shown[key]) == values[key], key


def test_types_are_shown_as_a_reader_would_write_them() -> None:
    kinds = {kind for _, kind, _, _ in describe(Config)}
    assert not [kind for kind in kinds if re.search(r"<class|typing\.|protocols\.|methods\.|annotation=", kind)]
