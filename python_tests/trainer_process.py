"""Trains a tiny model as a process of its own: python trainer_process.py SETTINGS.json.

SETTINGS holds the fields of SPOConfig, and beside them:
    model: "plain" or "adapters";  seed: of the weights
    resume: continue the last checkpoint
    kill: {"where": "step" | "draw" | "checkpoint", "step": n}: dies by SIGKILL there
    out: file for the final weights and the log
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from trainer_cases import make_model, make_tokenizer, with_adapters

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


def die_after_draw(step: int) -> None:
    plain = Feed._draw
    count = iter(range(10**6))

    def draw(self: Feed, version: int) -> Any:
        batch = plain(self, version)
        if next(count) == step:
            die()
        return batch

    Feed._draw = draw  # type: ignore[method-assign]


def train(options: dict[str, Any]) -> dict[str, Any]:
    kind, out = options.pop("model", "plain"), options.pop("out", None)
    resume, kill = options.pop("resume", False), options.pop("kill", {})
    model = make_model(options.pop("weights", 0), **options.pop("shape", {}))
    if kind == "adapters":
        model = with_adapters(model)
    trainer = Trainer(model, SPOConfig(**options), make_tokenizer())
    trainer.kill = kill
    if kill.get("where") == "draw":
        die_after_draw(kill["step"])
    trainer.train(resume_from_checkpoint=resume)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    result = {
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "weights": {name: tensor.float() for name, tensor in state.items()},
    }
    if out is not None and trainer.accelerator.is_main_process:
        torch.save(result, out)
    return result


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text()))
