"""Every method for two tiny steps, what it learns from and what it uses up."""

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sqlalchemy")

from learning.clock import Clock
from learning.feed import Feed, Rows
from learning.judging import Grade
from learning.learner import Learner, Task
from learning.method import Method
from learning.methods import METHODS
from learning.objectives import pass_rates, sums
from learning.outcomes import Outcomes
from learning.policy import Samples
from learning.sampling import Sampled
from learning.settings import SETTINGS

from spo_ext.contests.supervised import make_policy
from spo_ext.contests.vocabulary import encode_prompt

TINY = SETTINGS["tiny"]
PROBLEMS = TINY.problems("train", 0)
ROWS = TINY.config.prompts_per_batch * TINY.config.num_generations


class Lottery:
    """Judges by a checksum: an untrained policy passes too, and a test needs no sandbox."""

    def grade(self, problems, programs):
        total = len(PROBLEMS[0].tests)
        return [Grade("", total * (sum(program) % 3 == 0), total) for program in programs]


def reference():
    torch.manual_seed(5)
    return make_policy(TINY.config).requires_grad_(False)


def learn(method: Method, steps: int, seed: int = 0, setting=TINY):
    """A learner after so many steps, its clock and what was logged."""
    clock, logged = Clock(), []
    earlier = [
        Sampled(index, (7, 8, 9, 6 + n), (-1.0,) * 4, -float(n % 2), n)
        for index in range(len(PROBLEMS))
        for n in range(4)
    ]
    start = reference()
    torch.manual_seed(seed)
    task = Task(setting, PROBLEMS, Lottery(), clock, seed, earlier)
    learner = Learner(task, method, start)
    learner.run(steps, lambda step, values: logged.append((step, values)))
    return learner, clock, logged


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:prompt_value")  # which the raw estimate is there to show
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_two_steps_and_learns_something(name):
    # A start of three quarters needs four steps to leave one for the rest.
    steps = 4 if METHODS[name].sft_share else 2
    few = min(METHODS[name].updates, 2)
    learner, clock, logged = learn(replace(METHODS[name], updates=few), steps)
    assert [step for step, _ in logged] == list(range(1, steps + 1))
    assert bool(torch.isfinite(weights(learner.policy)).all())
    assert not torch.equal(weights(learner.policy), weights(reference()))
    assert all(abs(value) < 1e6 for _, values in logged for value in values.values())


