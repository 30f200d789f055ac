"""The verl plugin: the squared loss by way of verl's rewards, advantages and policy loss.

The contract is that of verl 0.9.1: the registries of `verl.trainer.ppo.core_algos`, how
`verl.trainer.ppo.ray_trainer` calls `apply_kl_penalty` and `compute_advantage`, and
`verl.workers.utils.losses.ppo_loss` a policy loss. "recorded" are these registries again, so that
the numbers are tested where verl does not install; "installed" runs verl's own code.
"""

import importlib
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import spo_ext

BETA = 0.3
ROOT = Path(__file__).parents[1]


def recorded_verl():
    """verl.trainer.ppo.core_algos as far as a plugin sees it."""
    core = ModuleType("verl.trainer.ppo.core_algos")
    core.POLICY_LOSS_REGISTRY, core.ADV_ESTIMATOR_REGISTRY = {}, {}

    def register_policy_loss(name):
        def decorator(function):
            core.POLICY_LOSS_REGISTRY[name] = function
            return function

        return decorator

    def register_adv_est(name):
        def decorator(function):
            if core.ADV_ESTIMATOR_REGISTRY.get(name, function) != function:
                raise ValueError(f"Adv estimator {name} has already been registered")
            core.ADV_ESTIMATOR_REGISTRY[name] = function
            return function

        return decorator

    core.register_policy_loss, core.register_adv_est = register_policy_loss, register_adv_est
    return core


@pytest.fixture(params=["recorded", "installed"])
def core(request, monkeypatch):
    """core_algos, after the plugin was loaded as verl loads it."""
    if request.param == "installed":
        core = pytest.importorskip("verl.trainer.ppo.core_algos")
    else:
        core = recorded_verl()
        parts = core.__name__.split(".")
        for i in range(1, len(parts)):
            name = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, core.__name__, core)
    # verl may have loaded the plugin itself, registers no name twice, and shall find it afterwards.
    monkeypatch.setattr(core, "ADV_ESTIMATOR_REGISTRY", {})
    monkeypatch.setattr(core, "POLICY_LOSS_REGISTRY", {})
    monkeypatch.delitem(sys.modules, "spo_ext.integrations.verl", raising=False)
    declared = '[project.entry-points."verl.plugins"]\nspo = "spo_ext.integrations.verl"\n'
    assert declared in (ROOT / "pyproject.toml").read_text()
    EntryPoint("spo", "spo_ext.integrations.verl", "verl.plugins").load()
    yield core
    sys.modules.pop("spo_ext.integrations.verl")


def algorithm(**changed):
    settings = {"use_kl_in_reward": True, "kl_penalty": "kl", "type": "fixed", "kl_coef": BETA}
    settings |= changed
    control = SimpleNamespace(type=settings.pop("type"), kl_coef=settings.pop("kl_coef"))
    correction = SimpleNamespace(rollout_is=None, rollout_rs=settings.pop("rollout_rs", None))
    return SimpleNamespace(kl_ctrl=control, rollout_correction=correction, **settings)


def actor(dro_beta=BETA, use_kl_loss=False, **batch):
    return SimpleNamespace(
        policy_loss=SimpleNamespace(loss_mode="spo", dro_beta=dro_beta),
        use_kl_loss=use_kl_loss,
        global_batch_info=batch,
    )


def case(rows=6, length=5):
    """log-probs of policy, old policy and reference, mask, rewards and q0, in float64."""
    policy, old, ref = (-torch.rand(3, rows, length, dtype=torch.float64)).unbind()
    mask = torch.arange(length) < torch.tensor([5, 3, 4, 1, 5, 2])[:rows, None]
    mask[4, 1:3] = False  # answers of tools: in the middle,
    mask[0, 4] = False  # at the end, where the score is
    mask[2, 0] = False  # and at the start
    ends = torch.tensor([4, 2, 3, 0, 4, 1])[:rows]
    rewards, q0 = torch.rand(2, rows, dtype=torch.float64)
    scores = torch.zeros(rows, length, dtype=torch.float64)
    scores[torch.arange(rows), ends] = rewards - q0
    return policy.requires_grad_(), old, ref, mask, rewards, q0, scores


def penalised(scores, old, ref, mask):
    """`apply_kl_penalty` of verl with kl_penalty="kl"."""
    return scores - BETA * (old - ref) * mask


