"""Token log-probabilities from inside the forward pass of a Transformers model, without logits.

Inside, because wrappers work there: DDP and FSDP must see one call of the model per backward pass,
so taking `model.model` and `model.lm_head` apart is right on one process only.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo_ext.head import HeadOptions, token_logprobs
from spo_ext.integrations.adapters import check_head, head_device, head_product
from spo_ext.integrations.heads import (
    head_input,
    inside,
    ordinary_tokens,
    read_head,
    router_loss,
)
from spo_ext.models import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_token_logprobs(
    model: PreTrainedModel,
    *,
    temperature: float = 1.0,
    max_dropped_mass: float = 0.0,
    workspace_mib: int | None = None,
) -> None:
    """Lets `model(..., logprob_targets=targets)` return log-probabilities instead of logits.

    Every other call of the model, `generate` included, stays as it was. Call it on the model
    itself, before or after PEFT wraps it, and before DDP, FSDP or Accelerate do.

    targets is int64 [B, T] like input_ids, not shifted: targets[b, t] is the token at position t,
    or -100 where it does not count. The result is float32 [B, T - 1], entry t for the token at
    t + 1, 0 where it does not count. Logit scale and softcap are those of the model's config.

    With `logprob_index` too, both are int64 [N]: targets[i] is the token after the one at index[i],
    counted over the flattened batch, as for sequences that are packed. The result is [N].

    The result is a tuple if more is asked for. `logprob_entropy=True` adds the entropies, of the
    same shape, in nats, differentiable. `output_router_logits=True` adds the load-balancing loss of
    a mixture of experts, a number, not yet times its coefficient, over the tokens of the batch as
    the model itself computes it; what the config says of output_router_logits plays no part.

    Adapters of PEFT may be anywhere, on the LM head too (`spo_ext.integrations.adapters` says what
    that costs). Virtual tokens of prompt learning come before those of input_ids and have no
    log-probabilities; they need this function to be called on PEFT's model, and go into a row once,
    so they do not fit sequences that are packed.

    Args:
        model: a causal language model of Transformers, or a PEFT model around one.
        temperature: > 0, that of the sampler; divides the logits.
        max_dropped_mass: as in `spo_ext.token_logprobs`.
        workspace_mib: as in `spo_ext.token_logprobs`.

    Raises:
        TypeError: if the LM head is nothing that `spo_ext.integrations.adapters` can serve.
        ValueError: for a temperature that is not > 0. From the call: for output_router_logits of a
            model that has no such loss.
    """
    if not temperature > 0:
        raise ValueError(f"add_token_logprobs: temperature must be > 0, got {temperature}")
    outside = model
    model = inside(model)
    check_head(model.get_output_embeddings())  # type: ignore[no-untyped-call]
    scales = _head_scales(model.config.get_text_config())
    options: HeadOptions = {"temperature": temperature}
    options["max_dropped_mass"] = max_dropped_mass
    options["workspace_mib"] = workspace_mib
    # Unbound, so that a deep copy of the model calls itself and not the model it was copied from.
    method = isinstance(model.forward, types.MethodType)
    original = getattr(model.forward, "__func__", model.forward)
    virtual_tokens = _virtual_tokens(outside)
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
        call = functools.partial(original, self) if method else original
        # X-LoRA looks at the hidden states first, with the arguments of the call itself.
        if logprob_targets is None or inputs.get("output_hidden_states"):
            return call(*args, **inputs)
        # Wrappers such as PEFT's pass on arguments that nobody gave.
        given = {name: value for name, value in inputs.items() if value is not None}
        given["use_cache"] = False
        nonlocal reading
        if reading is None:
            reading = read_head(self, call, scales)
        more: tuple[Tensor, ...] = ()
        if given.pop("output_router_logits", False):
            states, loss = router_loss(self, call, *args, **given)
            more = (loss,)
        elif reading.of_base:
            states = self.base_model(*args, **given).last_hidden_state
        else:
            states = head_input(self, call, *args, **given)
        if logprob_index is not None:
            before = virtual_tokens if "inputs_embeds" in given else 0
            hidden = states[:, before:].flatten(0, 1)[logprob_index]
            targets = logprob_targets
        else:
            hidden, targets = states[:, -logprob_targets.shape[1] : -1], logprob_targets[:, 1:]
        head: Any = self.get_output_embeddings()  # type: ignore[no-untyped-call]
        hidden = hidden.to(head_device(head))  # with device_map the states may be on another one
        hidden, weight, bias = head_product(head, hidden)
        targets, words = targets.to(hidden.device), slice(reading.vocabulary)
        weight = weight[words]
        scored: HeadOptions = {
            **options,
            **reading.scales,
            "bias": None if bias is None else bias[words],
        }
        results: tuple[Tensor, ...]
        if logprob_entropy:
            results = token_logprobs(hidden, weight, targets, return_entropy=True, **scored)
        else:
            results = (token_logprobs(hidden, weight, targets, **scored),)
        results += more
        return results if len(results) > 1 else results[0]

    vars(forward)["temperature"] = temperature
    former, wrapper = model.forward, getattr(outside, "base_model", None)
    vars(model)["forward"] = types.MethodType(forward, model)
    # The wrapper of llama-adapter keeps the method that it found.
    if wrapper is not None and vars(wrapper).get("forward") == former:
        vars(wrapper)["forward"] = model.forward


@torch.no_grad()
def router_coefficient(owner: str, model: Any, given: float | None) -> float:
    """What the load-balancing loss of a mixture of experts is multiplied by; 0 without one.

    given: None for the router_aux_loss_coef of the model's config, as in TRL.

    Raises ValueError for a number that is given to a model without such a loss.
    """
    model = inside(model)
    config = model.config.get_text_config()
    found = getattr(config, "router_aux_loss_coef", None) if given is None else given
    if not found:
        return 0.0
    ids = ordinary_tokens(model)[:4].to(head_device(model.get_output_embeddings()))
    try:
        if not hasattr(config, "output_router_logits"):
            raise ValueError(f"{type(model).__name__} has no output_router_logits in its config")
        if not _is_hollow(model):
            with evaluating(model):
                router_loss(model, model.forward, input_ids=ids[None], use_cache=False)
    except ValueError as error:
        if given is None:
            return 0.0
        raise ValueError(
            f"{owner}: router_aux_loss_coef must be left out for this model, got {given}: {error}"
        ) from error
    return float(found)


def _virtual_tokens(model: Any) -> int:
    """How many PEFT's prompt learning puts before each row."""
    config: Any = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0


def _is_hollow(model: nn.Module) -> bool:
    """Whether weights are still to come: on the meta device, or in parts elsewhere (ZeRO-3)."""
    return any(one.is_meta or one.numel() == 0 for one in model.parameters())


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
