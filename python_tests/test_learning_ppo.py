"""The controls' losses by hand, against loops over single tokens, and against verl's functions.

TRL 1.16 has no PPO. What verl 0.9.1 calls "adapted from TRL's ppo_trainer" is run as it is there,
where verl is installed. In float64, on ragged batches with mixed signs, but for whole updates of
a policy and its value network.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sqlalchemy")

from integration_cases import example
from learning import baselines
from learning.controls import Critic, likelihood_loss, ppo_loss

from spo_ext.trainer.batches import TokenBatch, Tokens, collate
from spo_ext.trainer.model import HeadSettings, answer_logprobs, completion_logprobs

CLIP, KL = 0.2, 0.07
EXACT = {"rtol": 1e-11, "atol": 1e-13}


class Case:
    """16 programs of 1 to 9 tokens; what lies after an end is not zero, so that it would show."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)

        def draw() -> torch.Tensor:
            return torch.randn(16, 9, dtype=torch.float64)

        self.sizes = [1, 9, *torch.randint(1, 10, (14,)).tolist()]
        self.mask = (torch.arange(9) < torch.tensor(self.sizes)[:, None]).double()
        self.rewards = (torch.rand(16, dtype=torch.float64) < 0.4).double() - 1
        self.values, self.returns, self.advantages = draw(), draw(), draw()
        self.new = -2 + draw()
        self.old, self.ref = self.new + 0.3 * draw(), self.new + 0.3 * draw()

    @property
    def tokens(self) -> list[tuple[int, int]]:
        return [(i, t) for i, size in enumerate(self.sizes) for t in range(size)]

    def full(self, values: dict[tuple[int, int], float]) -> torch.Tensor:
        """Of the tokens; zero after the end."""
        found = torch.zeros(16, 9, dtype=torch.float64)
        for place, value in values.items():
            found[place] = value
        return found


@pytest.fixture(params=[0, 1, 2])
def case(request) -> Case:
    return Case(request.param)


def double_sum(case: Case, rewards: torch.Tensor, gae_lambda: float) -> torch.Tensor:
    """sum_{l >= 0} lambda^l delta_{t + l}, from the definition and not from the recursion."""
    found = {}
    for i, t in case.tokens:
        size = case.sizes[i]
        total = 0.0
        for later in range(t, size):
            following = float(case.values[i, later + 1]) if later + 1 < size else 0.0
            delta = float(rewards[i, later]) + following - float(case.values[i, later])
            total += gae_lambda ** (later - t) * delta
        found[i, t] = total
    return case.full(found)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae(case, gae_lambda):
    rewards = baselines.kl_rewards(case.old, case.ref, case.rewards, case.mask, KL)
    advantages, returns = baselines.gae(rewards, case.values, case.mask, gae_lambda)
    expected = double_sum(case, rewards, gae_lambda)
    torch.testing.assert_close(advantages, expected, **EXACT)
    torch.testing.assert_close(returns, (expected + case.values) * case.mask, **EXACT)


def test_kl_rewards(case):
    found = baselines.kl_rewards(case.old, case.ref, case.rewards, case.mask, KL)
    expected = {}
    for i, t in case.tokens:
        expected[i, t] = -KL * float(case.old[i, t] - case.ref[i, t])
        if t == case.sizes[i] - 1:
            expected[i, t] += float(case.rewards[i])
    torch.testing.assert_close(found, case.full(expected), **EXACT)


def test_whitened(case):
    found = baselines.whitened(case.advantages, case.mask)
    kept = [float(case.advantages[place]) for place in case.tokens]
    mean = math.fsum(kept) / len(kept)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in kept) / len(kept))
    expected = {place: (float(case.advantages[place]) - mean) / deviation for place in case.tokens}
    # 1e-6 is added to the deviation, which is near 1.
    torch.testing.assert_close(found, case.full(expected), rtol=2e-6, atol=1e-13)


def test_clipped_loss_and_its_gradient(case):
    new = case.new.clone().requires_grad_()
    loss = baselines.clipped_loss(new, case.old, case.advantages, case.mask, CLIP)
    loss.backward()
    total, slopes, outside = 0.0, {}, 0
    for place in case.tokens:
        ratio = math.exp(float(case.new[place] - case.old[place]))
        advantage = float(case.advantages[place])
        held = ratio > 1 + CLIP if advantage > 0 else ratio < 1 - CLIP
        bound = 1 + CLIP if advantage > 0 else 1 - CLIP
        total -= (bound if held else ratio) * advantage / len(case.tokens)
        slopes[place] = 0.0 if held else -ratio * advantage / len(case.tokens)
        outside += held
    assert 5 < outside < len(case.tokens) - 20
    assert loss.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(new.grad, case.full(slopes), **EXACT)


