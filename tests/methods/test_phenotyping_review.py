"""The review page: which decisions are on it, what it is told of them, and what becomes of verdicts."""

import csv
import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from methods.phenotyping_decide import Decided
from methods.phenotyping_definition import Definition
from methods.phenotyping_review import FLAGGED, OTHER, TEMPLATE, ReviewSample, write_review
from tests.methods.phenotyping_toys import Run, note, reader, runner, ward

VX = Definition(phenotype_id="vx", version="2", name="VX fever", description="VX.", terms=["VX"])
KO = VX.model_copy(update={"phenotype_id": "ko", "name": "Ko"})
SAYS = ("yes", "uncertain", "failed", "no", "no_evidence")


def decision(patient: str, said: str, phenotype: str = "vx") -> Decided:
    return Decided(
        patient_id=patient, phenotype_id=phenotype, version="2", definition="d", decision=said, score=0.9,
        reducer="max", n_notes=1, n_found=1, n_groups=1, n_sent=1, evidence=[], model="m", prompt="p", run="r",
    )  # type: ignore[arg-type]  # fmt: skip


def chosen(found: list[Decided], flagged: int, others: int, seed: int = 0) -> list[dict[str, Any]]:
    sample = ReviewSample(seed, {FLAGGED: flagged, OTHER: others})
    for one in found:
        sample.add(one)
        assert all(len(heap) <= max(flagged, others) for heap in sample.kept.values())
    return sample.rows()


def page_data(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    return dict(json.loads(text))


FOUND = [decision(f"p{i}", SAYS[i % 5], "vx" if i % 3 else "ko") for i in range(600)]


@pytest.mark.parametrize(("flagged", "others"), [(20, 7), (1, 0), (0, 3), (1000, 1000)])
def test_the_smallest_hashes_of_each_stratum_are_shown(flagged: int, others: int) -> None:
    def rank(one: Decided) -> bytes:
        return hashlib.sha256(json.dumps([3, one.patient_id, one.phenotype_id]).encode()).digest()[:16]

    expected = {}
    for phenotype in ("vx", "ko"):
        own = [one for one in FOUND if one.phenotype_id == phenotype]
        plain = [one for one in own if one.decision in ("no", "no_evidence")]
        for stratum, some, most in (
            (FLAGGED, [one for one in own if one not in plain], flagged),
            (OTHER, plain, others),
        ):
            for one in sorted(some, key=rank)[:most]:
                expected[one.patient_id, phenotype] = (stratum, len(some), one.decision)
    rows = chosen(FOUND, flagged, others, seed=3)
    shown = {(r["patient_id"], r["phenotype_id"]): (r["sampled"], r["of"], r["decision"]) for r in rows}
    assert shown == expected and len(rows) == len(shown)
    shuffled = random.Random(1).sample(FOUND, len(FOUND))
    assert chosen(shuffled, flagged, others, seed=3) == rows
    assert chosen(FOUND, flagged, others, seed=4) != rows


def test_the_place_on_the_page_tells_nothing() -> None:
    # 40 of 400 and 40 of 1,600, drawn with other chances, are mixed all the same.
    found = [decision(f"p{i}", "yes" if i % 5 == 0 else "no") for i in range(2000)]
    first = Counter(row["sampled"] for row in chosen(found, 40, 40)[:40])
    assert 10 <= first[OTHER] <= 30


def test_the_page_says_whether_recall_can_be_read(tmp_path: Path) -> None:
    for others in (0, 5):
        sample = ReviewSample(0, {FLAGGED: 5, OTHER: others})
        for one in FOUND:
            sample.add(one)
        assert write_review(tmp_path / "review.html", sample, [VX, KO]) == 2 * (5 + others)
        head = (tmp_path / "review.html").read_text().split('id="export"')[1].split("</header>")[0]
        assert ("precision can be read from them, recall cannot" in head) is (others == 0)
        assert ("precision and recall can be read from them" in head) is (others > 0)
        data = page_data(tmp_path / "review.html")
        assert data["rows"] == sample.rows() and data["definitions"]["ko"]["name"] == "Ko"


def test_the_page_exports_stratum_and_size_and_keeps_verdicts_apart() -> None:
    page = TEMPLATE.read_text(encoding="utf-8")
    assert '"patient_id,phenotype,label,sampled,of,verdict,decision,definition"' in page
    assert "label(row), row.sampled, row.of, verdicts[keyOf(row)]" in page
    assert "[row.patient_id, row.phenotype_id, row.run, row.definition, row.model]" in page
    # What agree stands for; where the decision says neither, the reviewer is asked for the patient's state.
    assert 'const SAID = { yes: "1", no: "0", no_evidence: "0" };' in page
    assert 'const ILL = { "has it": "1", "does not have it": "0" };' in page
    assert "Judge by the chart, or leave it unclear." in page


@pytest.fixture
def run(tmp_path: Path, toys: Any) -> Run:
    return runner(tmp_path, lambda: reader(toys))


async def test_labels_from_the_page_stand_for_all_decisions(run: Run, tmp_path: Path) -> None:
    notes = [*ward(40), *(note(f"q{i}", 0, "Nothing of note was found today.") for i in range(30))]
    done = await run("first", notes, "review=5", "review_others=8")
    rows = page_data(done.folder / "review.html")["rows"]
    of = Counter(
        (one["phenotype_id"], OTHER if one["decision"] in ("no", "no_evidence") else FLAGGED)
        for one in done.decisions.values()
    )
    assert {(r["phenotype_id"], r["sampled"]): r["of"] for r in rows} == of
    shown = Counter((r["phenotype_id"], r["sampled"]) for r in rows)
    assert shown == {key: min(size, 5 if key[1] == FLAGGED else 8) for key, size in of.items()}
    with open(tmp_path / "labels.csv", "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["patient_id", "phenotype", "label", "sampled", "of"])
        for i, row in enumerate(rows):
            table.writerow([row["patient_id"], row["phenotype_id"], i % 3 % 2, row["sampled"], row["of"]])
    again = await run("second", tmp_path / "first-notes.jsonl", f"labels={tmp_path / 'labels.csv'}")
    found = json.loads((again.folder / "evaluation.json").read_text())
    assert [one["phenotype_id"] for one in found] == ["kolo", "velto"]
    for one in found:
        for measured in one["measured"]:
            total = sum(measured[name] for name in ("tp", "fp", "fn", "tn"))
            assert total == pytest.approx(sum(size for key, size in of.items() if key[0] == one["phenotype_id"]))


async def test_an_empty_page_shows_no_text_of_anybody(run: Run) -> None:
    done = await run("none", ward(12), "review=0")
    assert page_data(done.folder / "review.html")["rows"] == []
