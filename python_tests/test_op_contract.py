"""What PyTorch and its users expect of an operator: opcheck, gradcheck, torch.compile, clear
refusals."""

import pytest
import torch
from conftest import head_inputs, moved
from loss_cases import FORMS, packed_case, padded

import spo_ext
from spo_ext._ops import LossArgs

pytestmark = pytest.mark.usefixtures("device")
# Without a host synchronisation only the GPU sees values: there a kernel asserts them.
VALUES = pytest.mark.cpu_only("values are asserted on the GPU")
OPS = torch.ops.spo
KEPT = ("nothing", "logits", "jacobian", "dropped")


def head_arguments(dtype=torch.float32):
    hidden, weight, targets = head_inputs(5, 9, 4, dtype)
    targets[1] = -100
    return hidden, weight, targets, None, 0.9, 1.0, None, -100, True, 64, "nothing", 0.0


def loss_arguments(form):
    logprobs, ref, a = packed_case(form)
    given = dict(delta=0.2, leave_one_out=False, logprobs=logprobs, ref_logprobs=ref) | a
    return LossArgs(*map(given.get, LossArgs._fields))


def samples():
    head = head_arguments()
    logits = torch.randn(4, 9, requires_grad=True)
    labels = torch.tensor([0, 3, -100, 8])
    yield (
        "token_logprobs",
        (
            *head[:3],
            torch.randn(9, requires_grad=True),
            1.0,
            1.0,
            5.0,
            -100,
            False,
            64,
            "nothing",
            0.0,
        ),
    )
    for keep in KEPT:
        # A row of kept logits is left unwritten where the target is ignored.
        head[2][1] = 0 if keep == "logits" else -100
        frozen = keep == "jacobian"
        targets = head[2].clone()
        arguments = (head[0], head[1].detach() if frozen else head[1], targets, *head[3:8])
        yield "token_logprobs", (*arguments, not frozen, 64, keep, 0.1)
        saved = [t.detach() for t in OPS.token_logprobs(*arguments, not frozen, 64, keep, 0.1)]
        grads = (torch.randn(5), torch.randn(5) if keep in ("nothing", "logits") else None)
        inputs = (head[0].detach(), head[1].detach(), targets, None)
        needs = [True, not frozen, False]
        yield (
            "token_logprobs_backward",
            (*grads, *inputs, *saved, *head[4:8], needs, 64, keep),
        )
    yield "logprobs_from_logits", (logits, labels, 1.0, -100, True, False)
    saved = [t.detach() for t in OPS.logprobs_from_logits(logits, labels, 1.0, -100, True, False)]
    backward = (torch.randn(4), torch.randn(4), logits.detach(), labels, *saved, 1.0, -100)
    yield "logprobs_from_logits_backward", backward
    yield "logprobs_from_logits_backward_", (*backward[:2], logits.detach().clone(), *backward[3:])
    logprobs, ref, a = packed_case("squared")
    yield "soft_q", (logprobs, ref, a["q0"], 0.5, a["cu_seqlens"], None)
    yield "soft_q_backward", (torch.randn(22).double(), 0.5, a["cu_seqlens"], None)
    for form in ("squared", "group", "advantage, per token", "cross_entropy, per-token targets"):
        yield "cumulative_loss", loss_arguments(form)
    args = loss_arguments("squared, weights")
    args = args._replace(logprobs=args.logprobs.detach())
    yield "cumulative_loss_backward", (torch.randn(6).double(), *args)


@pytest.mark.parametrize("index", range(19))
def test_opcheck(index, device):
    cases = list(samples())
    assert len(cases) == 19  # every op is among them
    name, arguments = cases[index]
    torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(softcap=2.0, temperature=0.7), dict(logit_scale=0.5, return_entropy=True)],
)
def test_gradcheck_head(options):
    hidden, weight, targets = head_inputs(4, 11, 5, torch.float64)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    targets[2] = -100
    torch.autograd.gradcheck(
        lambda h, w, b: spo_ext.token_logprobs(h, w, targets, bias=b, **options),
        (hidden, weight, bias),
    )


