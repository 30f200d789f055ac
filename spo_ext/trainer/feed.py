"""The trajectories of every optimiser step, and this rank's micro-batches of them."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from spo_ext.checks import refuse
from spo_ext.rollout.values import PromptValues
from spo_ext.store import Batch, Sampler, SampleShortfall, StoredTrajectory, TrajectoryStore
from spo_ext.trainer.batches import Layout, TokenBatch, Tokens, collate, company, tokens_of
from spo_ext.trainer.config import SPOConfig
from spo_ext.trainer.model import HeadSettings, Precision, answer_logprobs, autocast, choose_layout
from spo_ext.trainer.reference import Prompts, Reference

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """S of a step's trajectories; tensors on the CPU, per token [N] of the policy's or per
    trajectory [S].

    tokens: a sequence for every segment. cu_seqlens: int64 [S + 1], where each trajectory starts.
    token_rewards: rewards on the way, None if there are none. turns: how often the policy spoke.
    behaviour_logprobs: of the policy that wrote it, nan where they are not known. online: bool,
    written by the policy of this run; fresh: bool, by the version that is published now, at the
    run's temperature and with all tokens; truncated: bool, cut at a limit of length. floor: the
    lowest reward of the whole step. share: 1 / (sequences of the step), by which the loss is
    scaled; 0 in place of a micro-batch without a sequence, which a rank must compute all the same,
    because the others wait for its part of their collectives.
    """

    tokens: TokenBatch
    cu_seqlens: Tensor
    ref_logprobs: Tensor
    rewards: Tensor
    token_rewards: Tensor | None
    turns: Tensor
    groups: Tensor
    q0: Tensor | None
    behaviour_logprobs: Tensor
    online: Tensor
    fresh: Tensor
    truncated: Tensor
    floor: float
    share: float

    @property
    def behaviour_sums(self) -> Tensor:
        """float32 [S], nan where it is not known."""
        return self._sums(self.behaviour_logprobs).float()

    @property
    def paid(self) -> Tensor:
        """float64 [S], the sums of the rewards on the way."""
        if self.token_rewards is None:
            return torch.zeros(len(self.rewards), dtype=torch.float64)
        return self._sums(self.token_rewards)

    def _sums(self, values: Tensor) -> Tensor:
        parts = torch.split(values, self.cu_seqlens.diff().tolist())
        return torch.stack([part.double().sum() for part in parts])


class Feed:
    """Draws, waits for producers where it must, and looks up what the loss needs.

    Every rank has one; all draw the same step and each takes its part.

    Args:
        produce: makes more trajectories of a policy version when the store has too few, and says
            whether it could; None if another process does that.
        waiting: called now and then by the main process while it waits for such a process.
        limit: tokens beyond which only sequences of one length share a call (`rope_limit`).
    """

    def __init__(
        self,
        config: SPOConfig,
        store: TrajectoryStore,
        reference: Reference,
        values: PromptValues | None,
        layout: Layout,
        produce: Callable[[int], bool] | None,
        waiting: Callable[[], object] = lambda: None,
        limit: int | None = None,
    ) -> None:
        self._config, self._store, self._reference = config, store, reference
        self._values, self._layout, self._produce = values, layout, produce
        self._waiting = waiting
        self._limit = limit
        self._sampler: Sampler | None = None
        self._version = 0

    def start(self, step: int, resume: bool) -> None:
        """Goes to a step, before the first draw of any rank.

        Raises ValueError if the run has drawn before and `resume` is False, or if the store does
        not hold the batches before the step.
        """
        settings = self._config.sampler_config()
        if not resume and str(self._config.run) in self._store.samplers():
            expected = "new in this store, or continued by train(resume_from_checkpoint=True)"
            refuse("SPO", "run", expected, self._config.run)
        self._sampler = Sampler(self._store, str(self._config.run), settings, resume=resume)
        state = {"name": self._sampler.name, "step": step, "config": settings.as_json()}
        self._sampler.load_state_dict(state)

    def next_step(self, policy_version: int) -> tuple[dict[str, float], list[MicroBatch]]:
        """Metrics of the step's batch, and a micro-batch for each accumulation step of this rank.

        Raises SampleShortfall if the store stays too small, ValueError if all of the step is
        longer than max_tokens.
        """
        batch = self._draw(policy_version)
        self._version = policy_version
        if self._values is not None:
            self._values.complete(batch.trajectories)
        prompts = prompt_tokens(self._store, {row.prompt_id for row in batch.trajectories})
        config = self._config
        tokens = [tokens_of(row, prompts[row.prompt_id]) for row in batch.trajectories]
        kept = self._kept(tokens)
        bounds = self._bounds(batch)
        here = config.process_index * config.gradient_accumulation_steps
        split = [range(*pair) for pair in itertools.pairwise(bounds)]
        calls = [
            len({self._company(one) for i in part if i in kept for one in tokens[i]})
            for part in split
        ]
        steps = config.gradient_accumulation_steps
        parts = [
            # As many calls of the model as the rank that needs most: all take part in each.
            self._micro_batch(
                batch, prompts, tokens, kept, split[here + i], max(1, *calls[i::steps])
            )
            for i in range(steps)
        ]
        metrics = batch.metrics()
        if config.max_tokens is not None:
            metrics["store/too_long"] = float(len(batch.trajectories) - len(kept))
        return metrics, parts

    def _bounds(self, batch: Batch) -> list[int]:
        """Where each micro-batch of the step begins, over all ranks, and where the last ends."""
        size, count = self._config.train_batch_size, len(batch.trajectories)
        if not self._config.mixed_groups:
            return list(range(0, count + 1, size))
        changes = batch.groups.diff().nonzero()[:, 0] + 1  # mixed groups differ in size
        return [0, *changes.tolist(), count][:: size // self._config.group_size]

    def _kept(self, tokens: Sequence[Sequence[Tokens]]) -> dict[int, int]:
        """Tokens of each trajectory that is not too long, by its place in the batch."""
        most = self._config.max_tokens
        sizes = [sum(map(len, segments)) for segments in tokens]
        kept = {i: size for i, size in enumerate(sizes) if most is None or size <= most}
        if not kept:
            expected = f"at least {min(sizes)}, the tokens of the shortest of a step's trajectories"
            refuse("SPO", "max_tokens", expected, most)
        return kept

    def _draw(self, policy_version: int) -> Batch:
        if self._produce is not None:
            return self._draw_producing(policy_version)
        seconds = self._config.wait_seconds if self._config.rollouts == "external" else 0.0
        deadline, waiting = time.monotonic() + seconds, False
        while True:
            try:
                return self._next(policy_version)
            except SampleShortfall as shortfall:
                if time.monotonic() >= deadline:
                    waited = (
                        f"; waited {seconds:g} s for spo rollout to add some" if seconds else ""
                    )
                    raise SampleShortfall(f"{shortfall}{waited}", shortfall.pools) from None
                if self._config.process_index == 0:
                    if not waiting:
                        words = "waiting up to %g s for trajectories: %s"
                        logger.warning(words, seconds, shortfall)
                    self._waiting()
                waiting = True
            time.sleep(_POLL_SECONDS)

    def _draw_producing(self, policy_version: int) -> Batch:
        """The first rank draws and says how it went, so that all produce more or none does."""
        assert self._produce is not None
        while True:
            drawn: Batch | None = None
            words: str
            lacking: tuple[str, ...]
            words, lacking = "", ()
            if self._config.process_index == 0:
                try:
                    drawn = self._next(policy_version)
                except SampleShortfall as shortfall:
                    words, lacking = str(shortfall), shortfall.pools
            words, lacking = broadcast_object_list([words, lacking])
            if not words:
                return drawn if drawn is not None else self._next(policy_version)
            if lacking != ("online",):
                raise SampleShortfall(f"{words}; rollouts add to online alone", lacking)
            if not self._produce(policy_version):
                raise SampleShortfall(
                    f"{words}; rolling out more prompts gave too few completions with a reward: "
                    "see why they have none, or lower group_size",
                    lacking,
                )

    def _next(self, policy_version: int) -> Batch:
        assert self._sampler is not None
        online = "online" in self._sampler.config.fractions
        return self._sampler.next_batch(policy_version if online else None)

    def _is_fresh(self, row: StoredTrajectory) -> bool:
        at = (row.origin.policy_version, row.temperature, row.top_p)
        return at == (self._version, self._config.temperature, 1.0)

    def _company(self, tokens: Tokens) -> int:
        return company(tokens, self._layout, self._limit)

    def _micro_batch(
        self,
        batch: Batch,
        prompts: Prompts,
        tokens: Sequence[Sequence[Tokens]],
        kept: Mapping[int, int],
        part: range,
        calls: int,
    ) -> MicroBatch:
        mine = [i for i in part if i in kept]
        places = mine or [min(kept, key=lambda i: kept[i])]
        rows = [batch.trajectories[i] for i in places]
        segments = [one for i in places for one in tokens[i]]
        rewards = batch.rewards
        paid = [_token_rewards(row) for row in rows]
        return MicroBatch(
            tokens=replace(collate(segments, self._layout), calls=calls),
            cu_seqlens=torch.tensor([0, *(row.num_policy_tokens for row in rows)]).cumsum(0),
            token_rewards=torch.cat(paid) if any(map(torch.any, paid)) else None,
            turns=torch.tensor([row.num_turns for row in rows]),
            ref_logprobs=torch.cat(self._reference.logprobs(rows, prompts)),
            rewards=rewards[places],
            groups=batch.groups[places],
            q0=None if self._values is None else self._values.of(rows),
            behaviour_logprobs=torch.cat([_behaviour(row) for row in rows]),
            online=batch.online[places],
            fresh=batch.online[places] & torch.tensor([self._is_fresh(row) for row in rows]),
            truncated=torch.tensor([row.finish == "truncated" for row in rows]),
            floor=float(rewards[list(kept)].min()),
            share=1 / len(kept) if mine else 0.0,
        )


def prompt_tokens(store: TrajectoryStore, ids: set[int]) -> dict[int, Sequence[int]]:
    """Token ids by prompt id. Raises ValueError for a prompt that has none."""
    found: dict[int, Sequence[int]] = {}
    for prompt in store.get_prompts(sorted(ids)):
        if prompt.token_ids is None:
            raise ValueError(
                f"SPO: prompt {prompt.id} must have token ids, got none: import it with --tokenizer"
            )
        found[prompt.id] = prompt.token_ids
    return found


def _behaviour(row: StoredTrajectory) -> Tensor:
    known = row.behaviour_logprobs
    if known is None:
        return torch.full((row.num_policy_tokens,), torch.nan)
    return row.of_policy(torch.as_tensor(known))


def _token_rewards(row: StoredTrajectory) -> Tensor:
    """Of the policy's tokens; what the environment's have goes to the last of these before it."""
    if row.token_rewards is None:
        return torch.zeros(row.num_policy_tokens)
    given = torch.as_tensor(row.token_rewards)
    mask = row.completion_mask
    if mask is None:
        return given
    receivers = torch.tensor(mask).cumsum(0).sub(1).clamp(min=0)  # nothing stands before the first
    return torch.zeros(row.num_policy_tokens).index_add(0, receivers, given)


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
