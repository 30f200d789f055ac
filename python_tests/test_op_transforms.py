"""What PyTorch does with an operator beside calling it: torch.func, forward-mode derivatives,
torch.export, inference mode, FLOP counters, fake tensors; and changes of what it returned."""

import math

import pytest
import torch
from conftest import eager, head_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import spo_ext

pytestmark = pytest.mark.usefixtures("device")
TARGETS = torch.tensor([3, 0, 6, 2, 2])


def calls():
    """name: (ours, the same in plain PyTorch, where)"""
    weight, labels = torch.randn(7, 4).double(), TARGETS.to(torch.get_default_device())
    ref, rewards = torch.randn(5, 4).double(), -torch.rand(5).double()
    terms = dict(beta=0.5, objective="cross_entropy")
    zero = torch.zeros(5).double()
    return {
        "token_logprobs": (
            lambda x: spo_ext.token_logprobs(x, weight, labels).sum(),
            lambda x: eager.token_logprobs(x, weight, labels)[0].sum(),
        ),
        "logprobs_from_logits": (
            lambda x: spo_ext.logprobs_from_logits(x @ weight.T, labels).sum(),
            lambda x: eager.logprobs_from_logits(x @ weight.T, labels)[0].sum(),
        ),
        "soft_q": (
            lambda x: spo_ext.soft_q(x, ref, 0.5, beta=0.1).square().sum(),
            lambda x: eager.soft_q(x, ref, zero + 0.5, beta=0.1).square().sum(),
        ),
        "loss": (
            lambda x: spo_ext.loss(x, ref, rewards, -0.3, reduction="sum", **terms),
            lambda x: eager.loss(x, ref, rewards, zero - 0.3, **terms).sum(),
        ),
    }


