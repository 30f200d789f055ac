"""The examples do what they say, on tiny random models."""

import pytest
import torch
from integration_cases import EXAMPLES, eager_logprobs, example, run_on_two_ranks

from spo_ext import eager

HELPERS = ("tiny", "make_tiny_model")
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in HELPERS)


def squared_losses(policy, start):
    """float64 [8], the loss of every trajectory of `tiny`, from the logits of both models."""
    tiny = example("tiny")
    batch = tiny.trajectories()
    logprobs, ref = (
        eager_logprobs(m, batch["input_ids"], batch["attention_mask"], tiny.TEMPERATURE)
        for m in (policy, start)
    )
    return eager.loss(
        logprobs,
        ref,
        batch["rewards"].double(),
        batch["q0"].double(),
        beta=tiny.BETA,
        objective="squared",
        mask=batch["labels"][:, 1:] != -100,
    )


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_short(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) < 30


def test_every_example_is_documented():
    files = ("integrations.md", "bring_your_own.md")
    pages = "".join((EXAMPLES.parent / "docs" / file).read_text() for file in files)
    assert [name for name in NAMES if f"examples/{name}.py" not in pages] == []
    assert NAMES == [
        "accelerate_loop", "fabric_loop", "plain_pytorch", "supervised_start",
        "transformers_trainer", "trl_grpo",
    ]  # fmt: skip


def test_a_supervised_start_learns_the_tokens_of_the_store():
    """All of it runs in test_bring_your_own."""
    pytest.importorskip("trl")
    row = example("supervised_start").tokens({"prompt_ids": [5, 6], "completion_ids": [7, 8, 9]})
    assert row == {"input_ids": [5, 6, 7, 8, 9], "completion_mask": [0, 0, 1, 1, 1]}


def test_plain_pytorch():
    losses = example("plain_pytorch").main(steps=20)
    start = example("tiny").tiny_model()
    assert losses[0] == pytest.approx(squared_losses(start, start).mean().item(), rel=1e-5)
    assert losses[-1] < losses[0] / 20


@pytest.mark.parametrize(("name", "size"), [("accelerate_loop", 2), ("fabric_loop", 4)])
def test_loops_of_the_launchers(name, size):
    pytest.importorskip({"accelerate_loop": "accelerate", "fabric_loop": "lightning_fabric"}[name])
    losses = example(name).main(epochs=10)
    start = example("tiny").tiny_model()
    want = squared_losses(start, start).view(-1, size).mean(1)
    # Before the first optimiser step: all batches of Accelerate's first window of two.
    before = {"accelerate_loop": 2, "fabric_loop": 1}[name]
    assert losses[:before] == pytest.approx(want[:before].tolist(), rel=1e-5)
    batches = len(want)
    assert sum(losses[-batches:]) < sum(losses[:batches]) / 20


def train(folder, **options):
    """The trained model and the last logged loss; two steps of plain SGD over all trajectories."""
    options = {"use_cpu": True, "optim": "sgd", "max_steps": 2, "logging_steps": 1} | options
    options |= {"learning_rate": 0.5, "lr_scheduler_type": "constant", "save_strategy": "no"}
    options |= {"report_to": "none", "disable_tqdm": True, "max_grad_norm": 0.0}
    trainer = example("transformers_trainer").main(str(folder), **options)
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_transformers_trainer_accumulates_exactly(tmp_path):
    whole, losses = train(tmp_path, per_device_train_batch_size=8)
    start = example("tiny").tiny_model()
    assert losses[0] == pytest.approx(squared_losses(start, start).mean().item(), rel=1e-5)
    assert losses[1] < 0.9 * losses[0]
    # 3 + 3 + 2 sequences: a mean of means would give the last two more weight.
    parts, in_parts = train(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    assert in_parts == pytest.approx(losses, rel=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    want = squared_losses(whole.model, start).mean().item()
    rows = example("tiny").rows(start_with_logprobs())
    assert whole.evaluate(rows)["eval_loss"] == pytest.approx(want, rel=1e-4)


def _trainer_rank(rank, folder, want):
    trainer, _ = train(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert trainer.accelerator.num_processes == 2
    for got, expected in zip(trainer.model.parameters(), want, strict=True):
        torch.testing.assert_close(got.detach(), expected, rtol=0, atol=1e-6)


def test_transformers_trainer_on_two_ranks(tmp_path):
    whole, _ = train(tmp_path, per_device_train_batch_size=8)
    want = [parameter.detach() for parameter in whole.model.parameters()]
    run_on_two_ranks(_trainer_rank, tmp_path, want)


def start_with_logprobs():
    from spo_ext.integrations.huggingface import add_token_logprobs

    model = example("tiny").tiny_model()
    add_token_logprobs(model, temperature=example("tiny").TEMPERATURE)
    return model
