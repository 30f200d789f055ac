"""Token log-probabilities from inside the forward pass of a Transformers model, without logits.

Inside, because wrappers work there: DDP and FSDP must see one call of the model per backward pass,
so taking `model.model` and `model.lm_head` apart is right on one process only.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from spo_ext.head import HeadOptions, token_logprobs
from spo_ext.integrations.heads import head_input, read_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_token_logprobs(
    model: PreTrainedModel,
    *,
    temperature: float = 1.0,
    max_dropped_mass: float = 0.0,
    workspace_mib: int = 64,
) -> None:
    """Lets `model(..., logprob_targets=targets)` return log-probabilities instead of logits.

    Every other call of the model, `generate` included, stays as it was. Call it on the model
    itself, before or after PEFT wraps it, and before DDP, FSDP or Accelerate do.

    targets is int64 [B, T] like input_ids, not shifted: targets[b, t] is the token at position t,
    or -100 where it does not count. The result is float32 [B, T - 1], entry t for the token at
    t + 1, 0 where it does not count; with `logprob_entropy=True`, a pair with the entropies of the
    same shape, nats. Logit scale and softcap are those of the model's config.

    With `logprob_index` too, both are int64 [N]: targets[i] is the token after the one at index[i],
    counted over the flattened batch, as for sequences that are packed. The result is [N].

    Args:
        model: a causal language model of Transformers, or a PEFT model around one.
        temperature: > 0, that of the sampler; divides the logits.
        max_dropped_mass, workspace_mib: see `spo_ext.token_logprobs`.

    Raises:
        TypeError: if the model has no LM head that is a plain linear layer. An adapter on the head
            is not one: its product with the hidden states is more than hidden weight^T.
        ValueError: for a temperature that is not > 0.
    """
    if not temperature > 0:
        raise ValueError(f"add_token_logprobs: temperature must be > 0, got {temperature}")
    inside = getattr(model, "get_base_model", None)  # of a PEFT model
    model = model if inside is None else inside()
    _linear_head(model)
    scales = _head_scales(model.config.get_text_config())
    options: HeadOptions = {"temperature": temperature}
    options["max_dropped_mass"] = max_dropped_mass
    options["workspace_mib"] = workspace_mib
    # Unbound, so that a deep copy of the model calls itself and not the model it was copied from.
    method = isinstance(model.forward, types.MethodType)
    original = getattr(model.forward, "__func__", model.forward)
    reading = None if _is_hollow(model) else read_head(model, model.forward, scales)

    # The signature of the class, because `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        logprob_targets: Tensor | None = None,
        logprob_index: Tensor | None = None,
        logprob_entropy: bool = False,
        **inputs: Any,
    ) -> Any:
        if logprob_targets is None:
            return original(self, *args, **inputs) if method else original(*args, **inputs)
        # Wrappers such as PEFT's pass on arguments that nobody gave.
        given = {name: value for name, value in inputs.items() if value is not None}
        given["use_cache"] = False
        plain = functools.partial(original, self) if method else original
        nonlocal reading
        if reading is None:
            reading = read_head(self, plain, scales)
        if reading.of_base:
            states = self.base_model(*args, **given).last_hidden_state
        else:
            states = head_input(self, plain, *args, **given)
        head = _linear_head(self)
        if logprob_index is not None:
            hidden, targets = states.flatten(0, 1)[logprob_index], logprob_targets
        else:
            hidden, targets = states[:, :-1], logprob_targets[:, 1:]
        device = head.weight.device  # with device_map the states may be on another one
        hidden, targets = hidden.to(device), targets.to(device)
        words = slice(reading.vocabulary)
        weight = _whole(head.weight)[words]
        call: HeadOptions = {
            **options,
            **reading.scales,
            "bias": None if head.bias is None else _whole(head.bias)[words],
        }
        if logprob_entropy:
            return token_logprobs(hidden, weight, targets, return_entropy=True, **call)
        return token_logprobs(hidden, weight, targets, **call)

    vars(forward)["temperature"] = temperature
    vars(model)["forward"] = types.MethodType(forward, model)


def _linear_head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
        raise TypeError(
            "add_token_logprobs: the model's LM head must be a linear layer without an adapter, "
            f"got {type(head).__name__}"
        )
    return head


def _is_hollow(model: nn.Module) -> bool:
    """Whether weights are still to come: on the meta device, or in parts elsewhere (ZeRO-3)."""
    return any(one.is_meta or one.numel() == 0 for one in model.parameters())


def _whole(parameter: Tensor) -> Tensor:
    """The parameter, gathered if FSDP2 keeps it in parts."""
    gather: Callable[[], Tensor] | None = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


def _head_scales(config: Any) -> HeadOptions:
    """Logit scale and softcap, by the names that the models of Transformers give them."""
    scales: HeadOptions = {}
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scales["logit_scale"] = float(getattr(config, name))
            break
    else:
        if getattr(config, "logits_scaling", None) is not None:
            by = float(config.logits_scaling)
            scales["logit_scale"] = by if config.model_type == "hyperclovax" else 1 / by
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if getattr(config, name, None) is not None:
            scales["softcap"] = float(getattr(config, name))
    return scales
