"""Publication to a running vLLM server.

The routes are those of vLLM's OpenAI-compatible server in the middle of 2026 (about 0.28): /pause,
/resume, /reset_prefix_cache and /collective_rpc exist only with VLLM_SERVER_DEV_MODE=1 in its
environment, /v1/load_lora_adapter and /v1/unload_lora_adapter only with
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. The worker's reload_weights must take weights_path; that of
0.14 does not, and fails. Weights go through a folder that the trainer and the server share. Over
NCCL (/init_weight_transfer_engine, /start_weight_update, /update_weights, /finish_weight_update)
they go by TRL's client: VLLMClientPublisher.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor, nn

from spo_ext.trainer.policy_weights import is_peft, policy_state
from spo_ext.trainer.publish import DirectoryPublisher, Publisher

logger = logging.getLogger(__name__)

_DEVELOPMENT = "start the server with VLLM_SERVER_DEV_MODE=1 in its environment"
_LORA = "start the server with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"


class PublishError(RuntimeError):
    """A server cannot be reached or refused; names the route and says what the server said.

    status: of HTTP, or None where there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerPublisher:
    """Publishes to a vLLM server through a shared folder.

    Each version is written like DirectoryPublisher does, then the server is paused once the
    requests under way are answered (so that one policy draws a completion from its first token to
    its last), loads it, forgets its prefix cache, which the old weights computed, and resumes. If
    loading fails the server stays paused rather than serve weights of two versions: restart it.

    Args:
        url: of the server, without /v1: "http://localhost:8000".
        directory: of the versions.
        lora_name: load only the adapter of a PeftModel, under this model name, which producers ask
            for. None: whole weights, an adapter merged into them.
        keep: versions that stay.
        server_directory: `directory` as the server sees it, if not by the same path.
        pause, prefix_cache: False for a server that lacks these routes; for prefix_cache it must
            run with --no-enable-prefix-caching.
        api_key: the --api-key of the server.
        timeout_s: of each request. /pause waits for the longest completion.

    Raises:
        ValueError: for an argument outside what is said.
        PublishError, from publish: if the server cannot be reached or refuses.
        OSError: if the folder cannot be written.
    """

    def __init__(
        self,
        url: str,
        directory: str | os.PathLike[str],
        *,
        lora_name: str | None = None,
        keep: int = 2,
        server_directory: str | os.PathLike[str] | None = None,
        pause: bool = True,
        prefix_cache: bool = True,
        api_key: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"ServerPublisher: url must be http://..., got {url!r}")
        if timeout_s <= 0:
            raise ValueError(f"ServerPublisher: timeout_s must be > 0, got {timeout_s!r}")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._folder = DirectoryPublisher(directory, keep, merge_adapter=lora_name is None)
        self._server_folder = PurePosixPath(server_directory or self._folder.directory.absolute())
        self._lora_name = lora_name
        self._pause = pause
        self._prefix_cache = prefix_cache
        self._api_key = api_key
        self._timeout_s = timeout_s

    def publish(
        self,
        model: nn.Module,
        tokenizer: Any,
        version: int,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """As Publisher says; `latest` names the version once the server has it."""
        if self._lora_name is not None and not is_peft(model):
            got = type(model).__name__
            raise ValueError(f"publish: model must be a PeftModel when lora_name is set, got {got}")
        written = self._folder.write(model, tokenizer, version, state_dict)
        if self._pause:
            self._post("/pause?mode=wait", hint=f"{_DEVELOPMENT}, or pass pause=False")
        if self._lora_name is None:
            rpc = {"method": "reload_weights", "kwargs": {"weights_path": self._seen(written)}}
            self._post("/collective_rpc", rpc, hint=_DEVELOPMENT)
        else:
            # PEFT saves an adapter that is not named "default" one folder deeper.
            adapter = next(written.rglob("adapter_config.json")).parent
            self._load_adapter(self._lora_name, self._seen(adapter))
        if self._prefix_cache:
            self._reset_prefix_cache()
        if self._pause:
            self._post("/resume", hint=_DEVELOPMENT)
        self._folder.announce(version)
        logger.info("%s serves version %d", self._url, version)

    def finish(self) -> None:
        """Writes `finished` into the folder; the server keeps the last version."""
        self._folder.finish()

    def _seen(self, path: Path) -> str:
        return str(self._server_folder / path.relative_to(self._folder.directory).as_posix())

    def _load_adapter(self, name: str, path: str) -> None:
        load = {"lora_name": name, "lora_path": path, "load_inplace": True}
        try:
            self._post("/v1/load_lora_adapter", load, hint=_LORA)
        except PublishError as error:
            # A server that does not know load_inplace refuses a name that is loaded.
            if error.status != 400 or "already been loaded" not in str(error):
                raise
            self._post("/v1/unload_lora_adapter", {"lora_name": name}, hint=_LORA)
            self._post("/v1/load_lora_adapter", load, hint=_LORA)

    def _reset_prefix_cache(self) -> None:
        hint = f"{_DEVELOPMENT}, or run it with --no-enable-prefix-caching and prefix_cache=False"
        answer = self._post("/reset_prefix_cache", hint=hint)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise PublishError(
                f"POST {self._url}/reset_prefix_cache: the server could not forget what the old "
                "weights computed, because requests are under way; publish with pause=True"
            )

    def _post(self, route: str, body: Mapping[str, Any] | None = None, *, hint: str) -> Any:
        """The answer, parsed if it is JSON."""
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = b"" if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + route, data, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                return _parsed(response.read())
        except urllib.error.HTTPError as error:
            said = _message(error.read())
            # The web framework's words for a route that the server does not have.
            advice = f"; {hint}" if error.code == 404 and said == "Not Found" else ""
            problem = f"POST {self._url}{route}: status {error.code}: {said}{advice}"
            raise PublishError(problem, error.code) from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset or timed out
            reason = getattr(error, "reason", error)
            raise PublishError(f"POST {self._url}{route}: no answer: {reason}") from None


class VLLMClientPublisher:
    """Publishes over NCCL by TRL's client of a vLLM server, without files.

    Args:
        client: a trl.generation.vllm_client.VLLMClient whose init_communicator(device) was called.
        device: where the client's communicator is, "cuda:0" or the like.

    Whatever the client raises is passed on.
    """

    def __init__(self, client: Any, device: str) -> None:
        self._client = client
        self._device = device

    def publish(
        self,
        model: nn.Module,
        tokenizer: Any,
        version: int,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """As Publisher says; the tokenizer is not sent."""
        if is_peft(model) or state_dict is not None:
            state = policy_state(model, state_dict)
        else:  # named once, where they are tied
            state = {name: weight.detach() for name, weight in model.named_parameters()}
        metadata = [
            (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
            for name, weight in state.items()
        ]
        self._client.update_named_params(metadata, self._moved(state))
        self._client.reset_prefix_cache()
        logger.info("the vLLM server has version %d", version)

    def finish(self) -> None:
        """Closes the communicator; the server keeps the last version."""
        self._client.close_communicator()

    def _moved(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in state.items():  # one at a time: they may be more than fit
            yield name, weight.to(self._device)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def _message(body: bytes) -> str:
    """What went wrong, from any of the forms in which servers put it."""
    found = _parsed(body)
    while isinstance(found, dict):
        inner = next((found[key] for key in ("error", "message", "detail") if key in found), None)
        if inner is None:
            break
        found = inner
    return str(found).strip() or "no message"


def publishers(url: str | None, directory: str | None, keep: int) -> list[Publisher]:
    """Those of SPOConfig's publish_url, publish_to and publish_keep."""
    if url is None:
        return [] if directory is None else [DirectoryPublisher(directory, keep)]
    if directory is None:
        raise ValueError(
            "SPOConfig: publish_to must be a folder that the server of publish_url reads, got None"
        )
    return [ServerPublisher(url, directory, keep=keep)]
