"""Named recipes of `SPOTrainer`: how the quickstart, this page's methods and its controls learn.

    PYTHONPATH=benchmarks python -m learning.recipes --recipes group-0.1 ppo --out FILE.jsonl

A recipe is a supervised start and settings of the trainer, as anybody would give them. A run is a
line of FILE, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import torch
from transformers import Qwen2ForCausalLM

from spo_ext.contests.problems import Problem, Split
from spo_ext.contests.recipe import PROMPTS_PER_BATCH, spo_settings
from spo_ext.contests.vocabulary import as_prompts, make_tokenizer
from spo_ext.sandbox import Sandbox
from spo_ext.store import Origin, Trajectory, TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer

from .controls import GRPO, PPO, SFT
from .evaluation import evaluate
from .judging import Grader
from .offline import write_solutions
from .references import load_reference, reference_key
from .settings import Setting, setting_named

# Every step samples its batch from the policy as it is.
_ONLINE: dict[str, Any] = {"sync_every": 1, "rollout_batch_size": PROMPTS_PER_BATCH}
_SPO = _ONLINE | {"beta": 0.1, "max_grad_norm": 0.2}
_CONTROL = _ONLINE | {"max_grad_norm": 1.0}
_HALF_ONLINE = _SPO | {
    "mixture": "half-online",
    "mixed_groups": True,
    "temperature": 0.8,
}
_SUPERVISED: dict[str, Any] = {
    "mixture": "offline",
    "rollouts": "none",
    "group_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_kwargs": {"lr_end": 1e-4, "power": 1.0},
    "max_grad_norm": 1.0,
}


@dataclass(frozen=True)
class Recipe:
    """What the trainer is given.

    changes: of `spo_ext.contests.recipe.spo_settings`. trainer: `SPOTrainer` or a control.
    sft_share: of all steps, on solutions first; the result is the reference of the rest. method:
    what the records of the harness call it.
    """

    method: str
    changes: dict[str, Any] = field(default_factory=dict)
    trainer: type[SPOTrainer] = SPOTrainer
    sft_share: float = 0.0


RECIPES = {
    "quickstart": Recipe("group:beta=0.05"),
    "spo": Recipe("group-0.1", _SPO),
    "half-online": Recipe(
        "group-0.1:offline=near,offline_share=0.5,baseline=online_group,sharpen=0.8", _HALF_ONLINE
    ),
    "sft-spo": Recipe("sft-group", _SPO, sft_share=0.75),
    "sft": Recipe("sft", _SUPERVISED, SFT),
    "expert": Recipe("expert", _CONTROL, SFT),
    "grpo": Recipe("grpo", _CONTROL, GRPO),
    "ppo": Recipe("ppo", _CONTROL, PPO),
    "sft-ppo": Recipe("sft-ppo", _CONTROL, PPO, sft_share=0.75),
}


def fill(store: TrajectoryStore, setting: Setting, problems: Sequence[Problem]) -> None:
    """The training problems with their known solutions."""
    prompts = store.add_prompts(as_prompts(problems, "train"))
    length = setting.config.max_program_tokens
    solutions = write_solutions(problems, "near", setting.offline_solutions, length, seed=0)
    store.append(
        [
            Trajectory(prompt, ids, 1.0, Origin("human"), "eos")
            for prompt, programs in zip(prompts, solutions, strict=True)
            for ids in programs
        ]
    )


def settings(
    recipe: Recipe, setting: Setting, folder: Path, run: str, steps: int, seed: int
) -> SPOConfig:
    """Those of the quickstart with the recipe's changes, and the sizes of the setting."""
    config = setting.config
    given = spo_settings(
        config,
        folder,
        output_dir=str(folder / run),
        max_steps=steps,
        seed=seed,
        logging_strategy="no",
        disable_tqdm=True,
    )
    group = config.num_generations
    sizes = {"group_size": group, "num_generations": group}
    sizes["per_device_train_batch_size"] = config.prompts_per_batch * group
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


def perform(
    name: str,
    setting: Setting,
    reference_seed: int,
    seed: int,
    steps: int,
    cache: Path,
    split: Split,
) -> dict[str, Any]:
    """Trains, and evaluates on the split before and after."""
    recipe = RECIPES[name]
    torch.set_num_threads(setting.config.threads)
    origin = load_reference(setting, reference_seed, cache)
    policy = copy.deepcopy(origin).requires_grad_(True)
    held_out = setting.problems(split, reference_seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        Sandbox(workers=setting.config.sandbox_workers) as sandbox,
    ):
        with TrajectoryStore(Path(folder) / "store.db") as store:
            fill(store, setting, setting.problems("train", reference_seed))
        started, cpu = time.perf_counter(), time.process_time()
        trainer = learn(recipe, setting, policy, Path(folder), steps, seed)
        spent = {
            "training_seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
        }
        sampled = sum(1 for _ in trainer.store.trajectories(run=trainer.args.run))
        looks = []
        for model in (origin, sharpened(policy, trainer.args.temperature)):
            grader = Grader(sandbox)
            found = evaluate(model, origin, origin, held_out, grader, setting.config, seed, None)
            names = ("pass_at", "correct", "distinct_correct", "entropy", "kl", "mean_tokens")
            looks.append({name: found[name] for name in names})
    return {
        "recipe": name,
        "method": recipe.method,
        "setting": setting.name,
        "split": split,
        "reference_seed": reference_seed,
        "seed": seed,
        "steps": steps,
        "sampled": sampled,
        "before": looks[0],
        "after": looks[1],
        **spent,
        "reference": reference_key(setting, reference_seed),
        "commit": machine.commit(),
        "processor": machine.processor(),
        "torch": torch.__version__,
    }


def sharpened(policy: Qwen2ForCausalLM, temperature: float) -> Qwen2ForCausalLM:
    """Its policy at the temperature, as a model that is sampled at 1."""
    model = copy.deepcopy(policy).requires_grad_(False).eval()
    model.lm_head.weight.div_(temperature)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m learning.recipes", description=__doc__)
    add = parser.add_argument
    add("--recipes", nargs="+", choices=RECIPES, default=["spo", "ppo", "sft-spo", "half-online"])
    add("--setting", default="standard", help="tiny, for a trial; standard")
    add("--reference-seeds", nargs="+", type=int, default=[0, 1])
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--steps", type=int, default=120)
    add("--split", choices=("development", "test"), default="development")
    add("--cache", type=Path, default=Path("build/learning/references"))
    add("--out", type=Path, required=True, help="a .jsonl file")
    options = parser.parse_args()
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    keys = ("recipe", "setting", "split", "reference_seed", "seed", "steps")
    done = {tuple(json.loads(line)[key] for key in keys) for line in lines}
    setting = setting_named(options.setting)
    for seed in options.seeds:
        for reference_seed in options.reference_seeds:
            for name in options.recipes:
                key = (name, setting.name, options.split, reference_seed, seed, options.steps)
                if key in done:
                    continue
                found = perform(
                    name, setting, reference_seed, seed, options.steps, options.cache, options.split
                )
                with options.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                after = found["after"]["pass_at"]
                print(*key, f"{after[0]:.3f} {after[min(10, len(after)) - 1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
