"""What servers with OpenAI's completions API differ in: requests, and what replies hold.

vllm: token ids in and out, n completions of a request, log-probabilities; SGLang too.
llama.cpp: text in and out, one completion.
transformers: text in and out, one completion; takes sampling only as a generation_config.
openai: text in and out, one completion, the fields that every such server knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from spo_ext.data.records import RowError
from spo_ext.data.tokens import Tokenizer
from spo_ext.rollout.generation import Generation, Sampling
from spo_ext.store.records import Finish, Prompt

Dialect = Literal["vllm", "transformers", "openai", "llama.cpp"]
_FINISH: dict[object, Finish] = {"stop": "eos", "length": "truncated"}

# What a server, or the generation_config of its model, would else apply to the draws, which are to
# be those of the policy at the temperature and top-p alone.
_OPENAI: dict[str, Any] = {"frequency_penalty": 0.0, "presence_penalty": 0.0}
_VLLM: dict[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, **_OPENAI}
_LLAMA_CPP: dict[str, Any] = {
    "samplers": ["temperature", "top_p"],  # by itself it cuts to top-p first
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dynatemp_range": 0.0,
    "mirostat": 0,
    "repeat_penalty": 1.0,
    "dry_multiplier": 0.0,
    **_OPENAI,
}
# A field that is left out would be filled from the model's own generation_config.
_TRANSFORMERS: dict[str, Any] = {
    "do_sample": True,
    "num_beams": 1,
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
}
_NEUTRAL: dict[str, dict[str, Any]] = {
    "vllm": _VLLM,
    "llama.cpp": _LLAMA_CPP,
    "transformers": {},  # in its generation_config
    "openai": _OPENAI,
}
# By what a server's list of models says of their owner, for users who call it "openai".
_OWNED_BY = {"vllm": _VLLM, "sglang": _VLLM, "llamacpp": _LLAMA_CPP}
_ROUNDED_UP = 1e-3  # log-probability of a token that is certain, in float16
_GENERATION_CONFIG = ("temperature", "top_p", "max_new_tokens")

# Stored with each completion, or what a reply is read by.
FIXED = (
    "model",
    "prompt",
    "messages",
    "n",
    "temperature",
    "top_p",
    "logprobs",
    "return_token_ids",
    "stream",
)
# Beside the neutral ones, what would change processed log-probabilities.
_BIASES = ("logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "ignore_eos")


class ReplyError(ValueError):
    """A reply of the right status that does not hold what was asked for."""


def request(
    dialect: Dialect,
    prompt: Prompt,
    sampling: Sampling,
    chat: bool,
    logprobs: bool,
    owned_by: str = "",
) -> dict[str, Any]:
    """The body of a request, but for the model; sampling.n is 1 unless the dialect is vllm."""
    body: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }
    body |= _NEUTRAL[dialect]
    if dialect == "vllm":
        body |= {"prompt": list(prompt.token_ids or ()), "n": sampling.n, "return_token_ids": True}
        return body | ({"logprobs": 0} if logprobs else {})
    if dialect == "openai":
        body |= _OWNED_BY.get(owned_by, {})
    if dialect == "transformers":
        names = {name: getattr(sampling, name) for name in _GENERATION_CONFIG}
        body["generation_config"] = json.dumps(_TRANSFORMERS | names)
    if chat:
        content = prompt.content
        asked = [{"role": "user", "content": content}] if isinstance(content, str) else content
        return body | {"messages": [dict(message) for message in asked]}
    return body | {"prompt": prompt.content}


def changes_logprobs(name: str, value: object) -> bool:
    """Whether a field of a request to vllm makes other processed log-probabilities."""
    if name == "top_k":
        return value not in (-1, 0)
    return value != _VLLM[name] if name in _VLLM else name in _BIASES


def from_token_ids(choice: Any, ends: Sequence[int], logprobs: bool) -> Generation:
    """A choice of vllm. Raises ReplyError."""
    finish = _finish(choice)
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not all(_is_token(token) for token in ids):
        raise ReplyError(
            "the reply has no token_ids; the dialect vllm needs a server that knows "
            f"return_token_ids, got the fields {sorted(choice)}"
        )
    known = _logprobs(choice, len(ids)) if logprobs else None
    if finish == "eos" and ends and (not ids or ids[-1] not in ends):
        # The server left it out; of a token that it does not show, it gives no log-probability.
        return Generation((*ids, ends[0]), finish)
    return Generation(tuple(ids), finish, known)


def from_text(choice: Any, prompt: Prompt, tokenizer: Tokenizer, chat: bool) -> Generation:
    """A choice with text, in the tokens that the tokenizer makes of it. Raises ReplyError."""
    finish = _finish(choice)
    words = _message(choice) if chat else choice.get("text")
    if not isinstance(words, str):
        raise ReplyError(f"the reply has no text, got the fields {sorted(choice)}")
    content = prompt.content
    completion = words if isinstance(content, str) else [{"role": "assistant", "content": words}]
    try:
        ids = tokenizer.completion_ids(content, completion, finish)
    except RowError as error:
        raise ReplyError(f"its text has no token ids: {error}") from None
    return Generation(tuple(ids), finish)


def choices(reply: Any, n: int) -> list[Any]:
    """Raises ReplyError unless there are n."""
    found = reply.get("choices") if isinstance(reply, dict) else None
    if (
        not isinstance(found, list)
        or len(found) != n
        or not all(isinstance(x, dict) for x in found)
    ):
        got = len(found) if isinstance(found, list) else "none"
        error = reply.get("error") if isinstance(reply, dict) else None
        said = f": {error}"[:200] if error else ""
        raise ReplyError(f"the reply must have {n} choices, got {got}{said}")
    places = [choice.get("index", 0) for choice in found]
    if not all(isinstance(place, int) for place in places):
        raise ReplyError(f"the index of a choice must be an integer, got {places}")
    return [choice for _, choice in sorted(zip(places, found, strict=True), key=lambda x: x[0])]


def weight_version(reply: Any) -> str | None:
    """What a reply says of the weights that wrote it, as SGLang's do."""
    metadata = reply.get("metadata") if isinstance(reply, dict) else None
    found = metadata.get("weight_version") if isinstance(metadata, dict) else None
    return None if found is None else str(found)


