"""Completions of a model in this process, where those of one prompt share its cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from spo_ext.checks import check_integer, refuse
from spo_ext.integrations.agreement import distance, rope_limit, rounded, undisturbed, window
from spo_ext.integrations.heads import inside, longest, ordinary_tokens
from spo_ext.models import evaluating
from spo_ext.rollout.generation import Draw, Generation, Sampling, completion_seeds
from spo_ext.store.records import Prompt

Shared = Literal["any", "equal", "none"]  # prompts of any length share a batch, of one, or none do

_PROBES = (9, 4, 1)  # lengths of prompts; the first goes on past windows of attention
_DRAWN = 4
_NAN = "ModelGenerator.generate: the logits of the model must not be NaN"


class ModelGenerator:
    """Generator of a causal language model of transformers, with PEFT's adapters or without.

    Args:
        model: anything with transformers' `generate`; take it out of DDP first.
        tokenizer: of transformers; asked for the end and the padding token where the model's
            generation_config names none.
        batch_size: completions generated at once.

    The distribution is softmax(logits / temperature) within top_p and nothing else: penalties,
    top_k and the like in the model's generation_config are not applied, only its end tokens.

    A completion depends on the seed, the model and its prompt, not on the other prompts of the
    batch, except that arithmetic in batches of other shapes rounds differently. No random state
    of PyTorch is read or moved.

    The first call draws a few tokens for prompts of different lengths, and compares with the
    model's own logits. Where its cache allows it, completions of one prompt share the prompt's and
    leave the batch when they end (`decode`); else they are those of `model.generate`. Where padding
    on the left changes what is drawn, only prompts of one length share a batch, as do prompts that
    reach the length beyond which rotary frequencies follow from the longest (`rope_limit`); where a
    batch changes it, completions are drawn one at a time.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, batch_size: int = 64) -> None:
        if not callable(getattr(model, "generate", None)):
            refuse("ModelGenerator", "model", "a model with generate()", type(model))
        check_integer("ModelGenerator", "batch_size", batch_size, 1)
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._shared: Shared | None = None
        self._sharing_cache = False

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        """n completions of each prompt, with log-probabilities.

        Raises ValueError for a prompt without token ids, if the model's logits are NaN, and for a
        model that draws from something else than its own logits.
        """
        ids = prompt_ids("ModelGenerator.generate", prompts)
        seeds = completion_seeds(sampling.seed, ids, sampling.n)
        # Prompts of like length share a batch, which spares padding.
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        rows = [(index, k) for index in order for k in range(sampling.n)]
        done: dict[tuple[int, int], Generation] = {}
        device = self._model.get_input_embeddings().weight.device
        with _on(device), evaluating(self._model), _plain_generation(self._model) as own:
            ends = self._ends(own)
            shared = self._shares(max(map(len, ids), default=0) + sampling.max_new_tokens)
            for part in _batches(rows, ids, self._batch_size, shared):
                part_ids = [ids[index] for index, _ in part]
                draw = Draw(
                    [seeds[index][k] for index, k in part],
                    sampling.temperature,
                    sampling.top_p,
                    sampling.max_new_tokens,
                )
                new = self._complete(part_ids, draw, sampling.max_new_tokens, ends, device)
                done.update(zip(part, _cut(new, draw.logprobs(), ends), strict=True))
        return [[done[index, k] for k in range(sampling.n)] for index in range(len(ids))]

    def _shares(self, longest: int) -> Shared:
        """Which prompts may share a batch, when the longest has so many tokens in the end."""
        if self._shared is None:
            self._shared = self._try_sharing()
        limit = rope_limit(inside(self._model).config)
        beyond = limit is not None and longest > limit
        return "equal" if beyond and self._shared == "any" else self._shared

    def _try_sharing(self) -> Shared:
        """What lets prompts draw from the logits that the model gives each alone.

        Raises ValueError if nothing does.
        """
        words = ordinary_tokens(self._model).tolist()
        most = longest(self._model) - _DRAWN
        sizes = [min(size, most) for size in (_PROBES[0] + window(self._model), *_PROBES[1:])]
        prompts = [tuple(words[i % len(words)] for i in range(3, 3 + size)) for size in sizes]
        attempts: list[tuple[Shared, bool, list[list[tuple[int, ...]]]]] = [
            ("any", True, [[ids for ids in prompts for _ in range(2)]]),
            ("any", False, [prompts]),
            ("equal", True, [[ids, ids] for ids in prompts]),
            ("equal", False, [[ids, ids] for ids in prompts]),
            ("none", False, [[ids] for ids in prompts]),
        ]
        if any(hasattr(weight, "to_local") for weight in self._model.parameters()):
            # Weights in parts take all ranks in every call, which generate sees to.
            attempts = [attempt for attempt in attempts if not attempt[1]]
        got = ""
        for shared, self._sharing_cache, batches in attempts:
            try:
                found = [self._compare(batch) for batch in batches]
            except Exception as error:  # whatever the code of a model may raise
                got = f"{type(error).__name__}: {error}"
                continue
            if any(math.isnan(difference) for difference, _ in found):
                raise ValueError(_NAN)
            if all(difference <= allowed for difference, allowed in found):
                return shared
            got = f"a difference of {max(difference for difference, _ in found):.3g}"
        raise ValueError(
            f"ModelGenerator.generate: {type(inside(self._model)).__name__} must draw from the "
            f"logits that it gives a prompt and its completion alone, got {got}"
        )

    def _compare(self, prompts: list[tuple[int, ...]]) -> tuple[float, float]:
        """How far what is drawn is from the model's own logits, and how far rounding may take it,
        root mean squares over a completion."""
        device = self._model.get_input_embeddings().weight.device
        draw = Draw(range(len(prompts)), 1.0, 1.0, _DRAWN)
        # Some rows end, and leave the others' cache.
        ends = ordinary_tokens(self._model)[::3].tolist() if self._sharing_cache else []
        with undisturbed(self._model):
            tokens = self._complete(prompts, draw, _DRAWN, ends, device)
            drawn = _cut(tokens, draw.logprobs(), ends)
            rows = [
                (torch.tensor([*ids, *new.token_ids], device=device), len(new.token_ids))
                for ids, new in zip(prompts, drawn, strict=True)
            ]
            own, sizes = zip(*(self._own(*row) for row in rows), strict=True)
            with rounded(self._model):
                noise = distance([self._own(*row)[0] for row in rows], own)
        logprobs = [torch.tensor(new.logprobs) for new in drawn]
        return distance(logprobs, own), 3 * noise + 1e-5 + max(sizes)

    def _own(self, row: Tensor, count: int) -> tuple[Tensor, float]:
        """Log-probabilities of the last tokens, and what rounding their logits may change."""
        logits = self._model(input_ids=row[None], use_cache=False).logits[0, -count - 1 : -1]
        logprobs = logits.float().log_softmax(-1).gather(-1, row[-count:, None])
        step = torch.finfo(logits.dtype).eps * float(logits.abs().max())
        return logprobs.squeeze(-1).cpu(), step

    def _ends(self, generation_config: Any) -> list[int]:
        found = getattr(generation_config, "eos_token_id", None)
        if found is None:
            found = getattr(self._tokenizer, "eos_token_id", None)
        if found is None:
            return []
        words = len(self._model.get_input_embeddings().weight)  # others cannot be drawn
        ends = found if isinstance(found, list | tuple) else [found]
        return [int(token) for token in ends if token < words]

    def _complete(
        self,
        ids: list[tuple[int, ...]],
        draw: Draw,
        length: int,
        ends: list[int],
        device: torch.device,
    ) -> Tensor:
        """New tokens [B, T] on the CPU, T <= length, what follows an end token included."""
        if self._sharing_cache:
            from spo_ext.rollout.embedded import decode  # which needs transformers

            return decode(self._model, ids, draw, length, ends, device)
        pad = ends[0] if ends else 0  # masked before a prompt, cut off behind an end
        longest = max(map(len, ids))
        tokens = torch.full((len(ids), longest), pad)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(ids):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        output = self._model.generate(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            generation_config=_generation_config(
                max_new_tokens=length,
                do_sample=False,  # the processor draws, and leaves one token to choose
                eos_token_id=ends or None,
                pad_token_id=pad,
                use_cache=True,
            ),
            logits_processor=[draw],
        )
        new: Tensor = output[:, longest : longest + length].cpu()
        return new


