"""pass@k against enumeration, and the counting of distinct programs."""

from itertools import combinations

import pytest

from spo_ext.metrics import distinct_correct, mean_pass_at_k, pass_at_k


def enumerate_pass_at_k(samples: int, correct: int, k: int) -> float:
    """Share of all k-subsets of the samples that hold a correct one."""
    outcomes = [True] * correct + [False] * (samples - correct)
    subsets = list(combinations(outcomes, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("samples", [1, 2, 5, 9])
def test_pass_at_k_equals_the_share_of_subsets_with_a_success(samples: int) -> None:
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            expected = enumerate_pass_at_k(samples, correct, k)
            assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_unbiased_where_the_plug_in_estimate_is_not() -> None:
    # Two draws of a program that is right half of the time: counts 0, 1, 2 with these chances.
    chances = {0: 0.25, 1: 0.5, 2: 0.25}
    truth = 1 - 0.5**2
    unbiased = sum(p * pass_at_k(2, c, 2) for c, p in chances.items())
    plug_in = sum(p * (1 - (1 - c / 2) ** 2) for c, p in chances.items())
    assert unbiased == pytest.approx(truth)
    assert plug_in != pytest.approx(truth)


def test_pass_at_k_stays_exact_for_many_samples() -> None:
    # One success in 10,000: exactly k / samples; a product of rounded ratios would drift.
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, rel=1e-13)


def test_mean_pass_at_k_weights_problems_equally() -> None:
    assert mean_pass_at_k(4, [4, 0, 1], 2) == pytest.approx((1 + 0 + 0.5) / 3)


def test_distinct_correct_ignores_copies_and_failures() -> None:
    assert distinct_correct(["a", "b", "a", "c"], [True, True, True, False]) == 2
    assert distinct_correct(["a"], [False]) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(5, 1, 0), r"k must be in \[1, samples = 5\], got 0"),
        (lambda: pass_at_k(5, 1, 6), "k must be in"),
        (lambda: pass_at_k(5, 6, 1), r"correct must be in \[0, samples = 5\], got 6"),
        (lambda: mean_pass_at_k(5, [], 1), "at least one problem"),
        (lambda: distinct_correct(["a"], []), "got 1 and 0"),
    ],
)
def test_wrong_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
