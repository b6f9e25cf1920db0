"""The wards: what their notes say is drawn with the shares of the specification, and known for each note."""

from collections import Counter

import pytest

from actors.retriever.retriever import RetrieverActor
from cluster.configure import configure
from methods.phenotyping_config import Config, preset
from methods.phenotyping_source import ward_lessons
from methods.worlds import wards
from methods.worlds.wards import PHRASES, Patient, Told, WardsConfig, patients_of, stuffed, vocabulary
from protocols.errors import BadInput
from protocols.retriever import RetrieverConfig

DISEASE = "lantormigosis"
PATIENTS = list(patients_of(WardsConfig(patients=2000), DISEASE, seed=7))


def said(text: str, *, unseen: bool) -> set[str]:
    """Phrases of a text."""
    some = [phrase for both in PHRASES.values() for phrase in both[unseen]]
    return {phrase for phrase in some if phrase.format(d=DISEASE) in text}


def test_each_patient_is_drawn_by_the_number_alone() -> None:
    assert list(patients_of(WardsConfig(), DISEASE, 7, first=5, count=1)) == [PATIENTS[5]]
    assert [one.id for one in PATIENTS[:3]] == ["p0", "p1", "p2"]
    assert list(patients_of(WardsConfig(), DISEASE, 8, first=5, count=1)) != [PATIENTS[5]]


def test_shares_are_those_of_the_specification() -> None:
    apart = list(patients_of(WardsConfig(patients=2000, copied=0.0), DISEASE, seed=7))
    shares = {}
    for ill in (True, False):
        notes = [note.said for one in apart if one.ill == ill for note in one.notes]
        shares[ill] = {kind: count / len(notes) for kind, count in Counter(notes).items()}
    assert shares[True] == pytest.approx({"assert": 0.45, "deny": 0.05, "question": 0.05, None: 0.45}, abs=0.03)
    assert shares[False] == pytest.approx({"deny": 0.1, "family": 0.04, "question": 0.06, None: 0.8}, abs=0.02)
    ill = [one for one in PATIENTS if one.ill]
    healthy = [one for one in PATIENTS if not one.ill]
    assert len(ill) / 2000 == pytest.approx(0.2, abs=0.03)
    assert sum(len(one.notes) for one in PATIENTS) / 2000 == pytest.approx(7, abs=0.2)
    assert min(len(one.notes) for one in PATIENTS) == 1
    coded = [
        [sum(getattr(one, what) for one in some) / len(some) for what in ("code", "drug")] for some in (ill, healthy)
    ]
    assert coded[0] == pytest.approx([0.62, 0.45], abs=0.06)
    assert coded[1] == pytest.approx([0.07, 0.05], abs=0.02)


def test_notes_name_the_disease_if_and_only_if_they_say_something() -> None:
    notes = [note for one in PATIENTS for note in one.notes]
    assert all((note.said is not None) == (DISEASE in note.text) for note in notes)
    for note in notes[:3000]:
        if note.said is not None:
            seen, held_back = PHRASES[note.said]
            assert any(phrase.format(d=DISEASE) in note.text for phrase in [*seen, *held_back])
            assert note.text.count(DISEASE) == 1
            above = [line for line in note.text.partition(DISEASE)[0].splitlines() if line in wards.SECTIONS]
            assert (above[-1] == "FAMILY:") == (note.said == "family")


def test_copies_are_the_note_before() -> None:
    pairs = [pair for one in PATIENTS for pair in zip(one.notes, one.notes[1:], strict=False)]
    copies = [pair for pair in pairs if pair[0].text == pair[1].text]
    assert all(earlier.said == later.said for earlier, later in copies)
    # All notes but those with news, which are as many as without copies.
    news = sum(later.said is not None for _, later in pairs) - sum(later.said is not None for _, later in copies)
    assert len(copies) / (len(pairs) - news) == pytest.approx(0.35, abs=0.02)
    none = patients_of(WardsConfig(patients=200, copied=0.0, filler=20), DISEASE, seed=7)
    assert all(len({note.text for note in one.notes}) == len(one.notes) for one in none)


