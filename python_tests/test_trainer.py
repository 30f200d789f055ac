"""The trainer in one process: what it learns from, and that its loss is the one of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from conftest import relative_error
from trainer_cases import dev_prompts, fill, make_model, make_tokenizer, with_adapters
from trainer_process import settings, train

from spo_ext.rollout import Generation
from spo_ext.store import PromptValue, TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer, yaml_config
from spo_ext.trainer.batches import Tokens, collate
from spo_ext.trainer.reference import score_tokens

OFFLINE = {"mixture": "offline", "rollouts": "none"}
SQUARED = {**OFFLINE, "objective": "squared", "group_size": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with TrajectoryStore(tmp_path / "store.db") as store:
        fill(store)
        dev_prompts(store)
        values = {prompt.id: PromptValue(0.3, 4, 0.5, 1.0) for prompt in store.prompts("train")}
        store.put_q0(values)
    return tmp_path


def losses(result: dict[str, Any]) -> list[float]:
    return [line["loss"] for line in result["log"]]


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(w, other["weights"][name]) for name, w in one["weights"].items())


def test_first_loss_is_that_of_the_reference_formula(folder: Path) -> None:
    """Policy and reference are equal at first; after one step they are what eager says."""
    result = train(settings(folder, **SQUARED, max_steps=1))
    with TrajectoryStore(folder / "store.db") as store:
        rows = store.get([row.id for row in store.trajectories()])
        drawn = _drawn(store)
    rewards = torch.tensor([row.reward for row in rows if row.id in drawn[0]])
    assert losses(result)[0] == pytest.approx(float((0.3 - rewards).square().mean()), rel=1e-6)


def _drawn(store: TrajectoryStore) -> list[list[int]]:
    import sqlalchemy as sa

    from spo_ext.store import schema

    with store.database.read() as connection:
        table = schema.draws.c
        found = connection.execute(sa.select(table.step, table.trajectory_id).order_by(table.step))
        batches: dict[int, list[int]] = {}
        for step, key in found:
            batches.setdefault(step, []).append(key)
    return list(batches.values())


@pytest.mark.parametrize("objective", ["squared", "cross_entropy", "advantage", "group"])
def test_every_objective_fits_its_data(folder: Path, objective: str) -> None:
    """The loss on all of a small store falls, and it is the one that `spo_ext.loss` gives."""
    options = settings(folder, **OFFLINE, objective=objective, max_steps=30, learning_rate=3e-3)
    options |= {"per_device_train_batch_size": 32, "group_size": 4, "lr_scheduler_type": "constant"}
    if objective == "cross_entropy":  # rewards are log-probabilities of success
        options |= {"output_dir": str(folder / "log"), "store": str(folder / "log.db")}
        _as_log_optimality(folder)
    found = losses(train(options))
    # "advantage" wants all tokens of a completion equal, which a small model takes long to learn.
    assert min(found[-5:]) < (0.9 if objective == "advantage" else 0.6) * found[0]


def _as_log_optimality(folder: Path) -> None:
    from spo_ext.store import Prompt, Trajectory

    with TrajectoryStore(folder / "store.db") as old, TrajectoryStore(folder / "log.db") as new:
        for prompt in old.prompts("train"):
            fields = ("content", "token_ids", "tests", "answer", "split")
            key = new.add_prompt(Prompt(**{name: getattr(prompt, name) for name in fields}))
            new.put_q0({key: PromptValue(-0.6, 4, 0.5, 1.0)})
            rows = list(old.trajectories(prompt_id=prompt.id))
            made = [Trajectory(key, r.token_ids, r.reward - 1, r.origin, r.finish) for r in rows]
            new.append(made)


def test_accumulation_is_one_big_batch(folder: Path) -> None:
    whole = train(settings(folder, **SQUARED, per_device_train_batch_size=8))
    parts = settings(folder, **SQUARED, output_dir=str(folder / "parts"), run="parts")
    parts |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    # The seed of the sampler is that of the run's data, not of its name.
    found = train(parts)
    assert losses(found)[0] == pytest.approx(losses(whole)[0], rel=1e-6)
    # Adam divides by the gradient's size, so that the rounding of a small one moves a weight.
    assert losses(found) == pytest.approx(losses(whole), rel=1e-4)
    for name, weight in whole["weights"].items():
        assert relative_error(found["weights"][name], weight) < 1e-3, name


def test_packed_is_padded_through_the_trainer(folder: Path) -> None:
    packed = train(settings(folder, **SQUARED, packing="packed"))
    padded = train(
        settings(folder, **SQUARED, packing="padded", output_dir=str(folder / "b"), run="b")
    )
    assert losses(padded) == pytest.approx(losses(packed), rel=1e-6)


def test_adapters_train_and_the_base_is_the_reference(folder: Path) -> None:
    base = make_model()
    model = with_adapters(make_model())
    trainer = SPOTrainer(
        model,
        SPOConfig(**settings(folder, **SQUARED, max_steps=2, reference="adapter")),
        make_tokenizer(),
    )
    trainer.train()
    # One model in memory: the trainer scored with the policy itself, adapters off.
    assert trainer.reference.model is model
    row = next(trainer.store.trajectories())
    prompt = trainer.store.get_prompts([row.prompt_id])[0]
    from spo_ext.trainer.model import HeadSettings, answer_logprobs

    answer_logprobs(base, HeadSettings())
    tokens = Tokens(prompt.token_ids, row.token_ids)
    expected = score_tokens(base, collate([tokens], "padded"))[0]
    held = trainer.reference.logprobs([row], {prompt.id: prompt.token_ids})[0]
    torch.testing.assert_close(held, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_a_trained_adapter_is_a_part_of_the_reference(folder: Path, target: str) -> None:
    """What the policy says as it starts, not what its base says; and the base is there once."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["v_proj", target], init_lora_weights=False)
    model = get_peft_model(make_model(), config)
    arguments = SPOConfig(**settings(folder, **SQUARED, max_steps=2, logging_steps=1))
    trainer = SPOTrainer(model, arguments, make_tokenizer())
    reference = trainer.reference.model
    assert reference is not None and reference is not model
    pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
    assert all((a is b) != a.requires_grad for a, b in pairs)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert (lines[0]["spo/log_ratio"], lines[0]["kl"]) == (0.0, 0.0)
    assert lines[1]["kl"] > 0


