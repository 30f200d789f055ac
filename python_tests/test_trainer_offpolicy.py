"""The lagged sampler as reference, what makes up for it, and how far it is from the trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_cases import fill, make_model, make_tokenizer
from trainer_process import settings

from spo_ext.store import Origin, Prompt, Trajectory, TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer
from spo_ext.trainer.model import completion_logprobs

LAGGED = {
    "mixture": {"run:lagged": 1.0},
    "rollouts": "none",
    "objective": "squared",
    "reference": "behaviour",
    "q0": "group_soft",
    "q0_beta": 0.25,
    "taper": False,
    "group_size": 4,
    "max_steps": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two groups of four with rewards and the log-probabilities of who wrote them."""
    torch.manual_seed(2)
    with TrajectoryStore(tmp_path / "store.db") as store:
        for i in range(2):
            key = store.add_prompt(Prompt(f"a{i}", [2, 5, 6 + i]))
            rows = [
                Trajectory(
                    key,
                    torch.randint(3, 15, (2 + j,)).tolist(),
                    float(j % 2),
                    Origin("policy", "lagged", 3),
                    "eos",
                    behaviour_logprobs=-4 * torch.rand(2 + j),
                    temperature=1.0,
                    top_p=1.0,
                )
                for j in range(4)
            ]
            store.append(rows)
    return tmp_path


def first_batch(folder: Path, **changes: Any) -> tuple[SPOTrainer, Any]:
    trainer = SPOTrainer(
        make_model(), SPOConfig(**settings(folder, **LAGGED | changes)), make_tokenizer()
    )
    trainer._feed.start(0, resume=False)
    _, [batch] = trainer._feed.next_step(0)
    return trainer, batch


def parts(batch: Any, logprobs: torch.Tensor) -> list[torch.Tensor]:
    return list((logprobs - batch.behaviour_logprobs).split(batch.cu_seqlens.diff().tolist()))


def test_oapl_regresses_on_the_policy_that_sampled(folder: Path) -> None:
    """(beta_2 log pi / pi_lag - (r - V))^2 with V = beta_1 log mean exp(r / beta_1) of the group,
    and no model is kept for it."""
    trainer, batch = first_batch(folder)
    assert trainer.reference.model is None
    loss = trainer.compute_loss(trainer.model, {"micro_batch": batch})
    logprobs = completion_logprobs(trainer.model, batch.tokens)[0].detach().double()
    ratios = torch.stack([part.sum() for part in parts(batch, logprobs)])
    value = 0.25 * math.log((1 + math.exp(1 / 0.25)) / 2)  # two of four are right
    expected = (0.5 * ratios - (batch.rewards - value)).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "ratio", "weight"),
    [
        ("token_truncate", "token", lambda w: w.clamp(max=1.5)),
        ("token_mask", "token", lambda w: w * (w <= 1.5)),
        ("sequence_truncate", "sequence", lambda w: w.clamp(max=1.5)),
        ("sequence_mask", "sequence", lambda w: w * (w <= 1.5)),
    ],
)
def test_importance_weights(folder: Path, mode: str, ratio: str, weight: Any) -> None:
    """A token's weight scales its part of the gradient, a sequence's its loss."""
    how = {"importance_sampling_mode": mode, "importance_sampling_cap": 1.5}
    trainer, batch = first_batch(folder, **how)
    leaf = completion_logprobs(trainer.model, batch.tokens)[0].detach().requires_grad_(True)
    from spo_ext.trainer.weights import importance_sampled

    learned, weights = importance_sampled(trainer.args, leaf, batch, None)
    assert torch.equal(learned.detach(), leaf.detach())
    logs = parts(batch, leaf.detach())
    assert any(part.exp().max() > 1.5 for part in logs), "else nothing is tested"
    if ratio == "token":
        learned.sum().backward()
        assert weights is None
        torch.testing.assert_close(leaf.grad, weight(torch.cat(logs).exp()))
    else:
        assert learned is leaf
        torch.testing.assert_close(weights, weight(torch.stack([p.sum() for p in logs]).exp()))


