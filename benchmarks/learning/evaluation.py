"""What a policy is worth on problems that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from spo_ext.contests.problems import Problem
from spo_ext.contests.reward import passes, source_of
from spo_ext.contests.vocabulary import as_prompts, encode_prompt, make_tokenizer
from spo_ext.evaluation.evaluate import evaluate as draw_and_judge
from spo_ext.metrics import mean_pass_at_k
from spo_ext.rollout import Sampling
from spo_ext.rollout.embedded import ModelGenerator
from spo_ext.rollout.rewards import as_reward
from spo_ext.trainer.batches import Tokens, collate
from spo_ext.trainer.model import completion_logprobs

from .settings import Setting

_PROMPTS_PER_CALL = 40
_SEED = 1_000_003  # so that no program of an evaluation is one of the training's


def evaluate(
    policy: Qwen2ForCausalLM,
    origin: Qwen2ForCausalLM,
    problems: Sequence[Problem],
    setting: Setting,
    seed: int,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Plain data of `evaluation_samples` programs for each problem, drawn at the temperature.

    pass_at: unbiased, for k = 1, 2, ... evaluation_samples. correct: of each problem.
    distinct_correct: mean number of different correct programs per solved problem. entropy, and kl
    to the policy that the run began with (origin, which `answer_logprobs` has seen) over
    kl_problems: nats per program. mean_tokens: of a program. No random state is moved.
    """
    n = setting.evaluation_samples
    found = draw_and_judge(
        as_prompts(problems, "test"),
        ModelGenerator(policy, make_tokenizer(), batch_size=_PROMPTS_PER_CALL * n),
        as_reward(passes),
        sampling=Sampling(
            n=n,
            temperature=temperature,
            max_new_tokens=setting.max_program_tokens,
            seed=_SEED + seed,
        ),
        ks=[n],
        decode=source_of,
        prompts_per_call=_PROMPTS_PER_CALL,
    )
    drawn = [sample.generation for row in found.samples for sample in row]
    sums = torch.tensor([sum(one.logprobs or ()) for one in drawn], dtype=torch.float64)
    rows = min(setting.kl_problems, len(problems)) * n
    prompts = [encode_prompt(problem) for problem in problems for _ in range(n)][:rows]
    ids = [one.token_ids for one in drawn]
    of_origin = torch.cat(
        [_score(origin, prompts[i : i + n], ids[i : i + n]) for i in range(0, rows, n)]
    )
    correct = [passed for _, passed in found.counts]
    distinct = found.values().get("distinct_correct")
    return {
        "pass_at": [mean_pass_at_k(n, correct, k) for k in range(1, n + 1)],
        "correct": correct,
        "distinct_correct": 0.0 if distinct is None else distinct.mean,
        "entropy": -float(sums.mean()),
        "kl": float((sums[:rows] - of_origin).mean()),
        "mean_tokens": sum(map(len, ids)) / len(ids),
    }


@torch.no_grad()
def _score(
    model: Qwen2ForCausalLM, prompts: Sequence[list[int]], programs: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Log-probability of each program, summed over its tokens: float64 [S], nats."""
    pairs = zip(prompts, programs, strict=True)
    tokens = collate([Tokens(prompt, program) for prompt, program in pairs], "padded")
    logprobs, _ = completion_logprobs(model, tokens)
    parts = torch.split(logprobs.double(), tokens.cu_seqlens.diff().tolist())
    return torch.stack([part.sum() for part in parts])
