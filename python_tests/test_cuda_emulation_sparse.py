"""The sparse backward pass on CUDA, run thread by thread on the host (cuda_emulation): what is
dropped, the lists of what is not, and the products over those lists, against the CPU kernels."""

import pytest
import torch
from conftest import relative_error
from cuda_emulation import build
from cuda_emulation.cases import GRAD_TOLERANCE, KERNELS, Case, everywhere


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


def sharp_case(tokens, depth, vocabulary, dtype, sharpest=20.0, eps=2.0**-8) -> Case:
    """States near the words they name, from a little to very; some ignored, one without
    gradient."""
    case = Case(tokens, depth, vocabulary, dtype)
    weight = torch.randn(vocabulary, depth) / depth**0.5
    strength = torch.linspace(sharpest / 2, sharpest, case.targets.numel()).view(*tokens, 1)
    case.weight = weight.to(dtype)
    case.hidden = (weight[case.targets] * strength).to(dtype)
    case.targets.view(-1)[3:6] = -100
    case.grad.view(-1)[7] = 0
    case.keep, case.max_dropped_mass = "dropped", eps
    return case


def check(case: Case, emulated) -> float:
    """The same choice as the CPU's, hence the same gradients; returns the share of pairs kept."""
    on_cpu, saved = case.forward(torch.ops.spo), case.forward(emulated)
    keep, case.keep = case.keep, "nothing"
    assert all(map(torch.equal, saved[:-1], case.forward(emulated)[:-1]))
    case.keep = keep
    dropped, want = saved[-1], on_cpu[-1]
    assert dropped.shape == want.shape and dropped.dtype == want.dtype
    assert ((dropped < 0) == (want < 0)).all()
    assert (dropped.clamp(min=0).double().sum(-1) <= case.max_dropped_mass).all()
    assert relative_error(dropped, want) <= 1e-4
    got_grads = case.backward(emulated, (*on_cpu[:-1], dropped))
    for got, expected in zip(got_grads, case.backward(torch.ops.spo, on_cpu), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        if expected.numel() > 0:
            assert relative_error(got, expected) <= GRAD_TOLERANCE[case.hidden.dtype]
    counted = case.targets.view(-1) != -100
    return (dropped[counted] < 0).double().mean().item()


@pytest.mark.parametrize(
    ("dtype", "shape"),
    everywhere(((61,), 72, 2000, 64), ((2, 65), 130, 1300, 64), ((24,), 130, 6000, 1)),
    indirect=["dtype"],
)
def test_what_is_dropped(emulated, shape, dtype) -> None:
    *sizes, workspace_mib = shape
    case = sharp_case(*sizes, dtype)
    case.workspace_mib = workspace_mib
    assert 0.05 < check(case, emulated) < 0.5


def test_every_option(emulated, dtype) -> None:
    case = sharp_case((50,), 136, 1200, dtype, sharpest=17.0)
    case.bias = torch.randn(1200).to(dtype)
    case.options = {"temperature": 0.8, "logit_scale": 1.2, "softcap": 30.0}
    case.needs = [True, True, True]
    assert 0.05 < check(case, emulated) < 0.5
    for needs in ([True, False, False], [False, True, False], [False, False, True]):
        case.needs = needs
        check(case, emulated)


def test_many_waves_and_groups_of_rows(emulated, dtype) -> None:
    """1 MiB holds neither the pairs nor the sums of a 16-bit grad_hidden."""
    case = sharp_case((1830,), 64, 1100, dtype, eps=2.0**-6)
    case.workspace_mib = 1
    assert 0.05 < check(case, emulated) < 0.5


def test_mixed_dtypes_and_strides(emulated, dtype) -> None:
    case = sharp_case((60,), 72, 2000, dtype)
    case.weight = case.weight.to(torch.bfloat16 if dtype == torch.float32 else torch.float32)
    check(case, emulated)
    case = sharp_case((3, 21), 72, 2000, dtype)
    padded = torch.randn(3, 22, 72).to(dtype)
    padded[:, :-1] = case.hidden
    case.hidden, case.weight = padded[:, :-1], case.weight.T.contiguous().T
    check(case, emulated)


def test_a_flat_softmax_takes_the_exact_way(emulated, dtype) -> None:
    case = sharp_case((70,), 40, 2000, dtype, sharpest=0.1)
    saved = case.forward(emulated)
    counted = case.targets != -100
    assert (saved[-1][counted] == -1).all()
    sparse = case.backward(emulated, saved)
    case.keep, case.max_dropped_mass = "nothing", 0.0
    exact = case.backward(emulated, case.forward(emulated))
    assert all(map(torch.equal, sparse, exact))


def test_a_block_without_a_possible_word(emulated, dtype) -> None:
    case = sharp_case((61,), 72, 2000, dtype)
    case.bias = torch.zeros(2000, dtype=dtype)
    case.bias[512:768] = -float("inf")
    case.targets[(case.targets >= 512) & (case.targets < 768)] = 0
    assert check(case, emulated) < 0.5
    assert case.backward(emulated, case.forward(emulated))[0].isfinite().all()


def test_nobody_needs_a_gradient(emulated, dtype) -> None:
    case = sharp_case((30,), 40, 2000, dtype)
    case.grad[:] = 0
    assert all((g == 0).all() for g in case.backward(emulated, case.forward(emulated)))


def test_a_state_that_is_not_a_number_stays_alone(emulated, dtype) -> None:
    case = sharp_case((40,), 72, 2000, dtype)
    whole = case.backward(emulated, case.forward(emulated))[0]
    case.hidden[20, 3] = float("nan")
    grad = case.backward(emulated, case.forward(emulated))[0]
    assert grad[20].isnan().all()
    others = torch.arange(40) != 20
    assert relative_error(grad[others], whole[others]) <= 0.02  # the centres moved a little


def test_a_gradient_of_the_entropy_is_exact(emulated, dtype) -> None:
    case = sharp_case((40,), 72, 2000, dtype)
    case.entropy, case.grad_entropy = True, torch.randn(40)
    sparse = case.backward(emulated, case.forward(emulated))
    case.keep, case.max_dropped_mass = "nothing", 0.0
    exact = case.backward(emulated, case.forward(emulated))
    assert all(map(torch.equal, sparse, exact))
