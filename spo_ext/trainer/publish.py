"""Publication of the behaviour policy: every k batches the producers get the current weights.

What a folder of policies holds is said in `spo_ext.rollout.follow`, which reads it.
"""

from __future__ import annotations

import filecmp
import http.client
import json
import logging
import os
import secrets
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor, nn

from spo_ext.durable import exchange_folders, fsync, fsync_tree, write_text
from spo_ext.rollout.follow import (
    FINISHED,
    LATEST,
    RUN,
    VERSION,
    check_run,
    latest_policy,
    version_name,
    version_of,
)
from spo_ext.shown import hide_passwords, visible
from spo_ext.trainer.model import is_peft, policy_state

logger = logging.getLogger(__name__)


class DirectoryPublisher:
    """Publishes to a folder, from which any process or machine that shares it may read.

    A version appears whole or not at all, whenever this process is killed. One process may write
    into a folder. To publish a version again, as a resumed run does, is harmless.

    Args:
        directory: made if missing.
        keep: versions that stay, >= 1. A reader may be loading the one before the latest: use >= 2.
        merge_adapter: a PeftModel is written as a whole model with the adapter merged into a copy,
            for AutoModelForCausalLM. False: the adapter only, for PeftModel and vLLM.
        run: whose policies they are; the folder must have those of no other run.

    Raises:
        ValueError: for an argument outside what is said, or an adapter that cannot be merged.
        OSError: if the folder cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 2,
        merge_adapter: bool = True,
        run: str | None = None,
    ) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"DirectoryPublisher: keep must be an integer >= 1, got {keep!r}")
        self.directory = Path(directory)
        self._keep = keep
        self._merge_adapter = merge_adapter
        self._run = run
        if run is not None:
            check_run(self.directory, run)
        self.directory.mkdir(parents=True, exist_ok=True)

    def publish(
        self,
        model: nn.Module,
        tokenizer: Any,
        version: int,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Returns when producers that ask get this version.

        Args:
            model: a PreTrainedModel or PeftModel, not wrapped by DDP. It is only read.
            tokenizer: of transformers, or None.
            version: >= 0, kept with every trajectory that this policy draws.
            state_dict: of `model`, with whole tensors, where `model.state_dict()` has only shards
                (FSDP2).

        Logs whether a version that was there was kept or replaced.
        """
        self.write(model, tokenizer, version, state_dict)
        self.announce(version)

    def write(
        self,
        model: nn.Module,
        tokenizer: Any,
        version: int,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """The folder of the version, complete, but not yet named by `latest`."""
        target = self.path(version)
        self._remove_temporary()
        (self.directory / FINISHED).unlink(missing_ok=True)  # of the run that this one resumes
        if self._run is not None:
            write_text(self.directory / RUN, self._run)
        temporary = self.directory / f"{target.name}.tmp-{os.getpid()}"
        temporary.mkdir()
        self._save(temporary, model, state_dict)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        fsync_tree(temporary)
        self._move(temporary, target)
        return target

    def announce(self, version: int) -> None:
        """Names the version in `latest`, and removes those that are too old."""
        write_text(self.directory / LATEST, self.path(version).name)
        self._remove_old(version)

    def finish(self) -> None:
        """Writes `finished`, which holds what `latest` holds: this version was the last."""
        latest = self.directory / LATEST
        write_text(self.directory / FINISHED, latest.read_text() if latest.is_file() else "")

    def path(self, version: int) -> Path:
        """Where a version is or will be."""
        return self.directory / version_name(version)

    def _save(self, folder: Path, model: Any, state_dict: Mapping[str, Tensor] | None) -> None:
        # save_pretrained takes tensors out of the mapping that it is given, hence the copies.
        if not is_peft(model):
            if getattr(model, "_hf_peft_config_loaded", False):
                raise ValueError(
                    "publish: model has adapters that were added without PEFT's get_peft_model; "
                    "wrap it as a PeftModel"
                )
            model.save_pretrained(folder, state_dict=None if state_dict is None else {**state_dict})
        elif self._merge_adapter:
            merged = policy_state(model, state_dict)
            model.get_base_model().save_pretrained(folder, state_dict=merged)
        else:
            given = {} if state_dict is None else {"state_dict": {**state_dict}}
            model.save_pretrained(folder, selected_adapters=list(model.active_adapters), **given)

    def _move(self, temporary: Path, target: Path) -> None:
        if not target.exists():
            os.rename(temporary, target)
            fsync(self.directory)
            logger.info("published %s", target)
            return
        if _same_files(temporary, target):
            logger.info("published %s: it was there already, with the same files", target)
        else:
            exchange_folders(temporary, target)
            logger.info("published %s: it replaces other weights of this version", target)
        shutil.rmtree(temporary)

    def _remove_old(self, version: int) -> None:
        """Versions after this one stay: a run that was resumed writes them again."""
        found = [
            (int(match[1]), path)
            for path in self.directory.iterdir()
            if (match := VERSION.fullmatch(path.name)) and int(match[1]) <= version
        ]
        for _, path in sorted(found)[: -self._keep]:
            # Renamed first: no reader may find a version with some of its files.
            doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)

    def _remove_temporary(self) -> None:
        for path in self.directory.glob("version-*.tmp-*"):
            logger.info("removed %s, left over by a process that was killed", path)
            shutil.rmtree(path)


