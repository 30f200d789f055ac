"""Recipes of `SPOTrainer` on a pretrained model, beside TRL's GRPO on as many completions.

    python examples/real_model/model.py runs/real/model
    PYTHONPATH=benchmarks python -m real_model.compare --model runs/real/model --tasks sums \\
        --recipes spo grpo trl-grpo --seeds 0 1 2 --split test --out FILE.jsonl

All begin with the same policy, which the commands of `examples/real_model/run.sh` make: the model
after supervised training on a few solutions. A run is a line of FILE, and what is there is not run
again. In the end all of FILE is shown as tables.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import machine
import torch
from learning.controls import SFT, TruncatedGRPO
from learning.evaluation import evaluate_on
from learning.recipes import Recipe, Run, add_sweep, sweep
from learning.tables import read_records, tables

from spo_ext.data.tokens import Tokenizer, load_tokenizer
from spo_ext.environments.gym import score
from spo_ext.models import load_model
from spo_ext.rollout import Sampling
from spo_ext.rollout.rewards import as_reward
from spo_ext.store import TrajectoryStore
from spo_ext.trainer import SPOConfig
from spo_ext.trainer.model import HeadSettings, answer_logprobs
from spo_ext.trainer.yaml_config import parse

_EXAMPLES = Path(__file__).parents[2] / "examples"
_SETTINGS = _EXAMPLES / "real_model" / "train.yaml"
_EVALUATED = {"n": 8, "max_new_tokens": 24}  # as in run.sh
_KL_PROMPTS = 40
_MICRO_BATCHES = 4  # of TRL: a whole step of 128 completions is killed on a machine of 23 GiB


@dataclass(frozen=True)
class Task:
    """A data set of reasoning-gym.

    arguments: of the environment, besides sizes. solutions: prompts whose answers the supervised
    start learns from.
    """

    dataset: str
    arguments: dict[str, Any]
    solutions: int = 32
    sizes: dict[str, int] = field(default_factory=lambda: {"size": 600, "eval_size": 200})

    def flags(self) -> list[str]:
        """Of `spo import`."""
        arguments = json.dumps(self.sizes | self.arguments)
        return ["--environment", f"reasoning_gym:{self.dataset}", "--environment-args", arguments]


_SUM = {"min_terms": 2, "max_terms": 2, "extract": "flexible", "instruction": ""}
TASKS = {
    # That of `make real`: after the supervised start the model half knows it.
    "sums": Task("chain_sum", _SUM | {"min_digits": 1, "max_digits": 2}),
    # No arithmetic; as it comes the model is right once in thirty times.
    "letters": Task(
        "letter_counting",
        {"min_words": 3, "max_words": 5, "extract": "flexible", "instruction": ""},
    ),
}


class GRPO(TruncatedGRPO):
    """GRPO with truncated importance weights and, as by default in TRL, no penalty."""

    kl = 0.0


_CONTROL: dict[str, Any] = {"max_grad_norm": 1.0}
# Q_0 by the group's soft value, log-ratios to whoever wrote the completions.
_OAPL: dict[str, Any] = {
    "objective": "squared",
    "reference": "behaviour",
    "q0": "group_soft",
    "q0_beta": 1.0,
    "taper": False,
}
RECIPES = {
    "spo": Recipe(),
    "oapl": Recipe(_OAPL),
    "grpo": Recipe(_CONTROL, GRPO),
    "expert": Recipe(_CONTROL, SFT),
    "trl-grpo": Recipe(_CONTROL),  # see `learn_by_trl`
}


def start(run: Run, cache: Path) -> Path:
    """The folder of what the run begins with: store.db, and policy/ with its evaluations."""
    task = TASKS[run.setting]
    digest = hashlib.sha256(json.dumps(asdict(task), sort_keys=True).encode()).hexdigest()
    return cache / f"{run.setting}-{digest[:8]}-{run.reference_seed}"


def prepare(run: Run, model: Path, cache: Path) -> None:
    """Makes that folder by the commands of run.sh, if it is not there."""
    folder, task = start(run, cache), TASKS[run.setting]
    if folder.exists():
        return
    torch.set_num_threads(1)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as made:
        new = Path(made) / "new"
        new.mkdir()
        store, solutions, solved = new / "store.db", new / "solutions.jsonl", new / "solved.jsonl"
        kept = ["--store", store, "--tokenizer", model]
        _command("spo", "import", *task.flags(), *kept)
        asked = ["python", _EXAMPLES / "real_model" / "solutions.py", store, task.solutions]
        solutions.write_text(_command(*asked))
        _command("spo", "import", solutions, *kept)
        _command("spo", "export", solved, "--store", store, "--min-reward", 1)
        _command(
            *("python", _EXAMPLES / "supervised_start.py", solved, model, new / "policy"),
            *("--seed", run.reference_seed, "--learning_rate", 5e-5, "--num_train_epochs", 3),
            *("--per_device_train_batch_size", 8, "--report_to", "none", "--save_strategy", "no"),
            *("--use_cpu", "true", "--bf16", "false"),
        )
        os.replace(new, folder)


def _command(name: str, *arguments: object) -> str:
    """Standard output of a program of this environment."""
    program = str(Path(sys.executable).with_name(name))
    words = [program, *map(str, arguments)]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def settings(run: Run, folder: Path) -> SPOConfig:
    """Those of examples/real_model/train.yaml with the recipe's changes; "spo:2e-5" is the recipe
    at another learning rate."""
    name, _, rate = run.recipe.partition(":")
    changes = run.lagged(RECIPES[name]).changes | ({"learning_rate": rate} if rate else {})
    given = {
        "config": _SETTINGS,
        "store": folder / "store.db",
        "output_dir": folder / "run",
        "max_steps": run.steps,
        "seed": run.seed,
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    flags = [word for pair in (given | changes).items() for word in (f"--{pair[0]}", str(pair[1]))]
    (found,) = parse([SPOConfig], flags)
    return found


def learn_by_trl(policy: Any, given: SPOConfig, tokenizer: Any) -> None:
    """Trains the policy in place by TRL's GRPOTrainer, with its defaults but for what `given` sets
    as well. Its default against too little memory is gradient checkpointing; micro-batches cost
    less time here, and change nothing else."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(
        completions: list[Any], answer: list[str], columns: list[str], **_: Any
    ) -> list[float | None]:
        rows = [json.loads(row) for row in columns]
        named = {name: [row.get(name) for row in rows] for row in rows[:1] for name in row}
        return score(completions, answer, **named)

    with TrajectoryStore(str(given.store)) as store:
        rows = [
            {"prompt": one.content, "answer": one.answer, "columns": json.dumps(dict(one.columns))}
            for one in store.prompts("train")
        ]
    same = (
        *("num_generations", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
        *("adam_beta2", "max_grad_norm", "seed", "use_cpu", "logging_strategy", "save_strategy"),
        *("report_to", "disable_tqdm", "output_dir"),
    )
    rows_at_once = given.per_device_train_batch_size // _MICRO_BATCHES
    config = GRPOConfig(
        **{name: getattr(given, name) for name in same},
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=_MICRO_BATCHES,
        max_completion_length=given.max_new_tokens,
        gradient_checkpointing=False,
        bf16=False,
    )
    GRPOTrainer(
        policy, reward, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    ).train()


def perform(run: Run, cache: Path) -> dict[str, Any]:
    """Trains, and evaluates before and after, on prompts of the run's split."""
    commit = machine.commit()  # now: somebody may commit while it runs
    torch.set_num_threads(1)
    begin, name = start(run, cache), run.recipe.partition(":")[0]
    tokenizer, policy = load_tokenizer(begin / "policy"), load_model(begin / "policy", "cpu")
    split = "dev" if run.split == "development" else run.split
    with TrajectoryStore(begin / "store.db") as store:
        prompts = list(store.prompts(split))

    def evaluated(model: Any, origin: Any) -> dict[str, Any]:
        answer_logprobs(origin, HeadSettings())
        words = Tokenizer(begin / "policy")
        return evaluate_on(
            prompts,
            model,
            origin,
            tokenizer,
            as_reward(score),
            Sampling(**_EVALUATED, seed=run.seed),
            lambda ids: str(words.completion("", tuple(ids))),
            _KL_PROMPTS,
        )

    kept = begin / f"{split}-{run.seed}.json"
    if not kept.exists():
        found = json.dumps(evaluated(policy, policy))
        kept.write_text(found)
    before = json.loads(kept.read_text())
    totals: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(begin / "store.db", folder)
        given = settings(run, Path(folder))
        started, cpu = time.perf_counter(), time.process_time()
        if name == "trl-grpo":
            learn_by_trl(policy, given, tokenizer)
            sampled = given.per_device_train_batch_size * run.steps
        else:
            trainer = RECIPES[name].trainer(policy, given, tokenizer)
            trainer.train()
            trainer.meter.drain(trainer.accelerator)
            totals = trainer.meter.totals
            sampled = sum(1 for _ in trainer.store.trajectories(run=given.run))
            del trainer
        spent = {
            "training_seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
    after = evaluated(policy.eval(), load_model(begin / "policy", "cpu"))
    return {
        **asdict(run),
        "sampled": sampled,
        "before": before,
        "after": after,
        **spent,
        **totals,
        "model": policy.config.architectures[0],
        "commit": commit,
        "processor": machine.processor(),
        "torch": torch.__version__,
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m real_model.compare", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the folder of a pretrained model")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--recipes", nargs="+", default=list(RECIPES), help="NAME, or NAME:LEARNING_RATE")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="each with a start of its own")
    add("--steps", type=int, default=60)
    add("--cache", type=Path, default=Path("build/real_model"))
    add_sweep(parser)
    options = parser.parse_args(words)
    for recipe in options.recipes:
        if recipe.partition(":")[0] not in RECIPES:
            parser.error(f"--recipes must be of {', '.join(RECIPES)}, got {recipe}")
    runs = [
        Run(recipe, task, options.split, seed, seed, options.steps, *lag)
        for seed in options.seeds
        for lag in product(options.sync, options.uses, options.versions)
        for task in options.tasks
        for recipe in options.recipes
    ]
    begin = partial(prepare, model=options.model, cache=options.cache)
    work = partial(perform, cache=options.cache)
    left = sweep(runs, options.out, begin, work, options.workers, options.budget)
    if left:
        print(f"no time for {len(left)} runs: {', '.join(map(str, left))}")
    if options.out.exists():
        print(tables(read_records([options.out]), "trl-grpo"))


if __name__ == "__main__":
    main()
