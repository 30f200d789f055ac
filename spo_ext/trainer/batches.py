"""Prompts and completions as tensors for the model and the loss, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spo_ext.checks import refuse
from spo_ext.store import Trajectory

Layout = Literal["shared", "row", "rows", "padded", "equal"]

# Computing a token costs as much as looking at so many others: six times a hidden size of 128. With
# a larger one sharing is worth more.
_TOKEN_COST = 768


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the model reads first, and what follows, as token ids; neither may be empty.

    mask: which of the completion the policy wrote, at least one; None if all. The others are read
    and never predicted.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    mask: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            refuse(
                "SPO", "prompt", "at least one token, which predicts the first of a completion", 0
            )
        if not self.completion:
            refuse("SPO", "completion", "at least one token", 0)

    @property
    def places(self) -> Tensor:
        """int64: where in the completion the policy's tokens are."""
        if self.mask is None:
            return torch.arange(len(self.completion))
        return torch.tensor(self.mask).nonzero()[:, 0]

    @property
    def read(self) -> list[int]:
        """What the model reads: the last token predicts nothing."""
        return self.all[:-1]

    @property
    def all(self) -> list[int]:
        return [*self.prompt, *self.completion]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def tokens_of(trajectory: Trajectory, prompt_ids: Sequence[int]) -> list[Tokens]:
    """Those of each segment in which the policy wrote, without what nobody answered to."""
    if trajectory.completion_mask is None and trajectory.contexts is None:
        return [Tokens(prompt_ids, trajectory.token_ids)]
    found = []
    for context, ids, mask in trajectory.segments(prompt_ids):
        if mask is None:
            found.append(Tokens(context, ids))
        elif any(mask):
            end = len(mask) - mask[::-1].index(True)
            found.append(Tokens(context, ids[:end], mask[:end]))
    return found


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What the model reads, and where the completions lie in it.

    model_inputs: input_ids and position_ids [B, L], and for "padded" attention_mask [B, L].
    index: int64 [N], the states that predict the policy's tokens, in the flattened batch.
    targets: int64 [N], those tokens.
    cu_seqlens: int64 [S + 1], where those of each sequence start in index and targets.
    sequences, layout: what `collate` was given, from which smaller batches can be made.
    calls: how often the model is called at least, because other ranks do.
    parts: int64 [2, B, L] for "shared", the prompt or completion that each column belongs to, and
        the prompt that it sees besides.
    """

    model_inputs: dict[str, Tensor]
    index: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    sequences: tuple[Tokens, ...] = ()
    layout: Layout = "padded"
    calls: int = 1
    parts: Tensor | None = None

    def inputs_on(self, device: torch.device) -> dict[str, Tensor]:
        """Arguments of any model. The mask of "shared", bool [B, 1, L, L], is made there."""
        inputs = {name: tensor.to(device) for name, tensor in self.model_inputs.items()}
        if self.parts is not None:
            own, besides = self.parts.to(device)[..., None]
            of_key = own.transpose(1, 2)
            inputs["attention_mask"] = ((own == of_key) | (besides == of_key)).tril()[:, None]
        return inputs

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Arguments of a model that answers log-probabilities."""
        where = {"logprob_index": self.index, "logprob_targets": self.targets}
        return self.inputs_on(device) | {name: tensor.to(device) for name, tensor in where.items()}


def collate(sequences: Sequence[Tokens], layout: Layout, pad_id: int = 0) -> TokenBatch:
    """Tensors on the CPU, with completions in the order of the sequences.

    Layouts:
        "shared": completions of one prompt behind one copy of it, each seeing it and itself, where
            that is less to compute; else a copy for each. Packed as "rows" are, with a mask.
        "row": all sequences in one row one after the other, for attention that takes lengths.
        "rows": as many in a row as fit beside the longest, so that a mask of each row costs no
            more than padding would; told apart by position_ids that start again at 0.
        "padded": one a row, padding on the right.
        "equal": one a row, all of one length, so that nothing is left to say with a mask. The last
            token is read too, since there are models to which the length itself matters.
    """
    if layout == "shared":
        return collate_shared(sequences, pad_id)
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
        own = tokens.places
        index.append(first + own)
        targets.append(torch.tensor(tokens.completion)[own])
        sizes.append(len(own))
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
    size = len(tokens)
    return size if layout == "equal" or (limit is not None and size > limit) else 0


def collate_shared(
    sequences: Sequence[Tokens], pad_id: int = 0, *, always: bool = False
) -> TokenBatch:
    """The layout "shared" of `collate`; always: whatever it costs."""
    by_prompt: dict[Sequence[int], list[int]] = {}
    for i, tokens in enumerate(sequences):
        by_prompt.setdefault(tuple(tokens.prompt), []).append(i)
    together, apart = list(by_prompt.values()), [[i] for i in range(len(sequences))]
    choices = [together] if always else [together, apart]
    groups = min(choices, key=lambda groups: _cost(_lengths(sequences, groups)))
    lengths = _lengths(sequences, groups)
    width = max(lengths)
    places = _places(lengths, width)
    shape = (1 + max(row for row, _ in places), width)
    ids, positions = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    of_column = torch.full((2, *shape), -1)
    index = [torch.empty(0)] * len(sequences)
    parts = 0
    for group, length, (row, start) in zip(groups, lengths, places, strict=True):
        prompt = sequences[group[0]].prompt
        end = start + len(prompt)
        ids[row, start:end] = torch.tensor(prompt)
        positions[row, start:end] = torch.arange(len(prompt))
        of_column[0, row, start:end] = parts
        of_column[1, row, start : start + length] = parts
        last_of_prompt = torch.tensor([row * width + end - 1])
        for i in group:
            read = torch.tensor(sequences[i].completion)[:-1]
            parts += 1
            columns = slice(end, end + len(read))
            ids[row, columns] = read
            positions[row, columns] = len(prompt) + torch.arange(len(read))
            of_column[0, row, columns] = parts
            behind = row * width + torch.arange(end, end + len(read))
            index[i] = torch.cat([last_of_prompt, behind])[sequences[i].places]
            end += len(read)
        parts += 1
    inputs = {"input_ids": ids, "position_ids": positions}
    targets = torch.cat([torch.tensor(tokens.completion)[tokens.places] for tokens in sequences])
    sizes = torch.tensor([0, *map(len, index)])
    where = (torch.cat(index), targets, sizes.cumsum(0))
    return TokenBatch(inputs, *where, tuple(sequences), "shared", parts=of_column)


def _lengths(sequences: Sequence[Tokens], groups: Sequence[Sequence[int]]) -> list[int]:
    """Tokens of each group, its prompt once."""
    return [
        len(sequences[group[0]].prompt) + sum(len(sequences[i].completion) - 1 for i in group)
        for group in groups
    ]


def _cost(lengths: Sequence[int]) -> int:
    return sum(lengths) * (_TOKEN_COST + max(lengths))


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
