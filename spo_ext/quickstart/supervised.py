"""Supervised stage: from random weights to the reference policy."""

from __future__ import annotations

import math
import random

import torch
from tqdm import tqdm
from transformers import Qwen2ForCausalLM

import spo_ext

from .config import QuickstartConfig
from .policy import hidden_states, make_batch, make_policy
from .problems import draw_problem
from .programs import demonstrate
from .session import Session
from .vocabulary import encode_prompt

_WARMUP_STEPS = 50
_FINAL_RATE = 0.05  # share of the peak learning rate left at the end of the cosine
_BATCHES_PER_SORT = 4

Example = tuple[list[int], list[int]]  # prompt ids, program ids


def train_reference(session: Session, rng: random.Random) -> Qwen2ForCausalLM:
    """Trains on demonstrations, each of a fresh problem and most of them wrong."""
    config = session.config
    policy = make_policy(config)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.sft_learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    waiting: list[list[Example]] = []
    steps = range(1, config.sft_steps + 1)
    bar = tqdm(steps, desc="supervised", disable=session.quiet, mininterval=1.0)
    for step in bar:
        waiting = waiting or _draw_batches(config, rng)
        rate = config.sft_learning_rate * _schedule(step, config.sft_steps)
        loss = _update(policy, optimizer, waiting.pop(), rate, config.max_grad_norm)
        session.log.write_metrics("supervised", step, {"loss": loss, "learning_rate": rate})
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return policy


def _update(
    policy: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    examples: list[Example],
    rate: float,
    max_grad_norm: float,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    prompts, programs = zip(*examples, strict=True)
    batch = make_batch(prompts, programs)
    logprobs = spo_ext.token_logprobs(
        hidden_states(policy, batch), policy.lm_head.weight, batch.targets
    )
    loss = -logprobs.sum() / (batch.targets >= 0).sum()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    optimizer.step()
    return float(loss.detach())


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine; steps count from 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    return min(1.0, step / _WARMUP_STEPS) * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)


def _draw_batches(config: QuickstartConfig, rng: random.Random) -> list[list[Example]]:
    """Several batches of rows of similar length: a third less padding to compute."""
    examples = [_draw_example(config, rng) for _ in range(_BATCHES_PER_SORT * config.sft_batch)]
    examples.sort(key=lambda example: sum(map(len, example)))
    size = config.sft_batch
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    rng.shuffle(batches)
    return batches


def _draw_example(config: QuickstartConfig, rng: random.Random) -> Example:
    problem = draw_problem(
        rng,
        "train",
        vague_probability=config.vague_probability,
        hidden_tests=0,
        operations=(config.least_operations, config.most_operations),
    )
    program = demonstrate(
        rng,
        problem.specification,
        corruption=config.corruption,
        token_noise=config.token_noise,
        max_tokens=config.max_program_tokens,
    )
    return encode_prompt(problem), program
