"""Intervals over seeds and problems, on made-up runs of the setting tiny."""

import pytest
import torch

pytest.importorskip("transformers")

from learning import over_problems
from learning.over_problems import difference_over_problems
from learning.settings import SETTINGS
from learning.tables import Series

from spo_ext.metrics import mean_pass_at_k

SAMPLES = 20
PAIRS = 8


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """40 problems of 25 specifications, in place of the six of tiny."""
    found = [*range(25), *range(15)]
    monkeypatch.setattr(over_problems, "_groups", lambda setting, split: found)
    return found


def series(counts: torch.Tensor) -> Series:
    """counts: [pairs, problems], of the programs that passed."""

    def point(correct):
        passed = [mean_pass_at_k(SAMPLES, correct, k) for k in range(1, SAMPLES + 1)]
        return {"correct": correct, "pass_at": passed}

    start = point([1] * counts.shape[1])
    return Series("a method", tuple(
        {"setting": "tiny", "split": "test", "reference_seed": 0, "seed": seed,
         "curve": [start, point(correct)]}
        for seed, correct in enumerate(counts.tolist())
    ))  # fmt: skip


def test_the_interval_has_the_spread_of_seeds_and_of_specifications(groups):
    # pass@1 is linear in the counts: an effect of the seed and one of the specification add up.
    of_pair = torch.tensor([0, 1, 1, 2, 2, 3, 3, 4])
    of_group = torch.randint(0, 8, (25,), generator=torch.Generator().manual_seed(1))[groups]
    counts = 2 + of_pair[:, None] + of_group
    nothing = series(torch.full((PAIRS, 40), 2))
    found = difference_over_problems(series(counts), nothing, 1)
    assert found.prompts == 40
    assert found.mean == pytest.approx((counts.double().mean().item() - 2) / SAMPLES)
    # Of a ratio of sums over groups: the groups' deviations from the mean, not the groups' sums.
    deviation = torch.zeros(25).index_add_(
        0, torch.tensor(groups), of_group - of_group.float().mean()
    )
    variance = of_pair.float().var(correction=0) / PAIRS + deviation.square().sum() / 40**2
    expected = 2 * 1.96 * float(variance.sqrt()) / SAMPLES
    assert found.high - found.low == pytest.approx(expected, rel=0.08)


def test_pass_at_k_of_each_problem_is_what_is_compared(groups):
    ours = torch.randint(0, SAMPLES + 1, (PAIRS, 40), generator=torch.Generator().manual_seed(2))
    theirs = torch.randint(0, SAMPLES + 1, (PAIRS, 40), generator=torch.Generator().manual_seed(3))
    for k in (1, 10):
        expected = sum(
            mean_pass_at_k(SAMPLES, mine, k) - mean_pass_at_k(SAMPLES, other, k)
            for mine, other in zip(ours.tolist(), theirs.tolist(), strict=True)
        )
        found = difference_over_problems(series(ours), series(theirs), k)
        assert found.mean == pytest.approx(expected / PAIRS)
        assert found.low < found.mean < found.high
        other_way = difference_over_problems(series(theirs), series(ours), k)
        assert other_way.mean == pytest.approx(-found.mean)


def test_no_interval_where_there_is_none(groups):
    counts = torch.full((PAIRS, 40), 3)
    same = difference_over_problems(series(counts), series(counts - 1), 1)
    assert (same.low, same.high) == pytest.approx((0.05, 0.05)), "no spread at all"
    assert difference_over_problems(series(counts[:1]), series(counts), 1) is None, "one pair"
    assert difference_over_problems(series(counts[:, :9]), series(counts), 1) is None, "others"
    silent = series(counts)
    for run in silent.runs:
        del run["curve"][-1]["correct"]
    assert difference_over_problems(silent, series(counts), 1) is None, "does not say"


def test_problems_with_one_specification_are_one_group():
    specifications = [p.specification for p in SETTINGS["standard"].problems("test", 0)]
    found = over_problems._groups("standard", "test")
    assert len(found) == len(specifications) and len(set(found)) == len(set(specifications)) < 160
    assert [specifications.index(s) for s in specifications] == [found.index(n) for n in found]
