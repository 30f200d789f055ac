"""Trains a tiny model, here or in a process of its own.

The options are the fields of SPOConfig, and beside them:
    model: "plain" or "adapters"
    weights: seed of the weights
    shape: changes to the model's config
    resume: continue the last checkpoint
    kill: {"where": "step" | "draw" | "append" | "checkpoint", "step": n}: dies by SIGKILL there
    out: file for the final weights and the log
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import warm
from fsdp_on_cpu import allow_fsdp_on_cpu
from trainer_cases import make_model, make_tokenizer, with_adapters

from spo_ext.store import TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer
from spo_ext.trainer.feed import Feed


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "store": str(folder / "store.db"),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "beta": 0.5,
        "reward": "answer",
        "max_new_tokens": 5,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    } | changes


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Trainer(SPOTrainer):
    """Dies where it is told to."""

    kill: dict[str, Any] = {}

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.kill.get("where") == "step" and self.state.global_step == self.kill["step"]:
            die()
        return super().compute_loss(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, *args: Any) -> None:
        if self.kill.get("where") == "checkpoint" and self.state.global_step == self.kill["step"]:
            die()  # the weights are written, the rest is not
        super()._save_optimizer_and_scheduler(*args)


def die_after(owner: type, name: str, calls: int) -> None:
    """When that method has returned so many times and returns once more."""
    plain = getattr(owner, name)
    count = iter(range(10**6))

    def method(self: Any, *args: Any) -> Any:
        result = plain(self, *args)
        if next(count) == calls:
            die()
        return result

    setattr(owner, name, method)


def train(options: dict[str, Any]) -> dict[str, Any]:
    kind, out = options.pop("model", "plain"), options.pop("out", None)
    resume, kill = options.pop("resume", False), options.pop("kill", {})
    if options.get("fsdp"):
        allow_fsdp_on_cpu()
    model = make_model(options.pop("weights", 0), **options.pop("shape", {}))
    if kind == "adapters":
        model = with_adapters(model)
    trainer = Trainer(model, SPOConfig(**options), make_tokenizer())
    trainer.kill = kill
    if kill.get("where") == "draw":
        die_after(Feed, "_draw", kill["step"])
    if kill.get("where") == "append":
        die_after(TrajectoryStore, "append", kill["step"] - 1)
    trainer.train(resume_from_checkpoint=resume)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    result = {
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "wrapped": type(trainer.model_wrapped).__name__,
        "sharded": all(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
        "weights": {name: tensor.float() for name, tensor in state.items()},
    }
    if out is not None and trainer.accelerator.is_main_process:
        torch.save(result, out)
    return result


def spawn(options: dict[str, Any], environment: dict[str, str] | None = None) -> warm.Process:
    """`train` in a process of its own."""
    return start(train, options, environment)


def start(
    function: Callable[..., object], options: Any, environment: dict[str, str] | None = None
) -> warm.Process:
    """A process that runs a function of a module of the tests."""
    code = f"import json, sys, {function.__module__} as module\n"
    code += f"module.{function.__name__}(json.loads(sys.argv[1]))"
    return warm.Process(
        ["-c", code, json.dumps(options)], env={**os.environ, **(environment or {})}
    )
