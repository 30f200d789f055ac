"""Prompts and completions as HTML, unselected: the first prompts, the first completion of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from spo_ext.evaluation import html
from spo_ext.evaluation.files import read_json_lines
from spo_ext.evaluation.runs import Saved

if TYPE_CHECKING:
    from spo_ext.store import TrajectoryStore

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
        text = decode(row.token_ids) if decode else " ".join(map(str, row.token_ids))
        version = row.origin.policy_version
        title = f"trajectory {row.id}" + ("" if version is None else f", policy version {version}")
        cell = _completion(title, text, row.reward, row.reason, None)
        articles.append(_article(content_text(prompt.content), [cell]))
    return articles


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
    why = f" ({html.text(_short(reason))})" if reason else ""
    return (
        f"<div><small>{html.text(title)}: {verdict}{why}</small>"
        f'<pre class="wrap">{html.text(_short(text)) or "(empty)"}</pre></div>'
    )


def _article(prompt: str, cells: Iterable[str]) -> str:
    words = f'<pre class="prompt">{html.text(_short(prompt))}</pre>'
    return f'<article>{words}<div class="pair">{"".join(cells)}</div></article>'


def _short(text: str) -> str:
    rest = len(text) - _LONGEST
    return text if rest <= 0 else f"{text[:_LONGEST]}… ({rest} more characters)"
