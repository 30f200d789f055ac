"""Completions of a server with OpenAI's completions API: vLLM, transformers serve, others."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, get_args

from spo_ext.data.records import RowError
from spo_ext.data.tokens import Tokenizer
from spo_ext.rollout import dialects
from spo_ext.rollout.dialects import Dialect, ReplyError
from spo_ext.rollout.draws import completion_seeds, derived_seed
from spo_ext.rollout.generation import Generation, Sampling
from spo_ext.store.checks import check_integer, check_one_of, number, refuse
from spo_ext.store.records import Prompt

_LONGEST_WAIT_S = 60.0
_CONNECT_S = 10.0


class ServerError(RuntimeError):
    """A server that cannot be reached, refuses, or says what cannot be used."""


class ServerGenerator:
    """Generator behind a server, which says nothing of its policy's version: the caller does.

    Args:
        url: up to and including /v1, as in "http://localhost:8000/v1".
        model: the name under which the server knows it.
        dialect: "vllm" (prompts and completions are token ids), or "transformers" and "openai"
            (texts; a completion gets the tokens that the tokenizer makes of it, which need not be
            those that were drawn).
        tokenizer: for texts; the one of the policy that is trained.
        api_key: sent as a bearer token.
        timeout_s: how long a request may stay without an answer. It is not repeated then, since
            the server may be at work on it still.
        retries: how often a request is sent again after 408, 429, 5xx or a broken connection.
        concurrency: requests at once.
        chat: whether texts go to /chat/completions; None: if the prompt has messages.
        logprobs: store the server's log-probabilities (dialect vllm). Only true of the policy at
            the sampling temperature if vLLM runs with --logprobs-mode processed_logprobs, or at
            temperature 1 without it.
        end_ids: the policy's end tokens (dialect vllm); the first is added to a completion that
            stopped without one.
        extra: more fields for each request.

    A seed is sent with every request; whether it decides the completions is up to the server.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        dialect: Dialect = "vllm",
        tokenizer: Tokenizer | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retries: int = 5,
        concurrency: int = 16,
        chat: bool | None = None,
        logprobs: bool = False,
        end_ids: Sequence[int] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        owner = "ServerGenerator"
        if not url.startswith(("http://", "https://")):
            refuse(owner, "url", "a URL of http or https", url)
        check_one_of(owner, "dialect", dialect, get_args(Dialect))
        if dialect == "vllm" and chat:
            refuse(owner, "chat", "None or False for dialect vllm, which reads token ids", chat)
        if dialect != "vllm" and tokenizer is None:
            refuse(owner, "tokenizer", f"given for dialect {dialect}", None)
        if dialect != "vllm" and logprobs:
            refuse(owner, "logprobs", f"False for dialect {dialect}", logprobs)
        number(owner, "timeout_s", timeout_s, above=0.0)
        check_integer(owner, "retries", retries, 0)
        check_integer(owner, "concurrency", concurrency, 1)
        self._url, self._model, self._dialect = url.rstrip("/"), model, dialect
        self._tokenizer, self._chat, self._logprobs = tokenizer, chat, logprobs
        self._end_ids, self._extra = tuple(end_ids), dict(extra or {})
        self._retries, self._concurrency, self._timeout_s = retries, concurrency, timeout_s
        self._random = random.Random()  # of waiting times, not the caller's
        self._client = _client(api_key, timeout_s, concurrency)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        """n completions of each prompt.

        Raises ServerError, and ValueError for a prompt without token ids in dialect vllm.
        """
        if self._dialect == "vllm":
            for index, prompt in enumerate(prompts):
                if not prompt.token_ids:
                    name = f"prompts[{index}].token_ids"
                    refuse("ServerGenerator.generate", name, "at least one token id", None)
        keys = [derived_seed(repr(prompt.content), prompt.token_ids) for prompt in prompts]
        seeds = completion_seeds(sampling.seed, [(key,) for key in keys], sampling.n)
        n = sampling.n if self._dialect == "vllm" else 1
        work = [
            (prompt, dialects.with_seed(sampling, seed, n))
            for prompt, own in zip(prompts, seeds, strict=True)
            for seed in own[:: sampling.n if n > 1 else 1]
        ]
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="spo-server")
        try:
            found = [x for part in pool.map(lambda each: self._ask(*each), work) for x in part]
        finally:
            pool.shutdown(cancel_futures=True)
        return [found[start : start + sampling.n] for start in range(0, len(found), sampling.n)]

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> ServerGenerator:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, prompt: Prompt, sampling: Sampling) -> list[Generation]:
        chat = self._dialect != "vllm" and (
            self._chat if self._chat is not None else not isinstance(prompt.content, str)
        )
        path = f"{self._url}/{'chat/completions' if chat else 'completions'}"
        if self._dialect != "vllm" and not chat and not isinstance(prompt.content, str):
            refuse("ServerGenerator", "chat", "None or True for prompts with messages", chat)
        body = dialects.request(self._dialect, prompt, sampling, chat, self._logprobs)
        reply = self._post(path, {"model": self._model, **body, **self._extra})
        try:
            found = dialects.choices(reply, sampling.n)
            if self._tokenizer is None or self._dialect == "vllm":
                return [
                    dialects.from_token_ids(choice, self._end_ids, self._logprobs)
                    for choice in found
                ]
            return [dialects.from_text(choice, prompt, self._tokenizer, chat) for choice in found]
        except (ReplyError, RowError) as error:
            raise ServerError(f"{path}: {error}") from None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        import httpx

        for attempt in range(self._retries + 1):
            asked_s = 0.0
            try:
                response = self._client.post(path, json=body)
            except httpx.ReadTimeout:
                raise ServerError(
                    f"{path}: no answer within timeout_s={self._timeout_s:g}; "
                    "allow more time, or fewer requests at once"
                ) from None
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return _json(path, response)
                problem = f"status {response.status_code}: {_message(response)}"
                if response.status_code not in (408, 429) and response.status_code < 500:
                    raise ServerError(f"{path}: {problem}")
                asked_s = _retry_after_s(response)
            if attempt < self._retries:
                wait_s = 0.25 * 2**attempt * (1 + self._random.random())
                time.sleep(min(max(wait_s, asked_s), _LONGEST_WAIT_S))
        raise ServerError(f"{path}: {problem} (after {self._retries + 1} attempts)")


def _client(api_key: str | None, timeout_s: float, concurrency: int) -> Any:
    try:
        import httpx
    except ImportError as error:
        raise ImportError(f"a server needs httpx ({error}): pip install httpx") from error
    return httpx.Client(
        headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        timeout=httpx.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s), pool=None),
        limits=httpx.Limits(max_connections=concurrency),
    )


def _json(path: str, response: Any) -> Any:
    try:
        return response.json()
    except ValueError:
        raise ServerError(f"{path}: the reply must be JSON, got {response.text[:200]!r}") from None


def _message(response: Any) -> str:
    """The server's own words: OpenAI's error.message, FastAPI's detail, or the text."""
    try:
        reply = response.json()
    except ValueError:
        return str(response.text[:500])
    if isinstance(reply, dict):
        error = reply.get("error", reply)
        if isinstance(error, dict):
            return str(error.get("message") or error.get("detail") or error)[:500]
        return str(error)[:500]
    return str(reply)[:500]


def _retry_after_s(response: Any) -> float:
    words = response.headers.get("retry-after", "")
    return float(words) if words.isdecimal() else 0.0
