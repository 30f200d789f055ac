"""The comparison on a pretrained model, on a policy and batches that take seconds."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

for package in ("transformers", "accelerate", "trl", "datasets", "reasoning_gym"):
    pytest.importorskip(package)

from data_cases import save_tokenizer
from real_model import compare
from rollout_cases import tiny_model

from spo_ext.data.tokens import Tokenizer
from spo_ext.environments import fill, load_environment
from spo_ext.store import TrajectoryStore
from spo_ext.trainer.yaml_config import load_yaml

TASK = compare.Task(
    "chain_sum",
    {"min_terms": 2, "max_terms": 2, "max_digits": 1, "extract": "flexible", "instruction": ""},
    sizes={"size": 12, "eval_size": 4},
)
# A random policy has no right answer.
REWARD = """
def odd(completions, *_, **__):
    return [float(len(str(said)) % 2) for said in completions]
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run begins with, but for the supervised training."""
    monkeypatch.setitem(compare.TASKS, "sums", TASK)
    few = load_yaml(compare._SETTINGS.read_text(), "train.yaml")
    few |= {"per_device_train_batch_size": 8, "num_generations": 4, "group_size": 4}
    few |= {"rollout_batch_size": 2, "warmup_steps": 0, "reward": f"{tmp_path / 'odd.py'}:odd"}
    (tmp_path / "odd.py").write_text(REWARD)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(few))
    monkeypatch.setattr(compare, "_SETTINGS", tmp_path / "train.yaml")
    folder = compare.start(run("spo"), tmp_path)
    tiny_model(0, 1.0).save_pretrained(folder / "policy")
    save_tokenizer(folder / "policy")
    words = TASK.flags()
    environment = load_environment(words[1], json.loads(words[3]))
    with TrajectoryStore(folder / "store.db") as store:
        for split in ("train", "dev", "test"):
            fill(store, environment, split, Tokenizer(folder / "policy"))
    return tmp_path


def run(recipe: str) -> compare.Run:
    return compare.Run(recipe, "sums", "test", 0, 0, 2)


def test_rates_and_recipes_change_the_settings_of_the_example(cache: Path) -> None:
    ours, faster, control = (compare.settings(run(n), cache) for n in ("spo", "spo:1e-3", "grpo"))
    assert (ours.learning_rate, ours.max_grad_norm, ours.beta) == (1e-5, 0.1, 0.05)
    assert (faster.learning_rate, faster.max_grad_norm) == (1e-3, 0.1)
    assert (control.learning_rate, control.max_grad_norm) == (1e-5, 1.0)


@pytest.mark.parametrize("recipe", ["spo", "trl-grpo"])
def test_a_run_is_trained_and_evaluated(
    cache: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {}
    exec(REWARD, names)
    monkeypatch.setattr(compare, "score", names["odd"])
    found = compare.perform(run(recipe), cache)
    assert found["sampled"] == 2 * 8
    before, after = found["before"], found["after"]
    assert len(before["correct"]) == 4 and len(before["pass_at"]) == 8
    assert before["kl"] == pytest.approx(0, abs=1e-5)
    assert after["entropy"] != before["entropy"] and after["kl"] != before["kl"]
    assert found["peak_bytes"] > 1 << 20 and found["cpu_seconds"] > 0