def _same_files(first: Path, second: Path) -> bool:
    files = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (first, second)
    ]
    filecmp.clear_cache()
    return files[0] == files[1] and all(
        filecmp.cmp(first / name, second / name, shallow=False) for name in files[0]
    )


logger = logging.getLogger(__name__)

_DEVELOPMENT = "start the server with VLLM_SERVER_DEV_MODE=1 in its environment"
_PAUSE_S = 2.0
_SERVER_S = 600.0  # that a server of `spo train` may take to start again
_LORA = "start the server with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"


class PublishError(RuntimeError):
    """A server cannot be reached or refused; names the route and says what the server said.

    status: of HTTP, or None where there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(visible(hide_passwords(message)))
        self.status = status


class ServerPublisher(DirectoryPublisher):
    """Publishes to a vLLM server through a shared folder.

    Each version is written like DirectoryPublisher does, then the server is paused once the
    requests under way are answered (so that one policy draws a completion from its first token to
    its last), loads it, forgets its prefix cache, which the old weights computed, is told the
    version, and resumes when `latest` names it: whoever gets an answer of the new weights can know.
    If loading fails the server stays paused rather than serve weights of two versions: restart it.

    Args:
        url: of the server, without /v1: "http://localhost:8000".
        directory, keep, run: see DirectoryPublisher.
        lora_name: load only the adapter of a PeftModel, under this model name, which producers ask
            for. None: whole weights, an adapter merged into them.
        server_directory: `directory` as the server sees it, if not by the same path.
        pause, prefix_cache: False for a server that lacks these routes; for prefix_cache it must
            run with --no-enable-prefix-caching.
        api_key: the --api-key of the server.
        timeout_s: of each request. /pause waits for the longest completion.
        retry_s: how long a server that is not there, as during a restart, is asked again.

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
        run: str | None = None,
        server_directory: str | os.PathLike[str] | None = None,
        pause: bool = True,
        prefix_cache: bool = True,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry_s: float = 0.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"ServerPublisher: url must be http://..., got {url!r}")
        if timeout_s <= 0:
            raise ValueError(f"ServerPublisher: timeout_s must be > 0, got {timeout_s!r}")
        super().__init__(directory, keep, merge_adapter=lora_name is None, run=run)
        self._url = url.rstrip("/").removesuffix("/v1")
        self._server_folder = PurePosixPath(server_directory or self.directory.absolute())
        self._lora_name = lora_name
        self._pause = pause
        self._prefix_cache = prefix_cache
        self._api_key = api_key
        self._timeout_s, self._retry_s = timeout_s, retry_s

    def publish(
        self,
        model: nn.Module,
        tokenizer: Any,
        version: int,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """As DirectoryPublisher says; `latest` names the version once the server has it."""
        if self._lora_name is not None and not is_peft(model):
            got = type(model).__name__
            raise ValueError(f"publish: model must be a PeftModel when lora_name is set, got {got}")
        self.write(model, tokenizer, version, state_dict)
        until = 0.0
        while True:
            try:
                self._serve(version)
                return
            except PublishError as error:
                now = time.monotonic()
                if error.status is not None or now >= (until or now + self._retry_s):
                    raise
                if not until:
                    logger.warning("%s; trying again for up to %g s", error, self._retry_s)
                    until = now + self._retry_s
            time.sleep(min(_PAUSE_S, self._retry_s))

    def restore(self) -> None:
        """Brings the latest version to the server again, if the server says that it has another,
        as after a restart.

        A server that cannot be reached now, or does not say what it has, is left alone.

        Raises PublishError if it refuses.
        """
        newest = latest_policy(self.directory)
        try:
            said = self._request("GET", "/weight_info")
            held = said.get("weight_version") if isinstance(said, dict) else None
            if newest is None or held is None or version_of(str(held)) == newest[0]:
                return
            words = "%s says that its weights are %r: it gets version %d again"
            logger.warning(words, hide_passwords(self._url), held, newest[0])
            self._serve(newest[0])
        except PublishError as error:
            if error.status not in (None, 404, 405):
                raise

    def _serve(self, version: int) -> None:
        folder = self.path(version)
        if self._pause:
            self._post("/pause?mode=wait", hint=f"{_DEVELOPMENT}, or pass pause=False")
        if self._lora_name is None:
            rpc = {"method": "reload_weights", "kwargs": {"weights_path": self._seen(folder)}}
            self._post("/collective_rpc", rpc, hint=_DEVELOPMENT)
        else:
            # PEFT saves an adapter that is not named "default" one folder deeper.
            adapter = next(folder.rglob("adapter_config.json")).parent
            self._load_adapter(self._lora_name, self._seen(adapter))
        if self._prefix_cache:
            self._reset_prefix_cache()
        self._tell_version(version)
        self.announce(version)
        if self._pause:
            self._post("/resume", hint=_DEVELOPMENT)
        logger.info("%s serves version %d", hide_passwords(self._url), version)

    def _tell_version(self, version: int) -> None:
        # The mark tells this publication from one before a restart.
        stamp = f"{version_name(version)}.{secrets.token_hex(4)}"
        try:
            self._post("/update_weight_version", {"new_version": stamp}, hint=_DEVELOPMENT)
        except PublishError as error:
            if error.status not in (404, 405):
                raise
            logger.warning(
                "%s has no /update_weight_version, as vLLM before 0.32: a restart of the server "
                "goes unnoticed",
                hide_passwords(self._url),
            )

    def _seen(self, path: Path) -> str:
        return str(self._server_folder / path.relative_to(self.directory).as_posix())

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
        return self._request(
            "POST", route, b"" if body is None else json.dumps(body).encode(), hint
        )

    def _request(self, method: str, route: str, data: bytes | None = None, hint: str = "") -> Any:
        """The answer, parsed if it is JSON."""
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(self._url + route, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                return _parsed(response.read())
        except urllib.error.HTTPError as error:
            said = _message(error.read())
            # The web framework's words for a route that the server does not have.
            advice = f"; {hint}" if error.code == 404 and said == "Not Found" else ""
            problem = f"{method} {self._url}{route}: status {error.code}: {said}{advice}"
            raise PublishError(problem, error.code) from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset or timed out
            reason = getattr(error, "reason", error)
            raise PublishError(f"{method} {self._url}{route}: no answer: {reason}") from None


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


def make_publisher(
    url: str | None, directory: str | None, keep: int, run: str
) -> DirectoryPublisher | None:
    """That of SPOConfig's publish_url, publish_to, publish_keep and run."""
    if url is None:
        return None if directory is None else DirectoryPublisher(directory, keep, run=run)
    if directory is None:
        raise ValueError(
            "SPOConfig: publish_to must be a folder that the server of publish_url reads, got None"
        )
    return ServerPublisher(url, directory, keep=keep, run=run, retry_s=_SERVER_S)
