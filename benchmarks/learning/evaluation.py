"""What a policy is worth on prompts that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2ForCausalLM

from spo_ext.contests.problems import Problem
from spo_ext.contests.reward import passes, source_of
from spo_ext.contests.vocabulary import as_prompts, make_tokenizer
from spo_ext.evaluation.evaluate import evaluate as draw_and_judge
from spo_ext.metrics import mean_pass_at_k
from spo_ext.rollout import Sampling
from spo_ext.rollout.embedded import ModelGenerator
from spo_ext.rollout.generation import Reward
from spo_ext.rollout.rewards import as_reward
from spo_ext.store.records import Prompt
from spo_ext.trainer.batches import Tokens, collate
from spo_ext.trainer.model import completion_logprobs

from .settings import Setting

_PROMPTS_PER_CALL = 40
_SEED = 1_000_003  # so that no completion of an evaluation is one of the training's


def evaluate(
    policy: Qwen2ForCausalLM,
    origin: Qwen2ForCausalLM,
    problems: Sequence[Problem],
    setting: Setting,
    seed: int,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """`evaluate_on` the problems of a contest, `evaluation_samples` programs for each."""
    sampling = Sampling(
        setting.evaluation_samples, temperature, max_new_tokens=setting.max_program_tokens
    )
    return evaluate_on(
        as_prompts(problems, "test"),
        policy,
        origin,
        make_tokenizer(),
        as_reward(passes),
        replace(sampling, seed=_SEED + seed),
        source_of,
        setting.kl_problems,
    )


def evaluate_on(
    prompts: Sequence[Prompt],
    policy: PreTrainedModel,
    origin: PreTrainedModel,
    tokenizer: Any,
    reward: Reward,
    sampling: Sampling,
    decode: Callable[[Sequence[int]], str],
    kl_prompts: int,
) -> dict[str, Any]:
    """Plain data of sampling.n completions of each prompt.

    pass_at: unbiased, for k = 1, 2, ... n. correct: of each prompt. distinct_correct: mean number
    of different correct completions per solved prompt. entropy, and kl to the policy that the run
    began with (origin, which `answer_logprobs` has seen) over kl_prompts: nats per completion.
    mean_tokens: of a completion. No random state is moved.
    """
    n = sampling.n
    found = draw_and_judge(
        prompts,
        ModelGenerator(policy, tokenizer, batch_size=_PROMPTS_PER_CALL * n),
        reward,
        sampling=sampling,
        ks=[n],
        decode=decode,
        prompts_per_call=_PROMPTS_PER_CALL,
    )
    drawn = [sample.generation for row in found.samples for sample in row]
    sums = torch.tensor([sum(one.logprobs or ()) for one in drawn], dtype=torch.float64)
    rows = min(kl_prompts, len(prompts)) * n
    starts = [list(prompt.token_ids or ()) for prompt in prompts for _ in range(n)][:rows]
    ids = [one.token_ids for one in drawn]
    of_origin = torch.cat(
        [_score(origin, starts[i : i + n], ids[i : i + n]) for i in range(0, rows, n)]
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
    model: PreTrainedModel, prompts: Sequence[list[int]], completions: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Log-probability of each completion, summed over its tokens: float64 [S], nats."""
    pairs = zip(prompts, completions, strict=True)
    tokens = collate([Tokens(*pair) for pair in pairs], "padded")
    logprobs, _ = completion_logprobs(model, tokens)
    parts = torch.split(logprobs.double(), tokens.cu_seqlens.diff().tolist())
    return torch.stack([part.sum() for part in parts])
