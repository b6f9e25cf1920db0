"""Snippets: exact windows, what holds of any text, and patterns that would take for ever elsewhere."""

import re
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.retriever import pattern
from actors.retriever.pattern import SHARED, Searcher, spans
from actors.retriever.snippets import snippets
from actors.retriever.windows import Edges, cut, windows
from protocols.errors import BadInput
from protocols.retriever import (
    Document,
    IndexRequest,
    Match,
    Pattern,
    PatternSet,
    SearchRequest,
    Snippet,
    SnippetsRequest,
    Window,
)
from protocols.service import Empty, Message
from tests.actors.retriever.conftest import Starter

PLAIN = Window(characters=0, snap=0, max_characters=10**6)


def patterns(*expressions: str) -> list[Pattern]:
    return [Pattern(expression=one) for one in expressions]


def looked_for(*include: str, exclude: Sequence[str] = (), name: str = "set") -> PatternSet:
    return PatternSet(id=name, include=patterns(*include), exclude=patterns(*exclude))


def found(text: str, *include: str, exclude: Sequence[str] = (), window: Window = PLAIN) -> list[Snippet]:
    sets = [looked_for(*include, exclude=exclude)]
    return snippets(SnippetsRequest(documents=[Document(id="d", text=text)], sets=sets, window=window))


def spans_of(matches: Sequence[tuple[int, int]], n: int, window: Window) -> list[tuple[int, int]]:
    given = [Match(start=start, end=end, pattern=0) for start, end in matches]
    return [span for span, _ in windows(Edges("x" * n), given, window)]


def texts(found: Sequence[Snippet]) -> list[str]:
    return [one.text for one in found]


def test_windows_that_overlap_are_one() -> None:
    window = Window(characters=100, snap=0)
    assert spans_of([(120, 132), (180, 192), (900, 912)], 1000, window) == [(20, 292), (800, 1000)]


def test_windows_that_touch_are_one_and_others_are_not() -> None:
    window = Window(characters=10, snap=0)
    assert spans_of([(20, 22), (42, 44)], 100, window) == [(10, 54)]
    assert spans_of([(20, 22), (43, 45)], 100, window) == [(10, 32), (33, 55)]


def test_edges_move_out_to_ends_of_sentences_and_lines() -> None:
    text = "One two. Three four HIT five six. Seven\r\neight HIT nine"
    narrow = Window(characters=2, snap=40)
    assert texts(found(text, "HIT", window=narrow)) == ["Three four HIT five six.", "eight HIT nine"]
    assert texts(found(text, "HIT", window=Window(characters=2, snap=7))) == ["r HIT f", "eight HIT nine"]
    commas = "PLAN:  ,The knee is sore.,2. A HIT is near.,DOPPLER,1. None"
    assert texts(found(commas, "HIT", window=narrow)) == ["A HIT is near."]


def test_a_long_span_is_cut_between_matches() -> None:
    span, at = (0, 100), [Match(start=i, end=i + 10, pattern=0) for i in (10, 30, 70)]
    assert cut(span, at, 100) == [(span, at)]
    assert cut(span, at, 60) == [((0, 55), at[:2]), ((55, 100), at[2:])]
    assert cut(span, at, 5) == [((10, 20), at[:1]), ((30, 40), at[1:2]), ((70, 80), at[2:])]
    # Those that overlap stay together, whatever their length.
    over = [Match(start=0, end=30, pattern=0), Match(start=20, end=50, pattern=1)]
    assert cut((0, 60), over, 40) == [((0, 50), over)]


def test_a_match_that_overlaps_an_excluded_one_does_not_count() -> None:
    text = "copd. family history of copd. denies copd"
    (one,) = found(text, r"\bcopd\b", exclude=[r"family history of copd", r"denies \w+"])
    assert (one.start, one.end, one.text) == (0, 4, "copd")
    # Touching is not overlapping.
    assert texts(found("abc", "b", exclude=["a", "c"])) == ["b"]


def test_a_group_is_the_match_and_the_rest_is_context() -> None:
    assert [one.start for one in found("copd copd xcopd copd", r"(?:^|\s)(copd)(?:\s|$)")] == [0, 5, 16]
    assert texts(found("no copd, emphysema", r"no copd|(emphysema)")) == ["emphysema"]


def test_case_counts_where_it_is_asked_for() -> None:
    sets = [PatternSet(id="s", include=[Pattern(expression="RA", case_sensitive=True), *patterns("ÉTAT")])]
    request = SnippetsRequest(documents=[Document(id="d", text="RA ra état")], sets=sets, window=PLAIN)
    assert texts(snippets(request)) == ["RA", "état"]