def test_virtual_tokens_train(folder: Path) -> None:
    from peft import MultitaskPromptTuningConfig, PromptTuningConfig, get_peft_model

    tasks = MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, task_type="CAUSAL_LM")
    arguments = SPOConfig(**settings(folder, **SQUARED, max_steps=2, logging_steps=1))
    with pytest.raises(ValueError, match="must need no task_ids.* got PEFT's MULTITASK_PROMPT"):
        SPOTrainer(get_peft_model(make_model(), tasks), arguments, make_tokenizer())
    prompt = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    trainer = SPOTrainer(get_peft_model(make_model(), prompt), arguments, make_tokenizer())
    trainer.train()
    assert trainer.layout == "padded"
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert (lines[0]["spo/log_ratio"], lines[0]["kl"]) == (0.0, 0.0)
    assert lines[1]["kl"] > 0


def test_cached_reference_needs_no_model(folder: Path) -> None:
    first = train(settings(folder, **SQUARED, max_steps=4, per_device_train_batch_size=32))
    options = settings(folder, **SQUARED, output_dir=str(folder / "c"), reference="cached")
    options |= {"max_steps": 4, "per_device_train_batch_size": 32, "run": "c"}
    trainer = SPOTrainer(make_model(), SPOConfig(**options), make_tokenizer())
    assert trainer.reference.model is None
    trainer.train()
    again = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert again == losses(first)


def test_cached_reference_says_what_is_missing(folder: Path) -> None:
    options = settings(folder, **SQUARED, reference="cached")
    with pytest.raises(ValueError, match="it has none: run spo score"):
        SPOTrainer(make_model(), SPOConfig(**options), make_tokenizer())
    train(settings(folder, **SQUARED, max_steps=1))
    options |= {"run": "later", "max_steps": 8}
    with pytest.raises(ValueError, match="must have the reference's log-probabilities of all"):
        SPOTrainer(make_model(), SPOConfig(**options), make_tokenizer()).train()


