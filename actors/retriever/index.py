"""The index of a retriever: documents on disk, their vectors beside them, and what kind of index that is."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actors.retriever.folder import MANIFEST, check, claim, identity, write_atomically
from actors.retriever.fusion import best, depth, fused, with_equals
from actors.retriever.lexical import Entry, Store, hit
from protocols.errors import BadInput, Corrupt
from protocols.retriever import (
    Hit,
    IndexRequest,
    IndexResponse,
    RetrieverConfig,
    SearchRequest,
    SearchResponse,
    SearchResult,
    Values,
)

if TYPE_CHECKING:
    from actors.retriever.dense import Encoder, Vectors

DOCUMENTS, VECTORS = "documents", "vectors.usearch"
UNSAVED = 0.1
"""Share of the vectors that their file may lag behind; those are in the documents too."""


class DocumentIndex:
    """Documents and their rankings.

    A change is one commit of the documents, which hold their vectors. The file of vectors is made of them: where it
    lags behind, because the process ended or it was not worth writing, it is brought up to date when it is opened.
    """

    def __init__(self, config: RetrieverConfig) -> None:
        """Raises BadInput when the folder holds another kind of index, or something else."""
        self._config = config
        self.encoder: Encoder | None = None
        self._vectors: Vectors | None = None
        # Vectors are not looked up while they change.
        self._turn = Lock()
        self._behind, self._unsaved = True, 0
        if config.kind != "bm25":
            from actors.retriever import dense

            self.encoder = dense.Encoder(config)
        self._temporary = None if config.path else TemporaryDirectory(prefix="repertory-retriever-")
        self._folder = Path(config.path or self._temporary.name).expanduser()  # type: ignore[union-attr]
        claim(self._folder, config)
        self._store = Store(self._folder / DOCUMENTS)
        if self.encoder is not None:
            from actors.retriever import dense

            self._vectors = dense.Vectors(self._folder / VECTORS, self.encoder.dimensions)
            self._catch_up()

    def __len__(self) -> int:
        return len(self._store)

    def _catch_up(self) -> None:
        """Bring the vectors to what the documents say."""
        if self._vectors is not None:
            have, wanted = self._vectors.keys(), self._store.keys({})
            missing = list(self._store.entries(np.setdiff1d(wanted, have)))
            gone = np.setdiff1d(have, wanted)
            if missing or len(gone):
                keys = np.array([entry.key for entry in missing], np.uint64)
                self._vectors.change(gone, keys, _matrix([entry.vector for entry in missing]))
                self._unsaved += len(missing) + len(gone)
        self._behind = False

    def change(self, request: IndexRequest) -> IndexResponse:
        """Add, replace and forget documents: all of it is on disk when this returns, or nothing if it fails."""
        check(request)
        documents = request.documents
        vectors = self.encoder.embed([one.text for one in documents]) if self.encoder else None
        with self._turn:
            if self._store.hold() or self._behind:
                self._catch_up()
            known = self._store.known({one.id for one in documents} | set(request.remove))
            first = self._store.next_key
            entries = [
                Entry(one, first + i, b"" if vectors is None else vectors[i].astype("<f4").tobytes())
                for i, one in enumerate(documents)
            ]
            self._behind = True
            self._store.change(entries, known)
            if self._vectors is not None and vectors is not None:
                keys = np.arange(first, first + len(documents), dtype=np.uint64)
                self._vectors.change(np.array(list(known.values()), np.uint64), keys, vectors)
                self._unsaved += len(known) + len(documents)
            self._behind = False
            if self._unsaved > UNSAVED * len(self._store):
                self._save()
        replaced = sum(one.id in known for one in documents)
        return IndexResponse(
            added=len(documents) - replaced,
            replaced=replaced,
            removed=len(known) - replaced,
            documents=len(self._store),
        )

    def _save(self) -> None:
        if self._vectors is not None and self._unsaved:
            self._vectors.save()
        self._unsaved = 0

    def search(self, request: SearchRequest) -> SearchResponse:
        """The nearest documents of each query. Raises BadInput for a ranking that this index does not have."""
        kind, own = request.kind or self._config.kind, self._config.kind
        if own not in ("hybrid", kind):
            raise BadInput(f"kind: got {kind!r}, expected {own!r}, the only ranking of this retriever")
        queries, k, where = request.queries, request.k, request.where
        if kind == "bm25":
            rankings = [self._store.bm25(query, k, where) for query in queries]
        elif kind == "dense":
            rankings = self._dense(queries, k, where)
        else:
            deep = depth(k)
            pairs = zip(queries, self._dense(queries, deep, where), strict=True)
            rankings = [
                fused({"bm25": self._store.bm25(query, deep, where), "dense": dense}, self._config.fusion, k)
                for query, dense in pairs
            ]
        return SearchResponse(results=[SearchResult(hits=hits) for hits in rankings])

    def _dense(self, queries: Sequence[str], k: int, where: Mapping[str, Values]) -> list[list[Hit]]:
        assert self.encoder is not None and self._vectors is not None
        asked = self.encoder.embed(queries)
        with self._turn:
            if self._behind:
                self._catch_up()
            allowed = self._store.keys(where) if where else None
            return [self._nearest(self._vectors, query, k, allowed) for query in asked]

    def _nearest(
        self, vectors: "Vectors", query: NDArray[np.float32], k: int, allowed: NDArray[np.uint64] | None
    ) -> list[Hit]:
        if allowed is None:
            found = vectors.nearest(query, k)
        else:
            ranking = vectors.among(query, allowed)
            found = with_equals(lambda limit: ranking[:limit], k)
        entries = self._store.entries(key for _, key in found)
        return best([hit(entry.document, score) for entry, (score, _) in zip(entries, found, strict=True)], k)

    def write(self, folder: Path) -> None:
        """Write a copy of the index, which can be opened or taken over."""
        with self._turn:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / DOCUMENTS, ignore_errors=True)
            if self._behind:
                self._catch_up()
            self._store.copy(folder / DOCUMENTS)
            if self._vectors is not None:
                self._vectors.save(folder / VECTORS)
            write_atomically(folder / MANIFEST, identity(self._config))

    def take(self, folder: Path) -> None:
        """Keep what is in another index instead. Raises Corrupt when it is none, BadInput for one of another kind."""
        if not (folder / MANIFEST).is_file() or not (folder / DOCUMENTS / "meta.json").is_file():
            raise Corrupt(f"{folder} is not a saved retriever")
        claim(folder, self._config)
        source = Store(folder / DOCUMENTS)
        with self._turn:
            self._store.hold()
            first = self._store.next_key
            entries = (replace(one, key=first + i) for i, one in enumerate(source.entries(source.keys({}))))
            self._behind = True
            self._store.change(entries, [], all_gone=True)
            self._catch_up()
            self._save()

    def close(self) -> None:
        """Leave the folder to others; a temporary one goes away."""
        with self._turn:
            if self._store.held:
                self._save()
            self._store.release()
        if self._temporary is not None:
            self._temporary.cleanup()


def _matrix(vectors: Sequence[bytes]) -> NDArray[np.float32]:
    return np.frombuffer(b"".join(vectors), "<f4").reshape(len(vectors), -1) if vectors else np.zeros((0, 0), "<f4")
