import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.worlds.documents import Document, passages, read_documents, read_rows, similar_groups
from protocols.errors import BadInput

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write files into a folder; rows become JSON Lines."""

    def write(**files: str | bytes | list[Any]) -> Path:
        folder = tmp_path / "docs"
        for name, content in files.items():
            file = folder / name.replace("__", "/").replace("_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, list):
                content = "".join(json.dumps(row) + "\n" for row in content)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return write


def row(name: str, text: str = "Some text.", **more: Any) -> dict[str, Any]:
    return {"id": name, "title": "", "text": text, **more}


# What can be read


def test_a_folder_of_all_kinds(make: Make) -> None:
    folder = make(
        b_txt="Second.", a_md="# First", sub__b_txt="Third.", c_jsonl=[row("x", "Fourth."), row("y", "Fifth.")],
        notes_pdf=b"%PDF\xff", image_png=b"\x89PNG\xff",
    )  # fmt: skip
    library = read_documents(folder)
    assert {name: document.text for name, document in library.documents.items()} == {
        "a.md": "# First", "b.txt": "Second.", "x": "Fourth.", "y": "Fifth.", "sub/b.txt": "Third."
    }  # fmt: skip
    assert (library.empty, library.repeated) == (set(), {})


def test_one_file(make: Make) -> None:
    folder = make(a_TXT="Text.")
    assert list(read_documents(folder / "a.TXT").documents) == ["a.TXT"]
    assert list(read_documents(folder).documents) == ["a.TXT"]


def test_hidden_files_are_no_documents(make: Make) -> None:
    folder = make(a_txt="Text.")
    for name in (".cache/b.txt", ".hidden.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("Not this.")
    assert list(read_documents(folder).documents) == ["a.txt"]


def test_the_title_stands_in_front_unless_it_is_there(make: Make) -> None:
    folder = make(
        a_jsonl=[
            row("1", "Plain.", title="A title"),
            row("2", "A title\n\nPlain.", title="A title"),
            row("3", "No title."),
            {"id": "4", "text": "No title at all."},
        ]
    )
    texts = [document.text for document in read_documents(folder).documents.values()]
    assert texts == ["A title\nPlain.", "A title\n\nPlain.", "No title.", "No title at all."]


@pytest.mark.parametrize("text", ["日本語の文書です。", "Ελληνικά", "עברית", "emoji 🙂 and ½", "naïve café"])
def test_any_language(make: Make, text: str) -> None:
    folder = make(a_txt=text, b_jsonl=[row("x", text + "!")])
    assert [document.text for document in read_documents(folder).documents.values()] == [text, text + "!"]


def test_line_ends_byte_order_marks_and_blank_lines(make: Make) -> None:
    lines = [json.dumps(row("1")), "", "   ", json.dumps(row("2", "Other."))]
    mark = b"\xef\xbb\xbf"
    folder = make(
        a_jsonl=mark + "\r\n".join(lines).encode() + b"\r\n", b_txt=mark + b"One.\r\nTwo.\r\n", c_jsonl="\n\n"
    )
    texts = {name: document.text for name, document in read_documents(folder).documents.items()}
    assert texts == {"1": "Some text.", "2": "Other.", "b.txt": "One.\nTwo.\n"}


def test_other_line_separators_do_not_cut_a_row(make: Make) -> None:
    file = make(a_jsonl=json.dumps(row("1", "a\u2028b\x85c"), ensure_ascii=False))
    assert read_documents(file).documents["1"].text == "a\u2028b\x85c"


def test_empty_and_repeated_documents_are_counted(make: Make) -> None:
    rows = [row("1"), row("2"), row("3", " \n"), row("4", "Other."), row("5")]
    library = read_documents(make(a_jsonl=rows, b_txt="Some text.", c_md=""))
    assert list(library.documents) == ["1", "4"]
    assert library.empty == {"3", "c.md"}
    assert library.repeated == {"2": "1", "5": "1", "b.txt": "1"}
    assert all(library.knows(name) for name in ("1", "2", "3", "4", "5", "b.txt"))
    assert not library.knows("6")
    assert [document.id for document in library.find(["5", "4", "3", "1"])] == ["1", "4"]


# What cannot


def refused(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        read_documents(path)
    message = str(caught.value)
    assert message.startswith("documents: ") and "\n" not in message
    return message


def test_nothing_to_read(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no .txt, .md, .jsonl files" in refused(tmp_path / "empty")
    assert "does not exist" in refused(tmp_path / "nowhere")
    folder = make(a_pdf="x")
    assert "is not one of .txt, .md, .jsonl" in refused(folder / "a.pdf")
    assert "holds no .txt" in refused(folder)
    assert "holds no text" in refused(make(b_txt=" \n", c_jsonl=[row("1", "")]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not UTF-8 text (byte 0)"),
        (b"fine so far \xff", "is not UTF-8 text (byte 12)"),
        (b"\xef\xbb\xbfa\xff", "is not UTF-8 text (byte 4)"),
        (b"a\0b", "holds a NUL character at 1"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "md", "jsonl"])
def test_binary_files(make: Make, content: bytes, message: str, suffix: str) -> None:
    folder = make(**{f"a_{suffix}": content})
    found = refused(folder)
    assert message in found and str(folder / f"a.{suffix}") in found


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_rows_come_one_by_one(tmp_path: Path, suffix: str) -> None:
    """Files may be larger than memory: what stands later has not been read yet."""
    file = tmp_path / f"rows{suffix}"
    content = b'\xef\xbb\xbf{"a": 1}\r{"a": 2}\r\n\n' + b'{"a": 3}\n' * 1000 + b'{"a": \xff}'
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    rows = read_rows(file, "rows")
    assert [next(rows) for _ in range(3)] == [(f"{file} line {n}", {"a": a}) for n, a in ((1, 1), (2, 2), (4, 3))]
    with pytest.raises(BadInput, match=rf"rows: .* is not UTF-8 text \(byte {content.index(0xFF)}\)"):
        list(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "2"}', "field text: required, but missing"),
        ('{"text": "x"}', "field id: required, but missing"),
        ('{"id": "2", "text": null}', "field text: got None, expected text"),
        ('{"id": "2", "text": ["a"]}', "field text: got ['a'], expected text"),
        ('{"id": 2, "text": "x"}', "field id: got 2, expected text"),
        ('{"id": "", "text": "x"}', "field id: got '', expected a name"),
        ('{"id": "2", "title": 5, "text": "x"}', "field title: got 5, expected text"),
        ('{"id": "1", "text": "x"}', "the id '1' occurs twice"),
        ('["2", "x"]', 'expected an object, got \'["2", "x"]\''),
        ('"text"', "expected an object"),
        ("plain words", "not JSON: Expecting value at column 1"),
        ('{"id": "2", "text": "x"', "not JSON"),
        ('{"id": "2", "text": "\\ud800"}', "JSON that cannot be used"),
        ('{"id": "2", "text": "x", "n": ' + "9" * 5000 + "}", "JSON that cannot be used"),
        ("[" * 100_000, "JSON that cannot be used"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(make: Make, line: str, message: str) -> None:
    folder = make(a_jsonl=f"{json.dumps(row('1'))}\n\n{line}\n")
    found = refused(folder)
    assert message in found
    assert f"{folder / 'a.jsonl'} line 3: " in found


def test_ids_are_unique_over_all_files(make: Make) -> None:
    folder = make(a_jsonl=[row("1")], b_jsonl=[row("2", "Two."), row("1", "Another.")])
    assert f"{folder / 'b.jsonl'} line 2: the id '1' occurs twice" in refused(folder)
    # Also where the first of them was left out.
    assert "occurs twice" in refused(make(a_jsonl=[row("1")], b_jsonl=[row("2"), row("2", "Two.")]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(make: Make) -> None:
    folder = make(a_txt="x")
    (folder / "a.txt").chmod(0)
    assert "cannot read" in refused(folder)


# Passages


def test_passages_end_at_lines_where_they_can() -> None:
    text = "one two three\nfour five\n\nsix seven eight nine ten eleven twelve thirteen\nfourteen"
    assert [(piece.id, piece.text) for piece in passages(Document("d", text), 5)] == [
        ("d#0", "one two three four five"),
        ("d#1", "six seven eight nine ten"),
        ("d#2", "eleven twelve thirteen fourteen"),
    ]
    assert passages(Document("d", "one\ntwo"), 5) == [Document("d", "one two")]
    assert passages(Document("d", " \n"), 5) == []


@given(st.text(alphabet="ab \n\t", max_size=200), st.integers(1, 12))
def test_passages_keep_every_word(text: str, words: int) -> None:
    pieces = passages(Document("d", text), words)
    assert " ".join(piece.text for piece in pieces).split() == text.split()
    assert all(1 <= len(piece.text.split()) <= words for piece in pieces)
    assert len({piece.id for piece in pieces}) == len(pieces)


# Similar documents


def test_documents_of_similar_words_are_put_together() -> None:
    topics = {
        "sea": "wave salt ship harbour tide",
        "sky": "cloud wind rain thunder storm",
        "soil": "root seed plough furrow field",
    }
    documents = [Document(f"{name}{i}", f"{words} number{i}") for i in range(4) for name, words in topics.items()]
    groups = similar_groups(documents, 4, seed=0)
    assert sorted(sorted(name.rstrip("0123") for name in group) for group in groups) == [
        ["sea"] * 4, ["sky"] * 4, ["soil"] * 4
    ]  # fmt: skip
    assert groups == similar_groups(documents, 4, seed=0)


@pytest.mark.parametrize(("count", "size", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (3, 5, [3]), (1, 1, [1])])
def test_sizes_of_groups(count: int, size: int, sizes: list[int]) -> None:
    documents = [Document(str(i), f"word{i} text") for i in range(count)]
    groups = similar_groups(documents, size, seed=3)
    assert [len(group) for group in groups] == sizes
    assert sorted(name for group in groups for name in group) == sorted(str(i) for i in range(count))


# They are all alike, which k-means complains of.
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("text", ["the and of a", "- * -", "日 本", "1 2 3"])
def test_documents_without_common_words(text: str) -> None:
    documents = [Document(str(i), text + " " * i) for i in range(5)]
    assert [len(group) for group in similar_groups(documents, 2, seed=0)] == [2, 2, 1]
