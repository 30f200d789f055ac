"""The mixin's prompt values by themselves, with LoRA and on two ranks, and what it refuses."""

import importlib
import sys

import pytest
import torch
from integration_cases import eager_logprobs, example, run_on_two_ranks
from test_trl import OPTIONS, losses, run

pytest.importorskip("trl")
trl_parts = pytest.importorskip("spo_ext.integrations.trl_parts")


def test_group_is_leave_one_out_shrunk():
    rewards, log_ratios = torch.rand(6), torch.randn(6)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    residuals = {
        name: trl_parts.group_q0(rewards, log_ratios, groups, 0.3, name)
        + 0.3 * log_ratios
        - rewards
        for name in ("leave_one_out", "group")
    }
    torch.testing.assert_close(residuals["group"], residuals["leave_one_out"] * 2 / 3)


def test_importance_weighs_the_policys_samples():
    """Every outcome once, as a uniform policy draws them in the mean: the estimate is exact."""
    ref = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    rewards = torch.tensor([0.0, 1.0, 0.5, -3.0], dtype=torch.float64)
    want = 0.2 * (ref * (rewards / 0.2).exp()).sum().log()
    log_ratios = (0.25 / ref).log()
    got = trl_parts.group_q0(rewards, log_ratios, torch.zeros(4, dtype=int), 0.2, "importance")
    torch.testing.assert_close(got, want.float().expand(4))
    # At the optimum pi = pi_ref exp((r - Q_0) / beta) one sample is enough.
    optimal = (rewards - want) / 0.2
    single = trl_parts.group_q0(rewards, optimal, torch.arange(4), 0.2, "importance")
    torch.testing.assert_close(single, want.float().expand(4))


def test_answers_of_tools_do_not_count():
    batch = {"completion_mask": torch.tensor([[1, 1, 1, 0]])}
    assert trl_parts.loss_mask(batch).tolist() == [[True, True, True, False]]
    batch["tool_mask"] = torch.tensor([[1, 0, 1, 1]])
    assert trl_parts.loss_mask(batch).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("spo", "options", "message"),
    [
        (
            {"objective": "group"},
            {},
            "objective must be one of squared, cross_entropy, got 'group'",
        ),
        ({"prompt_value": "ema"}, {}, "prompt_value must be one of leave_one_out, group"),
        ({"objective": "cross_entropy"}, {}, "must be column or importance for objective cross_"),
        (
            {"prompt_value": "column"},
            {"multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation must be 'sum_then_normalize' for prompt_value 'column'",
        ),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, spo, options, message):
    with pytest.raises(ValueError, match=f"SPOMixin: .*{message}"):
        run(tmp_path, spo, per_device_train_batch_size=8, **options)


def test_says_what_has_no_effect(tmp_path, caplog):
    run(tmp_path, per_device_train_batch_size=8, max_steps=1, loss_type="grpo", epsilon=0.3)
    assert "no effect on the SPO loss: epsilon=0.3, loss_type='grpo'" in caplog.text
    caplog.clear()
    run(tmp_path, per_device_train_batch_size=8, max_steps=1)
    assert "no effect" not in caplog.text


def test_refuses_beta_zero_and_other_trainers(tmp_path, monkeypatch):
    monkeypatch.setattr(example("trl_grpo"), "BETA", 0.0)
    with pytest.raises(ValueError, match="beta of GRPOConfig must be > 0.* got 0.0"):
        run(tmp_path, per_device_train_batch_size=8)
    mixin = example("trl_grpo").SPOMixin
    with pytest.raises(RuntimeError, match="must be TRL's GRPOTrainer with _calculate_rewards"):
        type("Mixed", (mixin, object), {})()


def test_without_trl(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "trl":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "spo_ext.integrations.trl", raising=False)
    with pytest.raises(ImportError, match="needs TRL .*pip install 'trl>=1.16'"):
        importlib.import_module("spo_ext.integrations.trl")


def test_lora_takes_the_model_without_adapters_as_reference(tmp_path):
    peft = pytest.importorskip("peft")
    tiny, module = example("tiny"), example("trl_grpo")
    args = module.GRPOConfig(
        str(tmp_path),
        beta=tiny.BETA,
        temperature=tiny.TEMPERATURE,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=8,
        max_steps=3,
        **OPTIONS,
    )
    seen = []

    class Recorded(module.SPOGRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            seen.append((inputs, loss.item()))
            return loss

    trainer = Recorded(
        model=tiny.save_tiny_model(str(tmp_path / "model")),
        reward_funcs=module.reward,
        args=args,
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
        peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    trainer.train()
    assert trainer.ref_model is None
    start, (inputs, loss) = tiny.tiny_model(), seen[-1]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length, mask = inputs["completion_ids"].shape[1], inputs["completion_mask"].bool()
    want = eager_logprobs(start, ids, attention, tiny.TEMPERATURE)[:, -length:]
    ref = inputs["ref_per_token_logps"].double()
    torch.testing.assert_close(ref[mask], want[mask], rtol=0, atol=2e-5)
    # After the last step the policy has left it, and the loss of the same batch is another one.
    policy = trainer.model.merge_and_unload()
    assert losses(policy, start, inputs).mean().item() != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_a_policy_with_a_trained_adapter_is_its_own_reference(tmp_path, saved):
    peft = pytest.importorskip("peft")
    tiny, module = example("tiny"), example("trl_grpo")
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=saved, init_lora_weights=False
    )
    options = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 8}
    args = module.GRPOConfig(str(tmp_path), beta=tiny.BETA, max_steps=2, logging_steps=1,
                             **options, **OPTIONS)  # fmt: skip
    trainer = module.SPOGRPOTrainer(
        model=peft.get_peft_model(tiny.tiny_model(), config),
        reward_funcs=module.reward,
        args=args,
        train_dataset=tiny.prompts(),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    first, second = (line for line in trainer.state.log_history if "kl" in line)
    assert (first["spo/log_ratio"], first["kl"]) == (0.0, 0.0)
    assert second["kl"] > 1e-4


def _gathered(rank, folder):
    module = example("trl_grpo")
    seen = []
    compute = module.SPOGRPOTrainer._compute_loss

    def record(self, model, inputs):
        loss = compute(self, model, inputs)
        assert self.accelerator.num_processes == 2
        gathered = {
            name: self.accelerator.gather(inputs[name]) for name in ("spo_q0", "spo_rewards")
        }
        seen.append((gathered, inputs, self.accelerator.gather(loss.detach()).mean().item(), model))
        return loss

    module.SPOGRPOTrainer._compute_loss = record
    module.save_tiny_model = lambda _: str(folder)
    trainer = module.main(f"{folder}/{rank}", per_device_train_batch_size=2, **OPTIONS)
    (gathered, inputs, loss, model), _ = seen
    # Four completions of one prompt, two on each rank; at the first step R is 0.
    rewards, beta = gathered["spo_rewards"], example("tiny").BETA
    others = (rewards.sum() - rewards) / 3
    assert rewards.unique().numel() > 1 and beta > 0
    torch.testing.assert_close(gathered["spo_q0"], others)
    assert loss == pytest.approx(((others - rewards) ** 2).mean().item(), rel=1e-5)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    for parameter in trainer.model.parameters():
        both = trainer.accelerator.gather(parameter.detach()[None])
        assert torch.equal(both[0], both[1])


def test_groups_over_two_ranks(tmp_path):
    example("tiny").save_tiny_model(str(tmp_path))
    run_on_two_ranks(_gathered, tmp_path)