def test_value_loss_and_its_gradient(case):
    values = case.values.clone().requires_grad_()
    loss = baselines.value_loss(values, case.returns, case.mask)
    loss.backward()
    errors = {place: float(case.values[place] - case.returns[place]) for place in case.tokens}
    count = len(case.tokens)
    expected = math.fsum(error**2 for error in errors.values()) / (2 * count)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    slopes = case.full({place: error / count for place, error in errors.items()})
    torch.testing.assert_close(values.grad, slopes, **EXACT)


@pytest.fixture(scope="module")
def verl():
    """verl's functions and configuration of an actor."""
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    config = pytest.importorskip("verl.workers.config")
    core.actor = config.FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_mini_batch_size=16,
        ppo_micro_batch_size_per_gpu=16,
        clip_ratio=CLIP,
        clip_ratio_low=CLIP,
        clip_ratio_high=CLIP,
        clip_ratio_c=1e9,  # verl's second clip, of large ratios with negative advantages
    )
    return core


def verl_scores(case: Case) -> torch.Tensor:
    """The reward of a program at its last token."""
    return case.full({(i, n - 1): float(case.rewards[i]) for i, n in enumerate(case.sizes)})


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_advantages_and_returns_of_verl(case, verl, gae_lambda):
    rewards = baselines.kl_rewards(case.old, case.ref, case.rewards, case.mask, KL)
    theirs = verl.compute_rewards(verl_scores(case), case.old, case.ref, KL) * case.mask
    torch.testing.assert_close(rewards, theirs, **EXACT)
    advantages, returns = baselines.gae(rewards, case.values, case.mask, gae_lambda)
    want, want_returns = verl.compute_gae_advantage_return(
        rewards, case.values, case.mask, 1.0, gae_lambda
    )
    torch.testing.assert_close(returns, want_returns * case.mask, **EXACT)
    # verl divides by the deviation of n - 1 and adds 1e-8 to the variance.
    count = float(case.mask.sum())
    ours = baselines.whitened(advantages, case.mask) * math.sqrt((count - 1) / count)
    torch.testing.assert_close(ours, want * case.mask, rtol=2e-6, atol=1e-13)


def test_losses_of_verl(case, verl):
    new, values = case.new.clone().requires_grad_(), case.values.clone().requires_grad_()
    loss = baselines.clipped_loss(new, case.old, case.advantages, case.mask, CLIP)
    want, _ = verl.compute_policy_loss_vanilla(
        case.old, new, case.advantages, case.mask, "token-mean", verl.actor
    )
    pairs = [(loss, want, new)]
    far = 1e9  # no clip of the values
    loss = baselines.value_loss(values, case.returns, case.mask)
    want, _ = verl.compute_value_loss(values, case.returns, case.values, case.mask, far)
    pairs.append((loss, want, values))
    for ours, theirs, leaf in pairs:
        torch.testing.assert_close(ours, theirs, **EXACT)
        gradients = [torch.autograd.grad(found, leaf)[0] for found in (ours, theirs)]
        torch.testing.assert_close(*gradients, **EXACT)


def test_group_advantages_and_penalty_of_verl(case, verl):
    numpy = pytest.importorskip("numpy")
    groups = torch.arange(16) % 4
    ours = baselines.group_advantages(case.rewards, groups, torch.ones_like(case.rewards))
    scores = verl_scores(case)
    want, _ = verl.compute_grpo_outcome_advantage(scores, case.mask, numpy.array(groups.tolist()))
    # To a deviation of at least 1/2, 1e-4 is added here and 1e-6 there.
    torch.testing.assert_close(ours[:, None] * case.mask, want, rtol=2.1e-4, atol=1e-13)
    penalty = baselines.kl_estimate(case.new, case.new, case.ref, case.mask)
    per_token = verl.kl_penalty(case.new, case.ref, "low_var_kl")
    want = verl.agg_loss(per_token, case.mask, "token-mean")
    torch.testing.assert_close(penalty, want, **EXACT)


def test_padded_puts_every_program_in_a_row_of_its_own():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    found, mask = baselines.padded(values, torch.tensor([0, 1, 4]))
    assert found.tolist() == [[1, 0, 0], [2, 3, 4]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    (found * torch.tensor([[5.0, 9, 9], [6, 7, 8]], dtype=torch.float64)).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [5, 6, 7, 8]


def test_likelihood_is_a_mean_over_the_tokens_of_successes():
    logprobs = torch.tensor([-1.0, -2.0, -8.0, -9.0, -3.0], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 1.0])
    tokens = TokenBatch({}, torch.arange(5), torch.zeros(5).long(), torch.tensor([0, 2, 4, 5]))
    rows = SimpleNamespace(tokens=tokens, cu_seqlens=tokens.cu_seqlens, rewards=rewards)
    assert likelihood_loss(logprobs, rows, 0.5).item() == pytest.approx((1 + 2 + 3) / 3, rel=1e-15)
    assert likelihood_loss(logprobs, rows, 1.5).item() == 0, "none"


