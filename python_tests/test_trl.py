"""The mixin in the real GRPOTrainer, on a tiny random model, against float64 and whole logits."""

import copy

import pytest
import torch
from integration_cases import eager_logprobs, example

from spo_ext import eager

pytest.importorskip("trl")
trl_parts = pytest.importorskip("spo_ext.integrations.trl_parts")

# Large steps, so that the policy leaves the reference at once; TRL's default is bf16 on a GPU.
OPTIONS = {
    "bf16": False,
    "use_cpu": True,
    "learning_rate": 0.02,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "gradient_checkpointing": False,
}


@pytest.fixture
def recorded(monkeypatch):
    """What every call of the loss saw: the model in float64, inputs, loss, steps to accumulate."""
    calls = []
    trainer_class = example("trl_grpo").SPOGRPOTrainer
    compute = trainer_class._compute_loss

    def record(self, model, inputs):
        before = copy.deepcopy(self.accelerator.unwrap_model(model))
        loss = compute(self, model, inputs)
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        calls.append((before, inputs, loss.detach(), steps))
        return loss

    monkeypatch.setattr(trainer_class, "_compute_loss", record)
    return calls


def run(folder, spo=None, **options):
    torch.manual_seed(3)
    return example("trl_grpo").main(str(folder), spo=spo, **{**OPTIONS, **options})


def completion_logprobs(model, inputs):
    """float64 [B, T], and which tokens count."""
    both = [
        torch.cat([inputs[f"prompt_{part}"], inputs[f"completion_{part}"]], 1)
        for part in ("ids", "mask")
    ]
    length = inputs["completion_ids"].shape[1]
    logprobs = eager_logprobs(model, *both, example("tiny").TEMPERATURE)
    return logprobs[:, -length:], inputs["completion_mask"].bool()


def losses(policy, start, inputs, objective="squared"):
    """float64 [B] by `spo_ext.eager`."""
    logprobs, mask = completion_logprobs(policy, inputs)
    ref, _ = completion_logprobs(start, inputs)
    return eager.loss(
        logprobs,
        ref,
        inputs["spo_rewards"].double(),
        inputs["spo_q0"].double(),
        beta=example("tiny").BETA,
        objective=objective,
        mask=mask & inputs["spo_counted"][:, None],
    )


