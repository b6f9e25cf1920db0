"""Documents found by their meaning: embeddings, and an index of nearest neighbours over them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer
from usearch.index import Index

from actors.policy.loading import ONE_AT_A_TIME, UNREADABLE, device_of, quiet
from actors.retriever.fusion import with_equals
from actors.router.backbone import encoder_source
from protocols.errors import BadInput
from protocols.retriever import RetrieverConfig

BATCH_TOKENS = 8192
"""Tokens of a batch, padding included."""
EXACT = 20_000
"""Vectors up to which all are compared; of more a graph finds nearly all of the nearest."""
WIDER = 64
"""Neighbours that the graph looks at beside those that are asked for."""


class Encoder:
    """A sentence encoder: the mean of a model's last states over the tokens of a text, at length 1."""

    def __init__(self, config: RetrieverConfig) -> None:
        """Raises BadInput when there is no such model."""
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        try:
            source = encoder_source(config.encoder)
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            with ONE_AT_A_TIME, quiet():
                self._model = AutoModel.from_pretrained(source, dtype=torch.float32)
        except BadInput as error:
            raise BadInput(f"encoder: {error.message.removeprefix('model: ')}") from error
        except UNREADABLE as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadInput(f"encoder: cannot load {config.encoder!r} as an encoder: {reason}") from error
        self._model.to(device_of(config.device)).eval()
        shape = self._model.config.get_text_config()
        self.dimensions = int(shape.hidden_size)
        # Some models count places from behind their padding token.
        self._limit = min(config.max_tokens, (getattr(shape, "max_position_embeddings", 0) or 1 << 30) - 2)
        self._pad = self._tokenizer.pad_token_id or 0

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts, float32[B, D]; texts of like length are computed together."""
        ids = [
            self._tokenizer(text, truncation=True, max_length=self._limit, verbose=False)["input_ids"] or [self._pad]
            for text in texts
        ]
        vectors = np.zeros((len(ids), self.dimensions), np.float32)
        for batch in batches([len(one) for one in ids]):
            vectors[batch] = self._embedded([ids[i] for i in batch])
        return vectors

    @torch.inference_mode()
    def _embedded(self, ids: Sequence[list[int]]) -> NDArray[np.float32]:
        longest = max(map(len, ids))
        tokens_BL = torch.tensor([[*one, *[self._pad] * (longest - len(one))] for one in ids])
        there_BL = torch.arange(longest) < torch.tensor([[len(one)] for one in ids])
        device = self._model.device
        given: dict[str, Any] = {"input_ids": tokens_BL.to(device), "attention_mask": there_BL.long().to(device)}
        states_BLD = self._model(**given).last_hidden_state
        mean_BD = (states_BLD * there_BL[..., None].to(device)).sum(1)
        vectors: NDArray[np.float32] = torch.nn.functional.normalize(mean_BD, dim=-1).float().cpu().numpy()
        return vectors


def batches(lengths: Sequence[int], most: int = BATCH_TOKENS) -> list[list[int]]:
    """Places of texts in batches of at most so many tokens, each padded to its longest; a long text has its own."""
    cut: list[list[int]] = []
    # Longest first, so that the first of a batch says what it is padded to.
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if cut and lengths[cut[-1][0]] * (len(cut[-1]) + 1) <= most:
            cut[-1].append(i)
        else:
            cut.append([i])
    return cut


class Vectors:
    """Vectors of length 1 by key, in a file that is read by memory map until something is to change."""

    def __init__(self, file: Path, dimensions: int) -> None:
        self._file = file
        found = self._restored() if file.is_file() else None
        self._viewed = found is not None
        self._index: Any = found if self._viewed else Index(ndim=dimensions, metric="cos", dtype="f32")

    def _restored(self) -> Any:
        """What is in the file; None if it is damaged, for it can be made again."""
        try:
            return Index.restore(self._file, view=True)
        except (ValueError, RuntimeError):
            return None

    def __len__(self) -> int:
        return len(self._index)

    def keys(self) -> NDArray[np.uint64]:
        """All keys, uint64[N], in rising order."""
        return np.sort(np.fromiter(self._index.keys, np.uint64, len(self._index)))

    def change(self, gone: NDArray[np.uint64], keys: NDArray[np.uint64], vectors: NDArray[np.float32]) -> None:
        """Forget some keys and add others; in memory only."""
        if self._viewed:
            # A view that is written to ends the process.
            self._index, self._viewed = Index.restore(self._file, view=False), False
        if len(gone):
            self._index.remove(gone)
        if len(keys):
            self._index.add(keys, vectors)

    def save(self, file: Path | None = None) -> None:
        """Put their file, or another one, in the place of an older one, whole or not at all."""
        file = file or self._file
        temporary = file.with_suffix(".tmp")
        self._index.save(temporary)
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)

    def nearest(self, query: NDArray[np.float32], k: int) -> list[tuple[float, int]]:
        """Cosines and keys of the k nearest, and of those that are as near as the last of them."""
        count = len(self._index)

        def fetch(limit: int) -> list[tuple[float, int]]:
            # The graph is asked for more than it is believed.
            wanted = limit if count <= EXACT else limit + WIDER
            found = self._index.search(query, min(wanted, count), exact=count <= EXACT)
            return self.among(query, np.asarray(found.keys, np.uint64))[:limit]

        return with_equals(fetch, k) if count else []

    def among(self, query: NDArray[np.float32], keys: NDArray[np.uint64]) -> list[tuple[float, int]]:
        """Cosines of a query with vectors that are there, and their keys, nearest first."""
        if not len(keys):
            return []
        vectors = np.stack(self._index.get(keys))
        # Row by row, so that a cosine does not depend on what else is asked.
        cosines = (vectors * query).sum(1)
        order = np.lexsort((keys, -cosines))
        return [(float(cosines[i]), int(keys[i])) for i in order]
