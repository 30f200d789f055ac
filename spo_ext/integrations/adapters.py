"""What an LM head multiplies hidden states with: plain, adapted by PEFT, or quantised.

The operators read one weight. A plain head has it. LoRA's B A x is a sum over r more columns,

    W h + sum_i s_i B_i A_i h = [W, B_1, ..] [h; s_1 A_1 h; ..]

so that both parts meet in the float32 accumulators of one product, and an update that is small
beside W is not rounded into a 16-bit W + s B A. Every other head that is affine in the hidden
states (DoRA, LoHa, OFT, ..., quantised weights) is asked for its products with the unit vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_ALIGNED = 8  # columns: 16 bytes of a 16-bit row, which the kernels for CUDA copy at once
# Adapters whose output is no affine function of one token's hidden state: routed, or drawn anew.
_NOT_AFFINE = ("Arrow", "ALora", "Lily", "Monteclora", "Pvera", "Shadow", "Velora")


class HeadProduct(NamedTuple):
    """Logits are hidden weight^T + bias: hidden [.., d'], weight [V, d'], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def check_head(head: Any) -> None:
    """Raises TypeError for a head that `head_product` cannot serve, and says why."""
    if _is_wrapper(head, "ModulesToSaveWrapper"):
        for module in (head.original_module, *head.modules_to_save.values()):
            check_head(module)
    elif _is_wrapper(head, "TrainableTokensWrapper"):
        check_head(head.token_adapter.base_layer)
    elif _is_tuner(head):
        check_head(head.base_layer)
        for part in (head, *getattr(head, "lora_variant", {}).values()):
            for name in _names(part):
                if name.startswith(_NOT_AFFINE):
                    _refuse(f"an affine function of hidden states, without {name}", head)
                if name.startswith("LoraParallel"):
                    _refuse("whole, not split over ranks as in Megatron", head)
        if not _adds_columns(head) and any(_drops(module) for module in head.modules()):
            _refuse("without dropout in its adapter, which only LoRA's form allows", head)
    elif "Linear8bitLt" in _names(head):
        _refuse("of another type: LLM.int8 rounds the hidden states as well", head)
    elif not isinstance(head, nn.Linear) and not _is_quantised(head):
        _refuse("a linear layer, adapted by PEFT, quantised or neither", head)


def check_tasks(owner: str, model: Any) -> None:
    """Raises ValueError for a PEFT model that asks for more than its inputs in every call."""
    config = getattr(model, "active_peft_config", None)
    kind = str(getattr(config, "peft_type", "")).rpartition(".")[2]
    if kind in ("MULTITASK_PROMPT_TUNING", "POLY"):
        raise ValueError(
            f"{owner}: the adapter must need no task_ids, which no trainer passes, got PEFT's "
            f"{kind}"
        )


def plain_layer(head: Any) -> Any:
    """The layer itself that PEFT wrapped, or the head."""
    if _is_wrapper(head, "ModulesToSaveWrapper"):
        return plain_layer(head.original_module)
    if _is_wrapper(head, "TrainableTokensWrapper"):
        return plain_layer(head.token_adapter)
    return plain_layer(head.base_layer) if _is_tuner(head) else head


def head_device(head: Any) -> torch.device:
    """Where the weight of a head is, or what stands for it."""
    found: torch.device = next(itertools.chain(head.parameters(), head.buffers())).device
    return found


def head_product(head: Any, hidden: Tensor) -> HeadProduct:
    """The factors of this head's logits for hidden states [.., d], with gradients.

    A plain head, and one in PEFT's modules_to_save, costs nothing. LoRA costs a copy of the weight,
    [V, d + r], and where it is trained, a gradient of that shape and its product, also if W itself
    is frozen. The other adapters and quantised weights cost a [V, d] weight and the product of the
    head with d unit vectors, in every call; trainable_token_indices cost the weight. LoRA's dropout
    acts on the low-rank part, as in PEFT.
    """
    if _is_wrapper(head, "ModulesToSaveWrapper"):
        return head_product(_saved(head), hidden)
    if _is_wrapper(head, "TrainableTokensWrapper"):
        return _with_tokens(head.token_adapter, hidden)
    if _is_tuner(head):
        _check_names(head)
        if head.disable_adapters and head.merged:
            head.unmerge()  # as its own forward
        if head.disable_adapters or head.merged:
            return head_product(head.base_layer, hidden)
        if not _adds_columns(head):
            return _by_unit_vectors(head, hidden)
        return _with_columns(head, [a for a in head.active_adapters if a in head.lora_A], hidden)
    if _is_quantised(head):
        return _by_unit_vectors(head, hidden)
    return HeadProduct(
        hidden, _whole(head.weight), None if head.bias is None else _whole(head.bias)
    )