def test_mean_over_groups_without_gradient_accumulation(recorded, tmp_path):
    trainer = run(tmp_path, per_device_train_batch_size=8)
    start = example("tiny").tiny_model()
    assert len(recorded) == 2
    for policy, inputs, loss, steps in recorded:
        assert steps == 1
        want = losses(policy, start, inputs).mean().item()
        assert loss.item() == pytest.approx(want, rel=1e-5)
        tokens = inputs["completion_ids"]
        mask = inputs["completion_mask"]
        rewards = ((tokens < 32) * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(inputs["spo_rewards"], rewards)
    first, second = (entry for entry in trainer.state.log_history if "spo/q0" in entry)
    assert first["spo/log_ratio"] == 0.0  # one kernel for both: not merely small
    assert first["kl"] == 0.0
    assert second["kl"] > 1e-3
    policy, inputs, *_ = recorded[1]
    counts = inputs["completion_mask"].sum(1)
    assert second["spo/residual_abs"] == pytest.approx(
        losses(policy, start, inputs).sqrt().mean().item(), rel=1e-4
    )
    logprobs, mask = completion_logprobs(policy, inputs)
    difference = (logprobs - completion_logprobs(start, inputs)[0]).where(mask, 0)
    kl = (torch.expm1(-difference) + difference).sum() / counts.sum()
    assert second["kl"] == pytest.approx(kl.item(), rel=1e-3)


@pytest.mark.parametrize("steps_per_generation", [2, 4])
def test_gradient_accumulation(recorded, tmp_path, steps_per_generation):
    # With 4, the second window learns from completions of the policy before the first step.
    run(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=steps_per_generation,
    )
    start = example("tiny").tiny_model()
    assert len(recorded) == 4
    windows = [recorded[:2], recorded[2:]]
    for window in windows:
        want = torch.cat([losses(policy, start, inputs) for policy, inputs, *_ in window]).mean()
        assert sum(loss.item() for *_, loss, _ in window) == pytest.approx(want.item(), rel=1e-5)
    means = [
        [torch.cat([inputs[name] for _, inputs, *_ in window]).mean().item() for window in windows]
        for name in ("spo_q0", "spo_rewards")
    ]
    drift = [abs(q0 - reward) for q0, reward in zip(*means, strict=True)]
    if steps_per_generation == 2:
        assert drift[0] < 1e-6 < 1e-4 < drift[1]  # mean Q_0 = mean r - beta R
    else:  # R was 0 when Q_0 was computed, for all four
        assert abs(sum(means[0]) - sum(means[1])) < 1e-6


@pytest.mark.parametrize("prompt_value", ["leave_one_out", "group", "importance"])
def test_q0_of_a_group(recorded, tmp_path, prompt_value):
    beta, start = example("tiny").BETA, example("tiny").tiny_model()
    run(tmp_path, {"prompt_value": prompt_value}, per_device_train_batch_size=8)
    policy, inputs, *_ = recorded[1]
    logprobs, mask = completion_logprobs(policy, inputs)
    ref, _ = completion_logprobs(start, inputs)
    gain = inputs["spo_rewards"].double() - beta * ((logprobs - ref) * mask).sum(1)
    prompts = inputs["prompt_ids"].tolist()
    assert len({tuple(prompt) for prompt in prompts}) == 2
    for i, prompt in enumerate(prompts):
        peers = [j for j in range(8) if prompts[j] == prompt]
        others = gain[[j for j in peers if j != i]]
        want = {
            "leave_one_out": others.mean(),
            "group": gain[peers].mean(),
            "importance": beta * ((gain[peers] / beta).exp().mean()).log(),
        }[prompt_value]
        assert inputs["spo_q0"][i].item() == pytest.approx(want.item(), abs=1e-5)


def test_column_and_cross_entropy(recorded, tmp_path, monkeypatch):
    module = example("trl_grpo")
    rows = example("tiny").prompts().map(lambda row, i: {"q0": -0.2 - i / 10}, with_indices=True)
    monkeypatch.setattr(module, "prompts", lambda: rows)
    monkeypatch.setattr(
        module, "reward", lambda completion_ids, **_: [-(ids[0] % 5) / 5 for ids in completion_ids]
    )
    spo = {"objective": "cross_entropy", "prompt_value": "column"}
    run(tmp_path, spo, per_device_train_batch_size=8)
    start = example("tiny").tiny_model()
    for policy, inputs, loss, _ in recorded:
        first = inputs["prompt_ids"][:, 0].double()
        torch.testing.assert_close(inputs["spo_q0"].double(), -0.2 - (first - 2) / 10)
        want = losses(policy, start, inputs, "cross_entropy").mean().item()
        assert loss.item() == pytest.approx(want, rel=1e-5)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="must have a number in column 'q0'"):
        run(tmp_path, spo, per_device_train_batch_size=8)


def test_completions_that_do_not_count(recorded, tmp_path, monkeypatch):
    """Without a reward, or cut off: no loss, no part in Q_0 nor in the number of sequences."""

    def reward(completion_ids, **_):
        return [None if ids[0] % 3 == 0 else ids[0] / 64 for ids in completion_ids]

    monkeypatch.setattr(example("trl_grpo"), "reward", reward)
    trainer = run(
        tmp_path,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_completion_length=30,
        mask_truncated_completions=True,
    )
    start, window = example("tiny").tiny_model(), recorded[2:]
    batch = {
        name: torch.cat([inputs[name] for _, inputs, *_ in window])
        for name in ("prompt_ids", "completion_ids", "completion_mask", "spo_counted", "spo_q0")
    }
    rewarded = batch["completion_ids"][:, 0] % 3 != 0
    whole = batch["completion_mask"].any(1)
    assert torch.equal(batch["spo_counted"], rewarded & whole)
    count = int((rewarded & whole).sum())
    assert 2 <= count < int(rewarded.sum()) < 16
    want = sum(losses(policy, start, inputs).sum() for policy, inputs, *_ in window) / count
    assert sum(call[2].item() for call in window) == pytest.approx(want.item(), rel=1e-5)
    assert (batch["spo_q0"][~batch["spo_counted"]] == 0).all()
    assert trainer.evaluate(example("tiny").prompts())["eval_spo/residual_abs"] >= 0
