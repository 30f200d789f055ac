"""Prints the MiB that forward and backward of token_logprobs take beyond inputs and gradients.

    python benchmarks/extra_memory.py TOKENS VOCABULARY DEPTH DTYPE [spo_ext|sparse|frozen|eager]

Run as a process of its own: it reads the high-water mark of the process's resident memory (Linux).
"""

import sys
from functools import partial

import torch
from torch import Tensor

import spo_ext


def status_mib(name: str) -> float:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None]).squeeze(-1)


FUNCTIONS = {
    "spo_ext": spo_ext.token_logprobs,
    # The states are random and flat: this leaves out half of the blocks.
    "sparse": partial(spo_ext.token_logprobs, max_dropped_mass=0.5),
    "frozen": spo_ext.token_logprobs,
    "eager": eager,
}


def main() -> None:
    tokens, vocabulary, depth = map(int, sys.argv[1:4])
    dtype = getattr(torch, sys.argv[4])
    name = sys.argv[5] if len(sys.argv) > 5 else "spo_ext"
    function, wanted = FUNCTIONS[name], 1 if name == "frozen" else 2

    def leaves(n: int, v: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
        for leaf in (hidden, weight)[:wanted]:
            leaf.requires_grad_()
        return hidden, weight, torch.randint(v, (n,))

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            function(hidden, weight, targets).sum(), (hidden, weight)[:wanted]
        )

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
