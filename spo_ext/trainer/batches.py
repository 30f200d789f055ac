"""Prompts and completions as tensors for the model and the loss, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spo_ext.store.checks import refuse

Layout = Literal["row", "rows", "padded", "equal"]


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
        return self.all[:-1]

    @property
    def all(self) -> list[int]:
        return [*self.prompt, *self.completion]


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What the model reads, and where the completions lie in it.

    model_inputs: input_ids and position_ids [B, L], and for "padded" attention_mask [B, L].
    index: int64 [N], the states that predict the tokens of completions, in the flattened batch.
    targets: int64 [N], those tokens.
    cu_seqlens: int64 [S + 1], where each completion starts in index and targets.
    sequences, layout: what `collate` was given, from which smaller batches can be made.
    calls: how often the model is called at least, because other ranks do.
    """

    model_inputs: dict[str, Tensor]
    index: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    sequences: tuple[Tokens, ...] = ()
    layout: Layout = "padded"
    calls: int = 1

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Arguments of a model that answers log-probabilities."""
        inputs = {name: tensor.to(device) for name, tensor in self.model_inputs.items()}
        where = {"logprob_index": self.index, "logprob_targets": self.targets}
        return inputs | {name: tensor.to(device) for name, tensor in where.items()}


def collate(sequences: Sequence[Tokens], layout: Layout, pad_id: int = 0) -> TokenBatch:
    """Tensors on the CPU, with completions in the order of the sequences.

    Layouts:
        "row": all sequences in one row one after the other, for attention that takes lengths.
        "rows": as many in a row as fit beside the longest, so that a mask of each row costs no
            more than padding would; told apart by position_ids that start again at 0.
        "padded": one a row, padding on the right.
        "equal": one a row, all of one length, so that nothing is left to say with a mask. The last
            token is read too, since there are models to which the length itself matters.
    """
    rows = [tokens.all if layout == "equal" else tokens.read for tokens in sequences]
    lengths = list(map(len, rows))
    width = sum(lengths) if layout == "row" else max(lengths)
    places = (
        _places(lengths, width)
        if layout in ("row", "rows")
        else [(i, 0) for i in range(len(lengths))]
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
    for (row, start), tokens, read in zip(places, sequences, rows, strict=True):
        length = len(read)
        ids[row, start : start + length] = torch.tensor(read)
        positions[row, start : start + length] = torch.arange(length)
        mask[row, start : start + length] = 1
        first = row * width + start + len(tokens.prompt) - 1
        index.append(torch.arange(first, first + len(tokens.completion)))
        targets.append(torch.tensor(tokens.completion))
        sizes.append(len(tokens.completion))
    inputs = {"input_ids": ids, "position_ids": positions}
    if layout == "padded":
        inputs = {"input_ids": ids, "attention_mask": mask}
    if layout == "equal":
        inputs = {"input_ids": ids}
    cu_seqlens = torch.tensor(sizes).cumsum(0)
    where = (torch.cat(index), torch.cat(targets), cu_seqlens)
    return TokenBatch(inputs, *where, tuple(sequences), layout)


def company(tokens: Tokens, layout: Layout, limit: int | None) -> int:
    """Sequences with the same number may be in one call of the model: 0, or their length where only
    those of one length may. limit: see `rope_limit`."""
    size = len(tokens.prompt) + len(tokens.completion)
    return size if layout == "equal" or (limit is not None and size > limit) else 0


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