@pytest.mark.parametrize(
    ("text", "section"),
    [
        ("PLAN:\nHIT", "PLAN"),
        ("PLAN: x\nPAST MEDICAL HISTORY: a HIT", "PAST MEDICAL HISTORY"),
        ("Family History: none\nand HIT", "Family History"),
        ("ASSESSMENT\nHIT", "ASSESSMENT"),
        ("PLAN:,1.  Sore knee.,2.  HIT.", "PLAN"),
        ("PLAN: ,1. Sore.,2. moderately restricted.,2. Mild x.,DOPPLER,1. There is HIT", "DOPPLER"),
        ("LABORATORY:,  PSA 32.1,PROCEDURES:,  A HIT", "PROCEDURES"),
        ("PMH:  ,COPD, HIT,CABG,HTN", "PMH"),
        ("HISTORY: arrest, COPD, HIT", "HISTORY"),
        ("HIT\nPLAN: none", ""),
        ("He said: HIT", ""),
    ],
)
def test_the_header_of_the_section_is_told(text: str, section: str) -> None:
    assert {one.section for one in found(text, "HIT")} == {section}


def test_documents_sets_and_places_are_in_order() -> None:
    documents = [Document(id=name, text="b a b") for name in ("2", "1")]
    sets = [looked_for("b", name="y"), looked_for("a", "b", name="x")]
    told = snippets(SnippetsRequest(documents=documents, sets=sets, window=PLAIN))
    assert [(one.document, one.set, one.start) for one in told[:5]] == [
        ("2", "y", 0), ("2", "y", 4), ("2", "x", 0), ("2", "x", 2), ("2", "x", 4),
    ]  # fmt: skip
    assert [one.document for one in told[5:]] == ["1"] * 5
    assert [match.pattern for one in told[2:5] for match in one.matches] == [1, 0, 1]


PIECES = st.sampled_from(
    ["a", "b", "ab", "é", "😀", "e\u0301", "\r\n", "\0", "\ud800", ". ", ".,", "PLAN:", " ", "ß"]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=60).map("".join), st.text(max_size=60))
OWN = {
    r"\s+": r"[\t\n\f\r ]+",
    r"\bab?": r"(?<![0-9A-Za-z_])ab?",
    "[[:^ascii:]]": r"[^\0-\x7f]",
}
"""Expressions that count only ASCII among spaces and words, and what Python writes for them."""
EXPRESSIONS = st.sampled_from(["a", "b+", "ab", "é", "[^a]b", ".b.", "😀", r"\0", "(a)b", r"\?", *OWN])
SETS = st.builds(
    lambda include, exclude: looked_for(*include, exclude=exclude),
    st.lists(EXPRESSIONS, min_size=1, max_size=4),
    st.lists(EXPRESSIONS, max_size=2),
)
WINDOWS = st.builds(
    Window,
    characters=st.integers(0, 12),
    snap=st.integers(0, 8),
    max_characters=st.integers(1, 40),
)


@given(TEXTS, SETS, WINDOWS)
def test_what_holds_of_any_text(text: str, one: PatternSet, window: Window) -> None:
    told = snippets(SnippetsRequest(documents=[Document(id="d", text=text)], sets=[one], window=window))
    for snippet in told:
        assert text[snippet.start : snippet.end] == snippet.text
        assert all(snippet.start <= match.start < match.end <= snippet.end for match in snippet.matches)
    for left, right in pairwise(told):
        assert left.end <= right.start
    # The same by the library on its own, over text instead of bytes.
    counted = Searcher([one]).found(text).get(0, [])
    assert [match for snippet in told for match in snippet.matches] == counted
    assert [(m.start, m.end, m.pattern) for m in counted] == plainly(text, one)


def plainly(text: str, one: PatternSet) -> list[tuple[int, int, int]]:
    """Every match that counts, by Python's own expressions, for those that mean the same there."""

    def places(expression: str) -> list[tuple[int, int]]:
        regex = re.compile(OWN.get(expression, expression), re.IGNORECASE)
        group, at, spans = min(regex.groups, 1), 0, []
        while match := regex.search(readable, at):
            spans.append(match.span(group))
            at = match.end(group)
        return spans

    readable = "".join("?" if 0xD800 <= ord(letter) < 0xE000 else letter for letter in text)
    barred = [span for each in one.exclude for span in places(each.expression)]
    every = [(*span, i) for i, each in enumerate(one.include) for span in places(each.expression)]
    return sorted(m for m in every if not any(start < m[1] and m[0] < end for start, end in barred))


