"""evaluation.json, and the table that `spo eval` prints."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from spo_ext.evaluation.records import Evaluation
from spo_ext.store.records import StoredPrompt

_VALUES = {
    "reward": "mean reward",
    "truncated": "share truncated",
    "num_tokens": "mean length, tokens",
    "distinct_correct": "distinct correct completions per solved prompt",
}


def summary(
    evaluation: Evaluation, settings: Mapping[str, Any], prompts: Sequence[StoredPrompt]
) -> dict[str, Any]:
    """As JSON: settings, values with their intervals, and of each prompt n (judged) and c (passed).

    From the last of these pass@k for every k can be computed again.
    """
    return {
        "settings": dict(settings),
        "k": list(evaluation.ks),
        "success": evaluation.success,
        "values": {name: asdict(value) for name, value in evaluation.values().items()},
        "completions": sum(map(len, evaluation.samples)),
        "unjudged": evaluation.unjudged,
        "per_prompt": [
            {"prompt_id": prompt.id, "n": judged, "c": passed}
            for prompt, (judged, passed) in zip(prompts, evaluation.counts, strict=True)
        ],
        "versions": _versions(),
    }


def label(name: str) -> str:
    """What to call a value of `Evaluation.values`."""
    return _VALUES.get(name, name)


def table(evaluation: Evaluation) -> str:
    """As aligned text."""
    rows = [("", "mean", "95% interval", "prompts")]
    for name, value in evaluation.values().items():
        interval = "" if value.low is None else f"[{value.low:.3f}, {value.high:.3f}]"
        rows.append((label(name), f"{value.mean:.3f}", interval, str(value.prompts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        first.ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        for first, *rest in rows
    ]
    if evaluation.unjudged:
        total = sum(map(len, evaluation.samples))
        lines.append(f"{evaluation.unjudged} of {total} completions could not be judged")
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("spo_ext", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
