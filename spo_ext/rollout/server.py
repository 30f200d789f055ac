"""Completions of a server with OpenAI's completions API: vLLM, transformers serve, others."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, get_args

from spo_ext.checks import check_integer, check_one_of, number, refuse
from spo_ext.data.records import RowError
from spo_ext.data.tokens import Tokenizer
from spo_ext.rollout import dialects
from spo_ext.rollout.dialects import Dialect, ReplyError
from spo_ext.rollout.generation import Generation, Sampling, completion_seeds, derived_seed
from spo_ext.shown import hide_passwords, visible
from spo_ext.store.records import Prompt, StoredPrompt

_LONGEST_WAIT_S = 60.0
_CONNECT_S = 10.0
_OF_THE_PROMPT = (400, 413, 422)
_LATER = (408, 425, 429)

LogprobsMode = Literal["processed_logprobs", "raw_logprobs"]


class ServerError(RuntimeError):
    """A server that cannot be reached, refuses, or says what cannot be used."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(hide_passwords(message)))


class PromptError(ServerError):
    """A request got no completions, which need not be so for other prompts.

    refused: the server says that the request is wrong, as for a prompt that is too long; else it
    gave no answer that can be used, however often it was asked.
    """

    def __init__(self, message: str, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


class WeightsChanged(ServerError):
    """The server got other weights while it drew: no one policy wrote the completions."""


class ServerGenerator:
    """Generator behind a server.

    Args:
        url: up to and including /v1, as in "http://localhost:8000/v1".
        model: the name under which the server knows it.
        dialect: "vllm" (prompts and completions are token ids; SGLang too), or "llama.cpp",
            "transformers" and "openai" (texts; a completion gets the tokens that the tokenizer
            makes of it, which need not be those that were drawn).
        tokenizer: for texts; the one of the policy that is trained.
        api_key: sent as a bearer token.
        timeout_s: how long a request may stay without an answer. It is not repeated then, since
            the server may be at work on it still.
        retries: how often a request is sent again after 408, 425, 429, 5xx or a broken connection.
        concurrency: requests at once.
        chat: whether texts go to /chat/completions; None: if the prompt has messages.
        logprobs: store the server's log-probabilities (dialect vllm).
        logprobs_mode: the --logprobs-mode of vLLM. What is stored is always that of the full
            softmax at the sampling temperature, so "processed_logprobs" (after temperature and
            top-p) need a top_p of 1, and "raw_logprobs" (vLLM's default) a temperature of 1.
        end_ids: the policy's end tokens (dialect vllm); the first is added to a completion that
            stopped without one.
        extra: more fields for each request; one that is None is left out of it.
        published: what a trainer says that the server's weights are; see `stamp`.

    Requests say that nothing but temperature and top-p is to shape the draws: top_k, min_p and
    penalties of the server or of the model's generation_config are switched off, by the names
    that the dialect has for them. A seed is sent with every request; whether it decides the
    completions is up to the server.
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
        logprobs_mode: LogprobsMode = "processed_logprobs",
        end_ids: Sequence[int] = (),
        extra: Mapping[str, Any] | None = None,
        published: Callable[[], object] = lambda: None,
    ) -> None:
        owner = "ServerGenerator"
        if not url.startswith(("http://", "https://")):
            refuse(owner, "url", "a URL of http or https", url)
        check_one_of(owner, "dialect", dialect, get_args(Dialect))
        check_one_of(owner, "logprobs_mode", logprobs_mode, get_args(LogprobsMode))
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
        self._tokenizer, self._chat = tokenizer, chat
        self._logprobs, self._logprobs_mode = logprobs, logprobs_mode
        self._end_ids, self._extra = tuple(end_ids), dict(extra or {})
        for name, value in self._extra.items():
            if name in dialects.FIXED:
                refuse(owner, "extra", "without fields that other arguments set", name)
            processed = logprobs and logprobs_mode == "processed_logprobs"
            if processed and dialects.changes_logprobs(name, value):
                refuse(owner, f"extra[{name!r}]", "left out with processed log-probs", value)
        self._published = published
        self._retries, self._concurrency, self._timeout_s = retries, concurrency, timeout_s
        self._random = random.Random()  # of waiting times, not the caller's
        self._client = _client(api_key, timeout_s, concurrency)
        self._card: dict[str, Any] | None = None
        self._stated_mode: str | None = None
        # vLLM's route, then SGLang's; one that the server does not have is not asked for again.
        self._weight_routes = ["/weight_info", "/model_info"] if dialect == "vllm" else []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        """n completions of each prompt.

        Raises ServerError, and ValueError for a prompt without token ids in dialect vllm or a
        sampling whose log-probabilities the server does not know.
        """
        self._check(prompts, sampling)
        self._about()
        try:
            stamp: object = self.stamp()
        except PromptError:
            stamp = None  # the requests will say what is wrong

        def ask(prompt: Prompt, one: Sampling) -> list[Generation]:
            try:
                return self._ask(stamp, prompt, one)
            except PromptError as error:
                name = described(prompt, sampling)
                raise PromptError(f"{name}: {error}", error.refused) from None

        return self._each(prompts, sampling, ask)

    def attempt(
        self, prompts: Sequence[Prompt], sampling: Sampling, stamp: object
    ) -> list[list[Generation] | ServerError]:
        """n completions of each prompt, or why there are none: a PromptError or WeightsChanged.

        Args:
            stamp: what `stamp` must return after each reply, else the reply is not used.

        Raises ServerError for what every prompt would meet (an address or a key that is wrong),
        and ValueError as `generate` does.
        """
        changed: list[ServerError] = []

        def ask(prompt: Prompt, sampling: Sampling) -> list[Any]:
            if changed:
                return changed * sampling.n
            try:
                return list(self._ask(stamp, prompt, sampling))
            except WeightsChanged as error:
                changed[:] = [error]
                return changed * sampling.n
            except PromptError as error:
                return [error] * sampling.n

        self._check(prompts, sampling)
        self._about()
        return [
            next((each for each in group if isinstance(each, ServerError)), group)
            for group in self._each(prompts, sampling, ask)
        ]

    def stamp(self) -> tuple[str | None, object]:
        """Tells the server's weights from those it had before, as far as they can be told: by its
        own word (`weights`), and by what was published.

        Raises ServerError if it cannot be reached.
        """
        return self.weights(), self._published()

    def weights(self) -> str | None:
        """The version that the server says its weights are, as set by /update_weight_version; vLLM
        says "default" of those it was started with. None: it does not say.

        Raises ServerError if it cannot be reached.
        """
        while self._weight_routes:
            path = self._url.removesuffix("/v1") + self._weight_routes[0]
            try:
                found = self._send("GET", path)
            except (ServerError, ReplyError) as error:
                if isinstance(error, PromptError) and not error.refused:
                    raise
                found = None
            if isinstance(found, dict) and found.get("weight_version") is not None:
                return str(found["weight_version"])
            del self._weight_routes[0]
        return None

    def context(self) -> int | None:
        """The most tokens of a prompt and its completion together, if the server says so."""
        found = self._about().get("max_model_len")
        return found if type(found) is int and found > 0 else None

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

    def _check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        if self._logprobs:
            check_logprobs_mode("ServerGenerator", self._mode(), sampling)
        for index, prompt in enumerate(prompts if self._dialect == "vllm" else ()):
            if not prompt.token_ids:
                name = f"prompts[{index}].token_ids"
                refuse("ServerGenerator.generate", name, "at least one token id", None)

    def _each(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        ask: Callable[[Prompt, Sampling], list[Any]],
    ) -> list[list[Any]]:
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
            found = [x for part in pool.map(lambda each: ask(*each), work) for x in part]
        finally:
            pool.shutdown(cancel_futures=True)
        return [found[start : start + sampling.n] for start in range(0, len(found), sampling.n)]

    def _ask(self, stamp: object, prompt: Prompt, sampling: Sampling) -> list[Generation]:
        chat = self._dialect != "vllm" and (
            self._chat if self._chat is not None else not isinstance(prompt.content, str)
        )
        path = f"{self._url}/{'chat/completions' if chat else 'completions'}"
        if self._dialect != "vllm" and not chat and not isinstance(prompt.content, str):
            refuse("ServerGenerator", "chat", "None or True for prompts with messages", chat)
        owner = str((self._card or {}).get("owned_by"))
        body = dialects.request(self._dialect, prompt, sampling, chat, self._logprobs, owner)
        body = {"model": self._model, **body, **self._extra}
        body = {name: value for name, value in body.items() if value is not None}
        try:
            reply = self._send("POST", path, body)
            found = self._read(reply, prompt, sampling.n, chat)
        except (ReplyError, RowError) as error:
            raise PromptError(f"{path}: {error}", refused=False) from None
        self._check_stamp(path, reply, stamp)
        return found

    def _read(self, reply: Any, prompt: Prompt, n: int, chat: bool) -> list[Generation]:
        found = dialects.choices(reply, n)
        if self._tokenizer is None or self._dialect == "vllm":
            return [dialects.from_token_ids(x, self._end_ids, self._logprobs) for x in found]
        return [dialects.from_text(x, prompt, self._tokenizer, chat) for x in found]

    def _check_stamp(self, path: str, reply: Any, stamp: Any) -> None:
        now = self.stamp()
        own = dialects.weight_version(reply)
        if stamp is None or (now == stamp and own in (None, now[0])):
            return
        before, after = (f"{held!r} (published: {latest})" for held, latest in (stamp, now))
        also = "" if own is None else f", {own!r} in the reply"
        raise WeightsChanged(
            f"{path}: the weights changed while it drew: {before} before, {after} after{also}"
        )

    def _mode(self) -> str:
        """The server's own word on its log-probabilities, which vLLM gives in its development
        mode, else what the caller says."""
        if self._stated_mode is None:
            self._stated_mode = self._logprobs_mode
            path = f"{self._url.removesuffix('/v1')}/server_info?config_format=json"
            try:
                found = self._send("GET", path, retries=0)
                self._stated_mode = str(found["vllm_config"]["model_config"]["logprobs_mode"])
            except (ServerError, ReplyError, KeyError, TypeError):
                pass
        return self._stated_mode

    def _about(self) -> dict[str, Any]:
        """What the server's list of models says of this one; nothing if it has no such list."""
        if self._card is None:
            try:
                models = self._send("GET", f"{self._url}/models", retries=0)
            except (ServerError, ReplyError) as error:
                if isinstance(error, PromptError) and not error.refused:
                    return {}  # it may answer later
                models = None
            found = models.get("data") if isinstance(models, dict) else None
            cards = [x for x in found if isinstance(x, dict)] if isinstance(found, list) else []
            mine = [card for card in cards if card.get("id") == self._model]
            self._card = (mine or cards[:1] or [{}])[0]
        return self._card

    def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        retries: int | None = None,
    ) -> Any:
        """The reply, parsed.

        Raises PromptError where another request might fare better, ReplyError if it is no JSON.
        """
        import httpx

        retries = self._retries if retries is None else retries
        for attempt in range(retries + 1):
            asked_s = 0.0
            try:
                response = self._client.request(method, path, json=body)
            except httpx.ReadTimeout:
                raise PromptError(
                    f"{path}: no answer within timeout_s={self._timeout_s:g}; "
                    "allow more time, or fewer requests at once",
                    refused=False,
                ) from None
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return _json(response)
                problem = f"status {response.status_code}: {_message(response)}"
                if response.status_code in _OF_THE_PROMPT:
                    raise PromptError(f"{path}: {problem}", refused=True)
                if response.status_code not in _LATER and response.status_code < 500:
                    raise ServerError(f"{path}: {problem}")
                asked_s = _retry_after_s(response)
            if attempt < retries:
                wait_s = 0.25 * 2**attempt * (1 + self._random.random())
                time.sleep(min(max(wait_s, asked_s), _LONGEST_WAIT_S))
        tried = f"(after {retries + 1} attempts)"
        raise PromptError(f"{path}: {problem} {tried}", refused=False)


