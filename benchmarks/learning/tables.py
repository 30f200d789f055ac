"""Records of runs as numbers to compare: means, intervals and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from spo_ext.evaluation.records import Estimate, estimate

Record = dict[str, Any]
# Reference seed, seed, and what the reference passed in the evaluation before the first step: one
# that was trained on another kind of processor is not quite the same for the same seed.
Pair = tuple[int, int, tuple[float, ...]]


@dataclass(frozen=True)
class Column:
    """A number of a finished run; digits after the point."""

    title: str
    digits: int
    read: Callable[[Record], float | None]


@dataclass(frozen=True)
class Series:
    """All runs of one method and one length in one setting. method: its name in tables."""

    method: str
    runs: tuple[Record, ...]

    @property
    def by_pair(self) -> dict[Pair, Record]:
        return {
            (run["reference_seed"], run["seed"], tuple(run["curve"][0]["pass_at"])): run
            for run in self.runs
        }


def columns_of(k: int) -> list[Column]:
    """What the tables show; k is that of pass@k."""
    return [
        Column("pass@1", 3, lambda run: pass_at(last(run), 1)),
        Column(f"pass@{k}", 3, lambda run: pass_at(last(run), k)),
        Column("distinct correct", 2, lambda run: float(last(run)["distinct_correct"])),
        Column("KL", 2, lambda run: float(last(run)["kl"])),
        Column("entropy", 2, lambda run: float(last(run)["entropy"])),
        Column("tokens", 1, lambda run: float(last(run)["mean_tokens"])),
        Column("Q_T ranked", 3, lambda run: _calibration(run, "ranked")),
        Column("Q_T residual", 3, lambda run: _calibration(run, "residual_rms")),
        Column("sampled", 0, lambda run: float(last(run)["sampled"])),
        Column("updates", 0, lambda run: float(last(run)["updates"])),
        Column("training s", 0, lambda run: float(last(run)["training_seconds"])),
    ]


def last(run: Record) -> dict[str, Any]:
    """The evaluation at the end of a run."""
    point: dict[str, Any] = run["curve"][-1]
    return point


def pass_at(point: dict[str, Any], k: int) -> float:
    """Of one evaluation; k counts from 1."""
    return float(point["pass_at"][k - 1])


def evaluation_k(runs: Sequence[Record]) -> int:
    """The k that the settings of the runs report."""
    return int(runs[0]["setting_settings"]["config"]["evaluation_k"])


def by_method(records: Sequence[Record]) -> list[Series]:
    """Records of one setting, in the order in which methods first appear.

    Where runs differ in length, a method's name says how many batches it had: "ppo@120".
    """
    found: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        found.setdefault((record["method"], record["steps"]), []).append(record)
    one_length = len({steps for _, steps in found}) == 1
    return [
        Series(method if one_length else f"{method}@{steps}", tuple(runs))
        for (method, steps), runs in found.items()
    ]


def series_named(methods: Sequence[Series], name: str) -> Series | None:
    """By its name in tables, or the longest runs of the method; None if there are none."""
    found = [series for series in methods if name in (series.method, series.runs[0]["method"])]
    return max(found, key=lambda one: (one.method == name, one.runs[0]["steps"]), default=None)


def by_setting(records: Sequence[Record]) -> dict[str, list[Record]]:
    """In order of appearance. Runs on different problems are different settings."""
    found: dict[str, list[Record]] = {}
    for record in records:
        title = f"{record['setting']}, {record['split']} problems"
        found.setdefault(title, []).append(record)
    return found


def mean(series: Series, column: Column) -> Estimate | None:
    """Over the runs, with a 95% bootstrap interval over pairs of seeds; None if one has none."""
    values = [column.read(run) for run in series.runs]
    known = [value for value in values if value is not None]
    return estimate(known) if len(known) == len(values) else None


def difference(series: Series, control: Series, column: Column) -> Estimate | None:
    """Mean of series - control over the pairs that both have, with its interval; None if none."""
    ours, theirs = series.by_pair, control.by_pair
    values = []
    for pair in sorted(ours.keys() & theirs.keys()):
        mine, other = column.read(ours[pair]), column.read(theirs[pair])
        if mine is None or other is None:
            return None
        values.append(mine - other)
    return estimate(values)


def samples_to_reach(series: Series, level: float, k: int) -> float | None:
    """Sampled programs until the mean curve of pass@k is at the level; None if it never is.

    Between two evaluations the curve is taken as straight.
    """
    curve = mean_curve(series, "sampled", lambda point: pass_at(point, k))
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if y1 >= level:
            share = 0.0 if y0 >= level else (level - y0) / (y1 - y0)
            return x0 + share * (x1 - x0)
    return None


def mean_curve(
    series: Series, against: str, read: Callable[[dict[str, Any]], float]
) -> list[tuple[float, float]]:
    """Mean over the runs of (what was used, what was read) at every step that all evaluated."""
    curves = [{point["step"]: point for point in run["curve"]} for run in series.runs]
    points = []
    for step in sorted(set.intersection(*map(set, curves))):
        column = [curve[step] for curve in curves]
        used = sum(point[against] for point in column) / len(column)
        points.append((used, sum(map(read, column)) / len(column)))
    return points


def shown(value: Estimate | None, digits: int, signed: bool = False) -> str:
    """The mean and its interval as text."""
    if value is None:
        return "-"
    sign = "+" if signed else ""

    def text(number: float) -> str:
        return f"{round(number, digits) + 0.0:{sign}.{digits}f}"  # never "-0.00"

    if value.low is None or value.high is None or value.low == value.high:
        return text(value.mean)
    return f"{text(value.mean)} [{text(value.low)}, {text(value.high)}]"


def _calibration(run: Record, name: str) -> float | None:
    found = last(run)["calibration"]
    return None if found is None or found[name] is None else float(found[name])
