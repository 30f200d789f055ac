"""report.html and the table printed at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from spo_ext.evaluation import html

from .chart import draw_learning_curve
from .config import QuickstartConfig
from .runlog import RunLog, Value

_PROBLEMS_SHOWN = 8


def write_report(config: QuickstartConfig, sandbox: str, log: RunLog, out: Path) -> None:
    """Writes learning_curve.png and report.html, which needs no other file, into `out`."""
    png = draw_learning_curve(config, log)
    (out / "learning_curve.png").write_bytes(png)
    before, after = _first_and_last(log)
    body = [
        "<h1>SPO quickstart</h1>",
        '<p class="lead">A small transformer learns to write Python functions that pass hidden '
        "tests, by Soft Policy Optimization from a mediocre supervised reference. "
        f"Seed {config.seed}, {config.steps} steps, {log.seconds:.0f} seconds.</p>",
        _cards(config, before, after),
        html.figure(png, "learning curves"),
        "<h2>Before and after</h2>",
        html.table(("", "reference", "after SPO", "change"), _rows(config, log)),
        f"<h2>Programs for the first {_PROBLEMS_SHOWN} {config.evaluation_title} problems</h2>",
        *_programs(config, log, int(before["step"]), int(after["step"])),
        "<h2>Where the time went</h2>",
        _time_table(log),
        "<h2>Settings</h2>",
        html.settings(asdict(config)),
        f"<footer>Rewards come from programs run in isolation: {html.text(sandbox)} "
        "All numbers are in metrics.jsonl, all sampled programs in samples.jsonl.</footer>",
    ]
    (out / "report.html").write_text(html.page("SPO quickstart", body), encoding="utf-8")


def final_table(config: QuickstartConfig, log: RunLog) -> str:
    """Before and after as aligned text."""
    rows = [("", "reference", "after SPO", "change"), *_rows(config, log)]
    width = max(len(label) for label, *_ in rows)
    lines = [
        label.ljust(width) + "".join(cell.rjust(11) for cell in cells) for label, *cells in rows
    ]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))


def _first_and_last(log: RunLog) -> tuple[dict[str, Value], dict[str, Value]]:
    evaluations = log.of_kind("evaluation")
    return evaluations[0], evaluations[-1]


def _rows(config: QuickstartConfig, log: RunLog) -> list[tuple[str, str, str, str]]:
    before, after = _first_and_last(log)
    names = {
        "pass_at_1": ("pass@1", 3),
        "pass_at_k": (f"pass@{config.evaluation_k}", 3),
        "distinct_correct": ("distinct correct programs per solved problem", 2),
        "kl": ("KL to the reference, nats per program", 2),
        "entropy": ("entropy, nats per program", 2),
        "mean_tokens": ("program length, tokens", 1),
    }
    rows = []
    for key, (label, digits) in names.items():
        old, new = float(before[key]), float(after[key])
        rows.append((label, f"{old:.{digits}f}", f"{new:.{digits}f}", f"{new - old:+.{digits}f}"))
    return rows


def _cards(config: QuickstartConfig, before: dict[str, Value], after: dict[str, Value]) -> str:
    shown = (
        ("pass_at_1", "pass@1"),
        ("pass_at_k", f"pass@{config.evaluation_k}"),
        ("distinct_correct", "distinct correct programs"),
        ("kl", "KL to the reference (nats)"),
    )
    return html.cards(
        html.card(label, f"{float(after[key]):.2f}", f"was {float(before[key]):.2f}")
        for key, label in shown
    )


def _programs(config: QuickstartConfig, log: RunLog, first: int, last: int) -> Iterable[str]:
    """The most frequent program per problem, unselected, before and after."""
    favourites: dict[tuple[Value, Value], dict[str, Value]] = {}
    for sample in log.samples:  # a problem's most frequent program comes first
        favourites.setdefault((sample["prompt"], sample["step"]), sample)
    prompts = list(dict.fromkeys(prompt for prompt, _ in favourites))[:_PROBLEMS_SHOWN]
    for prompt in prompts:
        cells = [
            _program(title, favourites[prompt, step], config.evaluation_samples)
            for title, step in (("reference", first), ("after SPO", last))
        ]
        yield (
            f"<article><code>{html.text(prompt)}</code>"
            f'<div class="pair">{"".join(cells)}</div></article>'
        )


def _program(title: str, sample: dict[str, Value], samples: int) -> str:
    passed, total = sample["passed"], sample["total"]
    verdict = "good" if passed == total else "bad"
    return (
        f'<div><small>{title}: <b class="{verdict}">{passed} of {total} tests</b>, '
        f"drawn {sample['count']} times in {samples}</small>"
        f"<pre>{html.text(sample['program'] or '(no program)')}</pre></div>"
    )


def _time_table(log: RunLog) -> str:
    stages = sorted(log.stage_seconds.items(), key=lambda stage: -stage[1])
    rest = max(0.0, log.seconds - sum(log.stage_seconds.values()))
    stages.append(("everything else", rest))
    longest = max(seconds for _, seconds in stages) or 1.0
    rows = "".join(
        f'<tr><td>{html.text(name)}</td><td class="number">{seconds:.1f} s</td>'
        f'<td style="width:50%"><div class="bar" style="width:{100 * seconds / longest:.1f}%">'
        "</div></td></tr>"
        for name, seconds in stages
    )
    return f'<div class="scroll"><table>{rows}</table></div>'