def _batches(
    rows: list[tuple[int, int]], ids: Sequence[tuple[int, ...]], size: int, shared: Shared
) -> Iterator[list[tuple[int, int]]]:
    """Up to size rows that may share a batch, in order."""
    size = 1 if shared == "none" else size
    for _, group in itertools.groupby(
        rows, lambda row: len(ids[row[0]]) if shared == "equal" else 0
    ):
        together = list(group)
        for start in range(0, len(together), size):
            yield together[start : start + size]


def prompt_ids(owner: str, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Raises ValueError unless every prompt has token ids."""
    for index, prompt in enumerate(prompts):
        if not prompt.token_ids:
            refuse(owner, f"prompts[{index}].token_ids", "at least one token id", prompt.token_ids)
    return [tuple(prompt.token_ids or ()) for prompt in prompts]


def _cut(tokens: Tensor, logprobs: Tensor, ends: list[int]) -> list[Generation]:
    """tokens [B, T], logprobs [B, >= T]."""
    is_end = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype))
    ended = is_end.any(1).tolist()
    sizes = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])
    inside = torch.arange(logprobs.shape[1]) < sizes[:, None]
    if not bool(torch.isfinite(logprobs[inside]).all()):
        raise ValueError(_NAN)
    rows = zip(tokens.tolist(), logprobs.tolist(), sizes.tolist(), ended, strict=True)
    return [
        Generation(tuple(ids[:size]), "eos" if end else "truncated", tuple(known[:size]))
        for ids, known, size, end in rows
    ]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one of this thread: each begins with the first, whatever the others
    set, and kernels are launched there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _plain_generation(model: Any) -> Iterator[Any]:
    """Without the model's own generation_config, which generate would take its defaults from."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = owner.generation_config
    owner.generation_config = _generation_config()
    try:
        yield own
    finally:
        owner.generation_config = own


def _generation_config(**fields: Any) -> Any:
    import transformers

    make: Any = transformers.GenerationConfig
    return make(**fields)


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