def _with_columns(layer: Any, active: list[str], hidden: Tensor) -> HeadProduct:
    """LoRA's: r more columns for each active adapter; a bias of B joins that of the head."""
    product = head_product(layer.base_layer, hidden)
    if not active:
        return product
    lows, columns, bias = [], [], product.bias
    for name in active:
        a, b = _whole(layer.lora_A[name].weight), layer.lora_B[name]
        low = linear(layer.lora_dropout[name](hidden.to(a.dtype)), a) * layer.scaling[name]
        lows.append(low.to(hidden.dtype))
        columns.append(_whole(b.weight).to(product.weight.dtype))
        if b.bias is not None:
            more = _whole(b.bias) * layer.scaling[name]
            bias = more if bias is None else bias + more
    missing = -sum(low.shape[-1] for low in lows) % _ALIGNED
    lows.append(hidden.new_zeros(*hidden.shape[:-1], missing))
    columns.append(product.weight.new_zeros(len(product.weight), missing))
    return HeadProduct(
        torch.cat([product.hidden, *lows], -1), torch.cat([product.weight, *columns], 1), bias
    )


def _with_tokens(layer: Any, hidden: Tensor) -> HeadProduct:
    """The rows of some tokens are trained instead of those of W; PEFT leaves out the bias then."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return head_product(layer.base_layer, hidden)
    return HeadProduct(hidden, layer.get_merged_weights(layer.active_adapters), None)


def _by_unit_vectors(head: Any, hidden: Tensor) -> HeadProduct:
    """Reads the columns of the weight from the unit vectors, and the bias from the zero vector."""
    width = hidden.shape[-1]
    units = torch.eye(width + 1, width, dtype=hidden.dtype, device=hidden.device)
    trains = any(p.requires_grad for p in head.parameters())
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        products = head(units)
        bias = products[width]
        return HeadProduct(hidden, (products[:width] - bias).t(), bias)


def _saved(wrapper: Any) -> Any:
    """The module that the wrapper would call now."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(a not in wrapper._adapters for a in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _check_names(layer: Any) -> None:
    for hook in layer._forward_pre_hooks.values():
        if getattr(hook, "keywords", {}).get("adapter_names") is not None:
            raise ValueError(
                "add_token_logprobs: adapter_names must be left out with an adapter on the LM "
                "head: the rows of a batch go through one head"
            )


def _names(module: Any) -> list[str]:
    """Names of its classes: neither PEFT nor a library of quantised layers need be installed."""
    return [kind.__name__ for kind in type(module).__mro__]


def _is_wrapper(module: Any, name: str) -> bool:
    return name in _names(module)


def _is_tuner(module: Any) -> bool:
    return "BaseTunerLayer" in _names(module)


def _adds_columns(layer: Any) -> bool:
    """Whether a tuner layer is LoRA in its plain form, on whatever weight."""
    factors = getattr(layer, "lora_A", None)
    return (
        "LoraLayer" in _names(layer)
        and isinstance(factors, nn.ModuleDict)
        and not any(name in layer.lora_variant for name in layer.active_adapters)
    )


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p > 0


def _is_quantised(module: Any) -> bool:
    """A linear layer whose weight is no tensor of numbers, or is not there under that name."""
    if not isinstance(getattr(module, "in_features", None), int):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    ):  # fmt: skip
        return True
    return is_traceable_wrapper_subclass(weight) and not hasattr(weight, "full_tensor")


def _whole(parameter: Tensor) -> Tensor:
    """The parameter, gathered if FSDP2 keeps it in parts."""
    gather: Callable[[], Tensor] | None = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


def _refuse(expected: str, head: Any) -> NoReturn:
    raise TypeError(
        f"add_token_logprobs: the LM head must be {expected}, got {type(head).__module__}."
        f"{type(head).__name__}"
    )
