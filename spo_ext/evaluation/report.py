"""A run as one HTML file, and its curves as PNG files beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_ext.durable import read_json_lines
from spo_ext.evaluation import html
from spo_ext.evaluation.panels import PANELS, SMOOTHING, draw_panel, draw_pass_curves, unplaced
from spo_ext.evaluation.runs import Run, Saved, Series
from spo_ext.shown import hide_passwords

if TYPE_CHECKING:
    from spo_ext.store import StoredTrajectory, TrajectoryStore


# Of the last training step, for the top of the page.
_HEADLINES = {
    "reward": "reward",
    "eval_pass@1": "held-out pass@1",
    "loss": "loss",
    "kl": "KL to the reference, nats",
    "entropy": "entropy, nats",
}
_TAIL = 20  # the last values that a headline averages, and the first ones
_CARDS = 4


def write_report(run: Run, out: Path, stored: Sequence[str] = ()) -> list[Path]:
    """Writes the page to `out` and the curves into the folder OUT_curves; returns their paths.

    Args:
        stored: articles of `stored_samples`, shown below those of the evaluations.
    """
    folder = out.with_name(f"{out.stem}_curves")
    folder.mkdir(parents=True, exist_ok=True)
    images = _images(run)
    paths = []
    for name, (_, png) in images.items():
        paths.append(folder / f"{name}.png")
        paths[-1].write_bytes(png)
    page = html.page(f"SPO run {run.name}", _body(run, images, stored))
    out.write_text(page, encoding="utf-8", errors="backslashreplace")
    return paths


def newest_trajectories(
    where: str, run: str, decode: Callable[[Sequence[int]], str] | None
) -> list[str]:
    """Articles of the newest trajectories of the run in a store."""
    from spo_ext.store import TrajectoryStore

    with TrajectoryStore(where) as store:
        return stored_samples(store, run, decode)


def _images(run: Run) -> dict[str, tuple[str, bytes]]:
    """Title and PNG by name; first the pass curves."""
    found = {"pass_at_k": ("pass@k", draw_pass_curves(run.evaluations))}
    found |= {panel.name: (panel.title, draw_panel(panel, run.series)) for panel in PANELS}
    return {name: (title, png) for name, (title, png) in found.items() if png is not None}


def _body(run: Run, images: dict[str, tuple[str, bytes]], stored: Sequence[str]) -> Iterable[str]:
    figures = {name: html.figure(png, title) for name, (title, png) in images.items()}
    curve = figures.pop("pass_at_k", "")
    yield f"<h1>SPO run {html.text(run.name)}</h1>"
    yield f'<p class="lead">{html.text(_lead(run))}</p>'
    yield _cards(run)
    if run.evaluations:
        yield "<h2>Evaluations</h2>"
        yield _comparison(run.evaluations)
        yield f'<div class="figures alone">{curve}</div>'
    if figures:
        yield "<h2>Training</h2>"
        yield f'<p class="lead">{SMOOTHING}</p>'
        yield f'<div class="figures">{"".join(figures.values())}</div>'
        yield from _dropped(run.series)
    for title, articles in (
        ("Completions in the evaluations", evaluation_samples(run.evaluations)),
        ("Newest trajectories", stored),
    ):
        if articles:
            yield f"<h2>{title}</h2>"
            yield from articles
    rest = unplaced(run.series)
    if rest:
        yield "<h2>Other metrics</h2>"
        header = ("metric", "first", "last", "lowest", "highest", "values")
        yield html.table(header, (_row(name, run.series[name]) for name in sorted(rest)))
    yield from _settings(run)


def _lead(run: Run) -> str:
    parts = []
    if run.series:
        parts.append(f"Logged up to optimiser step {run.step}.")
    if run.checkpoint is not None:
        parts.append(f"The last checkpoint is {run.checkpoint.name}.")
    count = len(run.evaluations)
    if count:
        parts.append("One evaluation." if count == 1 else f"{count} evaluations.")
    return " ".join(parts)


def _cards(run: Run) -> str:
    """The newest evaluation, then how the training began and where it is."""
    found = []
    if run.evaluations:
        last = run.evaluations[-1]
        for name, value in last.result.get("values", {}).items():
            if name.startswith("pass@"):
                found.append(html.card(name, f"{value['mean']:.3f}", _interval(value) or last.name))
    for name, label in _HEADLINES.items():
        values = run.series[name].values if name in run.series else []
        if values:
            width = max(1, min(_TAIL, len(values) // 4))
            begin, end = (sum(part) / width for part in (values[:width], values[-width:]))
            found.append(html.card(label, _short(end), f"was {_short(begin)}"))
    return html.cards(found[:_CARDS])


def _comparison(evaluations: Sequence[Saved]) -> str:
    """A row per evaluation, a column per value that any of them has."""
    names = list(dict.fromkeys(name for e in evaluations for name in e.result.get("values", {})))
    rows = []
    for saved in evaluations:
        values = saved.result.get("values", {})
        cells = [_cell(values[name]) if name in values else "" for name in names]
        unjudged = str(saved.result.get("unjudged", 0))
        rows.append((saved.name, str(len(saved.counts)), *cells, unjudged))
    titles = [name.replace("_", " ") for name in names]
    return html.table(("", "prompts", *titles, "not judged"), rows)


def _cell(value: dict[str, Any]) -> str:
    return " ".join(part for part in (_short(value["mean"]), _interval(value)) if part)


def _interval(value: dict[str, Any]) -> str:
    if value.get("low") is None or value.get("high") is None:
        return ""
    return f"[{_short(value['low'])},\u00a0{_short(value['high'])}]"  # no line ends in it


def _dropped(series: dict[str, Series]) -> Iterable[str]:
    lost = {name: found.dropped for name, found in series.items() if found.dropped}
    if lost:
        words = ", ".join(f"{name} ({count})" for name, count in sorted(lost.items()))
        yield f"<p>Values that were not finite, and are not in the curves: {html.text(words)}.</p>"


def _row(name: str, series: Series) -> tuple[str, ...]:
    values = series.values
    shown = (values[0], values[-1], min(values), max(values))
    return (name, *map(_short, shown), str(len(values)))


def _settings(run: Run) -> Iterable[str]:
    for title, values in [
        ("Settings", run.settings),
        *((f"Settings of {e.name}", e.result.get("settings", {})) for e in run.evaluations),
    ]:
        if values:
            yield f"<h2>{html.text(title)}</h2>"
            yield html.settings({key: hide_passwords(str(v)) for key, v in values.items()})


def _short(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


_PROMPTS = 8
_COMPARED = 3  # the last evaluations, side by side
_LONGEST = 2000  # characters of a text


def evaluation_samples(evaluations: Sequence[Saved]) -> list[str]:
    """An article per prompt, with its first completion in each of the last evaluations."""
    shown: dict[str, list[str]] = {}
    for saved in evaluations[-_COMPARED:]:
        for index, row in enumerate(_first_samples(saved)):
            judged, passed = saved.counts[index] if index < len(saved.counts) else (0, 0)
            title = f"{saved.name}, {passed} of {judged} passed; the first"
            success = float(saved.result.get("success", 1.0))
            cell = _completion(title, row["completion"], row["reward"], row["reason"], success)
            shown.setdefault(content_text(row["prompt"]), []).append(cell)
    return [_article(prompt, cells) for prompt, cells in islice(shown.items(), _PROMPTS)]


def stored_samples(
    store: TrajectoryStore, run: str, decode: Callable[[Sequence[int]], str] | None
) -> list[str]:
    """An article for each of the newest trajectories of the run, from the newest on.

    Without `decode` the completions are token ids.
    """
    rows = store.newest(run, _PROMPTS)
    prompts = store.get_prompts([row.prompt_id for row in rows])
    articles = []
    for row, prompt in zip(rows, prompts, strict=True):
        version = row.origin.policy_version
        title = f"trajectory {row.id}" + ("" if version is None else f", policy version {version}")
        cell = _completion(title, _turns(row, decode), row.reward, row.reason, None)
        articles.append(_article(content_text(prompt.content), [cell]))
    return articles


def _turns(row: StoredTrajectory, decode: Callable[[Sequence[int]], str] | None) -> str:
    """What was written; of several turns with who wrote it, what was read anew, and the rewards."""

    def words(ids: Sequence[int]) -> str:
        return decode(ids) if decode else " ".join(map(str, ids))

    if row.completion_mask is None and row.contexts is None and row.token_rewards is None:
        return words(row.token_ids)
    size = len(row.token_ids)
    mask, contexts = row.completion_mask or (True,) * size, row.contexts or {}
    paid = [0.0] * size if row.token_rewards is None else list(row.token_rewards)
    changes = [i for i in range(1, size) if mask[i] != mask[i - 1] or i in contexts]
    parts = []
    for start, end in pairwise([0, *changes, size]):
        if start in contexts:
            parts.append(f"[the policy reads anew] {words(contexts[start])}")
        given = float(sum(paid[start:end]))
        reward = f", reward {given:+g}" if given else ""
        who = "policy" if mask[start] else "environment"
        parts.append(f"[{who}{reward}] {words(row.token_ids[start:end])}")
    return "\n".join(parts)


def content_text(content: str | Iterable[Mapping[str, Any]]) -> str:
    """Messages as lines of their role and what they say."""
    if isinstance(content, str):
        return content
    parts = [(message.get("role", ""), message.get("content")) for message in content]
    return "\n".join(
        f"{role}: {words if isinstance(words, str) else json.dumps(words)}" for role, words in parts
    )


def _first_samples(saved: Saved) -> list[dict[str, Any]]:
    if saved.samples is None:
        return []
    drawn = int(saved.result.get("settings", {}).get("n", 1))
    return list(islice(read_json_lines(saved.samples), 0, _PROMPTS * drawn, drawn))


def _completion(
    title: str, text: str, reward: float | None, reason: str | None, success: float | None
) -> str:
    """success None: the reward is shown without a verdict."""
    if reward is None:
        verdict = "<b>not judged</b>"
    else:
        colour = "" if success is None else "good" if reward >= success else "bad"
        verdict = f'<b class="{colour}">reward {reward:g}</b>'
    why = f" ({html.text(_shortened(reason))})" if reason else ""
    return (
        f"<div><small>{html.text(title)}: {verdict}{why}</small>"
        f'<pre class="wrap">{html.text(_shortened(text)) or "(empty)"}</pre></div>'
    )


def _article(prompt: str, cells: Iterable[str]) -> str:
    words = f'<pre class="prompt">{html.text(_shortened(prompt))}</pre>'
    return f'<article>{words}<div class="pair">{"".join(cells)}</div></article>'


def _shortened(text: str) -> str:
    rest = len(text) - _LONGEST
    return text if rest <= 0 else f"{text[:_LONGEST]}… ({rest} more characters)"
