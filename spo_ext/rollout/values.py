"""Prompt values Q_0 from what the reference drew, as the store has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spo_ext.checks import check_name, refuse
from spo_ext.prompts import prompt_value
from spo_ext.store import Prompt, PromptValue, StoredPrompt, TrajectoryStore
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
