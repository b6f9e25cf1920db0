"""Snippets: exact windows, what holds of any text, and patterns that would take for ever elsewhere."""

import re
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.retriever import pattern
from actors.retriever.pattern import SHARED, Compiled, Searcher, compiled, counted, short, spans
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


class Counting:
    """An expression that counts what it is given to read at most."""

    def __init__(self, expression: str) -> None:
        self.regex = compiled("set", "include.0", Pattern(expression=expression))
        self.groups = self.regex.groups
        self.read = 0

    def _noted(self, find: Any, data: bytes, at: int, end: int | None) -> Any:
        self.read += min(len(data), len(data) if end is None else end) - at
        return find(data, at, end)

    def search(self, data: bytes, at: int, end: int | None = None) -> Any:
        return self._noted(self.regex.search, data, at, end)

    def match(self, data: bytes, at: int, end: int | None = None) -> Any:
        return self._noted(self.regex.match, data, at, end)


FAR = [
    "a.*b|a", "a.*b", "a.*?b|ab", "(a).*b|(b)", "(a)(?:.*b)?", r"a\b", r"a\B", "b$", "(?m)b$", "(?m)^.*b",
    r"\ba.*b\b|a", "é.*a|é", "^a", r"[ab]{3}|b", "(?s)a.*b|[^a]", "a(?:..)*b|b", r"(?:^|\s)(a+)(?:\s|$)",
]  # fmt: skip
LETTERS = st.text(st.sampled_from("aab é\n"), max_size=40)


def slowly(expression: str, data: bytes, most: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Of each byte the match that is the first from it on: every place is tried, and what is behind `most` bytes of
    it is only seen."""
    regex = compiled("set", "include.0", Pattern(expression=expression))
    begins = (regex.match(data, start, start + most) for start in range(len(data)))
    told: list[Any] = []
    for match in reversed(list(begins)):
        told.append((match.span(), match.span(min(regex.groups, 1))) if match else told[-1] if told else None)
    return told[::-1]


@pytest.mark.parametrize("expression", FAR)
@given(LETTERS, st.integers(1, 9))
def test_the_first_match_that_is_short_is_found(expression: str, text: str, most: int) -> None:
    data = text.encode()
    regex = compiled("set", "include.0", Pattern(expression=expression))
    found = [short(regex, data, at, most) for at in range(len(data))]
    told = [(match.span(), match.span(min(regex.groups, 1))) if match else None for match in found]
    assert told == slowly(expression, data, most)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    monkeypatch.setattr(pattern, "FREE", 3)
    monkeypatch.setattr(pattern, "MOST", 64)
    return 3, 64


def test_only_the_first_matches_may_be_long(limits: tuple[int, int]) -> None:
    free, most = limits
    regex = compiled("set", "include.0", Pattern(expression="a[^a]*b"))
    line = f"a{'c' * most}b"
    just = f"a{'c' * (most - 2)}b"
    assert list(spans(regex, (line * 9).encode())) == [(i * len(line), (i + 1) * len(line)) for i in range(free)]
    assert len(list(spans(regex, (just * 9).encode()))) == 9
    # Nor does a text that is no longer know of a limit.
    assert len(list(spans(compiled("set", "include.0", Pattern(expression="b|a.*")), b"b" * 40 + b"a" * 24))) == 41


def test_context_counts_for_the_length_of_a_match(limits: tuple[int, int]) -> None:
    free, most = limits
    regex = compiled("set", "include.0", Pattern(expression="(a)c*d|(?:b)"))
    far, near = f"a{'c' * most}d", f"a{'c' * (most - 2)}d"
    places = [start for start, _ in spans(regex, (near + far + "b" * free + near + far + near).encode())]
    ends = len(near) + len(far) + free
    assert places == [0, len(near), ends, ends + len(near) + len(far)]


def test_what_stands_behind_the_last_byte_is_seen(limits: tuple[int, int]) -> None:
    free, most = limits
    regex = compiled("set", "include.0", Pattern(expression=r"x|\ba+\b|(?m:b+$)"))
    words = ["x" * free, "a" * most, "a" * (most + 1), "a" * most + "b", "b" * most + "\n", "b" * most + "c", "a"]
    data = " ".join(words).encode()
    found = [data[start:end].decode() for start, end in spans(regex, data)]
    assert found == ["x"] * free + ["a" * most, "b" * most, "a"]


LINE = "a" * 30_000


@pytest.mark.parametrize(
    ("expression", "text", "matches", "stops"),
    [
        ("a.*b|a", LINE, 30_000, 30_000),
        ("a.*b|a", LINE[:20_000] + "c" * 10_000, 20_000, 20_000),
        (r"a+\bc|a", LINE, 30_000, 30_000),
        # What matches is not the group.
        ("(a).*b|a", LINE, 0, 30_000),
        ("a.*b|d", "d" * 9 + LINE, 9, 9),
        ("d", ("c" * 999 + "d") * 30, 30, 30),
        # The first match is the whole line, and nothing is left.
        ("a.*b|a", LINE + "b", 1, 1),
        # 37 places in each of 298 lines at which nothing begins that is short enough; two lines are free.
        ("a[^d]{63,99}b|d", ("a" * 100 + "bd") * 300, 302, 302 + 37 * 298),
        # The same behind a window that has grown.
        ("a[^d]{63,99}b|d", "ddd" + "c" * 30_000 + ("a" * 100 + "b") * 300, 3, 3 + 37 * 300),
    ],
)
def test_reading_is_bounded(limits: tuple[int, int], expression: str, text: str, matches: int, stops: int) -> None:
    free, most = limits
    regex: Any = Counting(expression)
    assert len(list(spans(regex, text.encode()))) == matches
    assert regex.read <= (free + 8) * len(text) + 3 * most * stops


def test_windows_grow_where_nothing_is() -> None:
    regex: Any = Counting("d")
    assert short(regex, b"c" * 100_000, 0, 64) is None
    assert 100_000 < regex.read < 101_000


def test_what_is_excluded_is_looked_for_in_the_same_bounds(limits: tuple[int, int]) -> None:
    free, most = limits
    include, exclude = Counting("a.*b|a"), Counting("c.*d|c")
    text = ("a" * 99 + "c") * 300
    one: Any = Compiled("set", (include,), (exclude,))
    assert [start for start, _, _ in counted(one, [0], text.encode())] == [i for i in range(30_000) if i % 100 != 99]
    assert include.read <= (free + 8) * len(text) + 3 * most * 29_701
    assert exclude.read <= (free + 8) * len(text) + 3 * most * 301
