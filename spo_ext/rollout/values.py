"""Prompt values Q_0: read from the store, or estimated from what the reference drew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from spo_ext.checks import check_name, refuse
from spo_ext.prompts import prompt_value
from spo_ext.store import Prompt, PromptValue, StoredPrompt, StoredTrajectory, TrajectoryStore
from spo_ext.store.counts import rewards_drawn


def estimate_q0(
    store: TrajectoryStore,
    prompts: Sequence[StoredPrompt],
    *,
    run: str,
    beta: float,
    temperature: float,
    top_p: float,
    smoothing: float = 0.5,
    reward_range: tuple[float, float] | None = None,
    reference: str = "",
    policy_version: int | None = None,
) -> int:
    """Stores an estimate of Q_0 for each prompt that the reference has samples of, and returns how
    many there are.

    Args:
        prompts: out of the store.
        run: whose trajectories are the reference's.
        policy_version: of the run; None takes all of them.
        beta: softness > 0, in units of reward.
        temperature: of the samples; others are not looked at.
        top_p: of the samples, likewise.
        smoothing: as in `spo_ext.prompt_value`.
        reward_range: as in `spo_ext.prompt_value`; None takes the extremes over all these samples.
        reference: fingerprint to store with the estimate, "" if there is only one.

    A completion that was drawn several times counts as often.

    Raises ValueError, besides for bad arguments, if smoothing needs a range of rewards and all
    samples have the same, and for -inf without smoothing; nothing is stored then.
    """
    check_name("estimate_q0", "run", run)
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, StoredPrompt):
            got = "a Prompt" if isinstance(prompt, Prompt) else prompt
            refuse("estimate_q0", f"prompts[{index}]", "a StoredPrompt", got)
    ids = list(dict.fromkeys(prompt.id for prompt in prompts))
    rows = rewards_drawn(
        store, ids, run=run, policy_version=policy_version, temperature=temperature, top_p=top_p
    )
    sampled = sorted({prompt_id for prompt_id, _, _ in rows})
    if not sampled:
        return 0
    place = {prompt_id: index for index, prompt_id in enumerate(sampled)}
    times = torch.tensor([count for _, _, count in rows])
    # In double: a reward must not differ from the ends of the range by rounding.
    rewards = torch.tensor([reward for _, reward, _ in rows], dtype=torch.float64)
    groups = torch.tensor([place[prompt_id] for prompt_id, _, _ in rows])
    values, counts = prompt_value(
        rewards.repeat_interleave(times),
        beta=beta,
        groups=groups.repeat_interleave(times),
        num_prompts=len(sampled),
        smoothing=smoothing,
        reward_range=reward_range,
        return_n=True,
    )
    store.put_q0(
        {
            prompt_id: PromptValue(value, n, beta, temperature, top_p, reference)
            for prompt_id, value, n in zip(sampled, values.tolist(), counts.tolist(), strict=True)
        }
    )
    return len(sampled)


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
