"""The worked example of the README: one sequence of three tokens over four words, every number on
its way.

weight is the identity, so that hidden[t] are the logits of token t; the second token is the one
followed.
"""

import math

import pytest
import torch

import spo_ext
from spo_ext import eager

HIDDEN = [[2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
TARGETS = [0, 2, 3]
REF_LOGPROBS = [-0.5, -0.25, -1.0]
REWARD, Q0, BETA = -0.1, -0.4, 0.5


def test_trace(device):
    hidden = torch.tensor([HIDDEN], device=device, requires_grad=True)
    weight = torch.eye(4, device=device, requires_grad=True)
    targets = torch.tensor([TARGETS], device=device)
    ref = torch.tensor([REF_LOGPROBS], device=device)

    # logits z = hidden . weight -> log p = z_target - log sum exp z
    logprobs = spo_ext.token_logprobs(hidden, weight, targets)
    lse = math.log(math.exp(0) + math.exp(1) + math.exp(3) + math.exp(0))
    assert lse == pytest.approx(3.21100, abs=1e-5)
    assert logprobs[0, 1].item() == pytest.approx(3 - lse) == pytest.approx(-0.21100, abs=1e-5)
    by_hand = eager.token_logprobs(hidden.double(), weight.double(), targets)[0]
    torch.testing.assert_close(logprobs.double(), by_hand, rtol=1e-6, atol=1e-7)

    # advantage A_2 = beta (log p - log p_ref), Q_2 = Q_0 + A_1 + A_2
    advantages = [BETA * (lp - r) for lp, r in zip(logprobs[0].tolist(), REF_LOGPROBS, strict=True)]
    assert advantages[1] == pytest.approx(0.01950, abs=1e-5)
    q = spo_ext.soft_q(logprobs, ref, Q0, beta=BETA)
    assert q[0].tolist() == pytest.approx(
        [Q0 + sum(advantages[: t + 1]) for t in range(3)], rel=1e-6
    )
    assert q[0].tolist() == pytest.approx([-0.32038, -0.30088, -0.17271], abs=1e-5)

    # terminal Q_3 against the reward: squared loss, and its gradient at every token's
    # log-probability
    loss = spo_ext.linear_loss(
        hidden, weight, targets, ref, torch.tensor([REWARD]), Q0, beta=BETA, objective="squared"
    )
    residual = q[0, 2].item() - REWARD
    assert loss.item() == pytest.approx(residual**2, rel=1e-5) == pytest.approx(0.00529, abs=1e-5)
    upstream = 2 * residual * BETA

    # back down: dL/dz_v = g (onehot - p)
    loss.backward()
    p = [math.exp(z - lse) for z in HIDDEN[1]]
    assert p == pytest.approx([0.04032, 0.10959, 0.80978, 0.04032], abs=1e-5)
    want = [upstream * ((v == 2) - p[v]) for v in range(4)]
    assert hidden.grad[0, 1].tolist() == pytest.approx(want, rel=1e-4)
    column = [upstream * ((v == 2) - p[v]) * HIDDEN[1][2] for v in range(4)]  # from token 2 alone
    assert weight.grad[:, 2].tolist() == pytest.approx(column, rel=1e-4)