def test_online_policy_learns_what_is_rewarded(folder: Path) -> None:
    """A reward for beginning with one letter: the policy comes to write it."""

    def reward(prompts: Any, completions: Any, token_ids: Any) -> list[Any]:
        from spo_ext.rollout import Judgement

        return [Judgement(float(ids[0] % 2)) for ids in token_ids]

    options = settings(folder, max_steps=15, learning_rate=2e-3, num_generations=8, beta=0.1)
    options |= {"group_size": 4, "per_device_train_batch_size": 16}
    trainer = SPOTrainer(make_model(), SPOConfig(**options), make_tokenizer(), reward=reward)
    trainer.train()
    found = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert found[0] < 0.2 and min(found[-5:]) > 0.7
    line = trainer.state.log_history[0]
    assert {"kl", "entropy", "spo/residual", "spo/calibration", "store/age_versions"} <= set(line)


def test_a_reward_function_of_trls_form(folder: Path) -> None:
    def reward(completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        assert sorted(columns) == ["answer", "prompts", "tests"]
        return [len(ids) / 8 for ids in completion_ids]

    config = SPOConfig(**settings(folder, max_steps=1))
    SPOTrainer(make_model(), config, make_tokenizer(), reward=reward).train()
    with TrajectoryStore(folder / "store.db") as store:
        rows = list(store.trajectories(run="run"))
    assert rows and all(row.reward == len(row.token_ids) / 8 for row in rows)


def test_several_reward_functions_with_weights(folder: Path) -> None:
    def half(completions: Any, **_: Any) -> list[float]:
        return [0.5] * len(completions)

    def length(completion_ids: Any, **_: Any) -> list[float]:
        return [len(ids) / 8 for ids in completion_ids]

    options = settings(folder, max_steps=1)
    config = SPOConfig(**options, reward_weights=[2.0, 0.5])
    trainer = SPOTrainer(make_model(), config, make_tokenizer(), reward_funcs=[half, length])
    trainer.train()
    with TrajectoryStore(folder / "store.db") as store:
        rows = list(store.trajectories(run="run"))
    assert rows and all(row.reward == 1 + len(row.token_ids) / 16 for row in rows)
    [line] = [line for line in trainer.state.log_history if "rewards/half/mean" in line]
    assert line["rewards/half/mean"] == 0.5 and line["rewards/length/std"] >= 0
    with pytest.raises(ValueError, match="SPOTrainer: reward_funcs must be left out with reward"):
        SPOTrainer(make_model(), config, reward=half, reward_funcs=half)
    with pytest.raises(ValueError, match="SPOConfig: reward_funcs must be left out with reward"):
        SPOConfig(**options | {"reward": "answer"}, reward_funcs="tests")
    found = SPOConfig(**options | {"reward": "tests"}, reward_funcs=["answer"])
    assert found.rewards == ["answer"]


@pytest.mark.parametrize("name", ["reward", "reward_funcs"])
def test_rewards_of_a_file_and_of_flags(folder: Path, name: str) -> None:
    path = folder / "run.yaml"
    path.write_text(
        f"store: {folder}/store.db\noutput_dir: {folder}/run\nmax_steps: 1\nuse_cpu: true\n"
        f"{name}: [tests, answer]\nreward_weights: [1, 2]\n"
    )

    def parse(*flags: str) -> Any:
        (config,) = yaml_config.parse([SPOConfig], ["--config", str(path), *flags])
        return config.rewards

    assert parse() == ["tests", "answer"]
    assert parse(f"--{name}", "answer") == "answer"
    assert parse(f"--{name}", "a.b:c", f"--{name}", "tests") == ["a.b:c", "tests"]
    assert parse(f"--{name}", "a.b:c", "tests") == ["a.b:c", "tests"]


def test_a_generator_of_ones_own_writes_rollouts_and_evaluations(folder: Path) -> None:
    class Fixed:
        """Writes the letters 5 and 6 in turn, with their log-probabilities unknown."""

        def generate(self, prompts: Any, sampling: Any) -> list[list[Generation]]:
            return [[Generation((5 + k % 2, 1), "eos") for k in range(sampling.n)] for _ in prompts]

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        return [float(ids[0] == 5) for ids in completion_ids]

    config = SPOConfig(**settings(folder, max_steps=2, eval_samples=4, eval_k=[1]))
    trainer = SPOTrainer(make_model(), config, make_tokenizer(), reward=reward, generator=Fixed())
    trainer.train()
    assert {tuple(row.token_ids) for row in trainer.store.trajectories(run="run")} == {
        (5, 1),
        (6, 1),
    }
    assert trainer.evaluate()["eval_pass@1"] == 0.5
    with pytest.raises(ValueError, match="SPOTrainer: generator must be an object with generate"):
        SPOTrainer(make_model(), config, make_tokenizer(), generator=reward)


def test_half_online_takes_half_from_each(folder: Path) -> None:
    result = train(settings(folder, mixture="half-online", sync_every=2, max_steps=4))
    assert {line["store/offline_share"] for line in result["log"]} == {0.5}
    with TrajectoryStore(folder / "store.db") as store:
        versions = {row.origin.policy_version for row in store.trajectories(run="run")}
    assert versions == {0, 1}


def test_replay_draws_a_share_of_the_completions(folder: Path) -> None:
    """Two versions of four steps, each of which samples what one step takes."""
    result = train(settings(folder, sync_every=4, replay_ratio=4.0, max_steps=8, group_size=4))
    with TrajectoryStore(folder / "store.db") as store:
        rows = list(store.trajectories(run="run"))
    assert {row.origin.policy_version for row in rows} == {0, 1}
    assert len(rows) <= 2 * 8
    reuse = [line["store/reuse"] for line in result["log"]]
    assert reuse[0] == 1 and reuse[3] == 4 and reuse[-1] > 3


def test_value_of_prompts_from_the_reference(folder: Path) -> None:
    options = settings(folder, objective="squared", group_size=1, q0_samples=4, beta=0.25)
    train(options | {"max_steps": 2})
    with TrajectoryStore(folder / "store.db") as store:
        prompts = [prompt.id for prompt in store.prompts("train")]
        [fingerprint] = store.reference_fingerprints()
        where = {"beta": 0.25, "temperature": 1.0, "reference": fingerprint}
        values = [value for value in store.q0(prompts, **where) if value is not None]
    assert values and all(value.n == 4 for value in values)


def test_missing_value_is_an_error(folder: Path) -> None:
    options = settings(folder, **OFFLINE, objective="squared", group_size=1, beta=0.125)
    with pytest.raises(ValueError, match="every prompt must have a value q0 for beta 0.125"):
        train(options)


def test_evaluation_draws_and_moves_nothing(folder: Path) -> None:
    options = settings(folder, **SQUARED, eval_samples=4, eval_k=[1, 2])
    plain = train(dict(options))
    options |= {"eval_strategy": "steps", "eval_steps": 2, "run": "b", "output_dir": f"{folder}/b"}
    trainer = SPOTrainer(make_model(), SPOConfig(**options), make_tokenizer())
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_pass@1" in line]
    assert len(lines) == 2 and "eval_pass@2" in lines[0]
    again = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert again == losses(plain)


def test_a_used_run_is_not_continued_by_mistake(folder: Path) -> None:
    train(settings(folder, **SQUARED))
    with pytest.raises(ValueError, match="run must be new in this store, or continued"):
        train(settings(folder, **SQUARED))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"store": None}, "store must be a file or a database"),
        ({"max_steps": -1}, "max_steps must be a number of optimiser steps > 0"),
        ({"objective": "ppo"}, "objective must be one of squared"),
        ({"group_size": 1}, "group_size must be at least 2 for objective group"),
        ({"per_device_train_batch_size": 6}, "must be a multiple of group_size 4"),
        ({"mixture": "offline"}, "rollouts must be none for mixture 'offline'"),
        ({"rollouts": "none"}, "rollouts must be embedded or external for mixture 'online'"),
        ({"temperature": 0.0}, "temperature must be a number > 0"),
        ({"reference": "adapter"}, "reference must be adapter only for a model with PEFT's"),
        ({"publish_url": "http://localhost:1"}, "publish_to must be a folder"),
    ],
)
def test_settings_that_do_not_fit(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SPOTrainer(make_model(), SPOConfig(**settings(folder, **changes)), make_tokenizer())


def test_published_policies_can_be_loaded(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = train(settings(folder, **SQUARED, sync_every=2, publish_to=str(folder / "policies")))
    latest = (folder / "policies" / "latest").read_text().strip()
    assert latest.endswith("0000001") and (folder / "policies" / "finished").exists()
    model = AutoModelForCausalLM.from_pretrained(folder / "policies" / latest)
    moved = [
        float((weight - result["weights"][name]).abs().max())
        for name, weight in model.state_dict().items()
    ]
    assert 0 < max(moved) < 0.1  # two steps behind the end of the run
