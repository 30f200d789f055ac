"""How the CUDA kernels behave towards the rest of a program: streams, graphs, the host, devices."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import head_inputs, moved
from cuda_cases import Outputs, assert_same_bits, run_head
from loss_cases import FORMS, packed_case, padded
from torch import Tensor

import spo_ext

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("on_cuda")]
DTYPES = [torch.bfloat16, torch.float32]
Case = tuple[Tensor, Callable[[], Outputs]]  # an input, and a forward and backward that reads it


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def head_case(dtype: torch.dtype, **options: Any) -> Case:
    inputs = head_inputs(300, 5000, 64, dtype)
    return inputs[0], lambda: run_head(*inputs, **options)


def test_explain_counts_what_a_call_starts() -> None:
    hidden, weight, targets = (t.detach() for t in head_inputs(300, 5000, 64, torch.bfloat16))
    plan = spo_ext.explain(hidden, weight, workspace_mib=1)
    torch.ops.spo.launch_log(False)
    spo_ext.token_logprobs(hidden, weight, targets, workspace_mib=1)
    launches, moved = torch.ops.spo.launch_log(False)
    assert plan.launches == launches > 5 and plan.moved_mib == moved >> 20


def linear_loss_case() -> Case:
    hidden, weight, targets = head_inputs(200, 5000, 64, torch.bfloat16)
    states, targets = hidden.detach().view(4, 50, 64).requires_grad_(), targets.view(4, 50)
    ref, rewards, q0 = -torch.rand(4, 50), -torch.rand(4), -torch.rand(4)

    def step() -> Outputs:
        loss = spo_ext.linear_loss(
            states, weight, targets, ref, rewards, q0, beta=0.1, objective="squared"
        )
        return (loss.detach(), *torch.autograd.grad(loss, (states, weight)))

    return states, step


def logits_case(dtype: torch.dtype) -> Case:
    logits = torch.randn(64, 3001).to(dtype).requires_grad_()
    targets = torch.randint(3001, (64,))

    def step() -> Outputs:
        logprobs = spo_ext.logprobs_from_logits(logits * 2, targets, inplace_backward=True)
        return (logprobs.detach(), *torch.autograd.grad(logprobs.sin().sum(), logits))

    return logits, step


def loss_case(form: str, layout: str) -> Case:
    lengths = [300, 1, 0, 45, 1025, 7]
    case = packed_case(form, lengths)
    leaf, ref, arguments = case if layout == "packed" else padded(*case, lengths)
    where = {k: arguments.get(k) for k in ("cu_seqlens", "mask")}

    def step() -> Outputs:
        total = spo_ext.loss(leaf, ref, **arguments)
        q = spo_ext.soft_q(leaf, ref, 0.5, beta=0.1, **where)
        if layout == "padded":  # masked positions repeat a value and take no gradient
            q = q * arguments["mask"]
        return total.detach(), q.detach(), *torch.autograd.grad(total + q.sin().sum(), leaf)

    return leaf, step


HEAD_CASES: dict[str, Callable[[], Case]] = {
    "head, bf16": lambda: head_case(torch.bfloat16),
    "head, float32": lambda: head_case(torch.float32),
    "head, float16, small workspace": lambda: head_case(
        torch.float16, workspace_mib=8, temperature=0.7, softcap=20.0
    ),
    "linear_loss": linear_loss_case,
    "logits, bf16": lambda: logits_case(torch.bfloat16),
    "logits, float32": lambda: logits_case(torch.float32),
}
CASES = HEAD_CASES | {
    f"{form}, {layout}": partial(loss_case, form, layout)
    for form in FORMS
    for layout in ("packed", "padded")
}


@pytest.mark.parametrize("name", CASES)
def test_the_host_never_waits(name, no_synchronisation):
    torch.cuda.set_sync_debug_mode("default")
    _, step = CASES[name]()
    step()  # the first call may load modules
    torch.cuda.set_sync_debug_mode("error")
    step()


@pytest.mark.parametrize("name", CASES)
def test_graph_of_forward_and_backward(name):
    """Captured once and replayed, the results are those of an ordinary call, to the last bit."""
    _, step = CASES[name]()
    want = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for tensor in got:
        tensor.fill_(7.0)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_of_the_forward_sees_new_inputs(dtype):
    """Static shapes, other values: also another number of ignored targets."""
    hidden, weight, targets = (t.detach() for t in head_inputs(300, 5000, 64, dtype))
    spo_ext.token_logprobs(hidden, weight, targets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = spo_ext.token_logprobs(hidden, weight, targets)
    for ignored in (0, 17, 300):
        hidden.copy_(torch.randn(300, 64))
        targets.copy_(torch.randint(5000, (300,)))
        targets[:ignored] = -100
        graph.replay()
        assert torch.equal(got, spo_ext.token_logprobs(hidden, weight, targets))


@pytest.mark.parametrize("name", HEAD_CASES)
def test_work_is_queued_on_the_current_stream(name):
    """The input arrives late on another stream; a kernel on the default one would read NaN."""
    leaf, step = CASES[name]()
    want = step()
    values = leaf.detach().clone()
    leaf.detach().fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        leaf.detach().copy_(values)
        got = step()
    stream.synchronize()
    assert_same_bits(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", [*HEAD_CASES, "squared, packed", "group, padded"])
def test_another_device_than_the_current_one(name):
    torch.manual_seed(7)
    want = CASES[name]()[1]()
    torch.set_default_device("cuda:1")
    torch.manual_seed(7)
    got = CASES[name]()[1]()
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in got)
    assert_same_bits(moved(got, "cuda:0"), want)


BAD_TARGET = """
import torch, spo_ext
torch.set_default_device("cuda")
targets = torch.tensor([0, 1, {label}, 2])
{call}
torch.cuda.synchronize()
"""
CALLS = {
    "head": "spo_ext.token_logprobs(torch.randn(4, 8).{dtype}(), torch.randn(9, 8).{dtype}(), "
    "targets)",
    "logits": "spo_ext.logprobs_from_logits(torch.randn(4, 9).{dtype}(), targets)",
}


@pytest.mark.parametrize(
    "op, dtype, label",
    [
        ("head", "bfloat16", 9),
        ("head", "float", -1),
        ("head", "bfloat16", 2**31),  # 32 bits of it would be a label
        ("logits", "bfloat16", 9),
        ("logits", "float", -1),
    ],
)
def test_a_bad_target_stops_the_program(op, dtype, label):
    """In a process of its own: after a device-side assert the GPU's context is lost."""
    code = BAD_TARGET.format(label=label, call=CALLS[op].format(dtype=dtype))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "device-side assert" in result.stderr and "target" in result.stderr.lower()
