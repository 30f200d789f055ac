"""The GRPO control against TRL's GRPOTrainer: same loss, same gradients on the same batches.

TRL's trainer reads no trajectory store, so it cannot stand in for the control; that the control
computes what it computes is shown here. Last run against TRL 1.16.
"""

import pytest
import torch
from integration_cases import example

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytest.importorskip("sqlalchemy")

from types import SimpleNamespace

from learning import baselines
from learning.controls import GRPO, grpo_loss, truncated_grpo_loss
from trl import GRPOConfig, GRPOTrainer

from spo_ext.trainer.batches import TokenBatch, Tokens, collate
from spo_ext.trainer.model import HeadSettings, answer_logprobs, completion_logprobs

GENERATIONS = 4
PROMPTS = ["w2 w3", "w4 w5 w6", "w7", "w8 w9 w10 w11"]
# Strengths that the control has; what else TRL has a default for in the loss is that default.
OPTIONS = {
    "beta": GRPO.kl,
    "epsilon": GRPO.clip,
    "num_iterations": 2,  # so that a batch is gone over with ratios that are not 1
    "num_generations": GENERATIONS,
    "per_device_train_batch_size": 2 * GENERATIONS,
    "max_completion_length": 40,
    "max_steps": 4,
    "learning_rate": 0.02,  # large, so that the policy leaves the reference and some ratios clip
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


def reward(completion_ids, **columns):
    """Of 0 and -1, as in the miniature: whether the completion has more low tokens than high."""
    return [float(sum(token < 32 for token in ids) * 2 > len(ids)) - 1 for ids in completion_ids]


class Recorder(GRPOTrainer):
    """Keeps what every call of the loss saw and gave: weights before, inputs, loss, gradients."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        self.calls.append((weights, inputs, loss.detach(), gradients))
        return loss


def trainer(folder, **options):
    torch.manual_seed(3)
    tiny = example("tiny")
    made = Recorder(
        model=tiny.save_tiny_model(f"{folder}/model"),
        reward_funcs=reward,
        args=GRPOConfig(str(folder), **{**OPTIONS, **options}),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny.tokenizer(),
    )
    made.calls = []
    return made


def lists(ids, mask):
    return [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]


def rows_of(inputs):
    """A batch of TRL as the control has it."""
    prompts = lists(inputs["prompt_ids"], inputs["prompt_mask"])
    completions = lists(inputs["completion_ids"], inputs["completion_mask"])
    kept = inputs["completion_mask"].bool()
    known = {tuple(prompt): n for n, prompt in enumerate(prompts)}
    pairs = zip(prompts, completions, strict=True)
    tokens = collate([Tokens(*pair) for pair in pairs], "padded")
    return SimpleNamespace(
        tokens=tokens,
        cu_seqlens=tokens.cu_seqlens,
        ref_logprobs=inputs["ref_per_token_logps"][kept],
        behaviour_logprobs=inputs["old_per_token_logps"][kept],
        rewards=torch.tensor(reward(completions)),
        groups=torch.tensor([known[tuple(prompt)] for prompt in prompts]),
        online=torch.ones(len(prompts), dtype=torch.bool),
    )


def control_step(weights, rows):
    """Loss, what is logged, and gradients of the control from these weights."""
    policy = example("tiny").tiny_model()
    policy.load_state_dict(weights)
    answer_logprobs(policy, HeadSettings())
    logprobs, _ = completion_logprobs(policy, rows.tokens)
    loss, values = grpo_loss(logprobs, rows, GRPO.clip, GRPO.kl)
    return loss.item(), values, torch.autograd.grad(loss, list(policy.parameters()))


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_updates_are_those_of_the_trainer(tmp_path, loss_type):
    """Weights, samples, rewards and log-probabilities are those of a run of the trainer.

    float32 in two different heads. A log-probability near -4 is rounded to 2e-7 of itself, and so
    is a ratio; 1e-5 of the largest gradient leaves room for other machines' order of sums.
    """
    made = trainer(tmp_path, loss_type=loss_type)
    made.train()
    assert len(made.calls) == 4
    steps = []
    for weights, inputs, loss, gradients in made.calls:
        assert len(set(inputs["completion_mask"].sum(1).tolist())) > 2
        assert len(set(inputs["prompt_mask"].sum(1).tolist())) == 2
        ours_loss, found, ours = control_step(weights, rows_of(inputs))
        assert ours_loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        for got, want in zip(ours, gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * largest)
        steps.append(found)
    # The first step on a batch has ratios of 1, the second many beyond the clip.
    assert [step["clipped"] > 0.2 for step in steps] == [False, True, False, True]
    assert min(abs(step["log_ratio"]) for step in steps[1:]) > 0.1


def double_batch():
    """Log-probabilities of the policy, its inputs for TRL, and the rows of the control: float64.

    Ratios far on both sides of the clip and inside it, two groups of mixed rewards and one that
    agrees.
    """
    torch.manual_seed(11)
    sizes = torch.randint(1, 10, (12,))
    kept = torch.arange(9) < sizes[:, None]
    new = -3 * torch.rand(12, 9, dtype=torch.float64)
    old, ref = (new + 0.4 * torch.randn(12, 9, dtype=torch.float64) for _ in range(2))
    rewards = (torch.rand(12, dtype=torch.float64) < 0.5).double() - 1
    groups = torch.arange(12) % 3
    rewards[groups == 2] = -1
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    count = int(sizes.sum())
    tokens = TokenBatch({}, torch.arange(count), torch.zeros(count, dtype=torch.int64), ends)
    rows = SimpleNamespace(
        tokens=tokens,
        cu_seqlens=tokens.cu_seqlens,
        ref_logprobs=ref[kept],
        behaviour_logprobs=old[kept],
        rewards=rewards,
        groups=groups,
        online=torch.ones(12, dtype=torch.bool),
    )
    inputs = {
        "prompt_ids": torch.full((12, 1), 2),
        "prompt_mask": torch.ones(12, 1, dtype=torch.int64),
        "completion_ids": torch.full((12, 9), 3),
        "completion_mask": kept.long(),
        "advantages": baselines.group_advantages(rewards, groups, torch.ones_like(rewards)),
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": torch.tensor(count),
    }
    return new.requires_grad_(), inputs, rows


def losses(folder, monkeypatch, **options):
    """Loss and gradient [12, 9] by TRL and by the control, given the log-probabilities."""
    made = trainer(folder, **options)
    made.model.eval()  # no accumulation of gradients
    new, inputs, rows = double_batch()
    found = (new, torch.zeros_like(new), None)
    monkeypatch.setattr(made, "_get_per_token_logps_and_entropies", lambda *_, **__: found)
    theirs = GRPOTrainer._compute_loss(made, made.model, inputs)
    ours, _ = grpo_loss(new[inputs["completion_mask"].bool()], rows, GRPO.clip, GRPO.kl)
    pairs = [(loss, torch.autograd.grad(loss, new)[0]) for loss in (theirs, ours)]
    return pairs, new, inputs


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_loss_in_double(tmp_path, monkeypatch, loss_type):
    (theirs, ours), new, inputs = losses(tmp_path, monkeypatch, loss_type=loss_type)
    ratio = (new - inputs["old_per_token_logps"]).exp()[inputs["completion_mask"].bool()]
    assert 5 < int((ratio > 1.2).sum()) and 5 < int((ratio < 0.8).sum()) < len(ratio) // 2
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_truncated_weights_in_double(tmp_path, monkeypatch):
    """TRL's with a server's log-probabilities, of a policy that wrote before this one."""
    made = trainer(tmp_path, loss_type="dapo")
    made.model.eval()
    new, inputs, rows = double_batch()
    kept = inputs["completion_mask"].bool()
    ratio = (new.detach() - inputs["old_per_token_logps"]).exp()
    assert 5 < int((ratio[kept] > 1.5).sum()) < int(kept.sum()) // 2
    inputs |= {
        "old_per_token_logps": new.detach(),
        "importance_sampling_ratio": ratio.clamp(max=1.5),
    }
    made.use_vllm = made.vllm_importance_sampling_correction = True
    found = (new, torch.zeros_like(new), None)
    monkeypatch.setattr(made, "_get_per_token_logps_and_entropies", lambda *_, **__: found)
    theirs = GRPOTrainer._compute_loss(made, made.model, inputs)
    ours, _ = truncated_grpo_loss(new[kept], rows, GRPO.kl, cap=1.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    gradients = [torch.autograd.grad(loss, new)[0] for loss in (theirs, ours)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
