"""Scores all trajectories of a store by a reference, once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn
from tqdm import tqdm

from spo_ext.store import StoredTrajectory, TrajectoryStore
from spo_ext.trainer.feed import prompt_tokens
from spo_ext.trainer.model import HeadSettings, Precision, answer_logprobs, autocast, choose_layout
from spo_ext.trainer.reference import Reference

_ROWS = 256  # held in memory at once


def score_store(
    store: TrajectoryStore,
    model: nn.Module,
    tokenizer: Any,
    *,
    temperature: float,
    precision: Precision = "no",
    batch_tokens: int = 16384,
    quiet: bool = False,
) -> tuple[str, int]:
    """The reference's fingerprint, and how many trajectories were scored now.

    precision is the mixed precision of the policy that will learn from them. A trajectory that is
    appended meanwhile may be left out. Prompts without token ids are refused.

    Raises ValueError or TypeError for a model whose log-probabilities would not be those of its own
    logits, ValueError for such prompts.
    """
    answer_logprobs(model, HeadSettings(temperature))
    with autocast(model, precision):
        layout = choose_layout("auto", model)
    reference = Reference.of_model(
        store,
        model,
        tokenizer,
        temperature,
        layout=layout,
        precision=precision,
        batch_tokens=batch_tokens,
    )
    count = 0
    missing = store.trajectories(without_reference=reference.fingerprint)
    with tqdm(desc="scoring", unit=" trajectories", disable=quiet) as bar:
        for rows in _batches(missing):
            reference.score(rows, prompt_tokens(store, {row.prompt_id for row in rows}))
            count += len(rows)
            bar.update(len(rows))
    return reference.fingerprint, count


def _batches(rows: Iterator[StoredTrajectory]) -> Iterator[list[StoredTrajectory]]:
    while batch := list(itertools.islice(rows, _ROWS)):
        yield batch
