"""Keys and values of sampling, kept with room for the tokens to come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """keys and values [B, heads, tokens, d] are views of buffers with room for more tokens.

    `DynamicLayer` copies all that it holds for every token that is added, which is over
    a quarter of the time of sampling from a small policy.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._buffers: list[Tensor] = []  # of keys and of values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes n tokens, both arguments [B, heads, n, d], behind those that are there."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if not self._buffers or end > self._buffers[0].shape[-2]:
            self._grow(key_states, begin, end)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = states
        return self._show(end)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """The keys and values of each row, repeats times."""
        super().batch_repeat_interleave(repeats)
        self._buffers = []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order."""
        length = self.get_seq_length()
        if not length:
            return
        size = length + self._room if not self._buffers else self._buffers[0].shape[-2]
        kept = []
        for held in self._held:
            buffer = held.new_empty(len(indices), held.shape[1], size, held.shape[3])
            torch.index_select(held, 0, indices, out=buffer[:, :, :length])
            kept.append(buffer)
        self._buffers = kept
        self._show(length)

    @property
    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _grow(self, states: Tensor, begin: int, end: int) -> None:
        batch, heads, _, width = states.shape
        size = end + self._room
        self._buffers = [states.new_empty(batch, heads, size, width) for _ in range(2)]
        if begin:
            for buffer, held in zip(self._buffers, self._held, strict=True):
                buffer[:, :, :begin] = held

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        return self._held


def roomy_cache(config: PreTrainedConfig, room: int) -> DynamicCache:
    """A cache that holds prompts of any length and room tokens more before it has to grow."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(room) for _ in cache.layers]
    return cache
