"""What is asked about a patient: copies, filters, the cap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from methods.phenotyping_definition import Definition
from methods.phenotyping_evidence import (
    EvidenceConfig,
    capped,
    current,
    evidence_of,
    jaccard,
    normalised,
    trigrams,
)
from methods.phenotyping_scan import Finding, Scanned, apart

DISEASE = Definition(
    phenotype_id="velto",
    version="1",
    name="Veltosis",
    description="The patient has veltosis.",
    terms=["veltosis"],
)
EVERY = "the patient was seen for veltosis and will come back to the clinic every {} months"


def note(name: str, *texts: str, day: str = "", section: str = "", **more: object) -> Scanned:
    findings = [
        Finding(set="velto", start=0, end=len(text), text=text, matches=[(0, 1)], section=section) for text in texts
    ]
    values = {"patient_id": "p", "note_id": name, "date": day, "digest": name, "findings": findings} | more
    return Scanned.model_validate(values)


def texts(found: object) -> list[str]:
    return [group.finding.text for group in found]  # type: ignore[attr-defined]


def test_near_copies_of_the_specification() -> None:
    told = "seen for veltosis and told to come back to the clinic every {} months"
    one, other = told.format("three"), told.format("six")
    assert len(one.split()) == len(other.split()) == 14
    a, b = trigrams(normalised(one)), trigrams(normalised(other))
    assert (len(a), len(b), len(a & b), len(a | b)) == (12, 12, 10, 14)
    assert round(jaccard(a, b), 3) == 0.714
    assert len(evidence_of([note("1", one), note("2", other)], DISEASE, EvidenceConfig()).groups) == 2


def test_copies_are_one_group_with_the_earliest_first() -> None:
    text = EVERY.format("three")
    notes = [note("b", f"{text.upper()}.", day="2020-02-01"), note("a", text, day="2020-01-01")]
    found = evidence_of(notes, DISEASE, EvidenceConfig())
    (group,) = found.groups
    assert (group.note.note_id, [other.note_id for other, _ in group.also_in]) == ("a", ["b"])
    assert (found.found, group.days_before) == (2, 31)
    apart = evidence_of([note("a", text), note("b", text)], DISEASE, EvidenceConfig(jaccard=2.0))
    assert len(apart.groups) == 2


def test_replaced_and_repeated_notes_are_left_out_and_different_texts_kept() -> None:
    notes = [
        note("a", digest="1"),
        note("a", digest="1"),
        note("a", digest="2"),
        note("b", digest="3"),
        note("c", digest="4", replaces=["b"]),
    ]
    kept, flagged = current(notes)
    assert [(one.note_id, one.digest) for one in kept] == [("a", "1"), ("a", "2"), ("c", "4")]
    assert flagged == {"a"}


def test_filters_say_why() -> None:
    rule = DISEASE.model_copy(
        update={"lookback_days": 30, "note_types": ["clinic"], "skip_sections": ["ALLERG"], "skip_family": True}
    )
    long = EVERY.format("three")
    notes = [
        note("old", long, day="2019-01-01", note_type="clinic"),
        note("type", long, day="2020-01-01", note_type="lab"),
        note("section", long, day="2020-01-01", note_type="clinic", section="Allergies"),
        note("family", long, day="2020-01-01", note_type="clinic", section="FAMILY HISTORY"),
        note("short", "veltosis 12345678901234567890", day="2020-01-02", note_type="clinic"),
        note("undated", long, note_type="clinic"),
    ]
    found = evidence_of(notes, rule, EvidenceConfig())
    assert [group.note.note_id for group in found.groups] == ["undated"]
    assert found.dropped == {"before the lookback": 1, "note type": 1, "section": 2, "too short": 1}
    assert found.found == 6


def test_the_cap_takes_one_of_each_note_first_and_the_latest() -> None:
    def different(i: int) -> str:
        return " ".join(f"word{i}{letter}" for letter in "abcdefgh")

    notes = [note("a", *map(different, range(3)), day="2020-01-03"), note("b", different(5), day="2020-01-01")]
    found = evidence_of(notes, DISEASE, EvidenceConfig(most=3))
    assert texts(found.groups) == [different(5), different(1), different(2)]
    assert found.dropped == {"beyond the cap": 1} and found.different == 4
    assert texts(capped(found.groups, 1)) == [different(2)]


words = st.lists(st.sampled_from(["was", "seen", "and", "not", "found", "in", "this", "test"]), max_size=12)


@given(st.lists(st.tuples(words, st.sampled_from(["2020-01-01", "2020-02-01", ""])), max_size=8), st.randoms())
def test_the_order_of_notes_does_not_matter(rows: list[tuple[list[str], str]], rng: object) -> None:
    notes = [
        note(f"{i}", " ".join(text) + " in a patient with veltosis", day=day) for i, (text, day) in enumerate(rows)
    ]
    found = evidence_of(notes, DISEASE, EvidenceConfig(most=3))
    rng.shuffle(notes)  # type: ignore[attr-defined]
    assert evidence_of(notes, DISEASE, EvidenceConfig(most=3)) == found
    in_groups = sum(1 + len(group.also_in) for group in found.groups)
    assert in_groups + found.dropped.get("beyond the cap", 0) == found.found == len(notes)
    assert found.different >= len(found.groups)


def test_matches_of_several_patterns_are_one_where_they_overlap() -> None:
    assert apart([(5, 9), (0, 4), (5, 9), (7, 12), (12, 14)]) == [(0, 4), (5, 12), (12, 14)]


def test_the_same_words_under_another_header_are_no_copy() -> None:
    text = EVERY.format("three")
    notes = [
        note("a", text, section="HISTORY"),
        note("b", text, section="FAMILY"),
        note("c", text, section="history"),
    ]
    groups = evidence_of(notes, DISEASE, EvidenceConfig()).groups
    assert [(group.note.note_id, len(group.also_in)) for group in groups] == [("a", 1), ("b", 0)]
    unknown = evidence_of([note("a", text), note("b", text, section="FAMILY")], DISEASE, EvidenceConfig()).groups
    assert [(group.note.note_id, len(group.also_in)) for group in unknown] == [("a", 1)]


def test_the_least_number_of_letters_is_a_setting() -> None:
    found = evidence_of([note("a", "Has velto 123456789.")], DISEASE, EvidenceConfig(letters=8))
    assert len(found.groups) == 1
    assert evidence_of([note("a", "Has velto 12.")], DISEASE, EvidenceConfig(letters=9)).dropped == {"too short": 1}


def test_copies_beyond_the_cap_count_as_snippets() -> None:
    old, new = EVERY.format("three"), "quite another text about veltosis that was seen in the ward today"
    notes = [note("a", old, day="2020-01-01"), note("b", old, day="2020-01-02"), note("c", new, day="2020-01-03")]
    found = evidence_of(notes, DISEASE, EvidenceConfig(most=1))
    assert texts(found.groups) == [new]
    assert (found.dropped, found.different, found.found) == ({"beyond the cap": 2}, 2, 3)


def test_of_equal_notes_the_earliest_stays_in_any_order() -> None:
    notes = [note("a", digest="1", day="2020-02-01"), note("a", digest="1", day="2020-01-01")]
    assert [one.date for one in current(notes)[0]] == ["2020-01-01"]
    assert current(notes) == current(notes[::-1])


@pytest.mark.parametrize("wrong", [{"most": 0}, {"letters": -1}, {"jaccard": 0}, {"jaccard": -0.5}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        EvidenceConfig.model_validate(wrong)


def test_one_word_in_a_long_snippet_tells_statements_apart() -> None:
    long = " ".join(f"word{i}" for i in range(70))
    told = f"{long}. Duplex {{}} veltosis in the vein{{}}. {long}"
    texts = [
        told.format("shows", ""),
        told.format("shows no", ""),
        told.format("shows", " (-)"),
        told.format("shows", ","),
    ]
    matches = [[(text.index("veltosis"), text.index("veltosis") + 8)] for text in texts]
    notes = [
        Scanned(
            patient_id="p", note_id=f"{i}", digest=f"{i}",
            findings=[Finding(set="velto", start=0, end=len(text), text=text, matches=found)],
        )
        for i, (text, found) in enumerate(zip(texts, matches, strict=True))
    ]  # fmt: skip
    assert jaccard(*(trigrams(normalised(text)) for text in texts[:2])) > 0.9
    groups = evidence_of(notes, DISEASE, EvidenceConfig()).groups
    assert [(group.note.note_id, [one.note_id for one, _ in group.also_in]) for group in groups] == [
        ("0", ["3"]),
        ("1", []),
        ("2", []),
    ]