@pytest.mark.parametrize(
    ("name", "sampled", "updates"),
    [
        ("group", 3 * ROWS, 3),
        ("replay", 3 * ROWS, 12),
        ("ppo-4", 3 * ROWS, 12),
        ("half-near", 3 * ROWS // 2, 3),
        ("sft", 0, 3),
        ("squared", 3 * ROWS + 12 * TINY.config.reference_samples, 3),
    ],
)
def test_samples_and_updates_are_counted(name, sampled, updates):
    _, clock, _ = learn(METHODS[name], 3)
    assert (clock.sampled, clock.updates) == (sampled, updates)


def test_a_supervised_start_takes_its_share_of_the_steps():
    learner, clock, _ = learn(METHODS["sft-ppo"], 4)
    assert (clock.sampled, clock.updates) == (ROWS, 4)
    assert not torch.equal(weights(learner.reference), weights(reference())), "it is reset"
    kept, _, _ = learn(replace(METHODS["sft-ppo"], reset_reference=False), 4)
    assert torch.equal(weights(kept.reference), weights(reference()))


def test_a_sharpened_policy_is_the_reference_and_its_head_is_divided():
    method = replace(METHODS["sft-ppo"], sharpen=0.5, learning_rate=0.0)
    plain, _, _ = learn(replace(method, sharpen=1.0), 4)
    sharp, _, _ = learn(method, 4)
    for model in (sharp.policy, sharp.reference):
        torch.testing.assert_close(model.lm_head.weight, 2 * plain.policy.lm_head.weight)
        assert torch.equal(weights(model.model), weights(plain.policy.model))
    unstarted, _, _ = learn(replace(METHODS["ppo"], sharpen=0.5, learning_rate=0.0), 1)
    assert torch.equal(unstarted.reference.lm_head.weight, 2 * reference().lm_head.weight)
    assert torch.equal(weights(unstarted.origin), weights(reference()))


def test_behaviour_logprobs_are_those_at_the_temperature(monkeypatch):
    stored, add_online = [], Feed.add_online

    def record(feed, sampled):
        add_online(feed, sampled)
        stored.append({row.temperature for row in feed._store.trajectories()})

    monkeypatch.setattr(Feed, "add_online", record)
    cold = learn(replace(METHODS["group"], temperature=0.5, learning_rate=0.0), 1)[0].sampled
    hot = learn(replace(METHODS["group"], learning_rate=0.0), 1)[0].sampled
    assert [row.program for row in cold] != [row.program for row in hot]
    assert stored == [{0.5}, {1.0}]
    prompt = encode_prompt(PROBLEMS[cold[0].problem])
    ids = torch.tensor([prompt + list(cold[0].program)])
    with torch.no_grad():
        logits = reference()(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    expected = (2 * logits).log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(cold[0].logprobs), expected, atol=1e-4, rtol=0)


def test_rare_syncing_samples_ahead_from_the_policy_as_it_was():
    stale = replace(TINY, sync_every=2)
    learner, clock, _ = learn(METHODS["group"], 3, setting=stale)
    assert clock.sampled == 3 * ROWS, "not more than the steps need"
    versions = sorted({row.version // TINY.config.num_generations for row in learner.sampled})
    assert versions == [0, 1, 2]
    # The second batch of two was sampled before the first update, so by the reference.
    torch.manual_seed(0)
    writer = learner._writer(0)
    order = [row.problem for row in learner.sampled[:: TINY.config.num_generations]]
    per_batch = TINY.config.prompts_per_batch
    for batch, from_reference in enumerate((True, True, False)):
        part = order[batch * per_batch : (batch + 1) * per_batch]
        again = writer.write(learner.reference, part, TINY.config.num_generations, 0, 0)
        expected = learner.sampled[batch * ROWS : (batch + 1) * ROWS]
        same = [row.logprobs for row in again] == [row.logprobs for row in expected]
        assert same == from_reference


@pytest.fixture
def drawn(monkeypatch):
    """Programs of every batch that a feed gave, in order."""
    batches = []
    original = Feed.next

    def record(feed):
        rows = original(feed)
        sizes = rows.tokens.cu_seqlens.diff().tolist()
        parts = torch.split(rows.tokens.targets, sizes)
        batches.append(sorted(tuple(part.tolist()) for part in parts))
        return rows

    monkeypatch.setattr(Feed, "next", record)
    return batches


def test_each_sampled_program_is_learnt_from_once_without_replay(drawn):
    learner, _, _ = learn(METHODS["group"], 3)
    assert sorted(sum(drawn, [])) == sorted(row.program for row in learner.sampled)


def test_spo_draws_again_for_every_update_and_ppo_goes_over_its_batch_again(drawn):
    learn(METHODS["ppo-4"], 3)
    assert len(drawn) == 3
    drawn.clear()
    learn(METHODS["replay"], 3)
    assert len(drawn) == 12 and drawn[-1] != drawn[-2]


def test_recent_batches_only(drawn):
    learner, _, _ = learn(replace(METHODS["replay"], updates=2, max_age=1), 3)
    for batch in range(3):
        fresh = sorted(row.program for row in learner.sampled[batch * ROWS : (batch + 1) * ROWS])
        assert drawn[2 * batch] == drawn[2 * batch + 1] == fresh


def test_equal_programs_of_one_problem_all_count(drawn, monkeypatch):
    always = [3, 4, 1]

    def sample(policy, prompts, per_prompt, max_tokens, temperature):
        count = len(prompts) * per_prompt
        return Samples([always] * count, -torch.ones(count, 3))

    monkeypatch.setattr("learning.sampling.sample", sample)
    learn(METHODS["group"], 2)
    assert drawn == [[tuple(always)] * ROWS] * 2


def test_guided_programs_begin_as_a_solution_does():
    method = replace(METHODS["guided"], guided_share=1.0)
    learner, _, _ = learn(method, 1)
    for row in learner.sampled:
        given = next(n for n, logprob in enumerate(row.logprobs) if logprob != 0)
        assert given >= 1
        starts = {tuple(program[:given]) for program in learner._solutions[row.problem]}
        assert row.program[:given] in starts


def test_pass_rates_count_sampled_rows_of_the_group_only():
    rows = Rows(
        None,
        torch.zeros(0),
        torch.zeros(0),
        rewards=torch.tensor([0.0, -1.0, -1.0, 0.0, -1.0, 0.0]),
        groups=torch.tensor([2, 2, 2, 2, 5, 7]),
        online=torch.tensor([True, True, True, False, True, False]),
    )
    assert pass_rates(rows).tolist() == pytest.approx([1 / 3] * 4 + [0.0, 0.0])


def test_sums_keep_an_unknown_program_apart():
    values, cut = torch.tensor([1.0, 2.0, torch.nan, 4.0, 5.0]), torch.tensor([0, 2, 4, 5])
    assert sums(values, cut).tolist()[::2] == [3.0, 5.0]
    assert sums(values, cut)[1].isnan()
    assert sums(values.nan_to_num(3.0), cut).tolist() == [3.0, 7.0, 5.0]


def test_random_state_of_the_caller_decides():
    first, _, _ = learn(METHODS["half-near"], 2, seed=1)
    again, _, _ = learn(METHODS["half-near"], 2, seed=1)
    other, _, _ = learn(METHODS["half-near"], 2, seed=2)
    assert torch.equal(weights(first.policy), weights(again.policy))
    assert not torch.equal(weights(first.policy), weights(other.policy))
    assert first.sampled == again.sampled != other.sampled


def test_outcomes_of_problems():
    """Problem 1 has both, problem 2 only failures; what another wrote counts for no rate."""
    method = replace(METHODS["replay"], replay="mixed", replay_size=4)
    outcomes = Outcomes(method, 2, random.Random(0))
    for key in range(6):
        outcomes.add(1, key, passed=key == 0, sampled=True)
        outcomes.add(2, 10 + key, passed=False, sampled=True)
    assert sorted(outcomes.draw())[0] == 0 and len(outcomes.draw()) == 4
    assert all(key < 6 for key in outcomes.draw())
    outcomes.add(1, 20, passed=True, sampled=False)
    assert {0, 20} < set(outcomes.draw()), "half of the rows have passed"
    # One of six passed, with one of each added two of eight.
    both = [(1, True), (1, False), (1, True), (1, False), (1, False), (2, False)]
    expected = [0.125, 0.25, 0.125, 0.25, 0.25, 1.0]
    assert outcomes.shares(both).tolist() == pytest.approx(expected)


def test_rarely_solved_problems_are_replayed_first():
    method = replace(METHODS["replay"], replay="mixed", replay_size=2, replay_rare=3.0)
    outcomes = Outcomes(method, 1, random.Random(0))
    for key in range(10):
        outcomes.add(1, key, passed=key > 0, sampled=True)
        outcomes.add(2, 10 + key, passed=key == 0, sampled=True)
    drawn = [min(outcomes.draw()) >= 10 for _ in range(40)]
    assert 32 < sum(drawn), "weights are .1^3 and .9^3"
