"""The report of a set of runs: Markdown for the terminal, HTML and PNG to keep."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from spo_ext.evaluation import html
from spo_ext.shown import visible

from . import figures
from .over_problems import difference_over_problems
from .references import write_text, write_whole
from .sensitivity import Sensitivity, sensitivities
from .tables import (
    Record,
    Series,
    by_method,
    by_setting,
    columns_of,
    difference,
    evaluation_k,
    last,
    mean,
    pass_at,
    samples_to_reach,
    series_named,
    shown,
)

Table = tuple[list[str], list[list[str]]]  # the header, and the rows
_PAIRED = 3  # columns from the left whose difference to the control is shown


def read_records(files: Iterable[Path]) -> list[Record]:
    """Of finished runs, in the order of the files: one each, or one a line where it ends in .jsonl.

    Raises OSError or ValueError for a file that cannot be read.
    """
    records: list[Record] = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        records += map(json.loads, text.splitlines() if file.suffix == ".jsonl" else [text])
    return records


def save_records(records: Sequence[Record], path: Path) -> None:
    """As .jsonl, for `read_records`."""
    write_text(path, "".join(f"{json.dumps(record)}\n" for record in records))


def write_report(records: Sequence[Record], out: Path, control: str) -> str:
    """report.html and PNG files in `out`. Returns the tables as Markdown.

    control: the method that all others are compared with, its longest runs unless the name says
    "ppo@40"; left out where it was not run. Raises ValueError without records.
    """
    if not records:
        raise ValueError("records must hold at least one run, got none")
    body = ["<h1>Does it learn?</h1>", f'<p class="lead">{html.text(_lead(records))}</p>']
    texts = []
    for title, runs in by_setting(records).items():
        methods = by_method(runs)
        against = series_named(methods, control)
        header, rows = _table(methods, against)
        texts += [f"## {title}", _markdown(header, rows)]
        body += [f"<h2>{html.text(title)}</h2>", html.table(header, rows)]
        if against is not None and len(methods) > 1:
            paired, heading = _paired_table(methods, against), f"Differences to {against.method}"
            texts += [f"{heading}, paired:", _markdown(*paired)]
            body += [f"<h2>{html.text(heading)}, paired</h2>", html.table(*paired)]
        body += _figures(title, methods, evaluation_k(runs), out)
    for found in sensitivities(records):
        k = evaluation_k(records)
        header, rows = _sensitivity_table(found, k)
        texts += [f"## {found.title}", _markdown(header, rows)]
        body += [f"<h2>{html.text(found.title)}</h2>", html.table(header, rows)]
        body.append(_saved(figures.sensitivity(found, k), found.title, out))
    body += [f"<footer>{html.text(_origin(records))}</footer>"]
    write_text(out / "report.html", html.page("Learning", body))
    return "\n\n".join([_lead(records), *texts, _origin(records)])


def _lead(records: Sequence[Record]) -> str:
    pairs = {(record["reference_seed"], record["seed"]) for record in records}
    return (
        f"{len(records)} runs over {len(pairs)} pairs of a reference seed and a seed. A number is "
        "a mean over pairs with its 95% bootstrap interval over them; an interval over fewer than "
        "five pairs is too narrow. What is said to be over problems too takes the problems as a "
        "sample as well: whether the difference would hold on others of the kind."
    )


def _table(methods: Sequence[Series], control: Series | None) -> Table:
    """The reference first, as it was before the first step."""
    k = evaluation_k(methods[0].runs)
    columns = columns_of(k)
    header = ["method", "pairs", *(column.title for column in columns), "samples to control"]
    level = None if control is None else _final(control, k)
    pairs: dict[tuple[int, int], Record] = {}
    for series in methods:
        for (reference_seed, seed, _), run in series.by_pair.items():
            pairs.setdefault((reference_seed, seed), run)
    before = Series("reference", tuple(map(_start, pairs.values())))
    rows = []
    for series in (before, *methods):
        cells = [shown(mean(series, column), column.digits) for column in columns]
        needed = None if level is None else samples_to_reach(series, level, k)
        cells.append("-" if needed is None else f"{needed:.0f}")
        rows.append([series.method, str(len(series.runs)), *cells])
    return header, rows


def _start(run: Record) -> Record:
    return {**run, "curve": run["curve"][:1]}


def _final(series: Series, k: int) -> float:
    """Mean pass@k after the last step."""
    values = [pass_at(last(run), k) for run in series.runs]
    return sum(values) / len(values)


def _paired_table(methods: Sequence[Series], against: Series) -> Table:
    k = evaluation_k(against.runs)
    columns = columns_of(k)[:_PAIRED]
    rows = []
    for series in methods:
        if series is against:
            continue
        shared = len(series.by_pair.keys() & against.by_pair.keys())
        cells = [
            shown(difference(series, against, column), column.digits, signed=True)
            for column in columns
        ]
        cells += [
            shown(difference_over_problems(series, against, n), 3, signed=True) for n in (1, k)
        ]
        rows.append([series.method, str(shared), *cells])
    wider = [f"pass@{n}, over problems too" for n in (1, k)]
    return ["method", "pairs", *(column.title for column in columns), *wider], rows


def _sensitivity_table(found: Sensitivity, k: int) -> Table:
    """Differences are paired, to the same method at the lowest value."""
    columns = columns_of(k)[:_PAIRED]
    titles = [column.title for column in columns]
    rows = []
    for name, curve in found.curves.items():
        lowest = curve[0][1]
        for x, series in curve:
            cells = [shown(mean(series, column), column.digits) for column in columns]
            for column in columns:
                change = difference(series, lowest, column) if series is not lowest else None
                cells.append(shown(change, column.digits, signed=True))
            rows.append([name, f"{x:g}", str(len(series.runs)), *cells])
    return ["method", found.quantity, "pairs", *titles, *(f"{t}, change" for t in titles)], rows


def _figures(title: str, methods: Sequence[Series], k: int, out: Path) -> list[str]:
    """Of methods with at least half as many pairs as any has: one pair draws a line like ten."""
    most = max(len(series.runs) for series in methods)
    methods = [series for series in methods if 2 * len(series.runs) >= most]
    drawn = {
        "learning curves": figures.learning_curves(methods, k),
        "trade-off": figures.trade_off(methods, k),
        "pass curve": figures.pass_curve(methods),
        "cost": figures.cost_of_gain(methods),
        "calibration": figures.calibration(methods),
        "time": figures.time_split(methods),
    }
    parts = []
    for name, png in drawn.items():
        if png is not None:
            parts.append(_saved(png, f"{title}: {name}", out))
    return parts


def _saved(png: bytes, title: str, out: Path) -> str:
    """Also as a file of its own, named after the title."""
    file = re.sub(r"[^a-z0-9]+", "-", title.lower())
    write_whole(out / f"{file}.png", lambda stream: stream.write(png))
    return html.figure(png, title)


def _origin(records: Sequence[Record]) -> str:
    def of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(record[name]) for record in records))

    return (
        f"Commits {of('commit')}; {of('processor')}, one thread a run; torch {of('torch')}, "
        f"transformers {of('transformers')}."
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned table."""
    cells = [
        [visible(cell, line=True).replace("|", "\\|") for cell in row] for row in (header, *rows)
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
