"""Processes that a test starts and kills, and the files of a whole run, from data to report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import data_cases
import warm
import yaml
from data_cases import write_rows
from rollout_cases import save_policy

from spo_ext.store import TrajectoryStore

# A verdict that follows from the tokens. With HOLD_AFTER it waits, after so many calls, to be
# killed: a test then knows how far the process has come.
REWARD = """
import os, time

calls = 0

def odd(prompts, completion_ids):
    global calls
    while calls == int(os.environ.get("HOLD_AFTER", "-1")):
        time.sleep(0.02)
    calls += 1
    return [float(sum(ids) % 2) for ids in completion_ids]
"""

DATA_SETS = {
    "code_contests": data_cases.CODE_CONTESTS,
    "taco": data_cases.TACO,
    "apps": data_cases.APPS,
    "mbpp": data_cases.MBPP,
    "mbpp_sanitized": data_cases.MBPP_SANITIZED,
    "mbpp_plus": data_cases.MBPP_PLUS,
    "humaneval": data_cases.HUMANEVAL,
    "humaneval_plus": data_cases.HUMANEVAL_PLUS,
    "livecodebench": data_cases.LIVECODEBENCH,
    "livecodebench_stdin": data_cases.LIVECODEBENCH_STDIN,
}
TEST_PROMPTS = 6
# Metrics of a step that is replayed with the same weights; the others tell the time, or what was
# appended meanwhile.
SAME = ("loss", "grad_norm", "learning_rate", "kl", "entropy", "spo/residual", "store/reward")


class Workplace:
    """The folder of a run, with a policy, a reward and files to import; its processes."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store = folder, store
        self.run, self.policies = folder / "run", folder / "policies"
        self.policy = save_policy(folder / "policy", end_weight=1.0)
        (folder / "rewards.py").write_text(REWARD)
        self.reward = f"{folder / 'rewards.py'}:odd"
        self._processes: dict[str, warm.Process] = {}

    def data_files(self) -> list[Path]:
        """One of each schema, and sums of all three splits, some with completions to learn from."""
        files = [write_rows(self.folder / f"{name}.jsonl", row) for name, row in DATA_SETS.items()]
        return [*files, write_rows(self.folder / "sums.jsonl", *_sums())]

    def write_config(self, **changes: Any) -> Path:
        settings = {
            "model": str(self.policy),
            "store": self.store,
            "output_dir": str(self.run),
            "run": "learner",
            "mixture": "half-online",
            "rollouts": "external",
            "publish_to": str(self.policies),
            "sync_every": 4,
            "max_offpolicy_steps": 1,
            "wait_seconds": 300,
            "max_steps": 50,
            "save_strategy": "steps",
            "save_steps": 10,
            "logging_steps": 1,
            "per_device_train_batch_size": 8,
            "group_size": 2,
            "beta": 0.5,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        } | changes
        path = self.folder / "train.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    def start(self, name: str, *arguments: object, **environment: str) -> warm.Process:
        """`spo ARGUMENTS` in a process of its own; what it says goes to the file NAME.log."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = warm.Process(
                ["spo", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )
        self._processes[name] = process
        return process

    def start_trainer(self, name: str, *more: str, **environment: str) -> warm.Process:
        config = self.folder / "train.yaml"
        return self.start(name, "train", "--config", config, *more, **environment)

    def start_producer(self, name: str, *more: object) -> warm.Process:
        """Eight prompts of each version, two of them stored at a time."""
        where = ("--store", self.store, "--follow", self.policies, "--run", "learner")
        how = ("--n", 2, "--max-new-tokens", 5, "--prompts-per-version", 8, "--batch-size", 2)
        return self.start(name, "rollout", *where, *how, "--reward", self.reward, "--quiet", *more)

    def start_evaluation(self, name: str, **environment: str) -> warm.Process:
        """Four completions of each test prompt, one prompt at a time."""
        where = ("--store", self.store, "--split", "test", "--out", self.run / "evaluation")
        how = ("--n", 4, "--k", "1,4", "--max-new-tokens", 5, "--batch-size", 4)
        what = ("--model", self.run, "--reward", self.reward)
        return self.start(name, "eval", *where, *how, *what, **environment)

    def metrics(self) -> dict[int, list[dict[str, Any]]]:
        """See `metrics`."""
        return metrics(self.run)

    def check_running(self) -> bool:
        """True; fails if a process has ended by itself with an error."""
        for name, process in self._processes.items():
            assert process.poll() in (None, 0, -signal.SIGKILL), f"{name}: {process.returncode}"
        return True

    def end(self) -> None:
        for process in self._processes.values():
            with suppress(ProcessLookupError):  # the group lives as long as any process of it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(120)

    def print_logs(self) -> None:
        """pytest shows it if the test fails."""
        for name in self._processes:
            tail = (self.folder / f"{name}.log").read_text(errors="replace")[-4000:]
            print(f"--- {name}\n{tail}")


def metrics(run: Path) -> dict[int, list[dict[str, Any]]]:
    """The lines of optimiser steps by step; two of a step that was replayed."""
    found: dict[int, list[dict[str, Any]]] = {}
    with suppress(FileNotFoundError):
        for line in (run / "metrics.jsonl").read_bytes().splitlines(keepends=True):
            values = json.loads(line) if line.endswith(b"\n") else {}
            if "loss" in values:
                found.setdefault(values["step"], []).append(values)
    return found


def contents(store: TrajectoryStore) -> dict[int, Any]:
    """What must stay of each trajectory."""
    return {
        row.id: (row.prompt_id, row.token_ids, row.reward, row.origin)
        for row in store.trajectories()
    }


@contextmanager
def workplace(folder: Path, store: str) -> Iterator[Workplace]:
    """Leaves no process behind."""
    place = Workplace(folder, store)
    try:
        yield place
    finally:
        place.end()
        place.print_logs()


def kill(process: warm.Process) -> None:
    process.kill()
    assert process.wait(120) == -signal.SIGKILL, "it had ended before it was killed"


def _sums() -> list[dict[str, Any]]:
    """24 prompts to learn from, 8 of them with a right and a wrong completion; 6 for each other
    split."""
    rows: list[dict[str, Any]] = []
    for i in range(24):
        row = {"prompt": f"{i}+1=", "answer": str(i + 1), "split": "train"}
        pairs = ((str(i + 1), 1.0), (str(i), 0.0)) if i < 8 else ()
        rows += [row | {"completion": text, "reward": reward} for text, reward in pairs] or [row]
    for split, second in (("dev", 2), ("test", 3)):
        for i in range(TEST_PROMPTS):
            answer = str(i + second)
            rows.append({"prompt": f"{i}+{second}=", "answer": answer, "split": split})
    return rows
