"""Errors against float64 and extra memory, as JSON on the standard output.

Each error stands beside that of eager PyTorch in the same dtype, on the same rounded inputs.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from states import load_states
from torch import Tensor

import spo_ext
from spo_ext import eager as specification

HERE = Path(__file__).parent
Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logprobs = torch.log_softmax((hidden @ weight.T).float(), -1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1)


def processor() -> str:
    with open("/proc/cpuinfo") as info:
        return next(line for line in info if line.startswith("model name")).split(":")[1].strip()


def errors(function: Logprobs, dtype: torch.dtype) -> dict[str, float]:
    """On 256 tokens over 50257 entries, logits of standard deviation 4."""
    torch.manual_seed(0)
    hidden = torch.randn(256, 256).to(dtype).requires_grad_()
    weight = (torch.randn(50257, 256) / 4).to(dtype).requires_grad_()
    targets, upstream = torch.randint(50257, (256,)), torch.randn(256)
    logprobs = function(hidden, weight, targets)
    grads = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    truth = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = specification.token_logprobs(truth[0], truth[1], targets)[0]
    want_grads = torch.autograd.grad(want, truth, upstream.double())
    out = {"logprob": ((logprobs - want).abs() / want.abs().clamp(min=1)).max().item()}
    for name, got, true in zip(("grad_hidden", "grad_weight"), grads, want_grads, strict=True):
        out[name] = ((got.double() - true).norm() / true.norm()).item()
    return out


def long_sums(function: Logprobs, dtype: torch.dtype) -> float:
    """Largest error of the sum of 1024 log-probabilities, over the four such sums of the states."""
    states = load_states()
    hidden, weight = states.hidden.bfloat16(), states.weight.bfloat16()
    worst = 0.0
    for rows in torch.arange(len(hidden)).split(1024):
        got = function(hidden[rows].to(dtype), weight.to(dtype), states.targets[rows])
        want = specification.token_logprobs(
            hidden[rows].double(), weight.double(), states.targets[rows]
        )[0]
        worst = max(worst, abs((got.double().sum() - want.sum()).item()))
    return worst


def extra_mib(implementation: str) -> float:
    arguments = [sys.executable, str(HERE / "extra_memory.py"), "4096", "65536", "256", "float32"]
    return float(subprocess.check_output([*arguments, implementation]))


def main() -> None:
    functions: dict[str, Logprobs] = {"spo_ext": spo_ext.token_logprobs, "eager": eager}
    types = (torch.float32, torch.bfloat16)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True, cwd=HERE).strip()
    result = {
        "commit": commit,
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "build": spo_ext.build_info(),
        "states": load_states().source,
    }
    for name, function in functions.items():
        by_type = {str(dtype).removeprefix("torch."): dtype for dtype in types}
        result[name] = {
            "relative_error": {key: errors(function, dtype) for key, dtype in by_type.items()},
            "error_of_1024_token_sum": {k: long_sums(function, d) for k, d in by_type.items()},
            "extra_mib_4096x65536x256_float32": extra_mib(name),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
