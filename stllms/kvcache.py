"""A key/value cache for batches whose rows come and go.

``transformers``' own dynamic cache copies all keys and values at every step, and has no way
to let one row out and another in. :class:`BatchCache` writes into buffers that double, keeps
rows, drops leading columns that are padding for everybody, and takes rows of a second cache.
Keys and values are ``[B, heads, T, head_dim]``; padding is on the left.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class BufferedLayer(DynamicLayer):
    """One layer's keys and values as views into buffers with room to grow."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.buffers: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Called by transformers before the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Append ``[B, heads, t, head_dim]`` and return everything so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.length + key_states.shape[-2]
        if not self.buffers or stop > self.buffers[0].shape[-2]:
            self._grow((key_states, value_states), 2 * stop)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : stop] = states
        return self._view(stop)

    def _grow(self, states: tuple[Tensor, Tensor], capacity: int) -> None:
        grown = []
        for index, state in enumerate(states):
            rows, heads, _, width = state.shape
            buffer = state.new_zeros(rows, heads, capacity, width)
            if self.buffers:
                buffer[:, :, : self.length] = self.buffers[index][:, :, : self.length]
            grown.append(buffer)
        self.buffers = grown

    def _view(self, length: int) -> tuple[Tensor, Tensor]:
        self.length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)
        return self.keys, self.values

    def put(self, states: tuple[Tensor, Tensor]) -> None:
        """Replace everything by ``states``."""
        self.buffers, self.length = [], 0
        self.is_initialized = True
        self.update(*states)


class BatchCache(Cache):
    """The cache of a whole decoder, ``layers`` of :class:`BufferedLayer`."""

    def __init__(self, n_layers: int) -> None:
        super().__init__(layers=[BufferedLayer() for _ in range(n_layers)])

    def select(self, rows: Tensor, first: int) -> None:
        """Keep ``rows`` (indices) and the columns from ``first`` on."""
        for layer in self.layers:
            layer.put((layer.keys[rows, :, first:], layer.values[rows, :, first:]))

    def join(self, other: BatchCache) -> None:
        """Add the rows of ``other`` below; the shorter of the two is padded on the left."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            width = max(mine.length, theirs.length)
            mine.put(
                (
                    torch.cat([_left(mine.keys, width), _left(theirs.keys, width)]),
                    torch.cat([_left(mine.values, width), _left(theirs.values, width)]),
                )
            )


def _left(states: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))
