"""report.html and the table printed at the end of a run."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from .chart import draw_learning_curve
from .config import QuickstartConfig
from .runlog import RunLog, Value

_PROBLEMS_SHOWN = 8
_STYLE = """
:root { --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --good: #047857; --bad: #b91c1c; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: #f8fafc; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p.lead { color: var(--soft); margin: 0 0 1.75rem; max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 1rem; }
.card, figure, .scroll, article { background: #fff; border: 1px solid var(--line);
  border-radius: 12px; }
.card { padding: 1rem 1.2rem; } .card span { color: var(--soft); font-size: .85rem; }
.card strong { display: block; font-size: 1.7rem; font-variant-numeric: tabular-nums; }
.card small { color: var(--soft); }
figure { margin: 1.5rem 0 0; padding: .75rem; } figure img { width: 100%; display: block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .5rem .9rem; border-bottom: 1px solid var(--line);
  vertical-align: top; } tr:last-child td { border-bottom: 0; }
th { font-size: .8rem; color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { background: #2563eb; height: .6rem; border-radius: 4px; min-width: 2px; }
article { padding: 1rem 1.2rem; margin-bottom: 1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; }
pre { background: #0f172a; color: #e2e8f0; padding: .75rem 1rem; border-radius: 8px;
  margin: .4rem 0 0; overflow-x: auto; font-size: .85rem; }
code { font-size: .9rem; } .good { color: var(--good); } .bad { color: var(--bad); }
.columns { columns: 3 260px; } .columns div { display: flex; justify-content: space-between;
  border-bottom: 1px solid var(--line); padding: .2rem 0; break-inside: avoid; }
footer { color: var(--soft); margin-top: 2.5rem; font-size: .9rem; }
"""


def write_report(config: QuickstartConfig, sandbox: str, log: RunLog, out: Path) -> None:
    """Writes learning_curve.png and report.html, which needs no other file, into `out`."""
    png = draw_learning_curve(config, log)
    (out / "learning_curve.png").write_bytes(png)
    image = base64.b64encode(png).decode("ascii")
    before, after = _first_and_last(log)
    body = [
        "<h1>SPO quickstart</h1>",
        '<p class="lead">A small transformer learns to write Python functions that pass hidden '
        "tests, by Soft Policy Optimization from a mediocre supervised reference. "
        f"Seed {config.seed}, {config.steps} steps, {log.seconds:.0f} seconds.</p>",
        _cards(config, before, after),
        f'<figure><img alt="learning curves" src="data:image/png;base64,{image}"></figure>',
        "<h2>Before and after</h2>",
        _table(("", "reference", "after SPO", "change"), _rows(config, log)),
        f"<h2>Programs for the first {_PROBLEMS_SHOWN} {config.evaluation_title} problems</h2>",
        *_programs(config, log, int(before["step"]), int(after["step"])),
        "<h2>Where the time went</h2>",
        _time_table(log),
        "<h2>Settings</h2>",
        _settings(config),
        f"<footer>Rewards come from programs run in isolation: {escape(sandbox)} "
        "All numbers are in metrics.jsonl, all sampled programs in samples.jsonl.</footer>",
    ]
    (out / "report.html").write_text(_page("\n".join(body)), encoding="utf-8")


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
    cards = []
    for key, label, digits in (
        ("pass_at_1", "pass@1", 2),
        ("pass_at_k", f"pass@{config.evaluation_k}", 2),
        ("distinct_correct", "distinct correct programs", 2),
        ("kl", "KL to the reference (nats)", 2),
    ):
        cards.append(
            f'<div class="card"><span>{label}</span><strong>{float(after[key]):.{digits}f}</strong>'
            f"<small>was {float(before[key]):.{digits}f}</small></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


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
            f"<article><code>{escape(str(prompt))}</code>"
            f'<div class="pair">{"".join(cells)}</div></article>'
        )


def _program(title: str, sample: dict[str, Value], samples: int) -> str:
    passed, total = sample["passed"], sample["total"]
    verdict = "good" if passed == total else "bad"
    return (
        f'<div><small>{title}: <b class="{verdict}">{passed} of {total} tests</b>, '
        f"drawn {sample['count']} times in {samples}</small>"
        f"<pre>{escape(str(sample['program']) or '(no program)')}</pre></div>"
    )


def _time_table(log: RunLog) -> str:
    stages = sorted(log.stage_seconds.items(), key=lambda stage: -stage[1])
    rest = max(0.0, log.seconds - sum(log.stage_seconds.values()))
    stages.append(("everything else", rest))
    longest = max(seconds for _, seconds in stages) or 1.0
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{seconds:.1f} s</td>'
        f'<td style="width:50%"><div class="bar" style="width:{100 * seconds / longest:.1f}%">'
        "</div></td></tr>"
        for name, seconds in stages
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def _settings(config: QuickstartConfig) -> str:
    items = "".join(
        f"<div><span>{name}</span><code>{escape(str(value))}</code></div>"
        for name, value in asdict(config).items()
    )
    return f'<div class="card columns">{items}</div>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        first, *others = (escape(cell) for cell in cells)
        numbers = "".join(f'<{tag} class="number">{cell}</{tag}>' for cell in others)
        return f"<tr><{tag}>{first}</{tag}>{numbers}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line(header, "th")}{body}</table></div>'


def _page(body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>SPO quickstart</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )
