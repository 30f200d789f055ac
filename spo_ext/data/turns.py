"""Turns of a policy and its environment, joined into the one trajectory that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spo_ext.data.records import RowError, Turn

MESSAGES = "completion"  # in a trajectory's info: the messages that its turns are


def is_plain(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it is one message of the assistant, in words alone."""
    return len(messages) == 1 and set(messages[0]) <= {"role", "content"}


def join(prompt_ids: Sequence[int], turns: Sequence[Turn]) -> dict[str, Any]:
    """The arguments of `Trajectory` that turns decide: token_ids, completion_mask, contexts,
    token_rewards and behaviour_logprobs.

    Where a turn's context begins with all that came before, the rest of it is what the environment
    said; where it does not, a template wrote earlier turns anew, and `contexts` keeps it.

    Raises RowError if the first context does not begin with the prompt, or if logprobs are not one
    for each token.
    """
    ids: list[int] = []
    mask: list[bool] = []
    rewards: list[float] = []
    logprobs: list[float] = []
    contexts: dict[int, list[int]] = {}
    read = list(prompt_ids)
    for turn in turns:
        context = list(turn.context)
        if context[: len(read)] == read:
            said = context[len(read) :]
            ids += said
            mask += [False] * len(said)
            rewards += [0.0] * len(said)
            logprobs += [0.0] * len(said)
        elif not ids:
            raise RowError("the first turn must read the prompt: it has other token ids")
        elif turn.token_ids:
            contexts[len(ids)] = context
        else:
            continue  # nobody answered to it
        if turn.logprobs is not None and len(turn.logprobs) != len(turn.token_ids):
            raise RowError(
                f"logprobs must be one for each of the {len(turn.token_ids)} tokens of a turn, got "
                f"{len(turn.logprobs)}"
            )
        ids += turn.token_ids
        mask += [turn.own] * len(turn.token_ids)
        rewards += [0.0] * len(turn.token_ids)
        logprobs += turn.logprobs or [0.0] * len(turn.token_ids)
        if turn.reward:
            rewards[-1] += turn.reward
        read = [*context, *turn.token_ids]
    known = all(turn.logprobs is not None for turn in turns if turn.own and turn.token_ids)
    return {
        "token_ids": ids,
        "completion_mask": mask,
        "contexts": contexts,
        "token_rewards": rewards,
        "behaviour_logprobs": logprobs if known else None,
    }
