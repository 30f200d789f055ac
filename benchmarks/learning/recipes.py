"""Named recipes of `SPOTrainer`, and runs of them beside each other.

    PYTHONPATH=benchmarks python -m learning.recipes --recipes spo ppo --out FILE.jsonl

A recipe is a supervised start and settings of the trainer, as anybody would give them. A run is a
line of FILE, and what is there is not run again. In the end all of FILE is shown as tables.

How far the policy that writes lags behind the one that learns, and how often its programs are used,
are the recipe's, or those of --sync, --uses and --versions, for each of which a recipe runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import machine
import torch
from transformers import Qwen2ForCausalLM

from spo_ext.contests.problems import Problem, Split
from spo_ext.contests.recipe import PROMPTS_PER_BATCH, spo_settings
from spo_ext.contests.vocabulary import as_prompts, make_tokenizer
from spo_ext.durable import cut_unfinished_line
from spo_ext.store import Origin, Trajectory, TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer
from spo_ext.trainer.model import HeadSettings, answer_logprobs

from .controls import GRPO, PPO, SFT, TruncatedGRPO
from .evaluation import evaluate
from .references import load_reference, reference_key
from .settings import SETTINGS, Setting
from .tables import columns, name_of, read_records, tables

# Every step samples its batch from the policy as it is.
_ONLINE: dict[str, Any] = {"sync_every": 1, "rollout_batch_size": PROMPTS_PER_BATCH}
_SPO = _ONLINE | {"beta": 0.1, "max_grad_norm": 0.2}
_CONTROL = _ONLINE | {"max_grad_norm": 1.0}
# OAPL: Q_0 by the group's soft value, log-ratios to whoever wrote the programs.
_OAPL = _ONLINE | {
    "beta": 0.3,
    "q0_beta": 1.0,
    "max_grad_norm": 0.6,
    "objective": "squared",
    "reference": "behaviour",
    "q0": "group_soft",
    "taper": False,
}
_HALF_ONLINE = _SPO | {"mixture": "half-online", "mixed_groups": True, "temperature": 0.8}
_SUPERVISED: dict[str, Any] = {
    "mixture": "offline",
    "rollouts": "none",
    "objective": "squared",  # of rows that are drawn one by one; SFT has a loss of its own
    "group_size": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_kwargs": {"lr_end": 1e-4, "power": 1.0},
    "max_grad_norm": 1.0,
}


@dataclass(frozen=True)
class Recipe:
    """What the trainer is given.

    changes: of `spo_ext.contests.recipe.spo_settings`. trainer: `SPOTrainer` or a control.
    sft_share: of all steps, on solutions first; the result is the reference of the rest.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    trainer: type[SPOTrainer] = SPOTrainer
    sft_share: float = 0.0


RECIPES = {
    "quickstart": Recipe(),
    "spo": Recipe(_SPO),
    "spo-lagged": Recipe(_SPO | {"importance_sampling_baseline": True}),
    "spo-tis": Recipe(_SPO | {"taper": False, "importance_sampling_mode": "sequence_truncate"}),
    "oapl": Recipe(_OAPL),
    "half-online": Recipe(_HALF_ONLINE),
    "sft-spo": Recipe(_SPO, sft_share=0.75),
    "sft": Recipe(_SUPERVISED, SFT),
    "expert": Recipe(_CONTROL, SFT),
    "grpo": Recipe(_CONTROL, GRPO),
    "grpo-tis": Recipe(_CONTROL, TruncatedGRPO),
    "ppo": Recipe(_CONTROL, PPO),
    "sft-ppo": Recipe(_CONTROL, PPO, sft_share=0.75),
}
# A budget may end in the middle, so what matters most comes first.
_DEFAULT = ("ppo", "spo", "sft", "sft-ppo", "sft-spo", "half-online", "grpo", "expert")


def fill(store: TrajectoryStore, setting: Setting, problems: Sequence[Problem]) -> None:
    """The training problems with their known solutions."""
    prompts = store.add_prompts(as_prompts(problems, "train"))
    store.append(
        [
            Trajectory(prompt, ids, 1.0, Origin("human"), "eos")
            for prompt, programs in zip(prompts, setting.solutions(problems), strict=True)
            for ids in programs
        ]
    )


