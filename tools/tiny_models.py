"""Tiny models of every causal type of transformers: defaults shrunk by rules, and exceptions.

`tiny_models.json` says which sizes become which (`sizes`, by the names of fields), and what single
types need beside that (`types`; "": of the default configuration nothing is kept).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 300
CAUSAL = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGES = [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in CAUSAL]

_DATA = json.loads((Path(__file__).parent / "tiny_models.json").read_text())
_SIZES = {name: int(size) for size, names in _DATA["sizes"].items() for name in names.split()}
_DROPPED = set(_DATA["dropped"].split())
# Recurrences that explode or vanish with weights drawn at random keep those of their own.
_KEPT = ("A_log", ".D", "dt_bias", "dt_proj.bias", "time_decay", "time_first", "recurrent_param",
         "igate", "fgate")  # fmt: skip


def tiny_config(kind: str) -> Any:
    """Raises whatever the configuration of this type raises."""
    changes = _DATA["types"].get(kind, {})
    fields = {} if "" in changes else _shrunk(CONFIG_MAPPING[kind]().to_dict())
    return CONFIG_MAPPING[kind](**_merged(fields, changes))


def tiny_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """With random weights that are large enough for every part to matter."""
    torch.manual_seed(0)
    loader: Any = AutoModelForCausalLM if kind in CAUSAL else AutoModelForImageTextToText
    return randomised(loader.from_config(tiny_config(kind), dtype=dtype).eval())


@torch.no_grad()
def randomised(model: Any) -> Any:
    rng = torch.Generator().manual_seed(1)
    ends = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=rng).to(weight)
        if any(part in name for part in _KEPT):
            continue
        if weight.dim() < 2:
            weight.add_(drawn * 0.1)
        elif any(weight is end for end in ends):
            weight.copy_(drawn * 0.3)
        else:
            inputs = weight.shape[-1] if weight.dim() == 2 else weight.shape[-2:].numel() ** 0.5
            weight.copy_(drawn / math.sqrt(inputs))
    return model


def _shrunk(fields: dict[str, Any], layers: int = 2) -> dict[str, Any]:
    """Small sizes; one layer of every kind that the defaults have."""
    kinds = {
        name: list(dict.fromkeys(value))
        for name, value in fields.items()
        if name in ("layer_types", "layers_block_type", "mlp_layer_types") and value
    }
    layers = max([layers, *map(len, kinds.values())])
    other = iter(range(VOCABULARY - 1, 0, -1))
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _DROPPED:
            continue
        if name in kinds:
            found[name] = kinds[name] + kinds[name][-1:] * (layers - len(kinds[name]))
        elif isinstance(value, dict) and name.endswith("config"):
            found[name] = _shrunk(value, layers)
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            found[name] = value if value < VOCABULARY else next(other)
        elif name == "eos_token_id" and isinstance(value, list):
            found[name] = [2, 5]
        elif isinstance(value, float) and "drop" in name:
            found[name] = 0.0
        elif name in _SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[name] = layers if _SIZES[name] == 2 and "layer" in name else _SIZES[name]
        else:
            found[name] = value
    return found


def _merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            fields[name] = _merged(fields[name], value)
        else:
            fields[name] = value
    return {name: value for name, value in fields.items() if name and value != "dropped"}
