"""How the policy samples in the harness, and how its batches look.

Training rows are [prompt | program | padding], which a causal model reads without a mask; sampling
needs every prompt to end at the same column, so there the padding stands on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2ForCausalLM

import spo_ext
from spo_ext.contests.programs import MAX_PROGRAM_TOKENS
from spo_ext.contests.vocabulary import EOS, PAD
from spo_ext.rollout.embedded import roomy_cache

IGNORED = -100
_ROWS_PER_PASS = 128


@dataclass(frozen=True, slots=True)
class Batch:
    """input_ids [B, T]; targets [B, T] are the next tokens, IGNORED outside the program."""

    input_ids: Tensor
    targets: Tensor


@dataclass(frozen=True, slots=True)
class Samples:
    """Programs drawn from a policy, n per prompt in prompt order, as ids up to their end token.

    logprobs float32 [B*n, longest program]: of every token under the policy that drew it, nats, 0
    after the end. logprob_sums float32 [B*n]: of every program.
    """

    programs: list[list[int]]
    logprobs: Tensor

    @property
    def logprob_sums(self) -> Tensor:
        return self.logprobs.double().sum(dim=1).float()


def make_batch(prompts: Sequence[Sequence[int]], programs: Sequence[Sequence[int]]) -> Batch:
    """One prompt and one program per row; both must be non-empty."""
    rows = [[*prompt, *program] for prompt, program in zip(prompts, programs, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    column = torch.arange(1, width)
    start = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
    end = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    in_program = (column >= start) & (column < end)
    return Batch(ids[:, :-1], ids[:, 1:].masked_fill(~in_program, IGNORED))


def hidden_states(policy: Qwen2ForCausalLM, batch: Batch) -> Tensor:
    """Last hidden states [B, T, d]; the head is applied inside the loss, never here."""
    hidden: Tensor = policy.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Left-padded ids and attention mask, both [B, P]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    return ids, mask


@torch.no_grad()
def sample(
    policy: Qwen2ForCausalLM,
    prompts: Sequence[Sequence[int]],
    per_prompt: int,
    max_tokens: int = MAX_PROGRAM_TOKENS,
    temperature: float = 1.0,
) -> Samples:
    """Draws programs from torch's current random state.

    `policy.generate` would read a prompt once per program and carry finished rows to the end of
    the longest one; a prompt is read once here and finished rows leave, a third of the time.
    A program that reaches max_tokens comes back without an end token. The log-probabilities are
    those of the policy at the temperature.
    """
    ids, mask = pad_prompts(prompts)
    cache = roomy_cache(policy.config, max_tokens)
    hidden = read(policy, ids, mask, cache).repeat_interleave(per_prompt, dim=0)
    cache.batch_repeat_interleave(per_prompt)
    mask = mask.repeat_interleave(per_prompt, dim=0)
    rows = torch.arange(len(hidden))
    drawn = torch.full((len(hidden), max_tokens), PAD)
    taken = torch.zeros(len(hidden), max_tokens)
    for column in range(max_tokens):
        logprobs = (policy.lm_head(hidden) / temperature).log_softmax(dim=-1)
        tokens = torch.multinomial(logprobs.exp(), 1)
        drawn[rows, column] = tokens.squeeze(1)
        taken[rows, column] = logprobs.gather(1, tokens).squeeze(1)
        running = (tokens.squeeze(1) != EOS).nonzero().squeeze(1)
        if column + 1 == max_tokens or not len(running):
            break
        if len(running) < len(rows):
            cache.batch_select_indices(running)
        rows, tokens, mask = rows[running], tokens[running], mask[running]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = read(policy, tokens, mask, cache)
    programs = [up_to_end(row) for row in drawn.tolist()]
    return Samples(programs, taken[:, : max(map(len, programs))])


def up_to_end(row: list[int]) -> list[int]:
    return row[: row.index(EOS) + 1] if EOS in row else row


def read(policy: Qwen2ForCausalLM, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Appends ids [B, n] to the cache; the last hidden state [B, d]. mask [B, all columns]."""
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    output = policy.model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
    )
    hidden: Tensor = output.last_hidden_state
    return hidden[:, -1]


@torch.no_grad()
def score(
    policy: Qwen2ForCausalLM, prompts: Sequence[list[int]], programs: Sequence[list[int]]
) -> Tensor:
    """Log-probability of each program, summed over its tokens: float32 [S], nats."""
    # Rows of similar length share a pass, which halves the padding.
    order = sorted(range(len(programs)), key=lambda i: len(prompts[i]) + len(programs[i]))
    sums = torch.empty(len(programs))
    for start in range(0, len(order), _ROWS_PER_PASS):
        rows = order[start : start + _ROWS_PER_PASS]
        batch = make_batch([prompts[i] for i in rows], [programs[i] for i in rows])
        hidden = hidden_states(policy, batch)
        logprobs = spo_ext.token_logprobs(hidden, policy.lm_head.weight, batch.targets)
        sums[rows] = logprobs.sum(dim=1)
    return sums
