"""What a cached reference log-probability depends on, as one short text."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spo_ext.checks import number, refuse
from spo_ext.store.codec import encode_json

_CHUNK_BYTES = 16 << 20
# What DDP, torch.compile and PEFT put into names of the same weights.
_WRAPPERS = re.compile(
    r"(^|\.)(module|_orig_mod|base_model\.model|base_layer|original_module)(?=\.)"
)
# Entries of a model's config that change with the place or the release, but no log-probability.
_VOLATILE = {"_name_or_path", "transformers_version", "use_cache", "architectures", "torch_dtype"}


@torch.no_grad()
def reference_fingerprint(model: nn.Module, tokenizer: Any, temperature: float) -> str:
    """64 hex digits for the key of cached reference log-probabilities.

    Hashes the content of every parameter and buffer, 16 MiB at a time, with the model's config,
    the tokenizer's vocabulary and rules, and the temperature; no path and no name of a checkpoint.
    Of PEFT's adapters only the active ones count: with all of them disabled the fingerprint is
    that of the base model, and training them does not change it.

    Args:
        model: as it will score: the reference, or the policy inside `model.disable_adapter()`.
        tokenizer: of transformers, or anything with `get_vocab()`; None if there is none.
        temperature: > 0, that of the log-probabilities.

    Raises:
        ValueError: for merged adapters, sharded or meta parameters, which hide the weights.
    """
    owner = "reference_fingerprint"
    state = hashlib.blake2b(digest_size=32)
    temperature = number(owner, "temperature", temperature, above=0.0)
    head = {"temperature": temperature, "config": _config(model), "tokenizer": _rules(tokenizer)}
    state.update(encode_json(head).encode())
    unused, scales = _adapters(model)
    state.update(encode_json(scales).encode())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    named = {_plain_name(name): tensor for name, tensor in tensors}
    for name, tensor in sorted(named.items()):
        if any(name == part or name.startswith(f"{part}.") for part in unused):
            continue
        if type(tensor).__name__ == "DTensor" or tensor.is_meta:
            refuse(owner, name, "a whole tensor with data: take it before sharding", type(tensor))
        state.update(encode_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        for piece in _pieces(tensor):
            state.update((ctypes.c_char * piece.nbytes).from_address(piece.data_ptr()))
    return state.hexdigest()


def _plain_name(name: str) -> str:
    """The name of a weight in the model that was wrapped."""
    return _WRAPPERS.sub("", name).lstrip(".")


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Contiguous parts on the CPU, in order; only one of them exists at a time."""
    rows = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
    if rows.numel() == 0:
        return
    step = max(1, _CHUNK_BYTES // (rows[0].numel() * rows.element_size()))
    for start in range(0, len(rows), step):
        yield rows[start : start + step].contiguous().cpu()


def _config(model: nn.Module) -> Any:
    """Softcaps and scales of logits are no parameters, but change log-probabilities."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    fields = config.to_dict()
    kept = {key: value for key, value in fields.items() if key not in _VOLATILE | {"dtype"}}
    # time_step_limit of Mamba-2 ends at infinity, which JSON has no number for.
    return json.loads(json.dumps(kept, default=str), parse_constant=str)


def _rules(tokenizer: Any) -> Any:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # left behind by the last call
        if backend is not None:
            rules.pop(state, None)
    return [rules, getattr(tokenizer, "chat_template", None)]


def _adapters(model: nn.Module) -> tuple[list[str], dict[str, Any]]:
    """Names of modules whose parameters are not in use, and the scales of those that are.

    Works on what PEFT's layers have in common, since PEFT may not be installed.
    """
    unused, scales = [], {}
    for name, module in model.named_modules():
        kinds = getattr(module, "adapter_layer_names", None)
        if kinds is None or not hasattr(module, "disable_adapters"):
            continue
        plain = _plain_name(f"{name}.")[:-1]
        if getattr(module, "merged", False):
            refuse("reference_fingerprint", name, "without merged adapters: unmerge them", "merged")
        active = [] if module.disable_adapters else list(module.active_adapters)
        held = {key for kind in kinds for key in getattr(module, kind, {})}
        unused += [f"{plain}.{kind}.{key}" for kind in kinds for key in held - set(active)]
        for key in sorted(held & set(active)):
            scales[f"{plain}.{key}"] = getattr(module, "scaling", {}).get(key)
    return unused, scales
