"""The LM head's CUDA kernels, run thread by thread on the host (cuda_emulation), against the CPU
kernels.

"hopper" takes the path of sm_90a: tiles, lists and epilogues are the real ones, the main loop of
CUTLASS is replaced by a plain sum.
"""

import pytest
import torch
from conftest import relative_error
from cuda_emulation import build
from cuda_emulation.cases import ALL_KERNELS, KERNELS, Case, everywhere

from spo_ext._ops import cuda_launches


@pytest.fixture(scope="module")
def emulated():
    build.load()
    return torch.ops.spo_emulated


@pytest.fixture(params=KERNELS, ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of the inputs, which the kernels of one path are to take."""
    path, dtype = request.param
    monkeypatch.setenv("SPO_EMULATE_HOPPER", str(int(path == "hopper")))
    return dtype


SHAPES = [((2, 65), 40, 257), ((5,), 3, 1), ((1,), 8, 7), ((13,), 33, 507), ((129,), 24, 300)]


@pytest.mark.parametrize(("dtype", "shape"), everywhere(*SHAPES), indirect=["dtype"])
def test_shapes(emulated, shape, dtype) -> None:
    Case(*shape, dtype).check(emulated)


def test_hopper_can_be_switched_off(emulated, monkeypatch) -> None:
    """The bits are those of the portable kernels, which differ from those of the Hopper ones."""
    case = Case((70,), 40, 507, torch.bfloat16)

    def logprobs(on_hopper: str, wanted: str):
        monkeypatch.setenv("SPO_EMULATE_HOPPER", on_hopper)
        monkeypatch.setenv("SPO_HOPPER", wanted)
        return case.forward(emulated)[0]

    portable, hopper = logprobs("0", ""), logprobs("1", "")
    assert not torch.equal(portable, hopper)
    assert torch.equal(logprobs("1", "0"), portable) and torch.equal(logprobs("1", "1"), hopper)
    with pytest.raises(ValueError, match="SPO_HOPPER must be 0, 1 or unset, got 'no'"):
        logprobs("1", "no")


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", ALL_KERNELS, indirect=True)
def test_every_option(emulated, dtype, softcap) -> None:
    case = Case((37,), 40, 507, dtype)
    case.bias = torch.randn(507).to(dtype)
    case.options = {"temperature": 0.7, "logit_scale": -1.5, "softcap": softcap}
    case.entropy, case.needs = True, [True, True, True]
    case.grad_entropy = torch.randn_like(case.grad)
    case.check(emulated)


@pytest.mark.parametrize("keep", ["logits", "jacobian"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    everywhere(((13,), 33, 507, 64), ((2, 65), 40, 1000, 1), ((40,), 24, 7000, 1)),
    indirect=["dtype"],
)
def test_what_the_forward_keeps(emulated, shape, dtype, keep) -> None:
    *sizes, workspace_mib = shape
    case = Case(*sizes, dtype)
    plain = case.forward(emulated)
    case.keep, case.workspace_mib = keep, workspace_mib
    assert all(map(torch.equal, case.forward(emulated)[:-1], plain[:3]))
    case.targets.view(-1)[4:7] = -100
    case.grad.view(-1)[2] = 0
    case.bias = torch.randn(len(case.weight)).to(dtype)
    case.options = {"temperature": 0.7, "logit_scale": 1.5, "softcap": 20.0}
    if keep == "logits":
        case.entropy, case.grad_entropy = True, torch.randn_like(case.grad)
    else:
        case.needs = [True, False, False]
    case.check(emulated)


def test_ignored_rows_may_hold_anything(emulated, dtype) -> None:
    case = Case((150,), 40, 300, dtype)
    case.targets[20:100] = -100
    case.hidden[60] = float("nan")
    case.hidden[70] = float("inf")
    case.grad[3] = 0  # and one row that counts has no gradient
    case.check(emulated)


def test_nothing_to_do(emulated, dtype) -> None:
    for case in (Case((0,), 8, 9, dtype), Case((300,), 8, 9, dtype)):
        case.targets[:] = -100
        case.check(emulated)


def test_strides(emulated, dtype) -> None:
    shifted = Case((3, 21), 40, 300, dtype)
    shifted.hidden = torch.randn(3, 22, 40).to(dtype)[:, :-1]
    shifted.check(emulated)
    sparse = Case((3, 21), 40, 300, dtype)  # too many rows in between to visit them all
    sparse.hidden = torch.randn(3, 900, 40).to(dtype)[:, :21]
    sparse.check(emulated)
    transposed = Case((20,), 24, 300, dtype)
    transposed.weight = transposed.weight.T.contiguous().T
    transposed.hidden = transposed.hidden.T.contiguous().T
    transposed.check(emulated)
    shared = Case((4, 20), 40, 300, dtype)  # tokens that lie in the same rows
    shared.hidden = torch.randn(20, 40).to(dtype).expand(4, 20, 40)
    shared.check(emulated)
    shared.hidden = torch.randn(32, 40).to(dtype).as_strided((4, 20, 40), (160, 40, 1))
    shared.check(emulated)
    unaligned = Case((20,), 40, 300, dtype)
    unaligned.hidden = torch.randn(20 * 40 + 1).to(dtype)[1:].view(20, 40)
    unaligned.targets = unaligned.targets.int()
    unaligned.check(emulated)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.half)])
def test_mixed_dtypes(emulated, dtypes) -> None:
    case = Case((70,), 40, 300, torch.bfloat16)
    case.hidden, case.weight = case.hidden.to(dtypes[0]), case.weight.to(dtypes[1])
    case.check(emulated)


def test_a_workspace_too_small_for_one_pass(emulated, dtype) -> None:
    case = Case((1830,), 64, 300, dtype)  # grad_hidden in groups, grad_weight over groups
    case.workspace_mib = 1
    case.check(emulated)
    case.needs = [False, True, False]
    case.check(emulated)


def test_a_token_does_not_see_its_batch(emulated, dtype) -> None:
    case = Case((150,), 40, 5000, dtype)
    case.entropy = True
    whole = case.forward(emulated)
    case.workspace_mib = 1
    assert all(map(torch.equal, case.forward(emulated), whole))
    hidden, targets = case.hidden, case.targets
    for rows in ([7], list(range(140, 3, -9))):
        case.hidden, case.targets = hidden[rows], targets[rows]
        assert all(
            torch.equal(a, b[rows])
            for a, b in zip(case.forward(emulated)[:-1], whole[:-1], strict=True)
        )


@pytest.mark.parametrize("dtype", KERNELS[1:], indirect=True)
def test_a_split_float_keeps_24_bits(emulated, dtype) -> None:
    """grad_hidden over many slices is no worse than over one."""
    case = Case((40,), 16, 6_000, dtype)
    case.needs = [True, False, False]
    saved = case.forward(torch.ops.spo)
    one_slice = case.backward(emulated, saved)[0]
    case.hidden, case.targets = case.hidden.repeat(16, 1), case.targets.repeat(16)
    case.grad, saved = case.grad.repeat(16), (*(t.repeat(16) for t in saved[:-1]), saved[-1])
    case.workspace_mib = 1
    many_slices = case.backward(emulated, saved)[0][:40]
    # The last bit of a bfloat16 may fall either way; more would show sums rounded on the way.
    assert relative_error(many_slices, one_slice) <= 1e-3


@pytest.mark.parametrize("keep", ["nothing", "logits", "jacobian"])
@pytest.mark.parametrize("dtype", ALL_KERNELS[-2:], indirect=True)
def test_what_a_call_starts_is_known_without_the_call(emulated, dtype, keep) -> None:
    case = Case((300,), 40, 9000, dtype)
    case.keep, case.workspace_mib = keep, 1
    case.needs = [True, keep != "jacobian", False]
    inputs = (case.hidden.clone().requires_grad_(), case.weight.clone())
    inputs[1].requires_grad_(case.needs[1])
    options = (False, case.workspace_mib, keep, 0.0)
    want = cuda_launches(*inputs, None, options, emulated, torch._C.DispatchKey.CPU)
    emulated.launch_log(False)
    case.backward(emulated, case.forward(emulated))
    assert tuple(emulated.launch_log(False)) == want
    assert want[0] > 10 and want[1] > 0


def test_few_launches_for_a_large_head(emulated, monkeypatch) -> None:
    """Of two products of 14336 entries by 8192 tokens and their sums, 256 MiB hold nine slices."""
    monkeypatch.setenv("SPO_EMULATE_HOPPER", "1")
    n, d, v, slices = 8192, 4096, 128256, 9
    hidden, weight = (
        torch.empty(rows, d, dtype=torch.bfloat16, requires_grad=True)  # and never touched
        for rows in (n, v)
    )

    def count(workspace_mib: int) -> tuple[int, int]:
        options = (False, workspace_mib, "nothing", 0.0)
        return cuda_launches(hidden, weight, None, options, emulated, torch._C.DispatchKey.CPU)

    launches, moved = count(256)
    assert launches <= 60 and count(64)[0] > 4 * launches
    forward = 2 * (n + v) * d + n * 501 * 12  # and of each block of 256 entries three floats
    gradient = 2 * (slices * n * d + v * d + n * v)
    grad_hidden = 2 * (n * v + v * d) + n * d * (3 + 6 * (slices - 2) + 5)  # sums are 3 bytes
    grad_weight = 2 * (n * v + slices * n * d + v * d)
    assert moved == forward + gradient + grad_hidden + grad_weight
