"""How errors are measured, and how large they may be. Needs torch alone, so that the checks of
benchmarks/gpu.sh use the same numbers as the tests."""

import torch
from torch import Tensor

# Largest relative error against the reference in float64 on the same (rounded) inputs.
# Log-probabilities come out in float32 whatever the input, so only gradients are coarser for 16-bit
# types: they are rounded once to that type.
LOGPROB_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.bfloat16: 3e-6,
    torch.float16: 3e-6,
}
GRAD_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 4e-3,  # 2^-8: half a unit in the last place of bfloat16 is 2^-9
    torch.float16: 6e-4,  # 2^-11 likewise, and some subnormals
}


def gpu_logprob_tolerance(dtype: torch.dtype, depth: int) -> float:
    """Return the largest relative error of a log-probability on a GPU, for states of `depth`.

    16-bit inputs are multiplied by tensor cores, which add 16 products at a time to a float32 sum
    and cut off what does not fit. Each of the d/16 additions takes up to 2^-23 of the sum so far,
    .36 * 2^-23 in the mean, always toward zero; the sum so far is half of the logit in the mean.
    So a logit z loses .36 d/16 2^-24 |z|, and log p = z - lse in the worst case what both lose,
    1.4 times as much where logits are about as large as log-probabilities: d/16 2^-25 in all. It
    comes on top of what the kernels' own arithmetic may do. `test_tolerances.py` simulates it.
    """
    additions = depth / 16 if dtype in (torch.bfloat16, torch.float16) else 0.0
    return LOGPROB_TOLERANCE[dtype] + additions * 2.0**-25


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference over the norm of the truth; the difference itself where the
    truth is 0."""
    want = want.detach().double().to(got.device)
    difference = (got.detach().double() - want).norm()
    scale = want.norm()
    return float(difference / scale) if scale > 0 else float(difference)


def logprob_error(got: Tensor, want: Tensor) -> float:
    """Return max |error| / max(1, |log-probability|)."""
    if got.numel() == 0:
        return 0.0
    want = want.detach().double().to(got.device)
    return float(((got.detach().double() - want).abs() / want.abs().clamp(min=1)).max())