def test_gradcheck_logits_and_soft_q():
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, -100, 8])
    torch.autograd.gradcheck(
        lambda z: spo_ext.logprobs_from_logits(z, labels, temperature=0.7, return_entropy=True),
        (logits,),
    )
    logprobs, ref, a = packed_case("squared")
    q0 = a["q0"].requires_grad_()
    torch.autograd.gradcheck(
        lambda lp, q: spo_ext.soft_q(lp, ref, q, beta=0.3, cu_seqlens=a["cu_seqlens"]),
        (logprobs, q0),
    )


@pytest.mark.parametrize("form", [f for f in FORMS if not f.startswith("group")])
def test_gradcheck_loss(form):
    """Not for "group", whose baseline is detached: its gradient is checked against the pairs in
    test_loss."""
    logprobs, ref, arguments = packed_case(form)
    torch.autograd.gradcheck(
        lambda lp: spo_ext.loss(lp, ref, **arguments, reduction="none"), (logprobs,)
    )


def scalar_ops():
    hidden, weight, targets = head_inputs(4, 6, 5, torch.float64)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    logprobs, ref, a = packed_case("squared")
    return {
        "token_logprobs": (hidden, spo_ext.token_logprobs(hidden, weight, targets)),
        "logprobs_from_logits": (logits, spo_ext.logprobs_from_logits(logits, targets)),
        "soft_q": (
            logprobs,
            spo_ext.soft_q(logprobs, ref, 0.0, beta=1.0, cu_seqlens=a["cu_seqlens"]),
        ),
        "loss": (logprobs, spo_ext.loss(logprobs, ref, **a)),
    }