def with_seed(sampling: Sampling, seed: int, n: int) -> Sampling:
    """Servers hold a seed in 32 bits or 64, with a sign."""
    return replace(sampling, seed=seed % 2**31, n=n)


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _logprobs(choice: Any, count: int) -> tuple[float, ...]:
    found = choice.get("logprobs")
    known = found.get("token_logprobs") if isinstance(found, dict) else None
    if not isinstance(known, list) or len(known) != count:
        got = len(known) if isinstance(known, list) else "none"
        raise ReplyError(
            f"the reply must have a log-probability for each of {count} tokens, got {got}"
        )
    for value in known:
        if type(value) not in (int, float) or not -math.inf < value <= _ROUNDED_UP:
            raise ReplyError(f"a log-probability must be a finite number <= 0, got {value!r}")
    return tuple(map(float, known))


def _message(choice: Any) -> Any:
    message = choice.get("message")
    if not isinstance(message, dict):
        return None
    for name in ("reasoning_content", "reasoning", "tool_calls"):
        if message.get(name):
            raise ReplyError(
                f"the server cuts {name} out of the message, so that the completion is not known; "
                "switch its parser off, or use token ids (dialect vllm)"
            )
    return message.get("content") or ""  # null for an empty answer


def _finish(choice: Any) -> Finish:
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or reason not in _FINISH:
        raise ReplyError(f"finish_reason must be stop or length, got {reason!r}")
    return _FINISH[reason]
