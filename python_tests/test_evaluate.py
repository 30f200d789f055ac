"""Evaluations: counts, estimates and intervals against values worked out here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")

from evaluation_cases import BAD, GOOD, LOST, Scripted, decode, judge  # noqa: E402

from spo_ext.evaluation.evaluate import evaluate  # noqa: E402
from spo_ext.evaluation.records import estimate, pass_estimate  # noqa: E402
from spo_ext.rollout import Generation, Judgement, Sampling  # noqa: E402
from spo_ext.store import Prompt  # noqa: E402

PROMPTS = [Prompt(f"p{i}", [i], split="test") for i in range(7)]


class Written:
    """Returns what a table says."""

    def __init__(self, rows: list[list[Generation]]) -> None:
        self.rows = rows

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        return [self.rows[(prompt.token_ids or ())[0]] for prompt in prompts]


def drawn(*words: tuple[int, ...], finish: Any = "eos") -> list[Generation]:
    return [Generation(ids, finish) for ids in words]


def run(rows: list[list[Generation]], judge: Any = judge, **more: Any) -> Any:
    settings = {"sampling": Sampling(n=4), "ks": (1, 2), "decode": decode, **more}
    return evaluate(PROMPTS[: len(rows)], Written(rows), judge, **settings)


def test_values_are_those_of_the_completions() -> None:
    result = run(
        [
            drawn((GOOD, 5), (GOOD, 5), (GOOD, 6), (BAD, 5, 5)),
            drawn((BAD, 1), (BAD, 1), (BAD, 1), (BAD, 1), finish="truncated"),
        ]
    )
    values = {name: value.mean for name, value in result.values().items()}
    assert result.counts == [(4, 3), (4, 0)]
    assert values == pytest.approx(
        {
            "pass@1": 3 / 8,
            "pass@2": 1 / 2,  # of the pairs of the first prompt none lacks a good one
            "reward": ((3 + 0.25) / 4 + 0.25) / 2,
            "truncated": 0.5,
            "num_tokens": (9 / 4 + 2) / 2,
            "distinct_correct": 2.0,  # over the solved prompt alone
        }
    )
    assert [result.values()[name].prompts for name in ("pass@1", "distinct_correct")] == [2, 1]


def test_what_cannot_be_judged_is_counted_and_left_out() -> None:
    result = run(
        [
            drawn((GOOD, 5), (LOST, 5), (LOST, 6), (BAD, 5)),
            drawn((LOST, 1), (LOST, 1), (LOST, 1), (GOOD, 1)),
            drawn((LOST, 1), (LOST, 1), (LOST, 1), (LOST, 2)),
        ]
    )
    values = result.values()
    assert (result.counts, result.unjudged) == ([(2, 1), (1, 1), (0, 0)], 9)
    assert (values["pass@1"].mean, values["pass@1"].prompts) == (0.75, 2)
    assert (values["pass@2"].mean, values["pass@2"].prompts) == (1.0, 1)
    assert (values["reward"].mean, values["reward"].prompts) == ((0.625 + 1) / 2, 2)
    assert values["num_tokens"].prompts == 3  # lengths need no judge


def test_success_is_a_threshold() -> None:
    rows = [drawn((GOOD, 1), (BAD, 2), (BAD, 2), (BAD, 3))]
    assert run(rows).counts == [(4, 1)]
    assert run(rows, success=0.25).counts == [(4, 4)]
    assert run(rows, success=0.2500001).counts == [(4, 1)]


def test_a_reward_may_be_minus_infinity() -> None:
    def log_optimality(prompts: Any, completions: Any, ids: Any) -> list[Judgement | None]:
        return [Judgement(0.0 if words == "1 1" else -math.inf) for words in completions]

    rows = [drawn((1, 1), (1, 1), (1, 1), (1, 1)), drawn((1, 1), (1, 2), (1, 2), (1, 2))]
    result = run(rows, judge=log_optimality, success=0.0)
    reward = result.values()["reward"]
    assert (reward.mean, reward.low, reward.high) == (-math.inf, -math.inf, 0.0)
    assert result.values()["pass@1"].mean == 0.625


def test_intervals_are_those_of_the_bootstrap() -> None:
    values = [float(i % 4 == 0) for i in range(200)]
    found = estimate(values)
    assert found is not None and found == estimate(values)
    # The mean of 200 coins with p = 1/4: normal enough for its own quantiles.
    half = 1.96 * math.sqrt(0.25 * 0.75 / 200)
    assert found.mean == 0.25
    assert found.low == pytest.approx(0.25 - half, abs=0.01)
    assert found.high == pytest.approx(0.25 + half, abs=0.01)
    assert estimate([]) is None
    alone = estimate([0.5])
    assert alone is not None and (alone.mean, alone.low, alone.high) == (0.5, None, None)
    assert pass_estimate([(1, 1)], 2) is None


def test_a_large_table_is_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [i / 50 for i in range(50)]
    whole = estimate(values)
    monkeypatch.setattr("spo_ext.evaluation.records._CHUNK", 50 * 300)  # 2000 is no multiple
    parts = estimate(values)
    assert whole is not None and parts is not None
    assert parts.low == pytest.approx(whole.low, abs=0.02)
    assert parts.high == pytest.approx(whole.high, abs=0.02)


def test_calls_repeat_and_do_not_depend_on_their_size() -> None:
    def draws(seed: int, size: int) -> Any:
        generator, sampling = Scripted(), Sampling(n=3, seed=seed)
        more: Any = {"sampling": sampling, "ks": [1], "decode": decode, "prompts_per_call": size}
        result = evaluate(PROMPTS, generator, judge, **more)
        sizes = [len(ids) for ids, _ in generator.calls]
        assert sizes == [size] * (7 // size) + [7 % size] * (7 % size > 0)
        assert {asked for _, asked in generator.calls} == {sampling}
        return result

    assert draws(0, 3) == draws(0, 3) == draws(0, 7) == draws(0, 1)
    assert draws(1, 3) != draws(0, 3)


@pytest.mark.parametrize("done", range(8))
def test_the_rest_is_drawn_as_without_the_interruption(done: int) -> None:
    def drawn(finished: Any) -> Any:
        told: list[int] = []
        result = evaluate(
            PROMPTS,
            Scripted(),
            judge,
            sampling=Sampling(n=3),
            ks=[1],
            decode=decode,
            prompts_per_call=3,
            finished=finished,
            on_samples=lambda index, samples: told.append(index),
        )
        return result, told

    whole, told = drawn([])
    assert told == list(range(7))
    assert drawn(whole.samples[:done]) == (whole, told[done:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": [5]}, "ks must be at most sampling.n = 4, got 5"),
        ({"ks": [0]}, "ks must be an integer >= 1, got 0"),
        ({"ks": []}, "ks must be at least one k"),
        ({"success": math.nan}, "success must be a number, got nan"),
        ({"prompts_per_call": 0}, "prompts_per_call must be an integer >= 1, got 0"),
        ({"finished": [[]]}, r"finished\[0\] must be sampling.n = 4 samples, got 0"),
        ({"finished": [[]] * 3}, "finished must be of at most 1 prompts, got 3"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(change: Any, message: str) -> None:
    generator = Scripted()
    settings = {"sampling": Sampling(n=4), "ks": [1], "decode": decode, **change}
    with pytest.raises(ValueError, match=f"evaluate: {message}"):
        evaluate(PROMPTS[:1], generator, judge, **settings)
    assert not generator.calls


def test_prompts_need_token_ids() -> None:
    more: Any = {"sampling": Sampling(), "ks": [1], "decode": decode}
    with pytest.raises(ValueError, match=r"prompts\[1\].token_ids must be given, got None"):
        evaluate([PROMPTS[0], Prompt("text")], Scripted(), judge, **more)
    with pytest.raises(ValueError, match="prompts must be at least one prompt"):
        evaluate([], Scripted(), judge, **more)


def test_broken_protocols_are_named() -> None:
    rows = [drawn((GOOD, 1), (GOOD, 1), (GOOD, 1))]
    with pytest.raises(ValueError, match=r"4 completions for each of 1 prompts, got \[3\]"):
        run(rows)
    full = [drawn(*[(GOOD, 1)] * 4)]
    with pytest.raises(ValueError, match="reward must be one that returns 4 judgements, got 0"):
        run(full, judge=lambda *_: [])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite numbers or -inf"):
            run(full, judge=lambda *_, bad=bad: [Judgement(bad)] * 4)