def test_phrases_that_are_held_back_are_not_learnt_from() -> None:
    taught = patients_of(WardsConfig(patients=1000, prevalence=0.5), DISEASE, seed=7, unseen=False)
    texts = [note.text for one in taught for note in one.notes]
    learnt = set().union(*(said(text, unseen=False) for text in texts))
    assert learnt == {phrase for seen, _ in PHRASES.values() for phrase in seen}
    # The end of "known {d} since childhood ." is another one of the phrases, not the other way round.
    assert not any(said(text, unseen=True) for text in texts)
    heard = set().union(*(said(note.text, unseen=True) for one in PATIENTS for note in one.notes))
    assert heard == {phrase for _, held_back in PHRASES.values() for phrase in held_back}


def test_the_vocabulary_has_all_words_of_the_notes_with_the_disease_masked() -> None:
    words = set(vocabulary())
    assert len(words) == len(vocabulary())
    for one in PATIENTS[:500]:
        for note in one.notes:
            assert set(note.text.replace(DISEASE, "[it]").split()) <= words


def test_stuffed_notes_are_the_oldest_until_the_context_is_full() -> None:
    def told(number: int, text: str) -> Told:
        return Told("p", f"p-{number}", f"2020-01-0{number + 1}", "clinic", text, None)

    patient = Patient(
        "p",
        True,
        [told(0, "PLAN:\nwalks ."), told(1, f"PLAN:\nknown {DISEASE} since ."), told(2, "no")],
        False,
        False,
    )
    (whole,) = stuffed(patient, DISEASE, 100).notes
    assert whole.text == f"PLAN:\nwalks .\nPLAN:\nknown {DISEASE} since .\nno"
    assert (whole.said, whole.note_id, whole.date) == ("assert", "p-0", "2020-01-03")
    (cut,) = stuffed(patient, DISEASE, wards.FRAME + 6).notes
    assert cut.text == f"PLAN:\nwalks .\nPLAN:\nknown {DISEASE}"
    (short,) = stuffed(patient, DISEASE, wards.FRAME + 5).notes
    assert (short.text, short.said) == ("PLAN:\nwalks .\nPLAN:\nknown", None)


async def lessons(*words: str) -> list[tuple[str, str]]:
    """Of a run with such settings."""
    given = ["world=wards", "wards.lessons=60", "seed=3", *words]
    retriever = RetrieverActor(RetrieverConfig(kind="pattern"))
    try:
        return await ward_lessons(configure(Config, given, None, preset), retriever)
    finally:
        await retriever.close()


async def test_lessons_are_cut_and_written_as_the_runs_own() -> None:
    whole = await lessons()
    assert len(whole) == 60 and {answer for _, answer in whole} <= {"yes", "no", "uncertain"}
    assert all(prompt.count("[it]") == 1 and wards.TAUGHT not in prompt for prompt, _ in whole)
    assert all(prompt.split()[1] in ("HISTORY", "FAMILY", "PLAN") for prompt, _ in whole)
    narrow = await lessons("window.characters=10", "window.snap=0", "evidence.letters=1", "prompt.section=false")
    assert [answer for _, answer in narrow] == [answer for _, answer in whole]
    assert all(prompt.startswith("[SECTION]  [TEXT]") for prompt, _ in narrow)
    assert all(len(prompt.partition("[it]")[2]) <= 10 for prompt, _ in narrow)
    none = await lessons("window.characters=0", "window.snap=0", "evidence.letters=1", "wards.lessons=30")
    assert {prompt.partition("[TEXT]")[2] for prompt, _ in none} == {" [it]"}


async def test_lessons_without_a_snippet_are_refused() -> None:
    with pytest.raises(BadInput, match=r"window: no snippet has evidence.letters=20 letters"):
        await lessons("window.characters=0", "window.snap=0")


async def test_stuffed_lessons_hold_several_mentions_and_the_truth() -> None:
    wide = ["window.characters=100000", "window.max_characters=100000", "prompt.section=false"]
    found = await lessons("wards.stuffed=taught", "wards.context=512", *wide)
    assert {answer for _, answer in found} >= {"yes", "no"}
    assert max(prompt.count("[it]") for prompt, _ in found) > 3
    assert all(len(prompt.split()) <= 512 - 2 for prompt, _ in found)
    assert any(prompt.count("HISTORY:") > 5 for prompt, _ in found)
