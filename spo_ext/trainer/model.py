"""The policy's forward pass from token ids to log-probabilities of completions, without logits.

`answer_logprobs` makes a causal language model of transformers answer one more kind of call:

    model(input_ids=..., position_ids=..., completions=(index, targets)) -> (logprobs, entropy)

The call goes through the model's own `forward`, so that DDP, FSDP2, autocast and PEFT, which all
wrap that, work as they do for any other loss.
"""

from __future__ import annotations

import functools
import types
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import spo_ext
from spo_ext.store.checks import refuse

Completions = tuple[Tensor, Tensor]
_PROBE_LENGTHS = (6, 4)


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """What every log-probability of a run has in common.

    entropy: also return the entropy of each token's softmax, for the log. See
    `spo_ext.token_logprobs` for the rest.
    """

    temperature: float = 1.0
    max_dropped_mass: float = 0.0
    workspace_mib: int = 64
    entropy: bool = True


def answer_logprobs(model: nn.Module, settings: HeadSettings) -> None:
    """Changes `forward` of this model, or of the model inside PEFT's, in place.

    With `completions=(index [N], targets [N])`, both int64, it returns log-probabilities in nats,
    float32 [N], of targets after the tokens at index, counted over the flattened batch, and their
    entropies ([0] without `settings.entropy`). Any other call does what it did before.

    Raises ValueError for a model without a decoder and a plain linear head, and for one whose own
    logits say something else than the head does.
    """
    causal_lm = base_model(model)
    _check_head(causal_lm)
    original = causal_lm.forward
    if hasattr(original, "spo_original"):  # a second trainer in one process
        original = original.spo_original
    scales = _scales(causal_lm)

    @functools.wraps(original)
    def forward(
        self: Any, *args: Any, completions: Completions | None = None, **kwargs: Any
    ) -> Any:
        if completions is None:
            return original(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}
        index, targets = completions
        hidden = self.get_decoder()(**given, use_cache=False).last_hidden_state
        chosen = hidden.flatten(0, 1)[index]
        head = self.get_output_embeddings()
        result: Any = spo_ext.token_logprobs(
            chosen,
            _whole(head.weight),
            targets,
            bias=None if head.bias is None else _whole(head.bias),
            temperature=settings.temperature,
            max_dropped_mass=settings.max_dropped_mass,
            workspace_mib=settings.workspace_mib,
            return_entropy=settings.entropy,
            **scales,
        )
        if settings.entropy:
            logprobs, entropy = result
            return logprobs, entropy.detach()
        return result, result.new_zeros(0)

    forward.spo_original = original  # type: ignore[attr-defined]
    causal_lm.forward = types.MethodType(forward, causal_lm)
    _check_logits(model, causal_lm, settings.temperature)


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
    device = next(model.parameters()).device
    rows = [_probe_ids(base_model(model), length, device) for length in _PROBE_LENGTHS]
    packed = torch.cat(rows, dim=1)
    positions = torch.cat([torch.arange(row.shape[1], device=device) for row in rows])
    with _evaluating(model):
        try:
            together = _probe(model, packed, positions[None])
        except (TypeError, ValueError, NotImplementedError, RuntimeError):
            return False
        alone = [
            _probe(model, row, torch.arange(row.shape[1], device=device)[None]) for row in rows
        ]
    cut = _PROBE_LENGTHS[0]
    # The last state of the first row predicts the first token of the second only when packed.
    parts = (together[: cut - 1], together[cut:])
    worst = max(float((a - b).abs().max()) for a, b in zip(parts, alone, strict=True))
    return worst < _tolerance(model)


def _whole(parameter: Tensor) -> Tensor:
    """Gathers a head that FSDP2 or tensor parallelism left in parts."""
    gather = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


def _check_head(causal_lm: Any) -> None:
    for name in ("get_decoder", "get_output_embeddings"):
        if not callable(getattr(causal_lm, name, None)):
            refuse("SPO", "model", f"a causal language model with {name}()", type(causal_lm))
    head = causal_lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        refuse("SPO", "model's head", "an nn.Linear without an adapter of its own", type(head))


def _scales(causal_lm: Any) -> dict[str, Any]:
    """How the model makes logits of products, by the names that configs have for it."""
    config = causal_lm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return {"logit_scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


@torch.no_grad()
def _check_logits(model: nn.Module, causal_lm: Any, temperature: float) -> None:
    """A model may do to its logits what no config says: compare with what it says itself."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    ids = _probe_ids(causal_lm, _PROBE_LENGTHS[0], device)
    with _evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature
        ours = _probe(model, ids, torch.arange(ids.shape[1], device=device)[None])
    theirs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    error = float((ours - theirs).abs().max())
    if not error < _tolerance(model):
        raise ValueError(
            f"SPO: log-probabilities from the head of {type(causal_lm).__name__} must be those of "
            f"its logits, got a difference of {error:.3g}: it changes its logits in a way that "
            "spo_ext does not know"
        )


def _probe_ids(causal_lm: Any, length: int, device: torch.device) -> Tensor:
    size = causal_lm.get_input_embeddings().weight.shape[0]
    return (torch.arange(1, length + 1, device=device) * 7919 % size)[None]


def _probe(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    index = torch.arange(ids.shape[1] - 1, device=ids.device)
    found: tuple[Tensor, Tensor] = model(
        input_ids=ids, position_ids=positions, completions=(index, ids[0, 1:])
    )
    return found[0]


def _tolerance(model: nn.Module) -> float:
    """Far above rounding, far below what a forgotten scale or mask would change."""
    return 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.1


class _evaluating:
    """Without dropout, for a while."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._training = model, model.training

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_error: object) -> None:
        self._model.train(self._training)
