"""Labelled mentions, from which a small policy learns to read snippets."""

from pathlib import Path
from typing import Any

import pytest

from actors.retriever.retriever import RetrieverActor
from cluster.cluster import Cluster
from cluster.config import MethodConfig
from methods.phenotyping_definition import Definition
from methods.phenotyping_mentions import AROUND, Mention, invented, mention_base, read_mentions, unrelated
from methods.phenotyping_prompts import PromptConfig
from protocols.errors import BadInput
from protocols.policy import PolicyConfig
from protocols.retriever import RetrieverConfig, RetrieverService

HEAD = "report_no\torder\tconcept\tsentence\tnegation\ttemporality\texperiencer\n"


def written(folder: Path, *rows: str, head: str = HEAD) -> list[str]:
    (folder / "m.tsv").write_text(head + "".join(f"1\t0\t{row}\n" for row in rows))
    return [str(folder / "m.tsv")]


def test_what_a_mention_says(tmp_path: Path) -> None:
    found = read_mentions(
        written(
            tmp_path,
            "gout\tShe has  GOUT.\tAffirmed\tRecent\tPatient",
            "gout\tHad GOUT once.\tAffirmed\tHistorical\tPatient",
            "gout\tNo GOUT.\tNegated\tRecent\tPatient",
            "gout\tIf GOUT comes.\tAffirmed\tNot particular\tPatient",
            "gout\tFather: GOUT.\tAffirmed\tRecent\tOther",
            "gout\tnothing of it\tAffirmed\tRecent\tPatient",
            f"gout\t{'x' * 300} GOUT {'y' * 300}\tAffirmed\tRecent\tPatient",
        )
    )
    assert [(one.text, one.answer) for one in found[:5]] == [
        ("She has [it].", "yes"),
        ("Had [it] once.", "yes"),
        ("No [it].", "no"),
        ("If [it] comes.", "no"),
        ("Father: [it].", "no"),
    ]
    assert len(found) == 6 and len(found[5].text) == 2 * AROUND + len("[it]")


@pytest.mark.parametrize(
    ("row", "head", "message"),
    [
        ("gout\tGOUT\tMaybe\tRecent\tPatient", HEAD, "m.tsv:2: negation: got 'Maybe'"),
        ("gout\tGOUT\tAffirmed\tSoon\tPatient", HEAD, "m.tsv:2: temporality: got 'Soon'"),
        ("gout\tGOUT\tAffirmed\tRecent\tPatient", HEAD.replace("concept", "term"), "has no column concept"),
        ("gout\tnothing\tAffirmed\tRecent\tPatient", HEAD, "none whose concept is in its sentence"),
    ],
)
def test_bad_mentions_are_named(tmp_path: Path, row: str, head: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_mentions(written(tmp_path, row, head=head))
    with pytest.raises(BadInput, match="cannot read"):
        read_mentions([str(tmp_path / "no.tsv")])


async def test_mentions_of_the_diseases_are_left_out(toys: Any) -> None:
    retriever = await toys.serve(RetrieverService, RetrieverActor(RetrieverConfig(kind="pattern")))
    disease = Definition(phenotype_id="g", version="1", name="Gout", description="Has gout.", terms=["gout"])
    mentions = [
        Mention("Has [it].", "yes", "Has GOUT."),
        Mention("Gout and [it].", "yes", "Gout and ASTHMA."),
        Mention("Has [it].", "yes", "Has ASTHMA."),
    ]
    assert await unrelated(mentions, retriever, [disease]) == mentions[2:]
    assert {one.answer for one in invented()} == {"yes", "no", "uncertain"}


@pytest.mark.parametrize("steps", [1, 3])
async def test_a_policy_may_be_taught_for_few_steps(tmp_path: Path, steps: int) -> None:
    mentions = [Mention("Has [it].", "yes", "Has ASTHMA."), Mention("No [it].", "no", "No ASTHMA.")]
    config = MethodConfig(runs_dir=str(tmp_path), wandb="disabled")
    async with Cluster(config, method="phenotyping", run="one") as company:
        folder = await mention_base(company, PolicyConfig(threads=1), mentions, PromptConfig().labels, steps, 1e-3)
    assert (Path(folder) / "model.safetensors").is_file()
