"""What spo_ext is compared with: each peer from its own package, called as its users call it.

A peer is a function (hidden [N, d], weight [V, d], targets [N]) -> log-probabilities [N]. Loading
one imports its package, and raises where that is missing or too old.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from tile_filter import tile_filter
from torch import Tensor

import spo_ext

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    load: Callable[[], Logprobs]
    every_shape: bool = False  # else only at shapes marked every_peer
    per_token: bool = True  # False: one sum, and one gradient scale for all tokens
    gpu_only: bool = True
    cpu_only: bool = False
    trains_head: bool = True  # False: the gradient of hidden alone
    note: str = ""


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1)


def pytorch_chunked() -> Logprobs:
    """PyTorch's own op without [N, V] logits, in the form that admits a gradient per token."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()

    return lambda hidden, weight, targets: (
        -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)
    )


def liger_rl() -> Logprobs:
    """Liger-Kernel's op for RL: per-token NLL. On compute capability 9.0 a CuTe kernel, which needs
    nvidia-cutlass-dsl; elsewhere chunked PyTorch."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return lambda hidden, weight, targets: (
        -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
    )


def liger_ce() -> Logprobs:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, targets: (
        -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")
    )


def cut_cross_entropy() -> Logprobs:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: (
        -linear_cross_entropy(hidden, weight, targets, reduction="none")
    )


def cut_cross_entropy_unfiltered() -> Logprobs:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: (
        -linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=None)
    )


def quack() -> Logprobs:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, targets: (
        -chunked_linear_cross_entropy(hidden, weight, targets, reduction="sum")
    )


def trl() -> Logprobs:
    from trl.kernels import ChunkedLogProbFunction

    chunk = 32768  # entries per tile, the width that TRL's trainers pass
    return lambda hidden, weight, targets: ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, chunk, None, 1.0, ()
    )[0]


PEERS: dict[str, Peer] = {
    "spo_ext": Peer(lambda: spo_ext.token_logprobs, every_shape=True, gpu_only=False),
    "spo_ext-512MiB": Peer(
        lambda: partial(spo_ext.token_logprobs, workspace_mib=512),
        every_shape=True,
        note="workspace_mib=512 instead of 256",
    ),
    "spo_ext-stored": Peer(
        lambda: partial(spo_ext.token_logprobs, strategy="stored"),
        gpu_only=False,
        note="keeps the logits for the backward pass",
    ),
    "spo_ext-frozen": Peer(
        lambda: partial(spo_ext.token_logprobs, strategy="frozen"),
        gpu_only=False,
        trains_head=False,
        note="the head is not trained: no grad_weight",
    ),
    "spo_ext-sparse10": Peer(
        lambda: partial(spo_ext.token_logprobs, max_dropped_mass=2.0**-10),
        every_shape=True,
        gpu_only=False,
        note="max_dropped_mass = 2^-10",
    ),
    "spo_ext-sparse8": Peer(
        lambda: partial(spo_ext.token_logprobs, max_dropped_mass=2.0**-8),
        every_shape=True,
        gpu_only=False,
        note="max_dropped_mass = 2^-8",
    ),
    "eager": Peer(lambda: eager, every_shape=True, gpu_only=False),
    "liger-rl": Peer(liger_rl, every_shape=True),
    "cce": Peer(
        cut_cross_entropy, every_shape=True, note="drops gradients below its filter's threshold"
    ),
    "quack": Peer(
        quack,
        per_token=False,
        note="one sum: no log-prob and no gradient per token, so it cannot train SPO; 3 products "
        "against the 4 of ops that recompute",
    ),
    "trl": Peer(trl),
    "tile-filter": Peer(
        lambda: tile_filter,
        every_shape=True,
        gpu_only=False,
        cpu_only=True,
        note="the filter of cut-cross-entropy restated in PyTorch; drops gradients without a bound",
    ),
    "chunked": Peer(pytorch_chunked, gpu_only=False),
    "compile": Peer(lambda: torch.compile(eager, dynamic=False), gpu_only=False),
    "liger-ce": Peer(liger_ce),
    "cce-exact": Peer(cut_cross_entropy_unfiltered, note="filter off"),
}


def warn_if_no_gradient_per_token(name: str) -> None:
    if not PEERS[name].per_token:
        warnings.warn(f"{name} has no gradient per token: {PEERS[name].note}", stacklevel=2)