def test_the_baseline_of_a_group_is_that_of_the_policy_that_learns(folder: Path) -> None:
    """Q_0 = sum_i w_i (r_i - beta R_i) / sum_i w_i over the group with w = min(1, pi / behaviour);
    without, that of equal weights, which the operator takes itself."""
    group = {"objective": "group", "q0": "stored", "q0_beta": None, "reference": "model"}
    for weighted in (True, False):
        how = {**group, "importance_sampling_baseline": weighted, "run": f"run-{weighted}"}
        trainer, batch = first_batch(folder, **how)
        with torch.no_grad():  # else pi is its own reference, and R is 0
            for weight in trainer.model.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=torch.manual_seed(4))
        loss = trainer.compute_loss(trainer.model, {"micro_batch": batch})
        logprobs = completion_logprobs(trainer.model, batch.tokens)[0].detach().double()
        sizes = batch.cu_seqlens.diff().tolist()
        ratios = torch.stack([p.sum() for p in (logprobs - batch.ref_logprobs).split(sizes)])
        weights = torch.stack([part.sum() for part in parts(batch, logprobs)]).exp().clamp(max=1)
        assert float(weights.min()) < 0.5, "else nothing is tested"
        weights = (weights if weighted else torch.ones_like(weights)).reshape(2, 4)
        gains = (batch.rewards.double() - 0.5 * ratios).reshape(2, 4)
        start = (weights * gains).sum(1) / weights.sum(1)
        expected = (start[:, None] - gains).square().mean()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"importance_sampling_baseline": True},
            "importance_sampling_baseline must be False for another objective than group",
        ),
        ({"objective": "group"}, "q0 must be stored for objective 'group', got 'group_soft'"),
        ({"q0": "stored"}, "q0_beta must be left out without q0 group_soft, got 0.25"),
        ({"q0": "mean"}, "q0 must be one of stored, group_soft, got 'mean'"),
        ({"q0_beta": 0.0}, "q0_beta"),
        ({"group_size": 1}, "group_size must be at least 2 for q0 group_soft, got 1"),
        ({"top_p": 0.9}, "top_p must be 1 with reference behaviour"),
        ({"reference_fingerprint": "x"}, "reference_fingerprint must be left out with reference"),
        ({"importance_sampling_mode": "token"}, "importance_sampling_mode must be one of none"),
        ({"importance_sampling_cap": 0.5}, "importance_sampling_cap"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SPOConfig(**settings(folder, **LAGGED | changes))


def test_rows_without_log_probabilities_have_no_behaviour(tmp_path: Path) -> None:
    with TrajectoryStore(tmp_path / "store.db") as store:
        fill(store)
    with pytest.raises(ValueError, match=r"trajectory \d+ \(human\) has none: draw from mixture"):
        first_batch(tmp_path, mixture="offline")


def test_rows_of_another_temperature_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="must be sampled at temperature 0.5 and top_p 1, got 1.0"):
        first_batch(folder, temperature=0.5)


def test_sampler_and_trainer_are_compared_where_they_should_agree(tmp_path: Path) -> None:
    """In this process they do, to float32; where the sampler is off, the difference shows."""
    with TrajectoryStore(tmp_path / "store.db") as store:
        fill(store)
    how = {
        "mixture": "online",
        "rollouts": "embedded",
        "sync_every": 2,
        "max_steps": 4,
        "max_new_tokens": 4,
        "reference": "auto",
        "learning_rate": 1e-2,
    }
    lines = train(tmp_path, 0.0, **how)
    seen = [line for line in lines if "sampling/kl" in line]
    assert [line["step"] for line in seen] == [1, 3], "where a version begins"
    assert max(line["sampling/sampling_logp_difference/max"] for line in seen) < 1e-5
    assert all(line["sampling/share_above_0.1"] == 0 for line in seen)
    off = train(tmp_path, 0.25, **how, run="off", output_dir=str(tmp_path / "off"))
    found = [line for line in off if "sampling/kl" in line][0]
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(0.25, abs=1e-5)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(0.25, abs=1e-5)
    assert found["sampling/kl"] == pytest.approx(math.exp(0.25) - 1.25, abs=1e-4)
    assert found["sampling/share_above_0.1"] == 1


def train(folder: Path, off: float, **how: Any) -> list[dict[str, Any]]:
    """With a sampler whose log-probabilities are off by so much."""
    from dataclasses import replace

    given = {**LAGGED, "objective": "group", "q0": "stored", "q0_beta": None} | how
    trainer = SPOTrainer(make_model(), SPOConfig(**settings(folder, **given)), make_tokenizer())
    generate = trainer.generator.generate

    def shifted(*arguments: Any, **options: Any) -> Any:
        return [
            [replace(one, logprobs=tuple(v - off for v in one.logprobs or ())) for one in of_prompt]
            for of_prompt in generate(*arguments, **options)
        ]

    trainer.generator.generate = shifted  # type: ignore[method-assign]
    trainer.train()
    return trainer.state.log_history
