"""Soft Policy Optimization: sample, judge, and regress the soft Q-value on the reward."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2ForCausalLM

import spo_ext

from .config import QuickstartConfig
from .policy import hidden_states, make_batch
from .problems import Problem
from .rollouts import Trajectories, collect, draw_and_grade
from .runlog import Value
from .session import Session

_FINAL_RATE = 0.1  # share of the learning rate left at the end of the linear decay
_SMOOTHING = 0.5  # many problems have no success among the reference's samples


def improve(
    policy: Qwen2ForCausalLM,
    reference: Qwen2ForCausalLM,
    problems: list[Problem],
    session: Session,
    rng: random.Random,
    after_step: Callable[[int], None],
) -> None:
    """Trains the policy in place; after_step is called with the number of steps done.

    `sync_every` batches are drawn at once and trained on one after the other, so the behaviour
    policy needs no copy of its own and its rollouts share the cost of sampling.
    """
    config = session.config
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    q0 = estimate_q0(reference, problems, session)
    stream = shuffled_forever(len(problems), rng)
    rows = config.prompts_per_batch * config.programs_per_prompt
    step = 0
    with tqdm(total=config.steps, desc="SPO", disable=session.quiet, mininterval=1.0) as bar:
        while step < config.steps:
            batches = min(config.sync_every, config.steps - step)
            drawn = [next(stream) for _ in range(batches * config.prompts_per_batch)]
            round_ = collect(policy, reference, [problems[i] for i in drawn], session)
            round_q0 = None if q0 is None else q0[drawn][round_.groups]
            for start in range(0, batches * rows, rows):
                step += 1
                batch_q0 = None if round_q0 is None else round_q0[start : start + rows]
                with session.log.stage("SPO: training"):
                    values = update_policy(
                        policy, optimizer, round_.rows(start, start + rows), batch_q0, config, step
                    )
                session.log.write_metrics("spo", step, values)
                bar.set_postfix(passed=f"{values['pass_rate']:.2f}", refresh=False)
                bar.update()
                after_step(step)


def estimate_q0(
    reference: Qwen2ForCausalLM,
    problems: list[Problem],
    session: Session,
) -> Tensor | None:
    """The value of every prompt, from samples of the reference; None for the group objective."""
    config = session.config
    if config.objective == "group":
        return None
    n = config.reference_samples
    _, grades, _ = draw_and_grade(reference, problems, n, session, "q0")
    rewards = torch.tensor([grade.reward for grade in grades]).view(len(problems), n)
    return spo_ext.prompt_value(
        rewards, beta=config.beta, smoothing=_SMOOTHING, reward_range=(-1.0, 0.0)
    )


def update_policy(
    policy: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    rows: Trajectories,
    q0: Tensor | None,
    config: QuickstartConfig,
    step: int,
) -> dict[str, Value]:
    """One optimiser step on the given rows; returns what to log. q0 is [S], None for "group"."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * _schedule(step, config)
    batch = make_batch(rows.prompts, rows.programs)
    hidden = hidden_states(policy, batch)
    weights = _stale_weights(policy, hidden.detach(), batch.targets, rows, config)
    loss, stats = spo_ext.linear_loss(
        hidden,
        policy.lm_head.weight,
        batch.targets,
        rows.ref_logprobs,
        rows.rewards,
        q0,
        beta=config.beta,
        objective=config.objective,
        groups=rows.groups if config.objective == "group" else None,
        weights=weights,
        max_dropped_mass=config.max_dropped_mass,
        return_stats=True,
    )
    optimizer.zero_grad()
    (_loss_scale(config) * loss).backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    optimizer.step()
    return {
        "loss": float(loss.detach()),
        "pass_rate": sum(grade.correct for grade in rows.grades) / len(rows.grades),
        "log_ratio": float(stats.log_ratio.mean()),
        "mean_weight": 1.0 if weights is None else float(weights.mean()),
        "grad_norm": float(norm),
    }


def _loss_scale(config: QuickstartConfig) -> float:
    """What makes one learning rate serve every objective and beta.

    d/dR of (Q_T - r)^2 is 2 beta (Q_T - r), R the log-ratio of the program: the factor 2 beta is
    taken out. cross_entropy, a function of Q_T / beta, has no such factor.
    """
    return 1.0 if config.objective == "cross_entropy" else 1.0 / (2.0 * config.beta)


def _stale_weights(
    policy: Qwen2ForCausalLM,
    hidden: Tensor,
    targets: Tensor,
    rows: Trajectories,
    config: QuickstartConfig,
) -> Tensor | None:
    """Tapers failing programs that the policy has since become unlikely to write.

    Pushing those down further would spend the step, and in the end the policy, on the past. The
    first batch after a sync is the policy's own, so with sync_every = 1 nothing is tapered.
    """
    if config.sync_every == 1:
        return None
    with torch.no_grad():
        logprobs = spo_ext.token_logprobs(hidden, policy.lm_head.weight, targets)
    return spo_ext.taper_weights(
        logprobs.sum(dim=1),
        rows.behaviour_logprobs,
        rows.rewards,
        threshold=0.0,  # rewards are 0 and -1
    )


def _schedule(step: int, config: QuickstartConfig) -> float:
    """Linear warm-up, then linear decay; steps count from 1."""
    decay = 1 - (1 - _FINAL_RATE) * (step - 1) / config.steps
    return min(1.0, step / max(1, config.warmup_steps)) * decay


def shuffled_forever(count: int, rng: random.Random) -> Iterator[int]:
    """Every index once in random order, then all again."""
    while True:
        yield from rng.sample(range(count), count)