def through_verl(core, policy, old, mask, token_level_rewards, config):
    advantages, returns = core.ADV_ESTIMATOR_REGISTRY["spo"](
        token_level_rewards=token_level_rewards,
        response_mask=mask.long(),
        config=algorithm(),
        index=None,
    )
    torch.testing.assert_close(advantages * BETA, returns)
    # Whatever is padded: a value where nothing counts must not be looked at.
    advantages = advantages.masked_fill(~mask, 1e9)
    return core.POLICY_LOSS_REGISTRY["spo"](
        old_log_prob=old,
        log_prob=policy,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode="seq-mean-token-sum",
        config=config,
        rollout_is_weights=None,
    )


def test_is_the_squared_loss(core):
    policy, old, ref, mask, rewards, q0, scores = case()
    want, stats = spo_ext.loss(
        policy, ref, rewards, q0, beta=BETA, objective="squared", mask=mask, return_stats=True
    )
    rewards_with_penalty = penalised(scores, old, ref, mask)
    got, metrics = through_verl(core, policy, old, mask, rewards_with_penalty, actor())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = (torch.autograd.grad(loss, policy)[0] for loss in (got, want))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    assert metrics["actor/spo_residual"] == pytest.approx(stats.residual.mean().item())
    assert metrics["actor/spo_residual_abs"] == pytest.approx(stats.residual.abs().mean().item())
    kl = (old - policy)[mask].mean().item()
    assert metrics["actor/ppo_kl"] == pytest.approx(kl)


def test_ranks_and_micro_batches_add_up(core):
    """Two ranks with three micro-batches of one response: the mean of their sums is the loss."""
    policy, old, ref, mask, rewards, q0, scores = case()
    want = spo_ext.loss(policy, ref, rewards, q0, beta=BETA, objective="squared", mask=mask)
    token_level_rewards = penalised(scores, old, ref, mask)
    config = actor(dp_size=2, global_batch_size=6, batch_num_tokens=int(mask.sum()))
    parts = [
        through_verl(
            core, *(t[i : i + 1] for t in (policy, old, mask, token_level_rewards)), config
        )[0]
        for i in range(6)
    ]
    torch.testing.assert_close((sum(parts[:3]) + sum(parts[3:])) / 2, want, rtol=1e-12, atol=0)


def test_another_beta_in_the_loss_moves_no_minimum(core, monkeypatch):
    policy, old, ref, mask, _, _, scores = case()
    token_level_rewards = penalised(scores, old, ref, mask)
    losses = []
    monkeypatch.setenv("SPO_BETA", str(2 * BETA))
    for config in (actor(), actor(dro_beta=None)):
        losses.append(through_verl(core, policy, old, mask, token_level_rewards, config)[0])
    torch.testing.assert_close(losses[1], 4 * losses[0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_kl_in_reward": False}, "algorithm.use_kl_in_reward must be True, got False"),
        ({"kl_penalty": "k3"}, "algorithm.kl_penalty must be kl or k1, got k3"),
        ({"type": "adaptive"}, "algorithm.kl_ctrl.type must be fixed, got adaptive"),
        ({"rollout_rs": "token_k1"}, "algorithm.rollout_correction.rollout_rs must be None"),
        ({"kl_coef": 0.0}, "algorithm.kl_ctrl.kl_coef must be a finite number > 0, got 0.0"),
    ],
)
def test_advantages_refuse(core, changed, message):
    *_, mask, _, _, scores = case()
    with pytest.raises(ValueError, match=f"spo: {message}"):
        core.ADV_ESTIMATOR_REGISTRY["spo"](
            token_level_rewards=scores, response_mask=mask, config=algorithm(**changed)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_agg_mode": "token-mean"}, "loss_agg_mode must be seq-mean-token-sum, got token-"),
        ({"rollout_is_weights": torch.ones(6, 5)}, "rollout_is_weights must be None"),
        ({"config": actor(use_kl_loss=True)}, "use_kl_loss must be False"),
        ({"config": actor(dro_beta=None)}, "dro_beta must be set to the softness beta"),
        ({"config": actor(dro_beta=-1)}, "dro_beta must be a finite number > 0, got -1"),
    ],
)
def test_policy_loss_refuses(core, monkeypatch, options, message):
    monkeypatch.delenv("SPO_BETA", raising=False)
    policy, old, _, mask, *_ = case()
    options = {"loss_agg_mode": "seq-mean-token-sum", "config": actor()} | options
    with pytest.raises(ValueError, match=f"spo: .*{message}"):
        core.POLICY_LOSS_REGISTRY["spo"](
            old_log_prob=old, log_prob=policy, advantages=old, response_mask=mask, **options
        )


def test_without_verl(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", None)
    monkeypatch.delitem(sys.modules, "spo_ext.integrations.verl", raising=False)
    with pytest.raises(ImportError, match="needs verl .*pip install verl"):
        importlib.import_module("spo_ext.integrations.verl")
