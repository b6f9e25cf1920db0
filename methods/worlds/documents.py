"""Reading documents, clusters and gold questions from files, with one clear error for each bad row."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocols.errors import BadInput

SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One document; `text` starts with its title if it has one."""

    id: str
    text: str


@dataclass
class Library:
    """Documents by id, in order, and what was left out on the way."""

    documents: dict[str, Document] = field(default_factory=dict)
    empty: set[str] = field(default_factory=set)
    """Ids of documents without text."""
    repeated: dict[str, str] = field(default_factory=dict)
    """Id of a document whose text occurs before -> id of the one that is kept."""

    def knows(self, name: str) -> bool:
        """Whether there is a document of this id, kept or left out."""
        return name in self.documents or name in self.empty or name in self.repeated

    def find(self, names: Sequence[str]) -> list[Document]:
        """The documents of known ids, each once, in order; a repeated one is found as the one that is kept."""
        kept = dict.fromkeys(self.repeated.get(name, name) for name in names)
        return [self.documents[name] for name in kept if name in self.documents]


def read_documents(path: Path) -> Library:
    """All documents of a file or folder of .txt, .md and .jsonl (`id`, `title`, `text`).

    The id of a text file is its path in the folder. Empty documents and exact repetitions of a text are left
    out and counted. Raises BadInput that names the file, the line and the field.
    """
    library, kept = Library(), dict[str, str]()
    for file in _files(path):
        name = file.name if file == path else file.relative_to(path).as_posix()
        for place, document in _read_file(file, name):
            if library.knows(document.id):
                raise BadInput(f"documents: {place}: the id {document.id!r} occurs twice")
            if not document.text.strip():
                library.empty.add(document.id)
            elif document.text in kept:
                library.repeated[document.id] = kept[document.text]
            else:
                kept[document.text] = document.id
                library.documents[document.id] = document
    if not library.documents:
        raise BadInput(f"documents: {path} holds no text")
    return library


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise BadInput(f"documents: {str(path)!r} does not exist")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise BadInput(f"documents: {str(path)!r} is not one of {', '.join(SUFFIXES)}")
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise BadInput(f"documents: the folder {str(path)!r} holds no {', '.join(SUFFIXES)} files")
    return files


def _read_file(file: Path, name: str) -> Iterator[tuple[str, Document]]:
    if file.suffix.lower() == ".jsonl":
        for place, row in read_rows(file, "documents"):
            yield place, _document(place, row)
    else:
        yield str(file), Document(id=name, text=read_text(file, "documents"))


def _document(place: str, row: dict[str, Any]) -> Document:
    texts = {name: row.get(name, "") for name in ("id", "title", "text")}
    for name in ("id", "text"):
        if name not in row:
            raise BadInput(f"documents: {place}: field {name}: required, but missing")
    for name, value in texts.items():
        if not isinstance(value, str):
            raise BadInput(f"documents: {place}: field {name}: got {value!r}, expected text")
    if not texts["id"]:
        raise BadInput(f"documents: {place}: field id: got {''!r}, expected a name")
    title, text = texts["title"], texts["text"]
    # Most texts open with their own title; only the others need it in front.
    has_title = not title or title in text[: 2 * len(title) + 200]
    return Document(id=texts["id"], text=text if has_title else f"{title}\n{text}")


def read_text(file: Path, what: str) -> str:
    """A UTF-8 text file, compressed if its name ends with .gz. Raises BadInput for a binary one."""
    return "".join(read_lines(file, what))


def read_lines(file: Path, what: str) -> Iterator[str]:
    """The lines of such a file, each with a line feed for whatever ends it; the file may be larger than memory."""
    offset = characters = 0
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
            for raw in stream:
                # A byte order mark, as Windows editors write it, is none of the text.
                line = raw.decode().removeprefix("" if offset else "\ufeff")
                offset += len(raw)
                if "\0" in line:
                    place = characters + line.index(chr(0))
                    raise BadInput(f"{what}: {file} is not text: it holds a NUL character at {place}")
                characters += len(line)
                yield from io.StringIO(line, newline=None)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{what}: {file} is not a whole gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{what}: {file} is not UTF-8 text (byte {offset + error.start})") from error
    except OSError as error:
        raise BadInput(f"{what}: cannot read {file}: {error.strerror}") from error


def read_rows(file: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file, one by one, each with `FILE line N`. Raises BadInput for what is none."""
    for number, ended in enumerate(read_lines(file, what), start=1):
        line = ended.removesuffix("\n")
        if not line.strip():
            continue
        place = f"{file} line {number}"
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise BadInput(f"{what}: {place}: not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            # Half a surrogate pair, an integer of thousands of digits, thousands of brackets.
            raise BadInput(f"{what}: {place}: JSON that cannot be used: {error}") from error
        if not isinstance(row, dict):
            raise BadInput(f"{what}: {place}: expected an object, got {line[:40]!r}")
        yield place, row


def passages(document: Document, words: int) -> list[Document]:
    """Cut a document into passages of at most so many words, at line ends where possible."""
    pieces: list[list[str]] = []
    for line in document.text.split("\n"):
        tokens = line.split()
        if pieces and len(pieces[-1]) + len(tokens) <= words:
            pieces[-1].extend(tokens)
        else:
            pieces.extend(tokens[i : i + words] for i in range(0, len(tokens), words))
    if len(pieces) == 1:
        return [Document(document.id, " ".join(pieces[0]))]
    return [Document(f"{document.id}#{i}", " ".join(piece)) for i, piece in enumerate(pieces)]


def similar_groups(documents: Sequence[Document], size: int, seed: int) -> list[list[str]]:
    """Ids in groups of `size` (the last may be smaller), documents of similar words together.

    TF-IDF and k-means stand in for the paper's embeddings and hierarchical k-means.
    """
    if len(documents) <= size:
        return [[document.id for document in documents]]
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Marks count as words too, so that no text is without any.
    tokens = r"\w+|[^\w\s]+"
    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=20000, token_pattern=tokens)
    vectors = vectorizer.fit_transform(document.text for document in documents)
    labels = KMeans(n_clusters=-(-len(documents) // size), random_state=seed, n_init=1).fit_predict(vectors)
    order = sorted(range(len(documents)), key=lambda i: (labels[i], i))
    ids = [documents[i].id for i in order]
    return [ids[i : i + size] for i in range(0, len(ids), size)]
