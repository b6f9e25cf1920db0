"""Choosers without weights: neighbours, clusters, the best model of all, and chance."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from actors.router.backbone import load_backbone
from actors.router.chooser import About, Chooser, Scored, matched, texts_of
from actors.router.layout import query_layout
from actors.router.nets import embedded
from protocols.errors import Corrupt
from protocols.router import RouterConfig, RouteRow, RouteTrainResponse

MEMORY = "memory.npz"


class MemoryChooser(Chooser):
    """Remembers rows by their id, and scores a query by rows that resemble it."""

    def __init__(self, config: RouterConfig, folder: Path | None) -> None:
        super().__init__(config)
        if config.kind in ("knn", "kmeans"):
            self.backbone = load_backbone(config, folder)
        self._rows: dict[str, tuple[NDArray[np.float32], NDArray[np.float64]]] = {}
        """Embedding float32[D], empty for kinds without one, and scores float64[T], NaN where there is none."""
        self._clusters: tuple[NDArray[np.float32], NDArray[np.float64]] | None = None

    def counts(self) -> tuple[int, int]:
        """Weights of the encoder; none is trained."""
        return sum(p.numel() for p in self.backbone.parameters()) if self.backbone else 0, 0

    def score(self, texts: Sequence[str]) -> Scored:
        """Mean scores of what is remembered."""
        if self.config.kind == "random":
            drawn = [_draws(text, self.config.seed, len(self.names)) for text in texts]
            return Scored(np.stack(drawn), [False] * len(texts))
        if not self._rows:
            return Scored(np.full((len(texts), len(self.names)), 0.5), [False] * len(texts))
        if self.config.kind == "best":
            mean_T = _means(self._scores)
            return Scored(np.tile(mean_T, (len(texts), 1)), [False] * len(texts))
        embeddings_BD, cut = self._embed(texts)
        by = self._by_neighbours if self.config.kind == "knn" else self._by_cluster
        return Scored(by(embeddings_BD), cut)

    @property
    def _scores(self) -> NDArray[np.float64]:
        return np.stack([scores for _, scores in self._rows.values()])

    def _by_neighbours(self, embeddings_BD: NDArray[np.float32]) -> NDArray[np.float64]:
        known_ND = np.stack([embedding for embedding, _ in self._rows.values()])
        count = min(self.config.neighbours, len(known_ND))
        nearest_BK = np.argsort(-embeddings_BD @ known_ND.T, axis=1, kind="stable")[:, :count]
        scores_NT = self._scores
        return np.stack([_means(scores_NT[nearest_K]) for nearest_K in nearest_BK])

    def _by_cluster(self, embeddings_BD: NDArray[np.float32]) -> NDArray[np.float64]:
        if self._clusters is None:
            from sklearn.cluster import KMeans

            known_ND, scores_NT = np.stack([embedding for embedding, _ in self._rows.values()]), self._scores
            count = min(self.config.neighbours, len(np.unique(known_ND, axis=0)))
            found = KMeans(n_clusters=count, random_state=self.config.seed, n_init=1).fit(known_ND)
            means_KT = np.stack([_means(scores_NT[found.labels_ == k]) for k in range(count)])
            self._clusters = found.cluster_centers_, means_KT
        centres_KD, means_KT = self._clusters
        # Of squared distances, what depends on the centre.
        distances_BK = (centres_KD**2).sum(1)[None] - 2 * embeddings_BD @ centres_KD.T
        nearest: NDArray[np.float64] = means_KT[distances_BK.argmin(1)]
        return nearest

    def _embed(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], list[bool]]:
        if self.backbone is None:
            return np.zeros((len(texts), 0), np.float32), [False] * len(texts)
        queries = [self.backbone.query(text, self.limit) for text in texts]
        rows = [query_layout(query) for query, _ in queries]
        with torch.inference_mode():
            embeddings_BD = embedded(self.backbone, rows).cpu().numpy()
        return embeddings_BD, [cut for _, cut in queries]

    def learn(self, rows: Sequence[RouteRow]) -> RouteTrainResponse:
        """Remember rows; one that is known already is replaced."""
        new = len({row.uid for row in rows} - self._rows.keys())
        embeddings_BD, _ = self._embed(texts_of(rows))
        self._rows |= {row.uid: (embeddings_BD[i], np.array(row.scores)) for i, row in enumerate(rows)}
        self._clusters = None
        self.version = len(self._rows)
        return RouteTrainResponse(loss=0.0, learnt=new, version=self.version)

    def _write(self, folder: Path, training_state: bool) -> None:
        count, width = len(self._rows), self.backbone.width if self.backbone else 0
        np.savez(
            folder / MEMORY,
            uids=np.array(list(self._rows), dtype=np.str_),
            embeddings=np.array([e for e, _ in self._rows.values()], np.float32).reshape(count, width),
            scores=np.array([s for _, s in self._rows.values()]).reshape(count, len(self.names)),
        )

    def read(self, folder: Path, about: About, training_state: bool) -> None:
        """Take over what was remembered; of candidates that were not there nothing is known."""
        pairs = matched(self.names, [one.name for one in about.candidates])
        try:
            with np.load(folder / MEMORY, allow_pickle=False) as saved:
                scores_NT = np.full((len(saved["uids"]), len(self.names)), np.nan)
                for here, there in pairs:
                    scores_NT[:, here] = saved["scores"][:, there]
                uids = [str(uid) for uid in saved["uids"]]
                self._rows = dict(zip(uids, zip(saved["embeddings"], scores_NT, strict=True), strict=True))
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise Corrupt(f"{folder} does not hold the memory of this router: {error}") from error
        self._clusters = None
        self.version = len(self._rows)


def _means(scores_NT: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over rows, 0.5 where no row has a score."""
    known_NT = ~np.isnan(scores_NT)
    sums_T, counts_T = np.where(known_NT, scores_NT, 0.0).sum(0), known_NT.sum(0)
    return np.where(counts_T > 0, sums_T / np.maximum(counts_T, 1), 0.5)


def _draws(text: str, seed: int, count: int) -> NDArray[np.float64]:
    """Numbers from 0 to 1 that depend on text and seed alone."""
    digest = hashlib.sha256(f"{seed}/{text}".encode("utf-8", "replace")).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).random(count)
