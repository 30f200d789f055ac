"""Prints the MiB that forward and backward of token_logprobs take beyond inputs and gradients.

    python benchmarks/extra_memory.py TOKENS VOCABULARY DEPTH DTYPE [spo_ext|eager]

Run as a process of its own: it reads the high-water mark of the process's resident memory (Linux).
"""

import sys

import torch
from torch import Tensor

import spo_ext


def status_mib(name: str) -> float:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None]).squeeze(-1)


def main() -> None:
    tokens, vocabulary, depth = map(int, sys.argv[1:4])
    dtype = getattr(torch, sys.argv[4])
    function = eager if sys.argv[5:] == ["eager"] else spo_ext.token_logprobs

    def leaves(n: int, v: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
        return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(v, (n,))

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(hidden, weight, targets).sum(), (hidden, weight))

    run(*leaves(300, 600, 64))  # threads, libraries and the allocator are warm
    inputs = leaves(tokens, vocabulary, depth)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the high-water mark starts again here
    before = status_mib("VmRSS")
    grads = run(*inputs)
    gradients = sum(grad.numel() * grad.element_size() for grad in grads) / 2**20
    print(f"{status_mib('VmHWM') - before - gradients:.1f}")


if __name__ == "__main__":
    main()
