"""A generator and a reward whose results are known, and a store of held-out prompts."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_cases import save_tokenizer

from spo_ext.rollout import Generation, Judgement, Sampling
from spo_ext.store import Prompt, TrajectoryStore

GOOD, BAD, LOST = 1, 0, 2  # first tokens: passes, fails, cannot be judged
END = 9


@dataclass
class Scripted:
    """Draws [verdict, number, end] from the seed and the prompt, and remembers what it was asked.

    seconds: how long a prompt takes. numbers: that there are.
    """

    verdicts: Sequence[int] = (GOOD, BAD)
    seconds: float = 0.0
    numbers: range = range(10, 99)
    calls: list[tuple[list[int], Sampling]] = field(default_factory=list)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        ids = [list(prompt.token_ids or ()) for prompt in prompts]
        self.calls.append((ids, sampling))
        time.sleep(self.seconds * len(ids))
        return [self._draw(random.Random(f"{sampling.seed} {row}"), sampling.n) for row in ids]

    def _draw(self, noise: random.Random, n: int) -> list[Generation]:
        return [
            Generation(
                (noise.choice(self.verdicts), noise.choice(self.numbers), END),
                noise.choice(("eos", "truncated")),
                (-noise.random(), -0.25, -0.5),
            )
            for _ in range(n)
        ]


def decode(ids: Sequence[int]) -> str:
    return " ".join(str(i) for i in ids if i != END)


def judge(
    prompts: Sequence[Prompt], completions: Sequence[str], token_ids: Sequence[Sequence[int]]
) -> list[Judgement | None]:
    assert len(prompts) == len(completions) == len(token_ids)
    judged = {GOOD: Judgement(1.0), BAD: Judgement(0.25, "wrong <b>"), LOST: None}
    return [judged[ids[0]] for ids in token_ids]


def fill(store: TrajectoryStore, count: int, split: str = "test") -> list[int]:
    return store.add_prompts(
        [Prompt(f"{split} {i} <&>", [i, i + 1], answer=i, split=split) for i in range(count)]  # type: ignore[arg-type]
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


class Workplace:
    """A store of 5 test prompts, a folder that stands for a model, and the command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.db = folder, folder / "out", folder / "store.db"
        self.model = save_tokenizer(folder / "model")
        self.store = TrajectoryStore(self.db)
        fill(self.store, 5)

    def arguments(self, *more: str) -> list[str]:
        paths = {"--store": self.db, "--model": self.model, "--out": self.out, "--reward": "judge"}
        given = [str(part) for pair in paths.items() for part in pair]
        return ["eval", *given, "--n", "4", "--k", "1,2", "--batch-size", "8", *more]

    def evaluation(self) -> Any:
        return json.loads((self.out / "evaluation.json").read_text())
