"""Log-probabilities of the reference policy: each trajectory is scored once, then read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from spo_ext.modes import evaluating
from spo_ext.store import StoredTrajectory, TrajectoryStore, reference_fingerprint
from spo_ext.trainer.batches import Layout, Tokens, collate
from spo_ext.trainer.model import adapters_off, completion_logprobs

Prompts = Mapping[int, Sequence[int]]
_NOTHING = Tokens([0], [0])  # for a rank that has no more to score


class Reference:
    """A reference whose log-probabilities the store keeps.

    Args:
        model: answers log-probabilities (see `answer_logprobs`). None: there is only what the
            store has, and no reference is in memory.
        fingerprint: of the reference, under which the store keeps its log-probabilities.
        base_only: the model is the policy itself, with adapters that are switched off while it is
            the reference. Else adapters that it has are a part of the reference.
        accelerator: of ranks that hold the model in parts (FSDP2) and can only score together: all
            call `logprobs` equally often.
        batch_tokens: how many tokens are scored at once.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        fingerprint: str,
        model: nn.Module | None,
        *,
        layout: Layout,
        base_only: bool = False,
        accelerator: Accelerator | None = None,
        batch_tokens: int = 16384,
    ) -> None:
        self.store, self.fingerprint, self.model = store, fingerprint, model
        self._base_only, self._accelerator = base_only, accelerator
        self._layout: Layout = layout
        self._batch_tokens = batch_tokens

    @classmethod
    def of_model(
        cls,
        store: TrajectoryStore,
        model: nn.Module,
        tokenizer: Any,
        temperature: float,
        *,
        base_only: bool = False,
        **how: Any,
    ) -> Reference:
        """A frozen model, or the policy with its adapters off."""
        with adapters_off(model) if base_only else nullcontext():
            fingerprint = reference_fingerprint(model, tokenizer, temperature)
        return cls(store, fingerprint, model, base_only=base_only, **how)

    @classmethod
    def cached(cls, store: TrajectoryStore, fingerprint: str | None, **how: Any) -> Reference:
        """Only what the store has; without a fingerprint, of the one reference in it.

        Raises ValueError if there is no such reference in the store, or no single one.
        """
        known = store.reference_fingerprints()
        if fingerprint is None and len(known) == 1:
            fingerprint = next(iter(known))
        if fingerprint not in known:
            raise ValueError(
                "SPO: reference_fingerprint must be that of a reference whose log-probabilities "
                f"the store has ({', '.join(known) or 'it has none: run spo score'}), "
                f"got {fingerprint!r}"
            )
        return cls(store, fingerprint, None, **how)

    def active(self) -> AbstractContextManager[object]:
        """A context in which the model is the reference."""
        if self.model is None or not self._base_only:
            return nullcontext()
        return adapters_off(self.model)

    def logprobs(self, rows: Sequence[StoredTrajectory], prompts: Prompts) -> list[Tensor]:
        """float32 [T] for each, from the store, or scored and then stored.

        Raises ValueError if some are not stored and there is no model to score them with.
        """
        ids = [row.id for row in rows]
        found = self.store.ref_logprobs(ids, self.fingerprint)
        missing = [row for row, known in zip(rows, found, strict=True) if known is None]
        if missing and self.model is None:
            raise ValueError(
                f"SPO: the store must have the reference's log-probabilities of all trajectories, "
                f"got {len(missing)} of {len(rows)} without, for example {missing[0].id}: run "
                "spo score, or train with another reference than cached"
            )
        if missing or self._accelerator is not None:
            self.score(missing, prompts)
        if missing:
            found = self.store.ref_logprobs(ids, self.fingerprint)
        return [known for known in found if known is not None]

    def score(self, rows: Sequence[StoredTrajectory], prompts: Prompts) -> None:
        """Scores and stores. Raises ValueError for log-probabilities that are not finite."""
        assert self.model is not None
        parts = _parts(rows, prompts, self._batch_tokens)
        for part in parts + [[]] * (self._rounds(len(parts)) - len(parts)):
            tokens = [Tokens(prompts[row.prompt_id], row.token_ids) for row in part]
            with self.active():
                scored = score_tokens(self.model, tokens or [_NOTHING], self._layout)
            pairs = zip(part, scored, strict=False)
            self.store.put_ref_logprobs(self.fingerprint, {row.id: lp for row, lp in pairs})

    def _rounds(self, mine: int) -> int:
        """Forward passes of the rank that needs most: sharded weights take all ranks."""
        if self._accelerator is None:
            return mine
        counts = torch.tensor([mine], device=self._accelerator.device)
        return int(self._accelerator.gather(counts).max())


@torch.no_grad()
def score_tokens(model: nn.Module, tokens: Sequence[Tokens], layout: Layout) -> list[Tensor]:
    """Log-probabilities of completions, float32 [T] each, on the CPU, without dropout."""
    batch = collate(tokens, layout)
    with evaluating(model):
        found, _ = completion_logprobs(model, batch)
    sizes: list[int] = batch.cu_seqlens.diff().tolist()
    return list(torch.split(found.float().cpu(), sizes))


def _parts(
    rows: Sequence[StoredTrajectory], prompts: Prompts, batch_tokens: int
) -> list[list[StoredTrajectory]]:
    """Cut where the tokens reach batch_tokens; a longer one stands alone."""
    parts: list[list[StoredTrajectory]] = []
    room = 0
    for row in rows:
        size = len(prompts[row.prompt_id]) + len(row.token_ids)
        if size > room:
            parts.append([])
            room = batch_tokens
        parts[-1].append(row)
        room -= size
    return parts
