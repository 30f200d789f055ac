"""Metrics of sampled programs."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of the probability that at least one of k programs is correct.

    1 - C(samples - correct, k) / C(samples, k): the share of the k-subsets of the drawn programs
    that hold a correct one. Plugging the success rate into 1 - (1 - rate)^k would be biased.

    Raises ValueError unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be in [1, samples = {samples}], got {k}")
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must be in [0, samples = {samples}], got {correct}")
    # Integers divide with one rounding, so no product of ratios is needed to stay accurate.
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def mean_pass_at_k(samples: int, correct_counts: Sequence[int], k: int) -> float:
    """Mean of pass@k over problems; correct_counts holds one count per problem.

    Raises ValueError for an empty list, and whatever `pass_at_k` refuses.
    """
    if not correct_counts:
        raise ValueError("correct_counts must name at least one problem, got none")
    return sum(pass_at_k(samples, correct, k) for correct in correct_counts) / len(correct_counts)


def distinct_correct(programs: Sequence[str], passed: Sequence[bool]) -> int:
    """Number of different programs among the correct ones.

    Raises ValueError when the two lists differ in length.
    """
    if len(programs) != len(passed):
        raise ValueError(
            f"programs and passed must have one entry each per sample, got {len(programs)}"
            f" and {len(passed)}"
        )
    return len({program for program, ok in zip(programs, passed, strict=True) if ok})
