"""A server that speaks vLLM's dialect of /v1/completions, and misbehaves by the model's name.

Run as a process: prints its port. GET /log gives the requests it got, and how many at once.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END = 256
_lock = threading.Lock()
_log: list[dict[str, Any]] = []
_busy = 0
_most_busy = 0
_refusals = {"flaky": [429, 503], "broken": [500] * 1000, "once": [429]}


def reply(body: dict[str, Any]) -> dict[str, Any]:
    """Tokens that say the prompt's length, the seed and the number of the completion."""
    assert all(isinstance(token, int) for token in body["prompt"]), "token ids"
    assert body["return_token_ids"] is True and body["top_k"] == -1
    choices = []
    for index in range(body["n"]):
        ids = [len(body["prompt"]), body["seed"] % 251, index]
        ended = index % 2 == 0
        ids += [END] if ended and body["model"] != "no-end" else []
        choice: dict[str, Any] = {
            "index": index,
            "text": "",
            "finish_reason": "stop" if ended else "length",
            "token_ids": None if body["model"] == "old" else ids,
        }
        if body["model"] == "aborted":
            choice["finish_reason"] = "abort"
        if "logprobs" in body:
            size = len(ids) - (body["model"] == "short")
            choice["logprobs"] = {"token_logprobs": [-0.5 * (i + 1) for i in range(size)]}
        choices.append(choice)
    return {"object": "text_completion", "choices": choices[::-1]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(200, {"log": _log, "most_busy": _most_busy})

    def do_POST(self) -> None:
        global _busy, _most_busy
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with _lock:
            _busy += 1
            _most_busy = max(_most_busy, _busy)
            entry = {"path": self.path, "key": self.headers.get("Authorization"), **body}
            _log.append(entry)
            refusals = _refusals.get(body["model"], [])
            status = refusals.pop(0) if refusals else 200
        if body["model"] == "hang":
            time.sleep(30)
        if body["model"] == "slow":
            time.sleep(0.2)
        with _lock:
            _busy -= 1
        if body["model"] == "dropped":
            self.close_connection = True
            return
        if status != 200:
            self._send(
                status, {"error": {"message": f"no room for {body['model']}", "code": status}}
            )
        elif body["model"] == "missing":
            self._send(404, {"detail": "The model `missing` does not exist."})
        elif body["model"] == "page":
            self._send(200, b"<html>not an API</html>")
        else:
            self._send(200, reply(body))

    def _send(self, status: int, content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_arguments: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)
