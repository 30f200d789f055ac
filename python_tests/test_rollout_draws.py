"""Drawing tokens by inverse distribution functions."""

from __future__ import annotations

import pytest
import torch

from spo_ext.rollout.generation import Draw, completion_seeds, derived_seed, nucleus, pick


def test_tokens_come_as_often_as_their_weight_says() -> None:
    weights = torch.tensor([0.0, 3.0, 1.0, 0.0, 4.0, 0.0])
    uniforms = (torch.arange(8000) + 0.5) / 8000  # every part of the range alike
    tokens = pick(weights.expand(8000, 6), uniforms)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 3000, 1000, 0, 4000, 0]


def test_the_ends_of_the_range_never_hit_a_token_without_weight() -> None:
    weights = torch.tensor([[0.0, 0.1, 0.7, 0.0]]).expand(2, 4)
    largest = 1.0 - 2.0**-32
    assert pick(weights, torch.tensor([0.0, largest], dtype=torch.float64)).tolist() == [1, 2]


def test_the_tail_of_a_large_vocabulary_is_not_rounded_away() -> None:
    size = 150_000
    weights = torch.full((1, size), 1e-9)
    weights[0, 0] = 1.0
    # The light tokens hold 1.5e-4 together, each far below float32's step at 1.
    mass = 1.0 + (size - 1) * 1e-9
    for token in (70_000, size - 1):
        uniform = torch.tensor([(1.0 + (token - 0.5) * 1e-9) / mass], dtype=torch.float64)
        assert pick(weights, uniform).item() == token


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.1, [1]),
        (0.5, [1]),  # the likeliest has 0.5 itself
        (0.51, [1, 3]),
        (0.8, [1, 3]),
        (0.85, [0, 1, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_nucleus_is_the_fewest_likeliest_with_top_p(top_p: float, kept: list[int]) -> None:
    probabilities = torch.tensor([[0.125, 0.5, 0.0625, 0.3125]])
    found = nucleus(probabilities, top_p)
    assert found.nonzero()[:, 1].tolist() == kept
    assert torch.equal(found[found > 0], probabilities[0, kept])


def test_a_draw_leaves_one_token_and_keeps_its_logprob_before_top_p() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    draw = Draw([1, 2, 3], temperature=0.5, top_p=0.4, length=2)
    expected = (logits / 0.5).log_softmax(-1)
    for step in range(3):  # one more than its length, as on a GPU
        scores = draw(torch.zeros(3, 1), logits.clone())
        assert (scores > -torch.inf).sum(1).tolist() == [1, 1, 1]
        tokens = scores.argmax(1, keepdim=True)
        got = draw.logprobs()[:, step]
        assert torch.allclose(got, expected.gather(1, tokens).squeeze(1), atol=1e-6)


def test_seeds_differ_by_prompt_completion_and_repetition() -> None:
    seeds = completion_seeds(5, [(1, 2), (3,), (1, 2)], 4)
    assert len({seed for row in seeds for seed in row}) == 12
    # The seeds of a prompt do not depend on the others.
    assert completion_seeds(5, [(3,)], 4) == [seeds[1]]
    assert completion_seeds(6, [(3,)], 4) != [seeds[1]]
    # For good: a rollout that goes on after an update draws what it would have drawn.
    assert derived_seed(0, "a", (1, 2)) == derived_seed(0, "a", (1, 2)) < 2**63
