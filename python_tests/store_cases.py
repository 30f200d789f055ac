"""What the tests of the store share: small records, and processes that write."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path
from typing import Any

import warm

from spo_ext.store import Origin, Prompt, Trajectory, TrajectoryStore

ROOT = Path(__file__).parent.parent


def add_prompts(store: TrajectoryStore, count: int, split: Any = "train") -> list[int]:
    return store.add_prompts(
        [Prompt(f"{split} {i}", token_ids=[i, i + 1], answer=i, split=split) for i in range(count)]
    )


def policy(version: int = 0, run: str = "run") -> Origin:
    return Origin("policy", run=run, policy_version=version)


def trajectory(prompt_id: int, number: int, origin: Origin, reward: float = 0.0) -> Trajectory:
    """A completion of its own for every number."""
    tokens = [number % 50_000, number // 50_000, 1]
    return Trajectory(prompt_id, tokens, reward, origin, "eos")


def start_process(body: str, *arguments: str) -> warm.Process:
    """Runs Python code, with `argv` its arguments and everything of this module at hand."""
    head = "import sys\nfrom store_cases import *\nargv = sys.argv[1:]\n"
    return warm.Process(
        ["-c", head + textwrap.dedent(body), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