def settings(
    recipe: Recipe, setting: Setting, folder: Path, run: str, steps: int, seed: int
) -> SPOConfig:
    """Those of the quickstart with the recipe's changes, and the sizes of the setting."""
    given = spo_settings(
        setting,
        folder,
        output_dir=str(folder / run),
        max_steps=steps,
        seed=seed,
        logging_strategy="no",
        disable_tqdm=True,
    )
    group = setting.num_generations
    sizes = {"group_size": group, "num_generations": group}
    sizes["per_device_train_batch_size"] = setting.prompts_per_batch * group
    if recipe.changes.get("mixture") == "half-online":
        sizes["num_generations"] = group // 2
    return SPOConfig(**(given | sizes | recipe.changes))


def learn(
    recipe: Recipe, setting: Setting, policy: Qwen2ForCausalLM, folder: Path, steps: int, seed: int
) -> SPOTrainer:
    """Trains the policy in place, on a store in the folder; returns the last trainer."""
    start = round(recipe.sft_share * steps)
    if start:
        given = settings(RECIPES["sft"], setting, folder, "start", start, seed)
        SFT(policy, given, make_tokenizer()).train()
    given = settings(recipe, setting, folder, "run", steps - start, seed)
    trainer = recipe.trainer(policy, given, make_tokenizer())
    trainer.train()
    return trainer


@dataclass(frozen=True)
class Run:
    """One recipe in one setting with one pair of seeds, evaluated on the split.

    sync_every: batches between versions of the policy that writes. uses: of each sampled batch.
    versions: batches are drawn evenly from what so many last versions wrote (None: from all, what
    was used least first).
    """

    recipe: str
    setting: str
    split: Split
    reference_seed: int
    seed: int
    steps: int
    sync_every: int = 1
    uses: int = 1
    versions: int | None = None

    def lagged(self, recipe: Recipe) -> Recipe:
        """The recipe, as the trainer runs it where the policy that writes lags behind."""
        asked = (self.sync_every, self.uses, self.versions) != (1, 1, None)
        if not asked or recipe.changes.get("rollouts") == "none":
            return recipe
        lag: dict[str, Any] = {"sync_every": max(self.sync_every, self.uses)}
        lag |= {"replay_ratio": float(self.uses), "replay_versions": self.versions}
        return replace(recipe, changes=recipe.changes | lag)

    def __str__(self) -> str:
        return f"{name_of(asdict(self))} r{self.reference_seed} s{self.seed}"


def perform(run: Run, cache: Path) -> dict[str, Any]:
    """Trains, and evaluates before and after. References are in the cache."""
    recipe, setting = run.lagged(RECIPES[run.recipe]), SETTINGS[run.setting]
    commit = machine.commit()  # now: somebody may commit while it runs
    torch.set_num_threads(1)  # of these sizes a second one only waits for its turn
    origin = load_reference(setting, run.reference_seed, cache)
    policy = copy.deepcopy(origin).requires_grad_(True)
    answer_logprobs(origin, HeadSettings())
    held_out = setting.problems(run.split, run.reference_seed)
    before = evaluate(origin, origin, held_out, setting, run.seed)
    with tempfile.TemporaryDirectory() as folder:
        with TrajectoryStore(Path(folder) / "store.db") as store:
            fill(store, setting, setting.problems("train", run.reference_seed))
        started, cpu = time.perf_counter(), time.process_time()
        trainer = learn(recipe, setting, policy, Path(folder), run.steps, run.seed)
        spent = {
            "training_seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
        }
        trainer.meter.drain(trainer.accelerator)
        sampled = sum(1 for _ in trainer.store.trajectories(run=trainer.args.run))
        temperature = trainer.args.temperature
        after = evaluate(policy, origin, held_out, setting, run.seed, temperature)
    return {
        **asdict(run),
        "sampled": sampled,
        "before": before,
        "after": after,
        **spent,
        **trainer.meter.totals,
        "reference": reference_key(setting, run.reference_seed),
        "commit": commit,
        "processor": machine.processor(),
        "torch": torch.__version__,
    }


