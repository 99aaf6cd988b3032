"""Caches that hold a prompt's keys and values, or rows of a known size. Each touchpoint names its version.

# B batch, K prompts, P length, M slots, N key/value heads, D head dim
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer  # 5.23: Cache(layers=[...])


class SharedLayer(DynamicLayer):
    """update(k, v) = ([prefix; k], [prefix; v]), with gradient: a cache layer that stores nothing.

    5.23: the layer's `update`, `get_mask_sizes` and `get_seq_length` decide what attention and mask code see.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix = keys, values
        self.keys, self.values = self.prefix  # where the base class looks for the length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.prefix
        return (
            torch.cat([keys.to(key_states.dtype), key_states], dim=-2),
            torch.cat([values.to(value_states.dtype), value_states], dim=-2),
        )


class OwnLayer(DynamicLayer):
    """A growing layer in memory taken once, behind `before` positions that are kept elsewhere.

    5.23: what `update` returns goes to attention, which adds the prefix itself (`Entering.shared`); the lengths
    that mask and position code ask for count the prefix.
    """

    def __init__(self, before: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before, self.room, self.used = before, room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = (
            t.new_empty(*t.shape[:2], self.room, t.shape[3]) for t in (key_states, value_states)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start, self.used = self.used, self.used + key_states.shape[2]
        self.keys[:, :, start : self.used] = key_states
        self.values[:, :, start : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def fill(
        self, row: Tensor, step: Tensor, key: Tensor, value: Tensor, size: tuple[int, int], repeats: int
    ) -> None:
        """Hold keys and values [N, M, D] of slots (row, step) [M] of `size` (rows, slots); each row `repeats` times."""
        for name, part in (("keys", key), ("values", value)):
            whole = part.new_zeros(size[0], part.shape[0], self.room, part.shape[2])  # [B, N, room, D]
            whole[row, :, step] = part.transpose(0, 1)
            setattr(self, name, whole.repeat_interleave(repeats, dim=0) if repeats > 1 else whole)
        self.dtype, self.device, self.is_initialized, self.used = key.dtype, key.device, True, size[1]

    def get_seq_length(self) -> int:
        return self.before + self.used

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for tensor in (self.keys, self.values):
            if tensor is not None:
                tensor[:, :, : self.used] = tensor[:, :, : self.used].index_select(
                    0, beam_idx.to(tensor.device)
                )


def own_cache(layers: int, before: int, room: int) -> Cache:
    """A cache for `room` positions of each row, behind `before` that attention adds."""
    return Cache(layers=[OwnLayer(before, room) for _ in range(layers)])


def prefix_cache(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Tensor,
    dtype: torch.dtype,
    *,
    grows: bool,
    repeats: int = 1,
) -> Cache:
    """Per-layer [K, N, P, D] -> a cache of B rows; one distinct prompt is expanded as a view, never copied.

    grows: a growing cache for generation (its rows repeated for beams); otherwise a read-only one. dtype is
    the model's: a growing layer joins what it is given as it is.
    """

    def spread(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype)
        if tensor.shape[0] == 1:
            return tensor.expand(rows.shape[0] * repeats, -1, -1, -1)
        return tensor[rows.repeat_interleave(repeats)]  # [B * repeats, N, P, D]

    layers: list[Any] = []
    for key, value in zip(keys, values, strict=True):
        if grows:
            layer = DynamicLayer()
            layer.lazy_initialization(key.to(dtype), value.to(dtype))
            layer.keys, layer.values = spread(key), spread(value)
        else:
            layer = SharedLayer(spread(key), spread(value))
        layers.append(layer)
    return Cache(layers=layers)


def fresh_cache(layers: int) -> Cache:
    """An empty cache that keeps every position, also in sliding-window layers."""
    return Cache(layers=[DynamicLayer() for _ in range(layers)])


def cached(cache: Cache) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and values of a cache, per layer [B, N, P, D]."""
    layers: list[Any] = cache.layers
    return tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)
