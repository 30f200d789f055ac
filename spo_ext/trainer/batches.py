"""Prompts and completions as tensors for the model and the loss, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spo_ext.store.checks import refuse

Layout = Literal["row", "rows", "padded"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """One prompt and its completion, as token ids; neither may be empty."""

    prompt: Sequence[int]
    completion: Sequence[int]

    def __post_init__(self) -> None:
        if not self.prompt:
            refuse(
                "SPO", "prompt", "at least one token, which predicts the first of a completion", 0
            )
        if not self.completion:
            refuse("SPO", "completion", "at least one token", 0)

    @property
    def read(self) -> list[int]:
        """What the model reads: the last token predicts nothing."""
        return [*self.prompt, *self.completion][:-1]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What the model reads, and where the completions lie in it.

    model_inputs: input_ids and position_ids [B, L], and for "padded" attention_mask [B, L].
    index: int64 [N], the states that predict the tokens of completions, in the flattened batch.
    targets: int64 [N], those tokens.
    cu_seqlens: int64 [S + 1], where each completion starts in index and targets.
    """

    model_inputs: dict[str, Tensor]
    index: Tensor
    targets: Tensor
    cu_seqlens: Tensor


def collate(sequences: Sequence[Tokens], layout: Layout, pad_id: int = 0) -> TokenBatch:
    """Tensors on the CPU, with completions in the order of the sequences.

    Layouts:
        "row": all sequences in one row one after the other, for attention that takes lengths.
        "rows": as many in a row as fit beside the longest, so that a mask of each row costs no
            more than padding would; told apart by position_ids that start again at 0.
        "padded": one a row, padding on the right.
    """
    lengths = [len(tokens.read) for tokens in sequences]
    width = sum(lengths) if layout == "row" else max(lengths)
    places = (
        _places(lengths, width) if layout != "padded" else [(i, 0) for i in range(len(lengths))]
    )
    height = 1 + max(row for row, _ in places)
    ids = torch.full((height, width), pad_id)
    # Padding counts on from 0 too: to the attention it is one more sequence.
    ends = [0] * height
    for (row, start), length in zip(places, lengths, strict=True):
        ends[row] = max(ends[row], start + length)
    positions = torch.arange(width).repeat(height, 1) - torch.tensor(ends)[:, None]
    mask = torch.zeros(height, width, dtype=torch.int64)
    index, targets, sizes = [], [], [0]
    for (row, start), tokens, length in zip(places, sequences, lengths, strict=True):
        ids[row, start : start + length] = torch.tensor(tokens.read)
        positions[row, start : start + length] = torch.arange(length)
        mask[row, start : start + length] = 1
        first = row * width + start + len(tokens.prompt) - 1
        index.append(torch.arange(first, first + len(tokens.completion)))
        targets.append(torch.tensor(tokens.completion))
        sizes.append(len(tokens.completion))
    inputs = {"input_ids": ids, "position_ids": positions}
    if layout == "padded":
        inputs |= {"position_ids": torch.arange(width).repeat(height, 1), "attention_mask": mask}
    return TokenBatch(inputs, torch.cat(index), torch.cat(targets), torch.tensor(sizes).cumsum(0))


def _places(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Row and first column of each: the longest first, each in the first row with room for it."""
    places = [(0, 0)] * len(lengths)
    used: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, end in enumerate(used) if end + lengths[i] <= width), len(used))
        if row == len(used):
            used.append(0)
        places[i] = (row, used[row])
        used[row] += lengths[i]
    return places