def test_group_advantages_are_normalised_in_the_group_and_leave_rows_out():
    rewards = torch.tensor([0.0, -1.0, -1.0, 0.0, -1.0, -1.0, 0.0], dtype=torch.float64)
    groups = torch.tensor([4, 4, 4, 4, 9, 9, 4])
    keep = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    found = baselines.group_advantages(rewards, groups, keep)
    # Rewards 0, -1, -1, 0: mean -1/2, deviation sqrt(1/3). The last row is not one of them.
    one = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert found.tolist() == pytest.approx([one, -one, -one, one, 0.0, 0.0, 0.0], rel=1e-14)


# What an update hands to its parts: which values, which tokens, which order.

GAE_LAMBDA = 0.9
SIZES = [3, 5, 2, 4, 1, 6]
REWARDS = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]


def policy():
    model = example("tiny").tiny_model()
    answer_logprobs(model, HeadSettings())
    return model


def rows_of(model, online: int):
    """Six rows, the first ones sampled under a behaviour near the model, the others offline."""
    generator = torch.Generator().manual_seed(2)
    pairs = [
        [torch.randint(2, 64, (n,), generator=generator).tolist() for n in (3, size)]
        for size in SIZES
    ]
    tokens = collate([Tokens(*pair) for pair in pairs], "padded")
    logprobs = completion_logprobs(model, tokens)[0].detach()
    near = [logprobs + 0.2 * torch.randn(len(logprobs), generator=generator) for _ in range(2)]
    near[1][sum(SIZES[:online]) :] = torch.nan
    return SimpleNamespace(
        tokens=tokens,
        cu_seqlens=tokens.cu_seqlens,
        ref_logprobs=near[0],
        behaviour_logprobs=near[1],
        rewards=torch.tensor(REWARDS),
        groups=torch.arange(6),
        online=torch.arange(6) < online,
    )


def uneven_critic(model) -> Critic:
    """One whose values are not a constant."""
    critic = Critic(model, 1e-2)
    torch.manual_seed(4)
    torch.nn.init.normal_(critic._head.weight, std=0.3)
    critic._started = True
    return critic


def check_gradients(parameters, loss, before):
    """What an update left behind, against the gradients of a loss of the copies before it."""
    wanted = torch.autograd.grad(loss, before, allow_unused=True)
    largest = max(float(want.abs().max()) for want in wanted if want is not None)
    assert largest > 1e-4
    for parameter, want in zip(parameters, wanted, strict=True):
        want = torch.zeros_like(parameter) if want is None else want
        torch.testing.assert_close(parameter.grad, want, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("online", [6, 4])
def test_an_update_learns_from_sampled_rows_by_the_values_before_it(online):
    model = policy()
    rows, critic = rows_of(model, online), uneven_critic(model)
    body, head = copy.deepcopy(critic._body), copy.deepcopy(critic._head)
    loss, _ = ppo_loss(
        completion_logprobs(model, rows.tokens)[0],
        rows,
        critic,
        clip=CLIP,
        kl=KL,
        gae_lambda=GAE_LAMBDA,
        max_grad_norm=1e9,  # gradients are left as they are
    )
    loss.backward()
    new, old, ref, flat = (
        baselines.padded(part, rows.cu_seqlens)[0][:online]
        for part in (
            completion_logprobs(model, rows.tokens)[0],
            rows.behaviour_logprobs,
            rows.ref_logprobs,
            head(
                body(
                    **rows.tokens.inputs_on(torch.device("cpu")), use_cache=False
                ).last_hidden_state.flatten(0, 1)[rows.tokens.index]
            ).squeeze(-1),
        )
    )
    mask = baselines.padded(rows.ref_logprobs, rows.cu_seqlens)[1][:online]
    rewards = baselines.kl_rewards(old, ref, rows.rewards[:online], mask, KL)
    advantages, returns = baselines.gae(rewards, flat.detach(), mask, GAE_LAMBDA)
    want = baselines.clipped_loss(new, old, baselines.whitened(advantages, mask), mask, CLIP)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4, abs=1e-6)
    check_gradients(model.parameters(), want, list(model.parameters()))
    error = baselines.value_loss(flat, returns, mask)
    check_gradients(critic.parameters, error, [*body.parameters(), *head.parameters()])
    assert not torch.equal(critic._head.weight, head.weight), "and has taken its step"


def test_a_value_is_that_of_the_state_before_its_token():
    """So it may depend on the tokens before, and neither on its own token nor on later ones."""
    critic = uneven_critic(policy())
    found = []
    for last in (7, 8):
        tokens = collate([Tokens([2, 3], [4, 5, last, 6])], "padded")
        found.append(
            critic.values(SimpleNamespace(tokens=tokens, cu_seqlens=tokens.cu_seqlens)).detach()
        )
    torch.testing.assert_close(found[0][:3], found[1][:3], rtol=0, atol=1e-6)
    assert not torch.allclose(found[0][3], found[1][3], atol=1e-4)


def test_the_critic_begins_with_the_mean_reward_of_sampled_rows():
    model = policy()
    values = Critic(model, 1e-2).values(rows_of(model, 4))
    torch.testing.assert_close(values, torch.full_like(values, sum(REWARDS[:4]) / 4))
