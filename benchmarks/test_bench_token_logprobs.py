"""token_logprobs against what a PyTorch user has today, on the same states.

Machines are shared and noisy, so a time alone says little: each round of spo_ext is preceded by one
round of the peer, and the ratio of the two medians is the result. Before anything is timed, the
log-probabilities must agree.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from states import HeadStates, load_states
from torch import Tensor

import spo_ext

ROUNDS = 7
Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None]).squeeze(-1)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own op without [N, V] logits, in the form that admits a gradient per token."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


PEERS: dict[str, Logprobs] = {"eager": eager, "compile": torch.compile(eager), "chunked": chunked}


@pytest.fixture(scope="module")
def states() -> HeadStates:
    return load_states()


def timed_call(function: Logprobs, states: HeadStates, backward: bool) -> Callable[[], float]:
    hidden, weight = states.hidden.clone(), states.weight.clone()
    upstream = torch.linspace(
        -1, 1, len(hidden)
    )  # a different gradient for every token, as SPO has

    def run() -> float:
        start = time.perf_counter()
        if backward:
            hidden.requires_grad_(), weight.requires_grad_()
            torch.autograd.grad(
                function(hidden, weight, states.targets), (hidden, weight), upstream
            )
        else:
            with torch.no_grad():
                function(hidden, weight, states.targets)
        return time.perf_counter() - start

    return run


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_against(benchmark, states: HeadStates, peer: str, backward: bool) -> None:
    benchmark.group = f"token_logprobs {'forward+backward' if backward else 'forward'}"
    with torch.no_grad():
        ours = spo_ext.token_logprobs(states.hidden, states.weight, states.targets)
        theirs = PEERS[peer](states.hidden, states.weight, states.targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    run_peer = timed_call(PEERS[peer], states, backward)
    run_spo = timed_call(spo_ext.token_logprobs, states, backward)
    run_peer(), run_spo()  # warm: compiled, threads started
    times: dict[str, list[float]] = {"peer": [], "spo_ext": []}
    benchmark.pedantic(
        lambda: times["spo_ext"].append(run_spo()),
        setup=lambda: times["peer"].append(run_peer()),
        rounds=ROUNDS,
    )
    peer_s, spo_s = (statistics.median(times[key]) for key in ("peer", "spo_ext"))
    benchmark.extra_info.update(
        peer_over_spo_ext=peer_s / spo_s,
        peer_ms=peer_s * 1e3,
        spo_ext_ms=spo_s * 1e3,
        threads=torch.get_num_threads(),
        states=states.source,
        shape=[*states.hidden.shape, len(states.weight)],
        build=spo_ext.build_info(),
    )
