"""Time and memory of a call on either device.

A time alone says little on a shared machine, so whatever is compared takes turns: one call of each
per round, and the medians are divided.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import spo_ext

Call = Callable[[], object]

# Larger than any L2 cache: written before every timed call, so that none finds its inputs there.
FLUSH_BYTES = 256 << 20


def pick_device() -> str:
    has_cuda = bool(spo_ext.build_info()["cuda_toolkit"]) and torch.cuda.is_available()
    return os.environ.get("SPO_BENCH_DEVICE") or ("cuda" if has_cuda else "cpu")


DEVICE = pick_device()
ON_GPU = DEVICE == "cuda"
ROUNDS = int(os.environ.get("SPO_BENCH_ROUNDS", "12" if ON_GPU else "7"))


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


class Stopwatch:
    """Milliseconds of one call: between two events on the GPU, by the clock on the CPU."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES if ON_GPU else 0, dtype=torch.uint8, device=DEVICE)

    def __call__(self, call: Call) -> float:
        if not ON_GPU:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return float(begin.elapsed_time(end))


def take_turns(benchmark: Any, call: Call, others: dict[str, Call]) -> dict[str, float]:
    """Median milliseconds of `call` (as "this") and of the others, one call of each per round."""
    stopwatch = Stopwatch()
    times: dict[str, list[float]] = {name: [] for name in ("this", *others)}

    def run_others() -> None:
        for name, other in others.items():
            times[name].append(stopwatch(other))

    for warm in (*others.values(), call, call):
        warm()
    synchronize()
    benchmark.pedantic(
        lambda: times["this"].append(stopwatch(call)), setup=run_others, rounds=ROUNDS
    )
    return {name: statistics.median(values) for name, values in times.items()}


def extra_mib(call: Callable[[], tuple[Tensor, ...]]) -> float | None:
    """Peak memory of a warm call beyond what is alive before it and what it returns. GPU only: on
    the CPU `extra_memory.py` measures a process of its own."""
    if not ON_GPU:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    returned = sum(t.numel() * t.element_size() for t in results)
    return (torch.cuda.max_memory_allocated() - before - returned) / 2**20


def input_sets(bytes_per_set: int) -> int:
    """How many sets of inputs to rotate through, so that a short call does not find its own in the
    cache."""
    return min(max(1, FLUSH_BYTES // bytes_per_set), 64) if ON_GPU else 1


def back_to_back(calls: list[Call]) -> tuple[Call, bool]:
    """One call that makes all of them. On the GPU as a graph, since a launch from Python takes
    longer than a kernel of a few microseconds; False if it could not be captured."""

    def plain() -> None:
        for call in calls:
            call()

    if not ON_GPU:
        return plain, False
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            plain()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in calls]

        def replay() -> object:
            graph.replay()
            return results  # whose memory the graph writes: alive as long as it is

        return replay, True
    except RuntimeError:
        torch.cuda.synchronize()
        return plain, False


def copy_call(num_bytes: int) -> Call:
    """A device copy that reads and writes `num_bytes` in all."""
    source = torch.empty(max(num_bytes // 2, 16), dtype=torch.uint8, device=DEVICE)
    source.random_(0, 255)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def roof() -> dict[str, float]:
    """The two ceilings of this machine: a large product (bf16 on a GPU) and a large copy."""
    size, dtype = (8192, torch.bfloat16) if ON_GPU else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    copied = (4 << 30) if ON_GPU else (256 << 20)
    stopwatch, copy = Stopwatch(), copy_call(copied)
    for _ in range(3):
        a @ b, copy()
    gemm_ms = statistics.median(stopwatch(lambda: a @ b) for _ in range(ROUNDS))
    copy_ms = statistics.median(stopwatch(copy) for _ in range(ROUNDS))
    return {
        "gemm_tflops": 2 * size**3 / gemm_ms / 1e9,
        "copy_gb_per_s": copied / copy_ms / 1e6,
        "gemm_size": size,
    }
