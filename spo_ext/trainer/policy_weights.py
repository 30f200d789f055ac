"""The weights that a policy computes with: those of the model, LoRA adapters added to a copy."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PREFIX = "base_model.model."  # what PEFT puts before the names of the model
_UNMERGED = "publish the adapter by itself with merge_adapter=False"


def is_peft(model: nn.Module) -> bool:
    """Whether it is a peft.PeftModel."""
    peft = sys.modules.get("peft")  # without the import there can be no such model
    return peft is not None and isinstance(model, peft.PeftModel)


def policy_state(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Weights by the names of the model without adapters.

    A merged weight is W + scaling * (B A), added in float32, rounded once to the dtype of W and
    kept in host memory. The model is only read. All other tensors are those of the model.

    Args:
        model: a PreTrainedModel, or a PeftModel with LoRA of linear and embedding layers.
        state_dict: of `model`, with whole tensors, where `model.state_dict()` has only shards.

    Raises ValueError for adapters that are no such sum (DoRA, other methods than LoRA, a weight
    tied to one that has no adapter).
    """
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if not is_peft(model):
        return state
    tuned = _lora_layers(model)
    merged: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = _plain_name(key, model)
        if name is None:
            continue
        layer_name, _, leaf = key.rpartition(".base_layer.")
        if leaf == "weight" and layer_name in tuned:
            tensor = _merge(tensor, layer_name, tuned[layer_name], state)
        merged[name] = tensor
    _check_tied(model, merged)
    return merged


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """LoRA layers by name; raises ValueError for what is not W + scaling * (B A)."""
    from peft.tuners.lora.layer import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    tuned: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            plain = isinstance(module, (Linear, Embedding)) and not (
                module.merged or module.lora_variant or any(module.lora_bias.values())
            )
            if not plain:
                _refuse(f"{name} ({type(module).__name__}) is not plain, unmerged LoRA")
            tuned[name] = module
        elif isinstance(module, AuxiliaryTrainingWrapper):
            if not isinstance(module, ModulesToSaveWrapper):
                _refuse(f"{name} ({type(module).__name__}) is not LoRA")
    return tuned


def _plain_name(key: str, model: Any) -> str | None:
    """The name without adapters; None for what exists only because of them."""
    if ".lora_" in key or ".original_module." in key:
        return None
    saved = re.search(r"\.modules_to_save\.([^.]+)\.", key)
    if saved is not None:
        if saved[1] not in model.active_adapters:
            return None
        key = key.replace(saved[0], ".")
    return key.replace(".base_layer.", ".").removeprefix(_PREFIX)


def _merge(weight: Tensor, name: str, layer: Any, state: Mapping[str, Tensor]) -> Tensor:
    embedding = bool(layer.lora_embedding_A)
    total = weight.detach().to(torch.float32)
    for adapter in layer.active_adapters:
        if adapter not in layer.scaling:
            continue
        if embedding:
            keys = [f"{name}.lora_embedding_{factor}.{adapter}" for factor in "AB"]
        else:
            keys = [f"{name}.lora_{factor}.{adapter}.weight" for factor in "AB"]
        if any(key not in state for key in keys):
            raise ValueError(f"policy_state: state_dict must have {keys[0]} and {keys[1]}")
        a, b = (state[key].detach().to(torch.float32) for key in keys)
        delta = b @ a
        transposed = embedding or layer.fan_in_fan_out
        total = total + layer.scaling[adapter] * (delta.T if transposed else delta)
    return total.to(weight.dtype).cpu()


def _check_tied(model: Any, merged: Mapping[str, Tensor]) -> None:
    base = model.get_base_model()
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return
    for name, source in base.all_tied_weights_keys.items():
        if {name, source} <= merged.keys() and not torch.equal(
            merged[name].cpu(), merged[source].cpu()
        ):
            _refuse(f"{source} and {name} are tied, and only one has the adapter")


def _refuse(reason: str) -> None:
    raise ValueError(f"policy_state: the adapter cannot be merged: {reason}; {_UNMERGED}")
