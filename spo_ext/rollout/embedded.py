"""Completions of a model in this process, by transformers' generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from spo_ext.modes import evaluating
from spo_ext.rollout.draws import Draw, completion_seeds
from spo_ext.rollout.generation import Generation, Sampling
from spo_ext.store.checks import check_integer, refuse
from spo_ext.store.records import Prompt


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
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, batch_size: int = 64) -> None:
        if not callable(getattr(model, "generate", None)):
            refuse("ModelGenerator", "model", "a model with generate()", type(model))
        check_integer("ModelGenerator", "batch_size", batch_size, 1)
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        """n completions of each prompt, with log-probabilities.

        Raises ValueError for a prompt without token ids, and if the model's logits are NaN.
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
            for start in range(0, len(rows), self._batch_size):
                part = rows[start : start + self._batch_size]
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

    def _ends(self, generation_config: Any) -> list[int]:
        found = getattr(generation_config, "eos_token_id", None)
        if found is None:
            found = getattr(self._tokenizer, "eos_token_id", None)
        if found is None:
            return []
        return [int(token) for token in (found if isinstance(found, list | tuple) else [found])]

    def _complete(
        self,
        ids: list[tuple[int, ...]],
        draw: Draw,
        length: int,
        ends: list[int],
        device: torch.device,
    ) -> Tensor:
        """New tokens [B, T] on the CPU, T <= length, what follows an end token included."""
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


def prompt_ids(owner: str, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Raises ValueError unless every prompt has token ids."""
    for index, prompt in enumerate(prompts):
        if not prompt.token_ids:
            refuse(owner, f"prompts[{index}].token_ids", "at least one token id", prompt.token_ids)
    return [tuple(prompt.token_ids or ()) for prompt in prompts]


def _cut(tokens: Tensor, logprobs: Tensor, ends: list[int]) -> list[Generation]:
    """tokens [B, T], logprobs [B, >= T]."""
    found = []
    is_end = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype))
    for row in range(len(tokens)):
        at = is_end[row].nonzero()
        size = int(at[0]) + 1 if len(at) else tokens.shape[1]
        kept = logprobs[row, :size]
        if not bool(torch.isfinite(kept).all()):
            raise ValueError("ModelGenerator.generate: the logits of the model must not be NaN")
        finish = "eos" if len(at) else "truncated"
        ids = tuple(tokens[row, :size].tolist())
        found.append(Generation(ids, finish, tuple(kept.tolist())))  # type: ignore[arg-type]
    return found


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
