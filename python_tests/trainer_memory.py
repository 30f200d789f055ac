"""Measures a training step in this process: largest tensors, peak memory, models in memory.

The options are the fields of SPOConfig, and beside them:
    logits: the same loss from the model's logits instead
    adapters: train adapters
    shape: changes to the model's config
    out: file for the measurements, as JSON
"""

from __future__ import annotations

import gc
import json
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainer_cases import make_model, make_tokenizer, with_adapters

from spo_ext.trainer import SPOConfig, SPOTrainer
from spo_ext.trainer import trainer as trainer_module
from spo_ext.trainer.model import Scores


class Largest(TorchDispatchMode):
    """Elements of the largest tensor an operator returned, not counting shapes in `known`."""

    def __init__(self, known: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.known, self.elements = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and tuple(leaf.shape) not in self.known:
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return result


def parameter_bytes() -> int:
    """Of the distinct storages of all parameters that are alive."""
    storages = {}
    for thing in gc.get_objects():
        # Not isinstance: it would ask lazy modules of other packages for their class.
        if issubclass(type(thing), torch.nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def from_logits(model: Any, batch: Any, **_: bool) -> Scores:
    """What `completion_scores` gives, by way of [N, V]."""
    logits = model(**batch.inputs_on(torch.device("cpu"))).logits.flatten(0, 1)[batch.index]
    logprobs = logits.log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(-1)
    return Scores(logprobs, None, None)


class Watched(SPOTrainer):
    """Looks at memory while it trains."""

    held: int = 0

    def training_step(self, *args: Any) -> Tensor:
        loss = super().training_step(*args)
        self.held = max(self.held, parameter_bytes())
        return loss


def measure(options: dict[str, Any]) -> None:
    out = Path(options.pop("out"))
    model = make_model(**options.pop("shape"))
    if options.pop("adapters", False):
        model = with_adapters(model)
    if options.pop("logits", False):
        trainer_module.completion_scores = from_logits
    one_model = parameter_bytes()
    trainer = Watched(model, SPOConfig(**options), make_tokenizer())
    known = {tuple(p.shape) for p in model.parameters()}  # gradients and the optimiser's moments
    before = peak_bytes()
    with Largest(known) as largest:
        trainer.train()
    found = {
        "largest": largest.elements,
        "peak": peak_bytes(),
        "peak_growth": peak_bytes() - before,
        "one_model": one_model,
        "held": trainer.held,
        "loss": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }
    out.write_text(json.dumps(found))
