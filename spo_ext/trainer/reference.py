"""Log-probabilities of the reference policy: each trajectory is scored once, then read."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from spo_ext.checks import refuse
from spo_ext.integrations.agreement import rope_limit
from spo_ext.models import evaluating
from spo_ext.store import StoredTrajectory, TrajectoryStore, reference_fingerprint
from spo_ext.trainer.batches import Layout, TokenBatch, Tokens, collate, company, tokens_of
from spo_ext.trainer.config import SPOConfig
from spo_ext.trainer.model import (
    Precision,
    adapters_off,
    autocast,
    base_model,
    completion_logprobs,
    has_adapters,
    is_named_with,
    named_with,
)

Prompts = Mapping[int, Sequence[int]]
_Segment = tuple[int, int, Tokens]  # of which trajectory, which of its segments
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
        precision: mixed precision in which the model scores: the policy's.
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
        precision: Precision = "no",
        batch_tokens: int = 16384,
    ) -> None:
        self.store, self.fingerprint, self.model = store, fingerprint, model
        self._base_only, self._accelerator = base_only, accelerator
        self._layout: Layout = layout
        self._precision: Precision = precision
        self._batch_tokens = batch_tokens
        self._behaviour_at: float | None = None
        self.scored_tokens = 0  # as the model read them, with prompts and padding
        self.scoring_seconds = 0.0

    @classmethod
    def behaviour(cls, store: TrajectoryStore, temperature: float) -> Reference:
        """The policy that wrote each trajectory, by what was stored with it."""
        found = cls(store, "behaviour", None, layout="padded")
        found._behaviour_at = temperature
        return found

    @classmethod
    def of_model(
        cls,
        store: TrajectoryStore,
        model: nn.Module,
        tokenizer: Any,
        temperature: float,
        *,
        base_only: bool = False,
        precision: Precision = "no",
        **how: Any,
    ) -> Reference:
        """A frozen model, or the policy with its adapters off."""
        with adapters_off(model) if base_only else nullcontext():
            weights = reference_fingerprint(model, tokenizer, temperature)
        name = named_with(weights, precision)
        return cls(store, name, model, base_only=base_only, precision=precision, **how)

    @classmethod
    def cached(
        cls,
        store: TrajectoryStore,
        fingerprint: str | None,
        *,
        precision: Precision = "no",
        **how: Any,
    ) -> Reference:
        """Only what the store has; without a fingerprint, of the one reference in it.

        Raises ValueError if there is no such reference of that precision in the store, or no
        single one.
        """
        stored = store.reference_fingerprints()
        known = [name for name in stored if is_named_with(name, precision)]
        if fingerprint is None and len(known) == 1:
            fingerprint = known[0]
        if fingerprint is None or fingerprint not in known:
            raise ValueError(
                "SPO: reference_fingerprint must be that of a reference whose log-probabilities "
                f"the store has in the policy's mixed precision {precision!r} "
                f"({', '.join(known) or 'it has none: run spo score'}), got {fingerprint!r}"
            )
        return cls(store, fingerprint, None, precision=precision, **how)

    def logprobs(self, rows: Sequence[StoredTrajectory], prompts: Prompts) -> list[Tensor]:
        """Of the policy's tokens of each, float32, from the store, or scored and then stored.

        Raises ValueError if some are not stored and there is no model to score them with.
        """
        if self._behaviour_at is not None:
            return [_behaviour(row, self._behaviour_at) for row in rows]
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

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """The model is the reference meanwhile: without the policy's adapters, in its precision."""
        assert self.model is not None
        with (
            adapters_off(self.model) if self._base_only else nullcontext(),
            autocast(self.model, self._precision),
        ):
            yield

    def score(self, rows: Sequence[StoredTrajectory], prompts: Prompts) -> None:
        """Scores and stores. Raises ValueError for log-probabilities that are not finite."""
        assert self.model is not None
        started = time.perf_counter()
        segments = {row.id: tokens_of(row, prompts[row.prompt_id]) for row in rows}
        parts = [
            part
            for together in self._together(segments)
            for part in _parts(together, self._batch_tokens)
        ]
        scored: dict[int, dict[int, Tensor]] = {row.id: {} for row in rows}
        for part in parts + [[]] * (self._rounds(len(parts)) - len(parts)):
            tokens = [one for _, _, one in part]
            batch = collate(tokens or [_NOTHING], self._layout)
            with self.speaking():
                found = score_tokens(self.model, batch)
            self.scored_tokens += batch.model_inputs["input_ids"].numel()
            for (key, place, _), logprobs in zip(part, found, strict=False):
                scored[key][place] = logprobs
            whole = [key for key, of in scored.items() if len(of) == len(segments[key])]
            done = {key: scored.pop(key) for key in whole}
            self.store.put_ref_logprobs(
                self.fingerprint,
                {key: torch.cat([of[place] for place in sorted(of)]) for key, of in done.items()},
            )
        self.scoring_seconds += time.perf_counter() - started

    def _together(self, segments: Mapping[int, Sequence[Tokens]]) -> Iterable[list[_Segment]]:
        """Segments that may be in one call of the model, so that ranks can count their calls."""
        assert self.model is not None
        groups: dict[int, list[_Segment]] = {}
        limit = rope_limit(base_model(self.model).config)
        for key, of_row in segments.items():
            for place, tokens in enumerate(of_row):
                number = company(tokens, self._layout, limit)
                groups.setdefault(number, []).append((key, place, tokens))
        return groups.values()

    def _rounds(self, mine: int) -> int:
        """Forward passes of the rank that needs most: sharded weights take all ranks."""
        if self._accelerator is None:
            return mine
        counts = torch.tensor([mine], device=self._accelerator.device)
        return int(self._accelerator.gather(counts).max())


