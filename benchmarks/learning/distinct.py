"""Different programs for every prompt: stochastic beam search (Kool et al. 2019, 1903.06059).

A policy that is sure of itself writes the same program again and again, and to judge it twice
teaches nothing. Drawn without replacement, n programs are n different ones, of which the policy's
likelier ones come more often. They are not n draws from it, as an on-policy loss needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from spo_ext.contests.vocabulary import EOS, PAD
from spo_ext.rollout.embedded import roomy_cache

from .policy import Samples, pad_prompts, read, up_to_end


@dataclass
class _Beams:
    """n slots for every prompt, all [P * n]: the programs so far, best first within a prompt.

    scores: log-probability plus Gumbel noise, -inf in a slot without a program.
    """

    tokens: Tensor  # [P * n, max_tokens]
    logprobs: Tensor  # [P * n, max_tokens]
    scores: Tensor
    ended: Tensor


@torch.no_grad()
def sample_distinct(
    policy: Qwen2ForCausalLM,
    prompts: Sequence[Sequence[int]],
    per_prompt: int,
    max_tokens: int,
    temperature: float = 1.0,
) -> Samples:
    """As `learning.policy.sample`, but the programs of a prompt are drawn without
    replacement, from torch's current random state. The first is one draw from the policy."""
    ids, mask = pad_prompts(prompts)
    cache = roomy_cache(policy.config, max_tokens)
    hidden = read(policy, ids, mask, cache)
    beams = _start(len(prompts), per_prompt, max_tokens)
    active = torch.arange(len(prompts)) * per_prompt  # the slots that rows of the cache are of
    for column in range(max_tokens):
        logprobs = (policy.lm_head(hidden) / temperature).log_softmax(dim=-1)
        parents, chosen = _extend(beams, active, logprobs, per_prompt, column)
        running = (~beams.ended).nonzero().squeeze(1)
        if column + 1 == max_tokens or not len(running):
            break
        row_of = torch.empty_like(beams.ended, dtype=torch.long)
        row_of[active] = torch.arange(len(active))
        rows = row_of[parents[running]]
        cache.batch_select_indices(rows)
        mask = torch.cat([mask[rows], mask.new_ones(len(rows), 1)], dim=1)
        hidden, active = read(policy, chosen[running, None], mask, cache), running
    programs = [up_to_end(row) for row in beams.tokens.tolist()]
    return Samples(programs, beams.logprobs[:, : max(map(len, programs))])


def _start(prompts: int, per_prompt: int, max_tokens: int) -> _Beams:
    slots = prompts * per_prompt
    scores = torch.full((prompts, per_prompt), -torch.inf)
    scores[:, 0] = 0.0
    return _Beams(
        torch.full((slots, max_tokens), PAD),
        torch.zeros(slots, max_tokens),
        scores.flatten(),
        torch.zeros(slots, dtype=torch.bool),
    )


def _extend(
    beams: _Beams, active: Tensor, logprobs: Tensor, per_prompt: int, column: int
) -> tuple[Tensor, Tensor]:
    """Makes the best of all programs that are one token longer, or ended, the new beams.

    logprobs [active, V]. Returns the slot that each new one came from and its token, PAD if ended.
    """
    slots, words = len(beams.scores), logprobs.shape[1]
    sums = beams.logprobs[active].double().sum(dim=1).float()
    grown = torch.full((slots, words + 1), -torch.inf)  # the last column: an ended one as it is
    grown[active, :words] = perturb(sums[:, None] + logprobs, beams.scores[active])
    grown[beams.ended, words] = beams.scores[beams.ended]
    best = grown.view(-1, per_prompt * (words + 1)).topk(per_prompt, dim=1)
    first = torch.arange(0, slots, per_prompt)[:, None]
    parents = (first + best.indices // (words + 1)).flatten()
    chosen = (best.indices % (words + 1)).flatten()
    ended = chosen == words
    steps = torch.zeros(slots, words)
    steps[active] = logprobs
    taken = steps[parents, chosen.clamp_max(words - 1)].masked_fill(ended, 0.0)
    chosen = chosen.masked_fill(ended, PAD)
    beams.tokens, beams.logprobs = beams.tokens[parents], beams.logprobs[parents]
    beams.tokens[:, column], beams.logprobs[:, column] = chosen, taken
    beams.scores, beams.ended = best.values.flatten(), ended | (chosen == EOS)
    return parents, chosen


def perturb(logprobs: Tensor, most: Tensor) -> Tensor:
    """Gumbel noise on log-probabilities [B, V], given that the largest sum of a row is most [B].

    Kool et al., appendix B.3: noise without the condition, shifted by its maximum, in double.
    """
    uniform = torch.rand(logprobs.shape, dtype=torch.float64).clamp_min(torch.finfo().tiny)
    free = logprobs.double() - (-uniform.log()).log()
    gap = free - free.amax(dim=1, keepdim=True)
    limit = most.double()[:, None]
    shift = limit - free + torch.log1p(-gap.exp())
    return (limit - shift.clamp_min(0) - torch.log1p((-shift.abs()).exp())).float()
