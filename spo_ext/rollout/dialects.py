"""What servers with OpenAI's completions API differ in: requests, and what replies hold.

vllm: token ids in and out, n completions of a request, log-probabilities.
transformers: text in and out, one completion; takes sampling only as a generation_config.
openai: text in and out, one completion, the fields that every such server knows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from spo_ext.data.tokens import Tokenizer
from spo_ext.rollout.generation import Generation, Sampling
from spo_ext.store.records import Finish, Prompt

Dialect = Literal["vllm", "transformers", "openai"]
_FINISH: dict[object, Finish] = {"stop": "eos", "length": "truncated"}


class ReplyError(ValueError):
    """A reply of the right status that does not hold what was asked for."""


def request(
    dialect: Dialect, prompt: Prompt, sampling: Sampling, chat: bool, logprobs: bool
) -> dict[str, Any]:
    """The body of a request, but for the model; sampling.n is 1 unless the dialect is vllm."""
    body: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }
    if dialect == "vllm":
        body |= {"prompt": list(prompt.token_ids or ()), "n": sampling.n, "return_token_ids": True}
        # Else the server takes these from the model's generation_config.
        body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        return body | ({"logprobs": 0} if logprobs else {})
    if dialect == "transformers":
        names = {"do_sample": True, "top_k": 0, "repetition_penalty": 1.0}
        names |= {name: getattr(sampling, name) for name in _GENERATION_CONFIG}
        body["generation_config"] = json.dumps(names)
    if chat:
        content = prompt.content
        asked = [{"role": "user", "content": content}] if isinstance(content, str) else content
        return body | {"messages": [dict(message) for message in asked]}
    return body | {"prompt": prompt.content}


_GENERATION_CONFIG = ("temperature", "top_p", "max_new_tokens")


def from_token_ids(choice: Any, ends: Sequence[int], logprobs: bool) -> Generation:
    """A choice of vllm. Raises ReplyError."""
    finish = _finish(choice)
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise ReplyError(
            "the reply has no token_ids; the dialect vllm needs a server that knows "
            f"return_token_ids, got the fields {sorted(choice)}"
        )
    known = None
    if logprobs:
        known = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(known, list) or len(known) != len(ids):
            raise ReplyError(f"the reply must have a log-probability for each of {len(ids)} tokens")
    if finish == "eos" and ends and (not ids or ids[-1] not in ends):
        # The server left it out; of a token that it does not show, it gives no log-probability.
        return Generation((*ids, ends[0]), finish)
    return Generation(tuple(ids), finish, None if known is None else tuple(map(float, known)))


def from_text(choice: Any, prompt: Prompt, tokenizer: Tokenizer, chat: bool) -> Generation:
    """A choice with text, in the tokens that the tokenizer makes of it. Raises ReplyError."""
    finish = _finish(choice)
    words = _message(choice) if chat else choice.get("text")
    if not isinstance(words, str):
        raise ReplyError(f"the reply has no text, got the fields {sorted(choice)}")
    content = prompt.content
    completion = words if isinstance(content, str) else [{"role": "assistant", "content": words}]
    return Generation(tuple(tokenizer.completion_ids(content, completion, finish)), finish)


def _message(choice: Any) -> Any:
    message = choice.get("message") or {}
    for name in ("reasoning_content", "reasoning", "tool_calls"):
        if message.get(name):
            raise ReplyError(
                f"the server cuts {name} out of the message, so that the completion is not known; "
                "switch its parser off, or use token ids (dialect vllm)"
            )
    return message.get("content") or ""  # null for an empty answer


def choices(reply: Any, n: int) -> list[Any]:
    """Raises ReplyError unless there are n."""
    found = reply.get("choices") if isinstance(reply, dict) else None
    if (
        not isinstance(found, list)
        or len(found) != n
        or not all(isinstance(x, dict) for x in found)
    ):
        got = len(found) if isinstance(found, list) else "none"
        raise ReplyError(f"the reply must have {n} choices, got {got}")
    return sorted(found, key=lambda choice: int(choice.get("index", 0)))


def with_seed(sampling: Sampling, seed: int, n: int) -> Sampling:
    """Servers hold a seed in 32 bits or 64, with a sign."""
    return replace(sampling, seed=seed % 2**31, n=n)


def _finish(choice: Any) -> Finish:
    reason = choice.get("finish_reason")
    if reason not in _FINISH:
        raise ReplyError(f"finish_reason must be stop or length, got {reason!r}")
    return _FINISH[reason]