@pytest.mark.parametrize("op", ["token_logprobs", "logprobs_from_logits", "soft_q", "loss"])
def test_second_derivatives_are_refused(op):
    leaf, out = scalar_ops()[op]
    upstream = torch.ones_like(out).requires_grad_()
    grad = torch.autograd.grad(out, leaf, upstream, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=f"{op}: second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("objective", ["squared", "cross_entropy", "group"])
def test_torch_compile_fullgraph(objective):
    hidden, weight, _ = head_inputs(24, 40, 16, torch.float32)
    targets = torch.randint(40, (4, 6))
    targets[:, 4:] = -100
    ref, rewards = -torch.rand(4, 6), -torch.rand(4)
    q0 = None if objective == "group" else torch.zeros(4)
    groups = torch.tensor([0, 0, 1, 1]) if objective == "group" else None

    def step(h, w):
        return spo_ext.linear_loss(
            h.view(4, 6, 16) * 1.5,
            w,
            targets,
            ref,
            rewards,
            q0,
            beta=0.2,
            objective=objective,
            groups=groups,
        )

    eager = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    compiled = torch.compile(step, fullgraph=True)(hidden, weight)
    assert compiled.item() == pytest.approx(step(hidden, weight).item(), rel=1e-6)
    for got, want in zip(torch.autograd.grad(compiled, (hidden, weight)), eager, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_torch_compile_of_soft_q_and_logits():
    logits, labels = torch.randn(3, 5, 12, requires_grad=True), torch.randint(12, (3, 5))

    def step(z):
        logprobs = spo_ext.logprobs_from_logits(z * 2, labels, inplace_backward=True)
        return spo_ext.soft_q(logprobs, torch.zeros(3, 5), torch.ones(3), beta=0.1).sum()

    want = torch.autograd.grad(step(logits), logits)[0]
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(logits), logits)[0]
    torch.testing.assert_close(got, want)


def test_autocast_leaves_the_numbers_alone(device):
    """Under autocast the states arrive in bf16; the head works on them as they are, in float32."""
    hidden, weight, targets = head_inputs(8, 30, 16, torch.float32)
    layer = torch.nn.Linear(16, 16)
    with torch.autocast(device, dtype=torch.bfloat16):
        states = layer(hidden)
        inside = spo_ext.token_logprobs(states, weight, targets)
    assert states.dtype == torch.bfloat16 and inside.dtype == torch.float32
    assert torch.equal(inside, spo_ext.token_logprobs(states, weight, targets))


BAD_HEAD = [
    (
        dict(weight=torch.randn(9, 5)),
        ValueError,
        r"weight must be \[V, d\] with d = 4 like hidden, got \[9, 5\]",
    ),
    (dict(weight=torch.randn(0, 4)), ValueError, "weight must have at least one row"),
    (
        dict(weight=torch.randn(9, 4).double()),
        TypeError,
        "weight must be float64 exactly when hidden is",
    ),
    (
        dict(hidden=torch.ones(5, 4).int()),
        TypeError,
        "hidden must be float32, float64, float16 or bfloat16, got Int",
    ),
    (dict(hidden=torch.tensor(1.0)), ValueError, r"hidden must be \[.., d\], got a scalar"),
    (
        dict(targets=torch.zeros(4).long()),
        ValueError,
        r"targets must have shape \[5\], one label per row, got \[4\]",
    ),
    (dict(targets=torch.zeros(5)), TypeError, "targets must be int64 or int32, got Float"),
    pytest.param(
        dict(targets=torch.tensor([0, 1, 9, 0, 0])),
        IndexError,
        r"targets must be in \[0, 9\) or ignore_index -100, got 9 at position 2",
        marks=VALUES,
    ),
    pytest.param(
        dict(targets=torch.tensor([0, 1, 8, 0, -1])),
        IndexError,
        "got -1 at position 4",
        marks=VALUES,
    ),
    (dict(bias=torch.zeros(8)), ValueError, r"bias must have shape \[9\], got \[8\]"),
    (dict(temperature=0.0), ValueError, "temperature must be a finite number > 0, got 0"),
    (
        dict(temperature=float("nan")),
        ValueError,
        "temperature must be a finite number > 0, got nan",
    ),
    (dict(softcap=-1.0), ValueError, "softcap must be a finite number > 0, got -1"),
    (dict(logit_scale=0.0), ValueError, "logit_scale must be a finite number other than 0"),
    (dict(workspace_mib=0), ValueError, "workspace_mib must be > 0, got 0"),
    (dict(strategy="fast"), ValueError, "strategy must be one of auto, .*, got 'fast'"),
    (dict(max_dropped_mass=1.0), ValueError, r"max_dropped_mass must be in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize("change, error, message", BAD_HEAD)
def test_token_logprobs_refuses(change, error, message, device):
    change = moved(change, device)
    arguments = dict(
        hidden=torch.randn(5, 4), weight=torch.randn(9, 4), targets=torch.zeros(5).long()
    )
    with pytest.raises(error, match=f"^token_logprobs: .*{message}"):
        spo_ext.token_logprobs(**{**arguments, **change})


def test_refuses_two_devices(device):
    hidden, weight, targets = torch.randn(5, 4), torch.randn(9, 4), torch.zeros(5).long()
    with pytest.raises(ValueError, match=f"targets must be on {device}.* like hidden, got meta"):
        spo_ext.token_logprobs(hidden, weight, targets.to("meta"))


@pytest.mark.cpu_only("the least that the kernels of the CPU can work in")
def test_workspace_too_small_names_the_least():
    hidden, weight, targets = torch.randn(4, 4096), torch.randn(300, 4096), torch.zeros(4).long()
    with pytest.raises(ValueError, match=r"workspace_mib must be at least \d+ for d = 4096"):
        spo_ext.token_logprobs(hidden, weight, targets, workspace_mib=1)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(logits=torch.randn(5, 0)), ValueError, r"logits must be \[.., V\] with V > 0"),
        pytest.param(
            dict(targets=torch.tensor([0, 1, 3])), IndexError, "got 3 at position 2", marks=VALUES
        ),
        (dict(temperature=-1.0), ValueError, "temperature must be a finite number > 0"),
    ],
)
def test_logprobs_from_logits_refuses(change, error, message, device):
    change = moved(change, device)
    arguments = dict(logits=torch.randn(3, 3), targets=torch.zeros(3).long())
    if "logits" in change:
        arguments["targets"] = torch.zeros(5).long()
    with pytest.raises(error, match=f"^logprobs_from_logits: .*{message}"):
        spo_ext.logprobs_from_logits(**{**arguments, **change})


@pytest.mark.cpu_only("the same module")
def test_build_info():
    info = spo_ext.build_info()
    assert info["version"] == spo_ext.__version__ and info["cpu_isa"] in (
        "generic",
        "avx2",
        "avx512",
    )
    assert info["compiler"].split()[0] in ("gcc", "clang")


def test_padded_cases_are_what_they_say():
    """The fixture itself: masked positions hold NaN, so a kernel that read them would be caught."""
    leaf, ref, rows = padded(*packed_case("squared"))
    assert leaf[~rows["mask"]].isnan().all() and not leaf[rows["mask"]].isnan().any()