def described(prompt: Prompt, sampling: Sampling) -> str:
    """A prompt for a message: id, first words and lengths."""
    content = prompt.content
    text = content if isinstance(content, str) else str(content[-1].get("content"))
    words = " ".join(text.split())
    shown = words if len(words) <= 40 else f"{words[:40]}..."
    name = f"prompt {prompt.id} " if isinstance(prompt, StoredPrompt) else "the prompt "
    size = len(prompt.token_ids or ())
    return f"{name}({shown!r}, {size} tokens and up to {sampling.max_new_tokens} new ones)"


def check_logprobs_mode(owner: str, mode: str, sampling: Sampling) -> None:
    """Raises ValueError unless these are the log-probabilities of the full softmax at the
    temperature."""
    check_one_of(owner, "logprobs_mode", mode, get_args(LogprobsMode))
    kept = "the store keeps those of the full softmax at the temperature"
    if mode == "processed_logprobs" and sampling.top_p != 1:
        expected = f"1 with {mode}, which are those of the tokens that top-p leaves, while {kept}"
        refuse(owner, "top_p", expected, sampling.top_p)
    if mode == "raw_logprobs" and sampling.temperature != 1:
        expected = f"1 with {mode}, which are those at temperature 1, while {kept}"
        refuse(owner, "temperature", expected, sampling.temperature)


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


def _json(response: Any) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError):
        raise ReplyError(f"the reply must be JSON, got {response.text[:200]!r}") from None


def _message(response: Any) -> str:
    """The server's own words: OpenAI's error.message, FastAPI's detail, or the text."""
    try:
        reply = response.json()
    except (ValueError, RecursionError):
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
