"""Key-value caches for batched decoding: written in place, rows can be repeated and dropped."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from protocols.errors import BadInput

GROWTH = 64


class RowLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """One layer's keys and values [R, heads, length, width] in buffers with room to grow.

    The stock layer copies its whole content for every token; this one copies once in `GROWTH` tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self._length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate empty buffers of the states' shape."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states and return all of them so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[2]
        if end > self.keys.shape[2]:
            # The first states are a whole prompt, and a prompt's cache may never grow.
            room = end + (GROWTH if self._length else 0)
            self.keys, self.values = _with_room(self.keys, room), _with_room(self.values, room)
        self.keys[:, :, self._length : end] = key_states
        self.values[:, :, self._length : end] = value_states
        self._length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens in the cache, padding included."""
        return self._length

    def select(self, rows: torch.Tensor) -> None:
        """Keep the given rows, in the given order; a row may occur several times."""
        self.keys = self.keys.index_select(0, rows)
        self.values = self.values.index_select(0, rows)

    def filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values without the room to grow."""
        return self.keys[:, :, : self._length], self.values[:, :, : self._length]

    @classmethod
    def joined(cls, layers: Sequence["RowLayer"]) -> "RowLayer":
        """Stack the rows of several layers; shorter ones are padded on the left."""
        length = max(layer._length for layer in layers)
        result = cls()
        result.dtype, result.device = layers[0].dtype, layers[0].device
        result.keys = torch.cat([_pad_left(layer.filled()[0], length) for layer in layers])
        result.values = torch.cat([_pad_left(layer.filled()[1], length) for layer in layers])
        result.is_initialized, result._length = True, length
        return result


def new_cache() -> Cache:
    """An empty cache for any number of layers."""
    return Cache(layer_class_to_replicate=RowLayer)


def check_cache(model: Any) -> None:
    """Feed one token. Raises BadInput unless all that the model remembers of it is in a cache of this kind."""
    cache = new_cache()
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    refusal = f"model: cannot sample from {model.config.model_type!r} models: they remember more than keys and values"
    try:
        with torch.inference_mode():
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise BadInput(refusal) from error
    if not cache.layers or any(layer.get_seq_length() != 1 for layer in cache.layers):
        raise BadInput(refusal)


def join_caches(caches: Sequence[Cache]) -> Cache:
    """One cache with the rows of all, padded on the left to one length."""
    if len(caches) == 1:
        return caches[0]
    layers = [RowLayer.joined(parts) for parts in zip(*(cache.layers for cache in caches), strict=True)]
    return Cache(layers=layers)


def select_rows(cache: Cache, rows: torch.Tensor) -> None:
    """Keep the given rows of every layer."""
    for layer in cache.layers:
        layer.select(rows)


def _with_room(states: torch.Tensor, length: int) -> torch.Tensor:
    rows, heads, _, width = states.shape
    grown = states.new_empty((rows, heads, length, width))
    grown[:, :, : states.shape[2]] = states
    return grown


def _pad_left(states: torch.Tensor, length: int) -> torch.Tensor:
    rows, heads, filled, width = states.shape
    if filled == length:
        return states
    # Zeros, not garbage: masked places must not be NaN, because 0 x NaN is NaN.
    return torch.cat([states.new_zeros((rows, heads, length - filled, width)), states], dim=2)
