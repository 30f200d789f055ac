"""The policy as the trainer calls it: from token ids to log-probabilities of completions.

`spo_ext.integrations.huggingface` puts them into the model's own forward pass; here is what is
tried out before a run relies on them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spo_ext.integrations.huggingface import add_token_logprobs
from spo_ext.modes import evaluating
from spo_ext.store.checks import refuse
from spo_ext.trainer.batches import Layout, TokenBatch

_FLASH = ("flash_attention_2", "flash_attention_3")
_PROBE_LENGTHS = (6, 4)


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """What every log-probability of a run has in common; see `spo_ext.token_logprobs`."""

    temperature: float = 1.0
    max_dropped_mass: float = 0.0
    workspace_mib: int = 64


def answer_logprobs(model: Any, settings: HeadSettings) -> None:
    """Lets the model answer `completion_logprobs`, and compares the answer with its logits.

    Raises TypeError for a model without a plain linear head, ValueError for one whose own logits
    say something else than the head does.
    """
    add_token_logprobs(
        model,
        temperature=settings.temperature,
        max_dropped_mass=settings.max_dropped_mass,
        workspace_mib=settings.workspace_mib,
    )
    _check_logits(model, settings.temperature)


def completion_logprobs(
    model: nn.Module, batch: TokenBatch, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the completions, float32 [N] in nats, and their entropies if asked for.

    In one call of the model, so that DDP, FSDP2, autocast and PEFT do what they do around it.
    """
    device = next(base_model(model).parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.model_inputs.items()}
    where = {"logprob_index": batch.index.to(device), "logprob_targets": batch.targets.to(device)}
    found: Any = model(**inputs, **where, logprob_entropy=entropy)
    return (found[0], found[1].detach()) if entropy else (found, None)


def base_model(model: nn.Module) -> Any:
    """The causal language model of transformers inside PEFT's, or the model itself."""
    get_base = getattr(model, "get_base_model", None)
    return model if get_base is None else get_base()


def adapters_off(model: nn.Module) -> AbstractContextManager[object]:
    """A context in which PEFT's adapters add nothing; without adapters it does nothing."""
    disable = getattr(model, "disable_adapter", None)
    return nullcontext() if disable is None else disable()


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


@torch.no_grad()
def supports_packing(model: nn.Module) -> bool:
    """Whether sequences in one row, told apart by their position_ids, leave each other alone."""
    rows = [_probe_ids(model, length) for length in _PROBE_LENGTHS]
    with evaluating(model):
        try:
            together = _probe(model, rows)
        except (TypeError, ValueError, NotImplementedError, RuntimeError):
            return False
        alone = torch.cat([_probe(model, [row]) for row in rows])
    return float((together - alone).abs().max()) < _tolerance(model)


def choose_layout(packing: str, model: nn.Module) -> Layout:
    """How sequences lie in a batch; flash attention takes one row, the others a mask of each row.

    packing: padded, packed, or auto for packed where the model allows it.

    Raises ValueError if packing is asked for and the model mixes up what is packed.
    """
    if packing == "padded":
        return "padded"
    if supports_packing(model):
        attention = getattr(base_model(model).config, "_attn_implementation", "")
        return "row" if attention in _FLASH else "rows"
    if packing == "packed":
        refuse("SPO", "packing", "auto or padded for this model, which mixes packed rows", "packed")
    return "padded"


@torch.no_grad()
def _check_logits(model: nn.Module, temperature: float) -> None:
    """A model may do to its logits what no config says: compare with what it says itself."""
    if next(model.parameters()).device.type == "meta":
        return
    ids = _probe_ids(model, _PROBE_LENGTHS[0])
    with evaluating(model):
        output: Any = model(input_ids=ids[None], use_cache=False)
        ours = _probe(model, [ids])
    # Virtual tokens of prompt learning come first.
    logits = output.logits[0, -len(ids) : -1].float() / temperature
    theirs = logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
    error = float((ours - theirs).abs().max())
    if not error < _tolerance(model):
        raise ValueError(
            f"SPO: log-probabilities from the head of {type(base_model(model)).__name__} must be "
            f"those of its logits, got a difference of {error:.3g}: it changes its logits in a way "
            "that spo_ext does not know"
        )


def _probe_ids(model: nn.Module, length: int) -> Tensor:
    table = base_model(model).get_input_embeddings().weight
    return torch.arange(1, length + 1, device=table.device) * 7919 % len(table)


def _probe(model: nn.Module, rows: list[Tensor]) -> Tensor:
    """Log-probabilities of all tokens of each row but its first, with the rows packed into one."""
    starts = torch.tensor([0] + [len(row) for row in rows]).cumsum(0).tolist()
    index = [torch.arange(a, a + len(row) - 1) for a, row in zip(starts, rows, strict=False)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    inputs = {"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}
    targets = torch.cat([row[1:] for row in rows])
    ends = torch.tensor([0, len(targets)])
    return completion_logprobs(model, TokenBatch(inputs, torch.cat(index), targets, ends))[0]


def _tolerance(model: nn.Module) -> float:
    """Far above rounding, far below what a forgotten scale or mask would change."""
    return 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.1
