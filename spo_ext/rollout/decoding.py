"""Completions token by token, where those of one prompt share its cache and finished ones leave.

`model.generate` reads a prompt once for each completion and carries finished rows to the end of the
longest. Whether a model's cache allows more is tried out by `ModelGenerator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from spo_ext.rollout.draws import Draw

_ROOM = 256  # tokens: more would take memory for completions that end early


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    draw: Draw,
    length: int,
    ends: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Draws up to `length` tokens for each row, rows of one prompt next to each other.

    Returns int64 [B, T] on the CPU, T <= length; what follows a row's end token means nothing.
    """
    groups = [(prompt, len(list(rows))) for prompt, rows in groupby(prompts)]
    width = max(len(prompt) for prompt, _ in groups)
    ids = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt, _ in groups])
    lengths = torch.tensor([len(prompt) for prompt, _ in groups], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    cache = roomy_cache(model.config, min(length, _ROOM))
    logits = _read(model, ids.to(device), mask, cache)
    first = torch.tensor([i for i, (_, count) in enumerate(groups) for _ in range(count)])
    cache.batch_select_indices(first.to(device))
    logits, mask = logits[first.to(device)], mask[first.to(device)]
    last = torch.tensor(list(ends), dtype=torch.int64, device=device)
    rows = torch.arange(len(mask), device=device)
    drawn = torch.zeros(len(mask), length, dtype=torch.int64, device=device)
    for column in range(length):
        tokens = draw.take(logits, rows)
        drawn[rows, column] = tokens
        running = torch.isin(tokens, last, invert=True).nonzero()[:, 0]
        if column + 1 == length or not len(running):
            break
        if len(running) < len(rows):
            cache.batch_select_indices(running)
            rows, tokens, mask = rows[running], tokens[running], mask[running]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = _read(model, tokens[:, None], mask, cache)
    return drawn[:, : column + 1].cpu()


def _read(model: Any, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Appends ids [B, n] to the cache; logits [B, V] after the last. mask [B, all columns]."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def roomy_cache(config: PreTrainedConfig, room: int) -> DynamicCache:
    """A cache that holds prompts of any length and room tokens more before it has to grow."""
    cache = DynamicCache(config=config)
    cache.layers = [
        _RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


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
            self._grow((key_states, value_states), begin, end)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = states
        return self._show(end)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Keeps each row that many times, the copies next to each other."""
        rows = torch.arange(len(self._held[0]), device=self.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order; a row may be taken more than once."""
        length = self.get_seq_length()
        if not length:
            return
        size = self._buffers[0].shape[-2]
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

    def _grow(self, new: tuple[Tensor, Tensor], begin: int, end: int) -> None:
        size = end + self._room
        buffers = [states.new_empty(*states.shape[:2], size, states.shape[3]) for states in new]
        if begin:
            for buffer, held in zip(buffers, self._held, strict=True):
                buffer[:, :, :begin] = held
        self._buffers = buffers

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        return self._held
