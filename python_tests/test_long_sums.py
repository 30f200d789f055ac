"""The number that SPO regresses is a sum over a completion: errors must not add up along it."""

import os

import pytest
import torch
from conftest import eager
from tolerances import LOGPROB_TOLERANCE, gpu_logprob_tolerance

import spo_ext

pytestmark = pytest.mark.usefixtures("device")

TOKENS = 1024


def synthetic_states(device):
    """bf16 states of a sharp softmax over 24576 words: about one nat per token."""
    weight = torch.randn(24576, 256).bfloat16()
    likely = torch.randint(24576, (TOKENS, 3))
    strength = torch.tensor([0.080, 0.076, 0.072])[:, None]
    hidden = (weight[likely].float() * strength).sum(1).bfloat16()
    return hidden, weight, likely[:, 0]


def real_states(device):
    path = os.environ.get("SPO_HEAD_STATES", "")
    if not path:
        pytest.skip("SPO_HEAD_STATES names no file of real head states")
    from safetensors.torch import load_file

    data = load_file(path, device=device)
    return data["samp2_hidden"][:TOKENS], data["weight"], data["samp2_targets"][:TOKENS]


@pytest.mark.parametrize("states", [synthetic_states, real_states])
def test_sum_over_a_long_completion(states, device):
    hidden, weight, targets = states(device)
    want = eager.token_logprobs(hidden.double(), weight.double(), targets)[0]
    truth, bound = want.sum(), 1e-4
    if device == "cuda":  # tensor cores err toward zero, so that their errors do add up
        dtype, depth = hidden.dtype, hidden.shape[1]
        bias = gpu_logprob_tolerance(dtype, depth) - LOGPROB_TOLERANCE[dtype]
        bound += bias * float(want.abs().clamp(min=1).sum())

    def error(logprobs):
        return abs(float(logprobs.double().sum() - truth))

    rounded = torch.log_softmax((hidden @ weight.T).float(), -1)
    rounded = rounded.gather(-1, targets.long()[:, None])
    assert error(spo_ext.token_logprobs(hidden, weight, targets)) <= bound
    assert error(rounded) >= 0.01  # what logits rounded to bf16 do to the same sum
