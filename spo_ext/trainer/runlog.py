"""What a run leaves for `spo report`, its settings and every line of the log; and what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from spo_ext.durable import write_text
from spo_ext.evaluation.files import cut_unfinished_line
from spo_ext.trainer.config import SPOConfig


class RunLog(TrainerCallback):
    """spo_config.json, and metrics.jsonl with one object a log call.

    A resumed run appends; where two lines have the same step, the later one counts.
    """

    def __init__(self, config: SPOConfig) -> None:
        self._config = config
        self._folder = Path(str(config.output_dir))

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            settings = json.dumps(self._settings(), indent=2, default=str)
            write_text(self._folder / "spo_config.json", settings + "\n")
            cut_unfinished_line(self._folder / "metrics.jsonl")

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            line = json.dumps({"step": state.global_step, **logs})
            with (self._folder / "metrics.jsonl").open("a") as file:
                file.write(line + "\n")

    def _settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self._config.to_dict()
        return found


class _Progress(ProgressCallback):
    """Shows loss and reward in the bar, not all of the forty numbers of metrics.jsonl above it."""

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self.training_bar is not None:
            names = ("loss", "reward", "store/online_reward", "eval_pass@1")
            self.training_bar.set_postfix({n: f"{logs[n]:.3g}" for n in names if n in logs})


def show_progress(trainer: Trainer) -> None:
    """Replaces the bar of transformers, if there is one."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Progress())
