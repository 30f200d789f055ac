"""A server that behaves as vLLM 0.32 was seen to, as far as producers and publishers can tell.

Completions say which weights wrote them. By the model's name, or by the first token of a prompt, it
misbehaves. Run as a process: prints its port. GET /log gives the requests it got, and how many at
once. POST /fake changes it:

{"restart": true}    it has the weights of its start again
{"away": 2}          seconds without an answer to anybody
{"seconds": 0.1}     of each completion
{"room": 64}         tokens of context
{"dev": false}       no routes of the development mode
{"versions": false}  no /weight_info, as before 0.32
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

END = 256
# A policy of four tokens, for which the defaults of the server's generation_config matter.
PROBABILITIES = (0.5, 0.3, 0.15, 0.05)
SERVER_DEFAULTS = {"top_k": 2, "min_p": 0.2, "repetition_penalty": 1.3, "presence_penalty": 0.5}
NEUTRAL = {"top_k": (-1, 0), "min_p": (0,), "repetition_penalty": (1,), "presence_penalty": (0,)}
MODES = ("processed_logprobs", "raw_logprobs")  # also names of models, which answer so

# By the first token of a prompt, what becomes of its request.
TROUBLES = {
    1000: "too long",
    1001: "status 422",
    1002: "status 500",
    1003: "dropped",
    1004: "not json",
    1005: "no logprobs",
    1006: "fewer logprobs",
    1007: "more logprobs",
    1008: "null logprob",
    1009: "nan logprob",
    1010: "positive logprob",
    1011: "no choices",
    1012: "choices that are no objects",
    1013: "no finish_reason",
    1014: "token ids of other types",
    1015: "an error of status 200",
    1016: "hang",
    1017: "status 413",
}
DEVELOPMENT = ("/pause", "/resume", "/collective_rpc", "/reset_prefix_cache")
VERSIONS = ("/update_weight_version", "/weight_info")

_lock = threading.Condition()
_log: list[dict[str, Any]] = []
_busy = 0
_most_busy = 0
_refusals = {"flaky": [429, 503], "broken": [500] * 1000, "once": [429]}


class Engine:
    """Weights, and who is served by them."""

    def __init__(self) -> None:
        self.seconds, self.room, self.dev, self.versions = 0.0, 100_000, True, True
        self.running = self.held = 0
        self.back = 0.0
        self.restart()

    def restart(self) -> None:
        self.weights, self.version, self.paused = 0, "default", False

    def complete(self) -> int:
        """The number of the weights that write a completion; a paused server holds it first."""
        with _lock:
            self.held += self.paused
            _lock.wait_for(lambda: not self.paused)
            self.running += 1
            weights = self.weights
        time.sleep(self.seconds)
        with _lock:
            self.running -= 1
            _lock.notify_all()
        return weights

    def control(self, path: str, body: Any) -> Any:
        """An answer to a route of the development mode."""
        if path == "/collective_rpc":
            time.sleep(10 * self.seconds)  # weights take a while
        with _lock:
            if path == "/pause":
                self.paused = True
                _lock.wait_for(lambda: not self.running)
                return {"status": "paused"}
            if path == "/resume":
                self.paused = False
                _lock.notify_all()
                return {"status": "resumed"}
            if path == "/collective_rpc":
                found = re.search(r"version-(\d+)$", body["kwargs"]["weights_path"])
                assert found is not None and not self.running
                self.weights = 1 + int(found[1])
                return {"results": [None]}
            if path == "/update_weight_version":
                self.version = body["new_version"]
                return {"success": True, "new_version": self.version}
            return {"weight_version": self.version} if path == "/weight_info" else {}


engine = Engine()


def reply(body: dict[str, Any], weights: int, trouble: str) -> Any:
    """Tokens that say the prompt's length, the seed, the number of the completion, and the
    weights."""
    assert all(isinstance(token, int) for token in body["prompt"]), "token ids"
    assert body["return_token_ids"] is True and body["top_k"] == -1
    if trouble == "an error of status 200":
        return {"error": {"message": "the engine is dead"}}
    choices: list[Any] = []
    for index in range(body["n"]):
        ids = [len(body["prompt"]), body["seed"] % 251, index]
        ids += [weights] if body["model"] == "policy" else []
        ended = index % 2 == 0
        ids += [END] if ended and body["model"] != "no-end" else []
        logprobs: list[Any] = [-0.5 * (i + 1) for i in range(len(ids))]
        if body["model"] in MODES:
            ids, logprobs = drawn(body, index)
            ended = False
        choice: dict[str, Any] = {
            "index": index,
            "text": "",
            "finish_reason": "stop" if ended else "length",
            "token_ids": None if body["model"] == "old" else ids,
        }
        if body["model"] == "aborted":
            choice["finish_reason"] = "abort"
        if "logprobs" in body and trouble != "no logprobs":
            change = (body["model"] == "short" or trouble == "fewer logprobs", "more logprobs")
            logprobs = logprobs[:-1] if change[0] else logprobs + [-1.0] * (trouble == change[1])
            wrong = {"null": None, "nan": math.nan, "positive": 0.5}.get(trouble.split(" ")[0], 0)
            logprobs[0] = logprobs[0] if wrong == 0 else wrong
            choice["logprobs"] = {"token_logprobs": logprobs}
        if trouble == "no finish_reason":
            choice["finish_reason"] = None
        if trouble == "token ids of other types":
            choice["token_ids"] = [True, 2.5, "3"]
        choices.append("word" if trouble == "choices that are no objects" else choice)
    found: dict[str, Any] = {"object": "text_completion", "choices": choices[::-1]}
    return found | ({"choices": []} if trouble == "no choices" else {})


def drawn(body: dict[str, Any], index: int) -> tuple[list[int], list[float]]:
    """Tokens of PROBABILITIES with their log-probabilities in the mode that the model's name is."""
    settings = {name: body.get(name, default) for name, default in SERVER_DEFAULTS.items()}
    changed = [name for name, value in settings.items() if value not in NEUTRAL[name]]
    assert not changed, changed
    scaled = [p ** (1 / body["temperature"]) for p in PROBABILITIES]
    kept = [p / sum(scaled) for p in scaled]
    before = 0.0
    for token, p in enumerate(kept):
        kept[token] = p if before < body["top_p"] else 0.0
        before += p
    kept = [p / sum(kept) for p in kept]
    draw = random.Random(f"{body['seed']} {index} {body['prompt']}")
    ids = draw.choices(range(4), kept, k=body["max_tokens"])
    shown = kept if body["model"] == "processed_logprobs" else PROBABILITIES
    return ids, [math.log(shown[token]) for token in ids]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def parse_request(self) -> bool:
        """False, without an answer, while the server is away."""
        known = super().parse_request()
        self.close_connection |= time.monotonic() < engine.back
        return known and time.monotonic() >= engine.back

    def do_GET(self) -> None:
        if self.path == "/weight_info" and engine.versions and engine.dev:
            self._send(200, engine.control(self.path, None))
        elif self.path == "/v1/models":
            card = {"id": "policy", "owned_by": "vllm", "max_model_len": engine.room}
            self._send(200, {"data": [card] if engine.room < 100_000 else []})
        elif self.path == "/health":
            self._send(200, b"")
        elif self.path == "/v1/log":
            self._send(200, {"log": _log, "most_busy": _most_busy, "held": engine.held})
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        global _busy, _most_busy
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(text) if text else {}
        path = self.path.partition("?")[0]
        if path == "/fake":
            if body.pop("restart", False):
                engine.restart()
            engine.back = time.monotonic() + body.pop("away", 0)
            vars(engine).update(body)
            self._send(200, {})
            return
        if path in DEVELOPMENT + VERSIONS:  # which ask for no key
            known = engine.dev and (engine.versions or path in DEVELOPMENT)
            answer = engine.control(path, body) if known else {"detail": "Not Found"}
            self._send(200 if known else 404, answer)
            return
        with _lock:
            _busy += 1
            _most_busy = max(_most_busy, _busy)
            entry = {"path": self.path, "key": self.headers.get("Authorization"), **body}
            _log.append(entry)
            refusals = _refusals.get(body["model"], [])
            status = refusals.pop(0) if refusals else 200
        prompt = body.get("prompt") or [0]
        trouble = TROUBLES.get(prompt[0], "") if isinstance(prompt, list) else ""
        if body["model"] == "hang" or trouble == "hang":
            time.sleep(30)
        if body["model"] == "slow":
            time.sleep(0.2)
        weights = engine.complete()
        with _lock:
            _busy -= 1
        if body["model"] == "dropped" or trouble == "dropped":
            self.close_connection = True
            return
        asked = len(prompt) + body.get("max_tokens", 16)
        if trouble == "too long" or asked > engine.room:
            room = min(engine.room, 4096)
            self._send(400, {"error": {"message": _too_long(room, len(prompt), body), "code": 400}})
            return
        if trouble.startswith("status"):
            status = int(trouble.split()[1])
        if status != 200:
            self._send(
                status, {"error": {"message": f"no room for {body['model']}", "code": status}}
            )
        elif body["model"] == "missing":
            self._send(404, {"detail": "The model `missing` does not exist."})
        elif body["model"] == "page" or trouble == "not json":
            self._send(200, b"<html>not an API</html>")
        else:
            self._send(200, reply(body, weights, trouble))

    def _send(self, status: int, content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_arguments: object) -> None:
        pass


def _too_long(room: int, size: int, body: dict[str, Any]) -> str:
    return (
        f"This model's maximum context length is {room} tokens. However, you requested "
        f"{body.get('max_tokens')} output tokens and your prompt contains at least {size} input "
        "tokens. Please reduce the length of the input prompt or the number of requested output "
        "tokens."
    )


def _served(arguments: list[str]) -> int:
    """The port of `vllm serve FOLDER --OPTION VALUE ...`, whose settings it takes."""
    options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    config = json.loads((Path(arguments[1]) / "config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    assert size % 32 == 0, f"head size {size} is not supported by the attention of a CPU"
    assert options["--host"] == "127.0.0.1", "its development routes ask for no key"
    assert options["--served-model-name"] == "policy"
    assert options["--logprobs-mode"] == "processed_logprobs"
    engine.dev = os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
    engine.room = config["max_position_embeddings"]
    return int(options["--port"])


if __name__ == "__main__":
    port = _served(sys.argv[1:]) if sys.argv[1:] else 0
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)