def reference(run: Run, cache: Path) -> None:
    """Puts what the run begins with into the cache."""
    load_reference(SETTINGS[run.setting], run.reference_seed, cache)


def sweep(
    runs: Sequence[Run],
    out: Path,
    prepare: Callable[[Run], None],
    perform: Callable[[Run], dict[str, Any]],
    workers: int,
    minutes: float,
) -> list[Run]:
    """Adds to `out` what it has no line of; returns the runs that there was no time for.

    prepare: makes what all runs of a setting and a reference_seed begin with; called first. Then no
    run is begun that would end after the minutes, going by the longest one before it. Killed, it
    goes on where it was.
    """
    deadline = time.monotonic() + 60 * minutes
    cut_unfinished_line(out)
    lines = read_records([out]) if out.exists() else []
    done = [{n.name: line.get(n.name, n.default) for n in fields(Run)} for line in lines]
    left = [run for run in runs if asdict(run) not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    active: dict[Future[dict[str, Any]], float] = {}
    longest = 0.0
    spawn = multiprocessing.get_context("spawn")
    # A process for each run, whose peak memory is then its own.
    with ProcessPoolExecutor(workers, spawn, max_tasks_per_child=1) as pool:
        starts = {(run.setting, run.reference_seed): run for run in left}
        for made in [pool.submit(prepare, run) for run in starts.values()]:
            made.result()
        while active or left:
            while left and len(active) < workers and time.monotonic() + longest < deadline:
                active[pool.submit(perform, left.pop(0))] = time.monotonic()
            if not active:
                break
            for future in wait(active, return_when=FIRST_COMPLETED).done:
                longest = max(longest, time.monotonic() - active.pop(future))
                found = future.result()
                with out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                run = Run(**{n.name: found[n.name] for n in fields(Run)})
                print(
                    run, *(f"{read(found):.3f}" for read in columns([found]).values()), flush=True
                )
    return left


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Arguments of all sweeps: how far the policy that writes lags, what is evaluated, how long."""
    add = parser.add_argument
    add("--sync", nargs="+", type=int, default=[1], help="batches between two versions")
    add("--uses", nargs="+", type=int, default=[1], help="of a sampled batch")
    add("--versions", nargs="+", type=int, default=[None], help="that a batch is drawn from")
    add("--split", choices=("development", "test"), default="development")
    add("--budget", type=float, default=math.inf, help="minutes, in which no run may end later")
    add("--workers", type=int, default=os.cpu_count(), help="processes of one thread")
    add("--out", type=Path, required=True, help="a .jsonl file")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m learning.recipes", description=__doc__)
    add = parser.add_argument
    add("--recipes", nargs="+", choices=RECIPES, default=_DEFAULT)
    add("--setting", choices=SETTINGS, default="standard", help="tiny is for a trial")
    add("--reference-seeds", nargs="+", type=int, default=[0, 1])
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--steps", type=int, default=120)
    add("--cache", type=Path, default=Path("build/learning/references"))
    add_sweep(parser)
    options = parser.parse_args(words)
    # Both seeds change together first, so that two pairs already vary both; a sweep that is cut
    # short has whole rows of them.
    pairs = sorted(product(options.reference_seeds, options.seeds), key=lambda p: (max(p), p))
    lags = list(product(options.sync, options.uses, options.versions))
    runs = [
        Run(name, options.setting, options.split, *pair, options.steps, *lag)
        for pair in pairs
        for lag in lags
        for name in options.recipes
    ]
    begin = partial(reference, cache=options.cache)
    work = partial(perform, cache=options.cache)
    left = sweep(runs, options.out, begin, work, options.workers, options.budget)
    if left:
        print(f"no time for {len(left)} runs: {', '.join(map(str, left))}")
    if options.out.exists():
        print(tables(read_records([options.out]), "ppo"))


if __name__ == "__main__":
    main()
