"""Prompt values Q_0: read from the store, or estimated once from samples of the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from spo_ext.store import StoredPrompt, StoredTrajectory, TrajectoryStore

Estimate = Callable[[Sequence[StoredPrompt]], object]


class PromptValues:
    """Q_0 under one reference, beta, temperature and top_p.

    Args:
        estimate: samples the reference for these prompts and stores their values, by all ranks
            together; None: what the store does not have is an error.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        *,
        beta: float,
        temperature: float,
        top_p: float,
        reference: str,
        estimate: Estimate | None,
    ) -> None:
        self._store, self._estimate = store, estimate
        self._key = {"beta": beta, "temperature": temperature, "top_p": top_p}
        self._reference = reference

    def complete(self, rows: Sequence[StoredTrajectory]) -> None:
        """Estimates what is missing, if it can. Every rank calls it with the same rows."""
        if self._estimate is None:
            return
        ids = sorted({row.prompt_id for row in rows})
        found = self._look_up(ids)
        missing = [[key for key in ids if key not in found]]
        broadcast_object_list(missing)  # another process may have stored some between two looks
        if missing[0]:
            self._estimate(self._store.get_prompts(missing[0]))

    def of(self, rows: Sequence[StoredTrajectory]) -> Tensor:
        """float32 [S]: the value of each row's prompt. Raises ValueError for one without."""
        ids = sorted({row.prompt_id for row in rows})
        found = self._look_up(ids)
        missing = [key for key in ids if key not in found]
        if missing:
            conditions = ", ".join(f"{name} {value:g}" for name, value in self._key.items())
            raise ValueError(
                f"SPO: every prompt must have a value q0 for {conditions}, got {len(missing)} "
                f"without, for example prompt {missing[0]}: run spo rollout with --q0-beta on the "
                "reference, set q0_samples, or use objective group"
            )
        return torch.tensor([found[row.prompt_id] for row in rows])

    def _look_up(self, ids: Sequence[int]) -> dict[int, float]:
        """A value of this reference before one that names none."""
        found: dict[int, float] = {}
        for reference in ("", self._reference):
            for key, value in zip(
                ids, self._store.q0(ids, reference=reference, **self._key), strict=True
            ):
                if value is not None:
                    found[key] = value.value
        return found
