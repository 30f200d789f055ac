"""Half-online SPO, sharpened, by `SPOTrainer` itself: the settings that a user would give.

    PYTHONPATH=benchmarks python -m learning.through_trainer --reference-seeds 0 1 --out FILE

The harness runs `group-0.1:offline=near,offline_share=0.5,baseline=online_group,sharpen=0.8` with a
loop of its own. This is the same recipe by the trainer: its rollouts, its mixed groups, a sampling
temperature in place of the divided head. Problems, references and evaluation are the harness's.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from spo_ext.contests.problems import Problem
from spo_ext.contests.vocabulary import TOKEN_IDS, encode_prompt
from spo_ext.rollout import Judgement
from spo_ext.sandbox import Sandbox
from spo_ext.store import Origin, Prompt, Trajectory, TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer

from .evaluation import evaluate
from .judging import Grader
from .offline import write_solutions
from .references import load_reference
from .settings import Config, Setting, setting_named

_BETA, _TEMPERATURE, _RATE = 0.1, 0.8, 3e-4


def tokenizer() -> PreTrainedTokenizerFast:
    """Of the quickstart's tokens, which are words; programs are judged by their ids."""
    words = Tokenizer(WordLevel(TOKEN_IDS, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


class Judge:
    """A reward: 0 for a program that passes all hidden tests of its problem, -1 for others."""

    def __init__(self, problems: Sequence[Problem], grader: Grader) -> None:
        self._problems = {tuple(encode_prompt(problem)): problem for problem in problems}
        self._grader = grader

    def __call__(
        self, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> list[Judgement]:
        asked = [self._problems[tuple(prompt.token_ids or ())] for prompt in prompts]
        return [Judgement(grade.reward) for grade in self._grader.grade(asked, ids)]


def fill(store: TrajectoryStore, setting: Setting, problems: Sequence[Problem]) -> None:
    """The training problems with their known solutions."""
    prompts = store.add_prompts(
        [Prompt(problem.description, encode_prompt(problem)) for problem in problems]
    )
    length = setting.config.max_program_tokens
    solutions = write_solutions(problems, "near", setting.offline_solutions, length, seed=0)
    for prompt, programs in zip(prompts, solutions, strict=True):
        store.append([Trajectory(prompt, ids, 0.0, Origin("human"), "eos") for ids in programs])


def settings(folder: Path, config: Config, steps: int, seed: int) -> SPOConfig:
    """Those of the harness's run, in the trainer's words."""
    rows = config.prompts_per_batch * config.programs_per_prompt
    return SPOConfig(
        output_dir=str(folder / "run"),
        store=str(folder / "trajectories.db"),
        objective="group",
        beta=_BETA,
        temperature=_TEMPERATURE,
        mixture="half-online",
        mixed_groups=True,
        group_size=config.programs_per_prompt,
        per_device_train_batch_size=rows,
        samples_per_prompt=config.programs_per_prompt // 2,
        rollout_batch_size=config.prompts_per_batch,
        max_new_tokens=config.max_program_tokens,
        reward_range=[-1.0, 0.0],
        max_steps=steps,
        seed=seed,
        learning_rate=_RATE,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"lr_end": _RATE / 10, "power": 1.0},
        warmup_steps=config.warmup_steps,
        adam_beta2=0.98,
        # The harness divides the loss by 2 beta, and clips after that.
        max_grad_norm=config.max_grad_norm * 2 * _BETA,
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )


def run(
    setting: Setting, reference_seed: int, seed: int, steps: int, cache: Path
) -> dict[str, Any]:
    """Trains, and evaluates on the test problems before and after."""
    torch.set_num_threads(setting.config.threads)
    problems = setting.problems("train", reference_seed)
    held_out = setting.problems("test", reference_seed)
    origin = load_reference(setting, reference_seed, cache)
    policy = copy.deepcopy(origin).requires_grad_(True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Sandbox(workers=setting.config.sandbox_workers) as sandbox,
    ):
        grader = Grader(sandbox)
        config = settings(Path(folder), setting.config, steps, seed)
        with TrajectoryStore(str(config.store)) as store:
            fill(store, setting, problems)
        trainer = SPOTrainer(policy, config, tokenizer(), reward=Judge(problems, grader))
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        looks = []
        for model in (origin, sharpened(policy)):
            found = evaluate(model, origin, origin, held_out, grader, setting.config, seed, None)
            looks.append({name: found[name] for name in ("pass_at", "distinct_correct", "entropy")})
        with TrajectoryStore(str(config.store)) as store:
            sampled = sum(1 for _ in store.trajectories(run=config.run))
    return {
        "setting": setting.name,
        "reference_seed": reference_seed,
        "seed": seed,
        "steps": steps,
        "sampled": sampled,
        "before": looks[0],
        "after": looks[1],
        "training_seconds": seconds,
        "commit": machine.commit(),
        "processor": machine.processor(),
        "torch": torch.__version__,
    }


def sharpened(policy: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """Its policy at the temperature, as a model that is sampled at 1."""
    model = copy.deepcopy(policy).requires_grad_(False).eval()
    model.lm_head.weight.div_(_TEMPERATURE)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m learning.through_trainer", description=__doc__)
    add = parser.add_argument
    add("--setting", default="standard", help="tiny, for a trial; standard")
    add("--reference-seeds", nargs="+", type=int, default=[0, 1])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", type=int, default=120)
    add("--cache", type=Path, default=Path("build/learning/references"))
    add("--out", type=Path, required=True, help="a .json file")
    options = parser.parse_args()
    runs = []
    for reference_seed in options.reference_seeds:
        for seed in options.seeds:
            runs.append(
                run(
                    setting_named(options.setting),
                    reference_seed,
                    seed,
                    options.steps,
                    options.cache,
                )
            )
            options.out.write_text(json.dumps(runs, indent=1) + "\n")
            after = runs[-1]["after"]["pass_at"]
            k = min(10, len(after))
            print(f"reference {reference_seed}, seed {seed}: {after[0]:.3f} / {after[k - 1]:.3f}")


if __name__ == "__main__":
    main()
