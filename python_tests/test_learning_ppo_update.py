"""What an update of the PPO control hands to its parts: which values, which tokens, which order."""

import copy
from dataclasses import replace

import pytest
import torch
from integration_cases import example

pytest.importorskip("transformers")
pytest.importorskip("sqlalchemy")

from learning import baselines
from learning.feed import Rows
from learning.methods import METHODS
from learning.settings import Config
from learning.updates import Updater

from spo_ext.trainer.batches import Tokens, collate
from spo_ext.trainer.model import HeadSettings, answer_logprobs, completion_logprobs

PPO = replace(METHODS["ppo"], gae_lambda=0.9, learning_rate=1e-2, value_learning_rate=1e-2)
MIXED = replace(PPO, offline="near", offline_share=0.5, offline_weight=0.3)
CONFIG = Config(max_grad_norm=1e9, warmup_steps=1)  # gradients are left as they are
SIZES = [3, 5, 2, 4, 1, 6]
OFFLINE_SIZE = 4
REWARDS = [0.0, -1.0, -1.0, 0.0, -1.0, -1.0]


def policy():
    model = example("tiny").tiny_model()
    answer_logprobs(model, HeadSettings())
    return model


def rows_of(model, count: int, offline: int = 0) -> Rows:
    """count sampled rows under a behaviour and a reference near the model, then offline ones."""
    generator = torch.Generator().manual_seed(2)
    sizes = SIZES[:count] + [OFFLINE_SIZE] * offline
    pairs = [
        [torch.randint(2, 64, (n,), generator=generator).tolist() for n in (3, size)]
        for size in sizes
    ]
    tokens = collate([Tokens(*pair) for pair in pairs], "padded")
    logprobs = completion_logprobs(model, tokens)[0].detach()
    near = [logprobs + 0.2 * torch.randn(len(logprobs), generator=generator) for _ in range(2)]
    known = sum(SIZES[:count])
    return Rows(
        tokens=tokens,
        ref_logprobs=near[0],
        behaviour_logprobs=torch.cat(
            [near[1][:known], torch.full((OFFLINE_SIZE * offline,), torch.nan)]
        ),
        rewards=torch.tensor(REWARDS[:count] + [0.0] * offline),
        groups=torch.arange(count + offline),
        online=torch.arange(count + offline) < count,
    )


class Watched(Updater):
    """Keeps the values that the critic gave, and lets it start from other ones than a constant."""

    def __init__(self, method, model):
        super().__init__(method, model, CONFIG, 10, None)
        torch.manual_seed(4)
        torch.nn.init.normal_(self._critic._head.weight, std=0.3)
        torch.nn.init.constant_(self._critic._head.bias, -0.5)
        self._critic._started = True
        self.values = []
        given = self._critic.values
        self._critic.values = lambda rows: self._keep(given(rows))

    def _keep(self, values):
        self.values.append(values.detach().clone())
        return values


def targets(updater, rows):
    """Advantages over sampled tokens, whitened, and returns, [S, T], by the first values given."""
    cut = rows.tokens.cu_seqlens
    values, mask = baselines.padded(updater.values[0], cut)
    old, ref = (
        baselines.padded(part, cut)[0] for part in (rows.behaviour_logprobs, rows.ref_logprobs)
    )
    sampled = rows.online
    kept = mask[sampled]
    rewards = baselines.kl_rewards(old[sampled], ref[sampled], rows.rewards[sampled], kept, PPO.kl)
    advantages, returns = baselines.gae(rewards, values[sampled], kept, PPO.gae_lambda)
    return baselines.whitened(advantages, kept), returns, kept


def expected_loss(logprobs, rows, advantages, kept):
    cut = rows.tokens.cu_seqlens
    new, old = (
        baselines.padded(part, cut)[0][rows.online] for part in (logprobs, rows.behaviour_logprobs)
    )
    return baselines.clipped_loss(new, old, advantages, kept, PPO.clip)


def compare(parameters, loss, before):
    """The gradients that an update left behind, against those of a loss of the copies before it."""
    wanted = torch.autograd.grad(loss, before, allow_unused=True)
    largest = max(float(want.abs().max()) for want in wanted if want is not None)
    assert largest > 1e-4
    for parameter, want in zip(parameters, wanted, strict=True):
        want = torch.zeros_like(parameter) if want is None else want
        torch.testing.assert_close(parameter.grad, want, rtol=0, atol=1e-4 * largest)


