"""The plugin inside verl's own code, where verl is installed; last run against verl 0.9.1."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from test_verl import BETA, ROOT, case

import spo_ext

pytest.importorskip("verl.trainer.ppo.core_algos")


def test_verl_finds_the_entry_point(tmp_path):
    """`import verl` alone, with the metadata that an installed spo_ext has."""
    info = tmp_path / "spo_ext-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spo_ext\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[verl.plugins]\nspo = spo_ext.integrations.verl\n")
    program = (
        "from verl.trainer.ppo import core_algos as c\n"
        "print(c.get_policy_loss_fn('spo').__name__, c.get_adv_estimator_fn('spo').__name__)"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "VERL_USE_EXTERNAL_PLUGINS": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.split() == ["spo_policy_loss", "spo_advantages"], done.stderr


def test_from_scores_to_the_loss():
    """apply_kl_penalty, compute_advantage and ppo_loss of verl, with its own configuration."""
    import numpy as np
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.config import AlgoConfig, KLControlConfig
    from verl.trainer.ppo.core_algos import FixedKLController
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    importlib.import_module("spo_ext.integrations.verl")  # registers, if verl has not
    policy, old, ref, mask, rewards, q0, scores = case()
    lengths = [5, 3, 4, 1, 5, 2]
    tensors = {
        "response_mask": mask.long(),
        "token_level_scores": scores,
        "old_log_probs": old,
        "ref_log_prob": ref,
    }
    data = DataProto.from_dict(tensors, {"uid": np.array(list("aabbcc"), dtype=object)})
    data, _ = apply_kl_penalty(data, FixedKLController(BETA), "kl")
    config = AlgoConfig(
        adv_estimator="spo",
        use_kl_in_reward=True,
        kl_ctrl=KLControlConfig(type="fixed", kl_coef=BETA),
    )
    data = compute_advantage(data, adv_estimator="spo", config=config)

    def nested(rows):
        parts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    # Prompts of two tokens; a model's output at a token is about the next one.
    whole = [torch.nn.functional.pad(policy[i, :n], (1, 1)) for i, n in enumerate(lengths)]
    batch = TensorDict(
        {
            "prompts": nested_ones([2] * 6),
            "responses": nested_ones(lengths),
            "response_mask": nested(mask.long()),
            "old_log_probs": nested(old),
            "advantages": nested(data.batch["advantages"]),
        },
        batch_size=6,
    )
    for name, value in {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": 6}.items():
        batch.set_non_tensor(name, value)
    actor = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_mini_batch_size=6,
        ppo_micro_batch_size_per_gpu=6,
        loss_agg_mode="seq-mean-token-sum",
        policy_loss=PolicyLossConfig(loss_mode="spo", dro_beta=BETA),
    )
    got, metrics = ppo_loss(actor, {"log_probs": torch.cat(whole)}, batch)
    want = spo_ext.loss(policy, ref, rewards, q0, beta=BETA, objective="squared", mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert "actor/spo_residual" in metrics
    grads = (torch.autograd.grad(loss, policy)[0] for loss in (got, want))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


def nested_ones(lengths):
    return torch.nested.as_nested_tensor([torch.ones(n) for n in lengths], layout=torch.jagged)
