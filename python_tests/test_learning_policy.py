"""How the harness samples, against the policy's own logits."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


from learning.policy import IGNORED, make_batch, sample, score

from spo_ext.contests.recipe import Contest
from spo_ext.contests.supervised import make_policy
from spo_ext.contests.vocabulary import EOS, PAD, encode_prompt


def problems_of(split: str, count: int) -> list:
    return Contest().draw(split, count)


@pytest.fixture(scope="module")
def policy():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_policy(Contest(hidden_size=32, intermediate_size=48, layers=2, heads=2))


def test_program_rows_hold_only_program_targets() -> None:
    batch = make_batch([[5, 6, 2], [7, 2]], [[8, 9, EOS], [8, EOS]])
    assert batch.input_ids.tolist() == [[5, 6, 2, 8, 9], [7, 2, 8, EOS, PAD]]
    assert batch.targets.tolist() == [
        [IGNORED, IGNORED, 8, 9, EOS],
        [IGNORED, 8, EOS, IGNORED, IGNORED],
    ]


def test_padding_does_not_change_logprobs(policy) -> None:
    """A program scores the same alone, in a padded batch, and while it is sampled."""
    problems = problems_of("train", 8)
    prompts = [encode_prompt(problem) for problem in problems]
    assert len(set(map(len, prompts))) > 1  # else nothing is padded
    torch.manual_seed(0)
    drawn = sample(policy, prompts, per_prompt=3)
    repeated = [prompt for prompt in prompts for _ in range(3)]
    batched = score(policy, repeated, drawn.programs)
    alone = [
        score(policy, [prompt], [program])
        for prompt, program in zip(repeated, drawn.programs, strict=True)
    ]
    torch.testing.assert_close(batched, torch.cat(alone), atol=1e-4, rtol=0)
    torch.testing.assert_close(batched, drawn.logprob_sums, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_say_the_log_probability_of_every_token(temperature: float, policy) -> None:
    prompts = [encode_prompt(problem) for problem in problems_of("train", 3)]
    torch.manual_seed(1)
    drawn = sample(policy, prompts, per_prompt=2, max_tokens=9, temperature=temperature)
    assert (
        drawn.logprobs.shape == (6, max(map(len, drawn.programs))) and drawn.logprobs.shape[1] < 10
    )
    for row, (program, logprobs) in enumerate(zip(drawn.programs, drawn.logprobs, strict=True)):
        prompt = prompts[row // 2]
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([prompt + program])).logits[0]
        ids = torch.tensor(program)[:, None]
        places = slice(len(prompt) - 1, len(prompt) - 1 + len(program))
        expected = (logits / temperature).log_softmax(-1)[places].gather(1, ids)[:, 0]
        torch.testing.assert_close(logprobs[: len(program)], expected, atol=1e-4, rtol=0)
        assert not logprobs[len(program) :].any()
