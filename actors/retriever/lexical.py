"""Documents on disk, found by their words: a store and an inverted index in one."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import tantivy
from numpy.typing import NDArray

from actors.retriever.fusion import best, with_equals
from protocols.errors import BadInput, Corrupt
from protocols.retriever import Document, Hit, Values

HEAP = 64 << 20
"""Bytes of documents that are gathered before some of them go to disk, still unseen."""
LONGEST = 100
"""Bytes of a word that can be found."""
EVERYTHING = tantivy.Query.all_query()


@dataclass(frozen=True)
class Entry:
    """A document as it is kept."""

    document: Document
    key: int
    """Number that no other document of the index has had."""
    vector: bytes = b""
    """Its embedding, little-endian float32; empty without one."""


def term(*parts: str) -> str:
    """Stands for texts of any length where they are compared as a whole."""
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _schema() -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("words", tokenizer_name="words", index_option="freq")
    builder.add_text_field("name", tokenizer_name="raw", index_option="basic")
    builder.add_text_field("labels", tokenizer_name="raw", index_option="basic")
    builder.add_unsigned_field("key", indexed=True, fast=True, stored=True)
    builder.add_bytes_field("document", stored=True)
    builder.add_bytes_field("vector", stored=True)
    return builder.build()


def _analyzer() -> Any:
    """Words without case, and without the endings of English."""
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for step in (
        tantivy.Filter.remove_long(LONGEST),
        tantivy.Filter.lowercase(),
        tantivy.Filter.stemmer("english"),
    ):
        builder = builder.filter(step)
    return builder.build()


class Store:
    """The documents of a folder. Whoever changes them first holds the folder until `release`."""

    def __init__(self, folder: Path) -> None:
        """Open what is there, or begin anew. Raises Corrupt when it cannot be read."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._schema, self._analyzer = _schema(), _analyzer()
        try:
            self._index = tantivy.Index(self._schema, path=str(folder))
        except (ValueError, OSError) as error:
            raise Corrupt(f"{folder} is not an index of documents: {error}") from error
        self._index.register_tokenizer("words", self._analyzer)
        self._index.config_reader("manual")
        self._writer: Any = None
        self._stamp = 0
        self.refresh()

    def refresh(self) -> None:
        """See what was committed last."""
        self._index.reload()
        self._searcher = self._index.searcher()

    def hold(self) -> bool:
        """Take the folder for changes; whether that was still to be done. Raises BadInput when another has it."""
        if self._writer is not None:
            return False
        try:
            self._writer = self._index.writer(heap_size=HEAP, num_threads=1)
        except ValueError as error:
            if "Lock" not in str(error):
                raise
            raise BadInput(
                f"path: got {str(self._folder.parent)!r}, which another retriever changes; expected one of its own"
            ) from error
        self._stamp = int(self._writer.commit_opstamp)
        self.refresh()
        return True

    @property
    def held(self) -> bool:
        """Whether this one may change the folder."""
        return self._writer is not None

    @property
    def next_key(self) -> int:
        """The first of the keys that no document has had; each document that is added may take one."""
        # The stamp of a commit is higher than the last one's by more than the number of its additions.
        return self._stamp + 1

    def release(self) -> None:
        """Let others change the folder; what is under way in it ends first."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.wait_merging_threads()

    def copy(self, folder: Path) -> None:
        """Write the documents into another folder."""
        self.release()
        shutil.copytree(self._folder, folder, ignore=shutil.ignore_patterns("*.lock"))

    def __len__(self) -> int:
        return int(self._searcher.num_docs)

    def change(self, entries: Iterable[Entry], gone: Iterable[str], *, all_gone: bool = False) -> None:
        """Forget the documents of these ids, or all, and add others, in one commit: all is done, or nothing."""
        assert self._writer is not None
        try:
            if all_gone:
                self._writer.delete_documents_by_query(EVERYTHING)
            for name in gone:
                self._writer.delete_documents_by_term("name", term(name))
            for entry in entries:
                self._writer.add_document(self._written(entry))
            self._stamp = self._writer.commit()
        except BaseException:  # raised again: what was added so far must not come with the next commit
            self._writer.rollback()
            raise
        self.refresh()

    def _written(self, entry: Entry) -> Any:
        document, written = entry.document, tantivy.Document()
        written.add_text("words", document.text)
        written.add_text("name", term(document.id))
        for key, value in document.metadata.items():
            written.add_text("labels", term(key, value))
        written.add_unsigned("key", entry.key)
        written.add_bytes("document", document.model_dump_json().encode())
        written.add_bytes("vector", entry.vector)
        return written

    def known(self, names: Iterable[str]) -> dict[str, int]:
        """The keys of those documents that are there, by id."""
        found: dict[str, int] = {}
        searcher: Any = self._searcher
        for name in names:
            query = tantivy.Query.term_query(self._schema, "name", term(name), "basic")
            for _, address in searcher.search(query, 1, count=False).hits:
                (found[name],) = searcher.fast_field_values("key", [address])
        return found

    def keys(self, where: Mapping[str, Values]) -> NDArray[np.uint64]:
        """Keys of all documents that a search is narrowed to, uint64[N], in rising order."""
        query = tantivy.Query.boolean_query([(tantivy.Occur.Must, EVERYTHING), *self._narrowed(where)])
        searcher = self._searcher
        hits = searcher.search(query, max(1, searcher.num_docs), count=False).hits
        values = searcher.fast_field_values("key", [address for _, address in hits])
        return np.sort(np.asarray(values, np.uint64))

    def entries(self, keys: Iterable[int]) -> Iterator[Entry]:
        """The documents with these keys; unknown ones are passed over."""
        searcher: Any = self._searcher
        for key in keys:
            query = tantivy.Query.term_query(self._schema, "key", int(key), "basic")
            for _, address in searcher.search(query, 1, count=False).hits:
                stored = searcher.doc(address)
                document = Document.model_validate_json(stored.get_first("document"))
                yield Entry(document, stored.get_first("key"), stored.get_first("vector"))

    def bm25(self, query: str, k: int, where: Mapping[str, Values]) -> list[Hit]:
        """The k best documents by BM25 of the query's words (k1 1.2, b 0.75)."""
        words = Counter(self._analyzer.analyze(query))
        if not words:
            return []
        terms = [(tantivy.Occur.Should, self._word(word, count)) for word, count in words.items()]
        asked = tantivy.Query.boolean_query(
            [(tantivy.Occur.Must, tantivy.Query.boolean_query(terms)), *self._narrowed(where)]
        )
        # One searcher for all: another thread may put a new one in its place.
        searcher: Any = self._searcher
        found = with_equals(lambda limit: searcher.search(asked, limit, count=False).hits, k)
        documents = (Document.model_validate_json(searcher.doc(one).get_first("document")) for _, one in found)
        return best([hit(one, score) for one, (score, _) in zip(documents, found, strict=True)], k)

    def _word(self, word: str, count: int) -> Any:
        query = tantivy.Query.term_query(self._schema, "words", word, "freq")
        return query if count == 1 else tantivy.Query.boost_query(query, float(count))

    def _narrowed(self, where: Mapping[str, Values]) -> list[Any]:
        """Conditions that add nothing to a score."""
        return [
            (tantivy.Occur.Must, tantivy.Query.const_score_query(self._one_of(key, one.values), 0.0))
            for key, one in where.items()
        ]

    def _one_of(self, key: str, values: Sequence[str]) -> Any:
        return tantivy.Query.term_set_query(self._schema, "labels", [term(key, value) for value in values])


def hit(document: Document, score: float) -> Hit:
    """A document that was found."""
    return Hit(id=document.id, text=document.text, metadata=document.metadata, score=score)