def _behaviour(row: StoredTrajectory, temperature: float) -> Tensor:
    """Raises ValueError where they are not known, or are those of another distribution."""
    if row.behaviour_logprobs is None:
        raise ValueError(
            f"SPO: reference behaviour needs the log-probabilities of whoever wrote a trajectory, "
            f"and trajectory {row.id} ({row.origin.kind}) has none: draw from mixture online, or "
            "take another reference"
        )
    if row.temperature not in (None, temperature) or row.top_p not in (None, 1.0):
        raise ValueError(
            f"SPO: with reference behaviour trajectories must be sampled at temperature "
            f"{temperature:g} and top_p 1, got {row.temperature} and {row.top_p} of trajectory "
            f"{row.id}"
        )
    return row.of_policy(torch.as_tensor(row.behaviour_logprobs))


def reference_model(
    config: SPOConfig, model: nn.Module, given: nn.Module | None, *, share: bool
) -> nn.Module | None:
    """The model that scores, which may be the policy itself; None if nothing is to be loaded.

    share: a frozen copy of a policy with adapters has the policy's own frozen parameters, not
        copies of them: false where the policy is to be sharded, which would take them apart.
    """
    kind = config.reference
    if given is not None and kind not in ("auto", "model"):
        refuse("SPO", "ref_model", f"None with reference {kind!r}", type(given))
    if kind in ("cached", "behaviour"):
        return None
    if kind == "adapter" and not has_adapters(model):
        refuse("SPO", "reference", "adapter only for a model with PEFT's adapters", kind)
    if given is not None:
        return given.requires_grad_(False).eval()
    if kind == "adapter" or (kind == "auto" and has_adapters(model) and _adds_nothing(model)):
        return model
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    shared = {id(parameter): parameter for parameter in frozen} if share else {}
    try:
        found = copy.deepcopy(model, shared if has_adapters(model) else {})
    except RuntimeError as error:  # tied adapters are results of operations, not parameters
        raise ValueError(
            "SPO: reference must be adapter, model with a ref_model, or cached for this policy, "
            f"which starts from a trained adapter and cannot be copied ({error}); got {kind!r}"
        ) from error
    return found.requires_grad_(False).eval()


@torch.no_grad()
def _adds_nothing(model: nn.Module) -> bool:
    """Whether the model says, to the last bit, what it would say without its adapters.

    So it is with LoRA that was not trained yet. What is only nearly so counts as trained.
    """
    table = base_model(model).get_input_embeddings().weight
    ids = (torch.arange(1, 9, device=table.device) * 7919 % len(table))[None]
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits
        with adapters_off(model):
            return torch.equal(model(input_ids=ids, use_cache=False).logits, logits)


@torch.no_grad()
def score_tokens(model: nn.Module, batch: TokenBatch) -> list[Tensor]:
    """Log-probabilities of completions, float32 [T] each, on the CPU, without dropout."""
    with evaluating(model):
        found, _ = completion_logprobs(model, batch)
    sizes: list[int] = batch.cu_seqlens.diff().tolist()
    return list(torch.split(found.float().cpu(), sizes))


def _parts(segments: Sequence[_Segment], batch_tokens: int) -> list[list[_Segment]]:
    """Cut where the tokens reach batch_tokens; a longer one stands alone."""
    parts: list[list[_Segment]] = []
    room = 0
    for segment in segments:
        size = len(segment[2])
        if size > room:
            parts.append([])
            room = batch_tokens
        parts[-1].append(segment)
        room -= size
    return parts
