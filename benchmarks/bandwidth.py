"""Ops that do little arithmetic, measured against a copy that moves the same bytes.

The bytes are those that the op cannot avoid: every input read once, every output written once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from measure import DEVICE, Call, back_to_back, copy_call, extra_mib, input_sets, take_turns
from torch import Tensor

Results = tuple[Tensor, ...]
# inputs -> results; the same inputs give the same results with every implementation
Implementation = Callable[[Results], Results]


@dataclass(frozen=True)
class BandwidthCase:
    op: str
    shape: str
    tokens: int
    direction: str
    num_bytes: int
    tolerance: float  # relative, between implementations
    make_inputs: Callable[[], Results]
    implementations: dict[str, Implementation]

    def calls(self, name: str, sets: list[Results]) -> list[Callable[[], Results]]:
        function = self.implementations[name]
        return [lambda inputs=inputs: function(inputs) for inputs in sets]  # type: ignore[misc]


def check_agreement(case: BandwidthCase, name: str, inputs: Results) -> None:
    got = case.implementations[name](inputs)
    want = case.implementations["eager"](inputs)
    for a, b in zip(got, want, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= case.tolerance, f"{name} differs from eager by {error:.1e}"


def run_case(benchmark: Any, case: BandwidthCase, name: str) -> None:
    benchmark.group = f"{case.op} {case.shape} {case.direction}"
    torch.manual_seed(0)
    sets = [case.make_inputs() for _ in range(input_sets(case.num_bytes))]
    try:
        check_agreement(case, name, sets[0])
    except AssertionError:
        raise
    except Exception as error:
        if name == "spo_ext":
            raise
        pytest.skip(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    calls = case.calls(name, sets)
    memory = extra_mib(calls[0])
    this, graph = back_to_back(list(calls))
    others: dict[str, Call] = {}
    others["copy"], _ = back_to_back([copy_call(case.num_bytes) for _ in sets])
    if name != "spo_ext":
        others["spo_ext"], _ = back_to_back(list(case.calls("spo_ext", sets)))
    times = {key: ms / len(sets) for key, ms in take_turns(benchmark, this, others).items()}
    times.setdefault("spo_ext", times["this"])
    benchmark.extra_info.update(
        op=case.op,
        implementation=name,
        direction=case.direction,
        shape=case.shape,
        tokens=case.tokens,
        calls_per_round=len(sets),
        cuda_graph=graph,
        device=DEVICE,
        num_bytes=case.num_bytes,
        extra_mib=memory,
        ms=times["this"],
        spo_ext_ms=times["spo_ext"],
        copy_ms=times["copy"],
        gb_per_s=case.num_bytes / times["this"] / 1e6,
        copy_share=times["copy"] / times["this"],
        peer_over_spo_ext=times["this"] / times["spo_ext"],
    )
