"""pass@k and the rest on a list of prompts, from any generator and any reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from spo_ext.checks import check_integer, refuse
from spo_ext.evaluation.records import Evaluation, Sample
from spo_ext.rollout.generation import Generation, Generator, Reward, Sampling, judge
from spo_ext.rollout.rewards import look_at
from spo_ext.store.records import Prompt


def evaluate(
    prompts: Sequence[Prompt],
    generator: Generator,
    reward: Reward,
    *,
    sampling: Sampling,
    ks: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    success: float = 1.0,
    prompts_per_call: int = 16,
    finished: Sequence[Sequence[Sample]] = (),
    on_samples: Callable[[int, Sequence[Sample]], None] | None = None,
) -> Evaluation:
    """Draws sampling.n completions of each prompt and judges them.

    Args:
        prompts: with token_ids.
        ks: of pass@k, each at most sampling.n.
        decode: token ids to the text that is judged, without special tokens.
        success: a completion passed if its reward is at least this.
        prompts_per_call: how many go to the generator at once. Every call has the same seed, so a
            generator should mix the prompt into it, as those of `spo_ext.rollout` do.
        finished: samples of the first prompts, from an evaluation that was interrupted.
        on_samples: called with the index of a prompt and its samples when they are judged.

    A completion that cannot be judged is counted and left out of what needs a reward.

    Raises:
        ValueError: for an argument outside what is said, before any work; if the generator or the
            reward does not return what its protocol says.
    """
    _check(prompts, sampling, ks, success, prompts_per_call, finished)
    look_at(reward, prompts)
    done = [tuple(row) for row in finished]
    for start in range(len(done), len(prompts), prompts_per_call):
        group = prompts[start : start + prompts_per_call]
        for row in _judge(group, _draw(group, generator, sampling), reward, decode):
            done.append(row)
            if on_samples is not None:
                on_samples(len(done) - 1, row)
    return Evaluation(tuple(done), tuple(sorted(set(ks))), success)


def _check(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    ks: Sequence[int],
    success: float,
    prompts_per_call: int,
    finished: Sequence[Sequence[Sample]],
) -> None:
    owner = "evaluate"
    if not prompts:
        refuse(owner, "prompts", "at least one prompt", list(prompts))
    for index, prompt in enumerate(prompts):
        if prompt.token_ids is None:
            refuse(owner, f"prompts[{index}].token_ids", "given", None)
    if not ks:
        refuse(owner, "ks", "at least one k", list(ks))
    for k in ks:
        check_integer(owner, "ks", k, 1)
        if k > sampling.n:
            refuse(owner, "ks", f"at most sampling.n = {sampling.n}", k)
    if math.isnan(success):
        refuse(owner, "success", "a number", success)
    check_integer(owner, "prompts_per_call", prompts_per_call, 1)
    if len(finished) > len(prompts):
        refuse(owner, "finished", f"of at most {len(prompts)} prompts", len(finished))
    for index, row in enumerate(finished):
        if len(row) != sampling.n:
            refuse(owner, f"finished[{index}]", f"sampling.n = {sampling.n} samples", len(row))


def _draw(
    prompts: Sequence[Prompt], generator: Generator, sampling: Sampling
) -> list[list[Generation]]:
    drawn = generator.generate(prompts, sampling)
    got = [len(row) for row in drawn]
    if got != [sampling.n] * len(prompts):
        wanted = f"{sampling.n} completions for each of {len(prompts)} prompts"
        raise ValueError(f"evaluate: generator must return {wanted}, got {got}")
    return drawn


def _judge(
    prompts: Sequence[Prompt],
    drawn: Sequence[Sequence[Generation]],
    reward: Reward,
    decode: Callable[[Sequence[int]], str],
) -> list[tuple[Sample, ...]]:
    pairs = [(prompt, each) for prompt, row in zip(prompts, drawn, strict=True) for each in row]
    judged = judge("evaluate", reward, pairs, decode)
    samples = [Sample(each, *found) for (_, each), found in zip(pairs, judged, strict=True)]
    n = len(drawn[0])
    return [tuple(samples[i : i + n]) for i in range(0, len(samples), n)]