@given(st.lists(TEXTS, min_size=1, max_size=5), st.randoms())
def test_documents_in_another_order_give_the_same_in_that_order(given: list[str], random: Random) -> None:
    documents = [Document(id=str(i), text=text) for i, text in enumerate(given)]
    sets = [looked_for("a", "é"), looked_for("b", name="other")]

    def told(order: Sequence[Document]) -> list[Snippet]:
        return snippets(SnippetsRequest(documents=list(order), sets=sets))

    shuffled = list(documents)
    random.shuffle(shuffled)
    by_document = {one.id: [s for s in told(documents) if s.document == one.id] for one in documents}
    assert told(shuffled) == [snippet for one in shuffled for snippet in by_document[one.id]]


def test_expressions_that_explode_elsewhere_end_here() -> None:
    text = "a" * 50_000 + "b"
    assert found(text, "(a+)+$", "(a|aa)+c") == []
    assert found(text, "(?:x+x+)+y|b")[0].start == 50_000


def test_context_that_reaches_to_the_end_is_not_read_for_each_match() -> None:
    told = found("ab" * 20_000, "(a).*")
    assert [one.start for one in told] == [0, *range(40_000 - SHARED, 40_000, 2)]


def test_a_document_of_five_megabytes() -> None:
    filler = "Die Füße sind warm. The knee is not swollen. "
    text = filler * 60_000 + "COPD 😀 " + filler * 60_000
    (one,) = found(text, r"\bcopd\b", window=Window(characters=10, snap=0))
    start = len(filler) * 60_000
    assert one.matches == [Match(start=start, end=start + 4, pattern=0)]
    assert one.text == " swollen. COPD 😀 Die Füß"


REFUSED = {
    "a*": "matches the empty string",
    r"\b": "matches the empty string",
    "(?m)^": "matches the empty string",
    "a|": "matches the empty string",
    "(a": "missing )",
    "a(?=b)": "invalid perl operator: (?=",
    r"(a)\1": r"invalid escape sequence: \1",
    r"\pL{1000}": "pattern too large",
    "((a{100}){100}){100}": "invalid repetition size",
}


@pytest.mark.parametrize(("expression", "reason"), REFUSED.items())
async def test_patterns_that_are_refused(started: Starter, expression: str, reason: str) -> None:
    retriever = await started(kind="pattern")
    one = PatternSet(id="lungs", include=patterns("copd"), exclude=patterns("x", expression))
    with pytest.raises(BadInput, match=re.escape(f"sets: 'lungs': exclude.1: got {expression!r}")) as caught:
        await retriever.snippets(SnippetsRequest(sets=[one]))
    assert reason in caught.value.message


async def test_a_retriever_of_patterns_keeps_no_index(started: Starter) -> None:
    retriever = await started(kind="pattern")
    asked: list[tuple[str, Message]] = [("index", IndexRequest()), ("search", SearchRequest(queries=["x"]))]
    assert (await retriever.info(Empty())).model_dump(exclude_defaults=True) == {"kind": "pattern", "documents": 0}
    for method, request in asked:
        with pytest.raises(BadInput, match=f"{method}: kind: got 'pattern', expected"):
            await getattr(retriever, method)(request)
    with pytest.raises(BadInput, match="sets: got 'set' twice"):
        await retriever.snippets(SnippetsRequest(sets=[looked_for("a"), looked_for("b")]))
    assert (await retriever.snippets(SnippetsRequest(sets=[looked_for("a")]))).snippets == []


def test_more_patterns_than_one_automaton_takes() -> None:
    many = [f"word{i}x" for i in range(600)]
    assert [one.matches[0].pattern for one in found("word599x word3x", *many)] == [599, 3]


@pytest.mark.parametrize("memory", [1 << 10, 1 << 14])
def test_where_one_automaton_is_too_large_each_pattern_is_looked_for(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattern, "TOGETHER", memory)
    one = Searcher([looked_for(*(rf"[a-q][^u-z]{{{90 + i}}}x{i}" for i in range(20)))])
    assert one.found("a" * 100) == {}
    assert one.found("a" * 100 + "x7") == {0: [Match(start=2, end=102, pattern=7)]}


def test_bytes_are_searched_where_characters_have_several() -> None:
    (one,) = Searcher([looked_for("é")]).sets
    assert list(spans(one.include[0], "aéé".encode())) == [(1, 3), (3, 5)]