def check_update(updater, rows, offline_tokens=0):
    """One update, whose loss and gradients are those of fixed advantages and returns."""
    model, critic = updater._policy, updater._critic
    before, body, head = (copy.deepcopy(part) for part in (model, critic._body, critic._head))
    found = updater.update(rows, 1)
    advantages, returns, mask = targets(updater, rows)
    logprobs = completion_logprobs(before, rows.tokens)[0]
    want = expected_loss(logprobs, rows, advantages, mask)
    if offline_tokens:
        want = want - MIXED.offline_weight * logprobs[-offline_tokens:].mean()
    assert found["loss"] == pytest.approx(want.item(), rel=1e-4, abs=1e-6)
    compare(model.parameters(), want, list(before.parameters()))
    states = body(**rows.tokens.inputs_on(torch.device("cpu")), use_cache=False).last_hidden_state
    flat = head(states.flatten(0, 1)[rows.tokens.index]).squeeze(-1)
    values = baselines.padded(flat, rows.tokens.cu_seqlens)[0][rows.online]
    wanted = baselines.value_loss(values, returns, mask)
    compare(critic.parameters, wanted, [*body.parameters(), *head.parameters()])


def test_epochs_share_the_values_from_before_the_first():
    model = policy()
    rows, updater = rows_of(model, 6), Watched(PPO, model)
    check_update(updater, rows)
    check_update(updater, rows)
    assert len(updater.values) == 2 and not torch.allclose(*updater.values, atol=1e-3)
    updater.values.clear()
    check_update(updater, rows_of(model, 5))


def test_offline_rows_add_their_likelihood_and_nothing_else():
    model = policy()
    rows = rows_of(model, 4, offline=3)
    check_update(Watched(MIXED, model), rows, offline_tokens=3 * OFFLINE_SIZE)


def test_a_value_is_that_of_the_state_before_its_token():
    """So it may depend on the tokens before, and neither on its own token nor on later ones."""
    model = policy()
    updater = Watched(PPO, model)
    found = []
    for last in (7, 8):
        tokens = collate([Tokens([2, 3], [4, 5, last, 6])], "padded")
        blank = torch.zeros(4)
        rows = Rows(tokens, blank, blank, torch.zeros(1), torch.zeros(1), torch.ones(1) > 0)
        found.append(updater._critic.values(rows).detach())
    torch.testing.assert_close(found[0][:3], found[1][:3], rtol=0, atol=1e-6)
    assert not torch.allclose(found[0][3], found[1][3], atol=1e-4)


def test_the_critic_begins_with_the_mean_reward():
    model = policy()
    rows, updater = rows_of(model, 6), Updater(PPO, model, CONFIG, 10, None)
    values = updater._critic.values(rows)
    torch.testing.assert_close(values, torch.full_like(values, sum(REWARDS) / 6))


def test_decoupled_clips_around_the_policy_that_first_saw_the_batch():
    """Stale programs learn as if fresh, each token by its truncated ratio to who wrote it."""
    model = policy()
    rows = rows_of(model, 6)
    rows.behaviour_logprobs[::3] -= 3.0  # ratios of e^3 are cut to 5
    updater = Watched(replace(PPO, decoupled=True), model)
    first = completion_logprobs(model, rows.tokens)[0].detach()
    for _ in range(2):
        before = copy.deepcopy(model)
        found = updater.update(rows, 1)
        advantages, _, mask = targets(updater, rows)
        new = completion_logprobs(before, rows.tokens)[0]
        cut = rows.tokens.cu_seqlens
        ratio = baselines.padded((first - rows.behaviour_logprobs).exp(), cut)[0]
        assert ratio.max() > 5
        weight = ratio.clamp(max=5.0)
        moved = baselines.padded((new - first).exp(), cut)[0]
        kept = torch.where(advantages > 0, moved.clamp(max=1.2), moved.clamp(min=0.8))
        loss = -(weight * advantages * kept * mask).sum() / mask.sum()
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
        compare(model.parameters(), loss, list(before.parameters()))
    assert (moved - 1).abs().max() > 0.2  # the second update is clipped somewhere
