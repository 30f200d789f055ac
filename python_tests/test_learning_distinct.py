"""Programs drawn without replacement: different, scored rightly, and as likely as they should."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sqlalchemy")

from learning.distinct import perturb, sample_distinct
from learning.methods import METHODS
from learning.policy import (
    sample,
    score,
)
from learning.settings import SETTINGS
from test_learning_methods import ROWS, learn

from spo_ext.contests.supervised import make_policy
from spo_ext.contests.vocabulary import EOS, encode_prompt

TINY = SETTINGS["tiny"]
PROMPTS = [encode_prompt(problem) for problem in TINY.problems("train", 0)[:5]]


@pytest.fixture(scope="module")
def policy():
    """Sure enough of itself to repeat a short program, and to end some sooner than others."""
    torch.manual_seed(3)
    made = make_policy(TINY.config).requires_grad_(False)
    made.lm_head.weight.mul_(80)
    made.lm_head.weight[EOS] = made.lm_head.weight[135]  # a word that it likes
    return made


def of_prompts(programs, per_prompt):
    return [programs[at : at + per_prompt] for at in range(0, len(programs), per_prompt)]


def test_no_program_of_a_prompt_comes_twice(policy):
    torch.manual_seed(0)
    drawn = sample_distinct(policy, PROMPTS, 12, max_tokens=3)
    plain = sample(policy, PROMPTS, 12, max_tokens=3)
    for mine, other in zip(
        of_prompts(drawn.programs, 12), of_prompts(plain.programs, 12), strict=True
    ):
        assert len({tuple(program) for program in mine}) == 12
        assert len({tuple(program) for program in other}) < 12, "else this says nothing"
        assert all(len(p) <= 3 and EOS not in p[:-1] for p in mine)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probabilities_are_those_of_the_policy(policy, temperature):
    torch.manual_seed(1)
    drawn = sample_distinct(policy, PROMPTS, 6, max_tokens=8, temperature=temperature)
    assert len(set(map(len, drawn.programs))) > 1, "some have to end before others"
    for row, (program, logprobs) in enumerate(zip(drawn.programs, drawn.logprobs, strict=True)):
        prompt = PROMPTS[row // 6]
        logits = policy(input_ids=torch.tensor([prompt + program])).logits[0]
        ids = torch.tensor(program)[:, None]
        places = slice(len(prompt) - 1, len(prompt) - 1 + len(program))
        expected = (logits / temperature).log_softmax(-1)[places].gather(1, ids)[:, 0]
        torch.testing.assert_close(logprobs[: len(program)], expected, atol=1e-3, rtol=0)
        assert not logprobs[len(program) :].any()


def test_all_of_a_short_list_is_found_and_the_first_follows_the_policy(policy):
    """With one token there are 296 programs: without replacement each comes once."""
    torch.manual_seed(2)
    prompt = PROMPTS[0]
    everything = sample_distinct(policy, [prompt], 296, max_tokens=1).programs
    assert sorted(program[0] for program in everything) == list(range(296))
    logprobs = policy(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    draws = 3000
    pairs = of_prompts(sample_distinct(policy, [prompt] * draws, 2, max_tokens=1).programs, 2)
    first = torch.bincount(torch.tensor([pair[0][0] for pair in pairs]), minlength=296)
    both = torch.bincount(torch.tensor([token for pair in pairs for (token,) in pair]))
    expected = logprobs.double().exp()
    # Of two without replacement: first, or second after any other that came first.
    odds = expected / (1 - expected)
    inclusion = expected + expected * (odds.sum() - odds)
    for counts, wanted in ((first, expected), (both, inclusion)):
        deviation = (draws * wanted * (1 - wanted)).sqrt().clamp_min(1)
        gap = (torch.nn.functional.pad(counts, (0, 296 - len(counts))) - draws * wanted).abs()
        assert float((gap / deviation).max()) < 6
    assert float(expected.max()) > 0.05, "or both are the same"


def test_the_first_program_of_several_tokens_follows_the_policy(policy):
    torch.manual_seed(4)
    draws, prompt = 2000, PROMPTS[1]
    drawn = of_prompts(sample_distinct(policy, [prompt] * draws, 3, max_tokens=2).programs, 3)
    firsts = [tuple(group[0]) for group in drawn]
    common = max(set(firsts), key=firsts.count)
    probability = float(score(policy, [prompt], [list(common)])[0].double().exp())
    deviation = (draws * probability * (1 - probability)) ** 0.5
    assert abs(firsts.count(common) - draws * probability) < 6 * deviation


def test_noise_under_a_maximum_has_it():
    torch.manual_seed(5)
    logprobs = torch.randn(400, 50).log_softmax(-1) + torch.linspace(-300, 0, 400)[:, None]
    most = logprobs.logsumexp(1) + torch.randn(400)
    found = perturb(logprobs, most)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.amax(1), most)
    # The word that has it is drawn by its probability.
    row = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
    winners = perturb(row, torch.full((20_000,), -1.5)).argmax(1)
    shares = torch.bincount(winners, minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.02, rtol=0)


def test_scores_fall_from_one_program_to_the_next(policy, monkeypatch):
    """What makes n programs a sample without replacement of any size up to n."""
    from learning import distinct

    seen = []
    extend = distinct._extend

    def spy(beams, *args):
        answer = extend(beams, *args)
        seen.append(beams.scores.view(-1, 4).clone())
        return answer

    monkeypatch.setattr(distinct, "_extend", spy)
    sample_distinct(policy, PROMPTS, 4, max_tokens=6)
    assert len(seen) > 2
    assert all(bool((scores.diff(dim=1) <= 0).all()) for scores in seen)
    for before, after in pairwise(seen):
        torch.testing.assert_close(after[:, 0], before[:, 0])  # the best stays the best


def test_a_method_samples_so_where_it_says_so():
    plain, _, _ = learn(METHODS["group"], 2)
    learner, clock, _ = learn(replace(METHODS["group"], distinct=True), 2)
    assert clock.sampled == 2 * ROWS == len(learner.sampled)
    groups = {}
    for row in learner.sampled:
        groups.setdefault((row.problem, row.version // 4), []).append(row.program)
    assert all(len(set(programs)) == len(programs) for programs in groups.values())
    assert [row.program for row in learner.sampled] != [row.program for row in plain.sampled]
