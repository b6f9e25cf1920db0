"""Definitions of phenotypes, rules on facts, cue words."""

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from actors.retriever.retriever import RetrieverActor
from methods.phenotyping_definition import Definition, read_definitions
from methods.phenotyping_rules import Fact, Rule, any_code, cue
from protocols.errors import BadInput
from protocols.retriever import Document, RetrieverConfig, RetrieverService, SnippetsRequest

SHIPPED = Path(__file__).parents[2] / "methods" / "definitions"
SMALL = "phenotype_id: x\nversion: 1\nname: X\ndescription: Has x.\n"


def written(folder: Path, **files: str) -> list[str]:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return [str(folder)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL, "one.yaml: expected at least one of terms, abbreviations and include"),
        (SMALL + "terms: [a]\nterm: [b]", "one.yaml: term: unknown field"),
        (SMALL + "terms: [' ']", "got an empty one"),
        (SMALL.replace("x\n", "'x y'\n", 1) + "terms: [a]", "one.yaml: phenotype_id: got 'x y'"),
        (SMALL + "terms: [a]\nrules: {any: []}", "one.yaml: rules.any: got"),
        (SMALL + "terms: [a]\nrules: {codes: [a], drugs: [b]}", "got codes and drugs, expected one of any"),
        (SMALL + "terms: [a]\nrules: {measurement: a}", "measurement goes with above or below"),
        (SMALL + "terms: [a]\nreduce: {by: median}", "one.yaml: reduce.by: got 'median'"),
        ("- a", "expected keys with values"),
        ("a: [", "one.yaml is not YAML"),
        (SMALL + "terms: [a]\nenabled: false", "at least one file of a phenotype that is enabled"),
    ],
)
def test_a_bad_definition_is_named_with_its_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        read_definitions(written(tmp_path, one=text))


def test_definitions_of_a_folder_are_sorted_and_differ(tmp_path: Path) -> None:
    other = SMALL.replace("phenotype_id: x", "phenotype_id: a")
    paths = written(tmp_path, one=SMALL + "terms: [t]", two=other + "terms: [t]")
    assert [one.phenotype_id for one in read_definitions(paths)] == ["a", "x"]
    with pytest.raises(BadInput, match=r"phenotype_id: 'x' is that of .*one.yaml too"):
        read_definitions(written(tmp_path, three=SMALL + "terms: [t]"))
    with pytest.raises(BadInput, match="cannot read"):
        read_definitions([str(tmp_path / "no.yaml")])


def test_the_digest_is_of_what_decides() -> None:
    one = Definition(phenotype_id="x", version="1", name="X", description="Has x.", terms=["t"])
    assert one.digest == one.model_copy(update={"approved_by": "someone"}).digest
    assert one.digest != one.model_copy(update={"terms": ["u"]}).digest


def test_terms_become_expressions() -> None:
    one = Definition(
        phenotype_id="x", version="1.0", name="X", description="d", terms=["deep vein (leg)"], abbreviations=["PH"],
        include=["a+b"], exclude_match=["c"],
    )  # fmt: skip
    found = one.pattern_set()
    assert [p.case_sensitive for p in found.include] == [False, True, False]
    assert found.include[0].expression == r"(?:^|[^\p{L}\p{M}\p{N}_])(deep[\s\p{Z}]+vein[\s\p{Z}]+\(leg\))"
    assert (found.include[2].expression, found.exclude[0].expression) == ("a+b", "c")


@pytest.mark.parametrize(
    ("term", "text", "found"),
    [
        ("a-fib", "An A-FIB.", ["A-FIB"]),
        ("a-fib", "ta-fib a-fibs xa-fib", []),
        ("épilepsie", "Une Épilepsie, épilepsies", ["Épilepsie"]),
        ("ödem", "xödem Ödem", ["Ödem"]),
        ("диабет", "диабет диабет", ["диабет", "диабет"]),
        ("deep vein thrombosis", "deep\u00a0vein\n thrombosis", ["deep\u00a0vein\n thrombosis"]),
        ("(leg)", "x(leg)y", ["(leg)"]),
    ],
)
async def test_terms_are_found_in_any_script(toys: Any, term: str, text: str, found: list[str]) -> None:
    one = Definition(phenotype_id="x", version="1", name="X", description="d", terms=[term])
    retriever = await toys.serve(RetrieverService, RetrieverActor(RetrieverConfig(kind="pattern")))
    request = SnippetsRequest(documents=[Document(id="d", text=text)], sets=[one.pattern_set()])
    told = (await retriever.snippets(request)).snippets
    assert [text[match.start : match.end] for snippet in told for match in snippet.matches] == found


def test_shipped_definitions_are_sound() -> None:
    found = read_definitions([str(SHIPPED)])
    assert [one.phenotype_id for one in found] == ["AF", "COPD", "DVT", "PH"]
    assert all(one.rules for one in found)


def fact(kind: str, code: str, day: str = "", value: float | None = None) -> Fact:
    return Fact.model_validate(
        {
            "patient_id": "p",
            "kind": kind,
            "code": code,
            "day": date.fromisoformat(day) if day else None,
            "value": value,
        }
    )


def test_rules_of_pulmonary_hypertension() -> None:
    (rules,) = (one.rules for one in read_definitions([str(SHIPPED / "PH.yaml")]))
    assert rules is not None
    near = [fact("code", "I27.20", "2020-01-01"), fact("code", "416.0", "2020-01-20")]
    assert not rules.holds(near)
    assert rules.holds([*near, fact("code", "i27.0", "2020-01-31")])
    assert rules.holds([near[0], fact("drug", "Sildenafil 20 mg")])
    assert not rules.holds([fact("drug", "Sildenafil 20 mg")])
    assert rules.holds([fact("measurement", "Mean pulmonary artery pressure", value=20.5)])
    assert not rules.holds([fact("measurement", "mean pulmonary artery pressure", value=20)])
    assert not rules.holds([])
    assert any_code(rules, near) and not any_code(rules, [fact("code", "I10")])
    assert Rule(measurement="a", above=1, below=3).holds([fact("measurement", "a", value=2)])
    assert not Rule(measurement="a", above=1, below=3).holds([fact("measurement", "a", value=3)])


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("The patient has [it].", "present"),
        ("No evidence of [it].", "negated"),
        ("She has no fever but has [it].", "present"),
        ("No fever. [it] is stable.", "present"),
        ("Denies pain, [it], and cough.", "negated"),
        ("His mother had [it].", "family"),
        ("Possible [it].", "possible"),
        ("Heparin for [it] prophylaxis.", "risk_or_prophylaxis"),
        ("Risks include infection and [it].", "risk_or_prophylaxis"),
        ("[it] was not seen. [it] is known.", "present"),
    ],
)
def test_cue_words(text: str, status: str) -> None:
    at = text.index("[it]")
    assert cue(text, at, at + 4) == status
