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


def gpu_logprob_tolerance(dtype: torch.dtype, depth: int, logits: float = 1.0) -> float:
    """Return the largest relative error of a log-probability on a GPU, for states of `depth`.

    `logits` is the largest |logit of a target| / max(1, |log-probability|): about 1 for states that
    know nothing of their targets, far above it for confident tokens.

    Tensor cores multiply 16-bit inputs. They add 16 products at a time to a float32 sum and cut off
    what does not fit, so each of the n = d/16 additions takes up to 2^-23 of the sum so far, .36 of
    that in the mean. That has two parts:
      the mean    sums so far are half of the final one, so a logit z is scaled by 1 - .36 n 2^-24,
                  and log p changes by .36 n 2^-24 |log p + entropy|: at most n/2 2^-24 |log p|
                  where the sums' own spread is counted in
      the spread  of n independent cuts, .35 sqrt(n) 2^-24 |z|; its largest among thousands of
                  tokens 2 sqrt(n) 2^-24 |z|
    They come on top of what the rest of the arithmetic may do. test_tolerances.py simulates them.
    """
    additions = depth / 16 if dtype in (torch.bfloat16, torch.float16) else 0.0
    return LOGPROB_TOLERANCE[dtype] + 2.0**-24 * (additions / 2 + 2 * additions**0.5 * logits)


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