@pytest.mark.parametrize("name", calls())
def test_gradients_by_torch_func(name):
    ours, plain = calls()[name]
    x = torch.randn(5, 4).double()
    leaf = x.clone().requires_grad_()
    want = torch.autograd.grad(plain(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(ours)(x), want)
    value, pull = torch.func.vjp(ours, x)
    torch.testing.assert_close(pull(torch.ones_like(value))[0], want)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.func.grad(lambda y: torch.func.grad(ours)(y).sum())(x)


@pytest.mark.parametrize("name", calls())
def test_forward_mode_derivatives_are_refused(name):
    """PyTorch itself would take them to be zero."""
    ours, _ = calls()[name]
    x, message = torch.randn(5, 4).double(), f"{name}: forward-mode derivatives .* not implemented"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(ours, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        ours(forward_ad.make_dual(x, x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_sample():
    """vmap over grad, sequence by sequence."""
    logprobs, ref, rewards = torch.randn(3, 4), torch.randn(3, 4), -torch.rand(3)

    def one(x, r, reward):
        return spo_ext.loss(x[None], r[None], reward[None], 0.0, beta=0.5)

    got = torch.func.vmap(torch.func.grad(one))(logprobs, ref, rewards)
    whole = torch.func.grad(lambda x: spo_ext.loss(x, ref, rewards, 0.0, beta=0.5, reduction="sum"))
    torch.testing.assert_close(got, whole(logprobs))


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(16, 300)

    def forward(self, x, y):
        return spo_ext.token_logprobs(x, self.lin.weight, y)


class Loss(torch.nn.Module):
    def forward(self, logprobs, ref, rewards, mask):
        return spo_ext.loss(logprobs, ref, rewards, 0.0, beta=0.1, mask=mask)


@pytest.mark.cpu_only("decided on the host")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("most", [5000, 1 << 40])
def test_export_leaves_the_sizes_open(strict, most):
    """Also where the logits of few tokens would fit into the workspace, and those of many not."""
    n = torch.export.Dim("n", min=2, max=most)
    head, arguments = Head(), (torch.randn(7, 16), torch.randint(0, 300, (7,)))
    program = torch.export.export(head, arguments, dynamic_shapes=({0: n}, {0: n}), strict=strict)
    other = torch.randn(501, 16), torch.randint(0, 300, (501,))
    torch.testing.assert_close(program.module()(*other), head(*other))


@pytest.mark.cpu_only("decided on the host")
@pytest.mark.parametrize("strict", [True, False])
def test_export_of_the_loss_leaves_the_sizes_open(strict):
    def case(b, t):
        return -torch.rand(b, t), -torch.rand(b, t), -torch.rand(b), torch.rand(b, t) < 0.7

    b, t = torch.export.Dim("b", min=2), torch.export.Dim("t", min=2)
    table = {0: b, 1: t}
    shapes = (table, table, {0: b}, table)
    program = torch.export.export(Loss(), case(4, 7), dynamic_shapes=shapes, strict=strict)
    other = case(9, 3)
    torch.testing.assert_close(program.module()(*other), Loss()(*other))


def test_what_was_made_in_inference_mode():
    """Constants of the loss are copied for the backward pass; a head is refused by name."""
    with torch.inference_mode():
        ref, rewards, mask = torch.zeros(2, 3), -torch.ones(2), torch.ones(2, 3).bool()
        targets, frozen = torch.zeros(5).long(), torch.randn(7, 4)
    logprobs = torch.full((2, 3), -1.0, requires_grad=True)
    total = spo_ext.loss(logprobs, ref, rewards, 0.0, beta=0.1, objective="squared", mask=mask)
    got = torch.autograd.grad(total, logprobs)[0]
    assert got[0, 0].item() == pytest.approx(2 * 0.1 * (0.1 * -3 + 1) / 2)
    hidden = torch.randn(5, 4, requires_grad=True)
    spo_ext.token_logprobs(hidden, torch.randn(7, 4), targets).sum().backward()
    assert hidden.grad.abs().sum() > 0
    with pytest.raises(
        RuntimeError, match="token_logprobs: weight must not be made in torch.infer"
    ):
        spo_ext.token_logprobs(hidden, frozen, targets)
    with torch.no_grad():
        spo_ext.token_logprobs(hidden, frozen, targets)


@pytest.mark.parametrize("strategy", ["recompute", "stored", "frozen", "sparse"])
def test_results_may_be_changed_in_place(strategy):
    hidden, weight, targets = head_inputs(5, 300, 4, torch.float32)
    weight.requires_grad_(strategy != "frozen")
    options = dict(strategy=strategy, max_dropped_mass=1e-3 if strategy == "sparse" else 0.0)
    entropy = strategy in ("recompute", "stored")

    def grads(change):
        out = spo_ext.token_logprobs(hidden, weight, targets, return_entropy=entropy, **options)
        parts = out if entropy else (out,)
        kept = torch.tensor([True, False, True, True, False])
        parts = [p.masked_fill_(~kept, 0) if change else p.masked_fill(~kept, 0) for p in parts]
        return torch.autograd.grad(sum(p.sum() for p in parts), hidden)[0]

    assert torch.equal(grads(True), grads(False))


def test_results_of_logits_and_losses_may_be_changed_in_place():
    logits = torch.randn(5, 7, requires_grad=True)
    targets = torch.randint(7, (5,))
    for change in (torch.Tensor.mul_, torch.Tensor.mul):
        logprobs, entropy = spo_ext.logprobs_from_logits(logits, targets, return_entropy=True)
        total = (change(logprobs, 2) + change(entropy, 3)).sum()
        grad = torch.autograd.grad(total, logits)[0]
        want = grad if change is torch.Tensor.mul_ else want  # noqa: F821
    assert torch.equal(grad, want)
    lp = torch.randn(2, 3, requires_grad=True)
    groups = torch.zeros(2).int()
    losses, stats = spo_ext.loss(
        lp, torch.zeros(2, 3), torch.rand(2), None, beta=0.1, objective="group", groups=groups,
        reduction="none", return_stats=True,
    )  # fmt: skip
    for value in (losses, stats.q0, stats.residual, stats.terminal_q):
        value.mul_(0.5)
    losses.sum().backward()
    assert lp.grad.isfinite().all()


@pytest.mark.parametrize(
    "strategy, products", [("recompute", 4), ("stored", 3), ("frozen", 2), ("none", 1)]
)
def test_flop_counter(strategy, products):
    hidden, weight, targets = head_inputs(6, 9, 4, torch.float32)
    weight.requires_grad_(strategy != "frozen")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(strategy != "none"):
        options = {} if strategy == "none" else dict(strategy=strategy)
        out = spo_ext.token_logprobs(hidden.view(2, 3, 4), weight, targets.view(2, 3), **options)
        if strategy != "none":
            out.sum().backward()
    assert counter.get_total_flops() == products * 2 * 6 * 9 * 4


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: spo_ext.token_logprobs(t(5, 4), t(9, 3), t(5).long()), "token_logprobs: weight"),
        (
            lambda t: spo_ext.token_logprobs(t(5, 4), t(9, 4), t(4).long()),
            "token_logprobs: targets",
        ),
        (
            lambda t: spo_ext.token_logprobs(t(5, 4), t(9, 4), t(5).long(), bias=t(8)),
            r"token_logprobs: bias must have shape \[9\], got \[8\]",
        ),
        (
            lambda t: spo_ext.logprobs_from_logits(t(5, 4), t(4).long()),
            "logprobs_from_logits: targ",
        ),
        (
            lambda t: spo_ext.soft_q(t(5, 4), t(5, 3), 0.0, beta=1.0),
            "soft_q: ref_logprobs must have",
        ),
        (
            lambda t: spo_ext.loss(t(5, 4), t(5, 4), t(4), 0.0, beta=1.0),
            "loss: rewards must have sha",
        ),
        (lambda t: spo_ext.loss(t(5), t(5), t(4), 0.0, beta=1.0), "loss: logprobs must be padded"),
        (
            lambda t: spo_ext.loss(t(5, 4), t(4), t(5), 0.0, beta=1.0),
            "loss: ref_logprobs must have",
        ),
    ],
)
def test_fake_tensors_are_refused_as_real_ones_are(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.zeros)
    with FakeTensorMode(), pytest.raises((ValueError, TypeError), match=message):
        call(torch.zeros)


NUMBERS = [
    ("token_logprobs", name, wrong)
    for name in ("temperature", "logit_scale", "softcap", "max_dropped_mass")
    for wrong in (torch.tensor(0.5, requires_grad=True), torch.ones(2), "0.5", True)
] + [
    ("token_logprobs", "workspace_mib", 64.5),
    ("token_logprobs", "ignore_index", torch.tensor(1.5)),
    ("logprobs_from_logits", "temperature", torch.tensor(2.0, requires_grad=True)),
    ("logprobs_from_logits", "temperature", None),
    ("logprobs_from_logits", "ignore_index", "-100"),
]


@pytest.mark.parametrize("op, name, wrong", NUMBERS)
def test_numbers_are_checked(op, name, wrong):
    hidden, weight, targets = head_inputs(5, 7, 4, torch.float32)
    tensors = (hidden, weight, targets) if op == "token_logprobs" else (hidden, targets % 4)
    expected = "must (not require grad|be a (whole )?number)"
    with pytest.raises((ValueError, TypeError), match=f"^{op}: {name} {expected}"):
        getattr(spo_ext, op)(*tensors, **{name: wrong})


def test_numbers_of_other_kinds(device):
    hidden, weight, targets = head_inputs(5, 7, 4, torch.float32)
    want = spo_ext.token_logprobs(hidden, weight, targets, temperature=0.5)
    cpu = torch.tensor(0.5, device="cpu")
    for half in (cpu, cpu.numpy()[()], cpu.double().numpy()[()]):
        assert torch.equal(spo_ext.token_logprobs(hidden, weight, targets, temperature=half), want)
    if device == "cuda":
        with pytest.raises(TypeError, match="temperature must be a number, got 'a tensor"):
            spo_ext.token_logprobs(hidden, weight, targets, temperature=cpu.cuda())


@pytest.mark.parametrize(
    "view", [lambda p: p, lambda p: p.view(8, 16), lambda p: p[2:].T, lambda p: p.view(2, 4, 16)[0]]
)
def test_inplace_backward_spares_leaves(view):
    leaf = torch.randn(8, 16, requires_grad=True)
    before, logits = leaf.detach().clone(), view(leaf)
    targets = torch.zeros(logits.shape[:-1]).long()
    with pytest.raises(
        ValueError, match="logits must not be a leaf with inplace_backward=True, .* got"
    ):
        spo_ext.logprobs_from_logits(logits, targets, inplace_backward=True)
    made = view(leaf * 1.0)  # a view of what is no leaf may be overwritten
    spo_ext.logprobs_from_logits(made, targets, inplace_backward=True).sum().backward()
    assert torch.equal(leaf.detach(), before) and leaf.grad.abs().sum() > 0


@pytest.mark.cpu_only("the least that the kernels of the CPU can work in")
@pytest.mark.parametrize("options", [{}, dict(max_dropped_mass=1e-3), dict(strategy="stored")])
def test_a_workspace_too_small_for_the_backward_pass_is_refused_in_the_forward(options):
    hidden = torch.zeros(8, 16384, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(300, 16384, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(8).long()
    with torch.no_grad():
        spo_ext.token_logprobs(hidden, weight, targets, workspace_mib=40)
    with pytest.raises(
        ValueError, match=r"^token_logprobs: workspace_mib must be at least \d+"
    ) as e:
        spo_ext.token_logprobs(hidden, weight, targets, workspace_mib=40, **options)
    least = int(str(e.value).split("at least ")[1].split()[0])
    out = spo_ext.token_logprobs(hidden, weight, targets, workspace_mib=least, **options)
    out.sum().backward()
    assert out[0].item() == pytest.approx(-math.log(300))
