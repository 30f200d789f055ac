"""Publication to a server that answers as vLLM does, over real HTTP on loopback."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from publish_cases import lora_model, tiny_model, trained

from spo_ext.rollout.follow import version_of
from spo_ext.trainer.publish import PublishError, ServerPublisher

transformers = pytest.importorskip("transformers")


class Server(ThreadingHTTPServer):
    """Records what it is asked; `answers` has the status and body of routes that fail."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: dict[str, list[tuple[int, Any]]] = {}
        self.weights: torch.Tensor | None = None
        self.version = "default"
        self.latest: list[bool] = []  # whether DIR/latest was there when it was asked to resume
        self.directory: Path | None = None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if self.answers.get(path):
            return self.answers[path].pop(0)
        if path == "/collective_rpc":
            folder = body["kwargs"]["weights_path"]
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
            self.weights = loaded.model.norm.weight.detach()
            return 200, {"results": [None]}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/resume" and self.directory is not None:
            self.latest.append((self.directory / "latest").exists())
        if path == "/v1/load_lora_adapter":
            assert (Path(body["lora_path"]) / "adapter_model.safetensors").is_file()
            return 200, "Success: LoRA adapter added successfully."
        return 200, None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        status, answer = self.server.answer(self.path, None)
        self.reply(status, {"weight_version": self.server.version} if status == 200 else answer)

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(text) if text else None
        self.server.calls.append((self.path, body))
        self.server.headers.append(dict(self.headers))
        self.reply(*self.server.answer(self.path, body))

    def reply(self, status: int, answer: Any) -> None:
        content = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def routes(server: Server) -> list[str]:
    return [path for path, _ in server.calls]


def test_whole_weights(server: Server, tmp_path: Path) -> None:
    model = trained(tiny_model())
    publisher = ServerPublisher(f"{server.url}/v1/", tmp_path, api_key="secret")
    server.directory = tmp_path
    publisher.publish(model, None, 3)
    folder = str(tmp_path / "version-0000003")
    first = server.version
    assert version_of(first) == 3
    assert server.calls == [
        ("/pause?mode=wait", None),
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
        ("/reset_prefix_cache", None),
        ("/update_weight_version", {"new_version": first}),
        ("/resume", None),
    ]
    assert server.latest == [True], "whoever gets an answer of the new weights can know"
    assert torch.equal(server.weights, model.model.norm.weight)
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)
    assert (tmp_path / "latest").read_text() == "version-0000003"
    publisher.publish(model, None, 3)
    assert version_of(server.version) == 3 and server.version != first, "told apart"
    publisher.finish()
    assert (tmp_path / "finished").exists()


def test_only_the_adapter(server: Server, tmp_path: Path) -> None:
    publisher = ServerPublisher(server.url, tmp_path, lora_name="policy", pause=False)
    publisher.publish(lora_model("linear"), None, 1)
    path = str(tmp_path / "version-0000001")
    load = {"lora_name": "policy", "lora_path": path, "load_inplace": True}
    assert server.calls[:2] == [("/v1/load_lora_adapter", load), ("/reset_prefix_cache", None)]
    assert routes(server)[2:] == ["/update_weight_version"]


def test_a_server_that_does_not_load_in_place(server: Server, tmp_path: Path) -> None:
    said = "The lora adapter 'policy' has already been loaded."
    server.answers["/v1/load_lora_adapter"] = [(400, {"error": {"message": said, "code": 400}})]
    publisher = ServerPublisher(server.url, tmp_path, lora_name="policy", prefix_cache=False)
    publisher.publish(lora_model("linear"), None, 1)
    assert routes(server)[1:-2] == [
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/load_lora_adapter",
    ]
    assert server.calls[2][1] == {"lora_name": "policy"}


def test_the_server_may_see_the_folder_elsewhere(server: Server, tmp_path: Path) -> None:
    server.answers["/collective_rpc"] = [(200, None)]
    ServerPublisher(server.url, tmp_path, server_directory="/mnt/run").publish(
        tiny_model(), None, 4
    )
    assert server.calls[1][1]["kwargs"] == {"weights_path": "/mnt/run/version-0000004"}


@pytest.mark.parametrize(
    ("route", "answer", "words"),
    [
        (
            "/pause?mode=wait",
            (404, {"detail": "Not Found"}),
            ["status 404", "VLLM_SERVER_DEV_MODE"],
        ),
        ("/collective_rpc", (500, {"error": {"message": "no file"}}), ["status 500: no file"]),
        ("/collective_rpc", (400, {"detail": "Missing 'method'"}), ["400: Missing 'method'"]),
        ("/reset_prefix_cache", (200, {"success": False}), ["requests are under way"]),
        ("/update_weight_version", (500, None), ["status 500: no message"]),
        ("/resume", (503, None), ["status 503: no message"]),
    ],
)
def test_what_the_server_says_is_passed_on(
    server: Server, tmp_path: Path, route: str, answer: tuple[int, Any], words: list[str]
) -> None:
    server.answers[route] = [answer]
    with pytest.raises(PublishError) as error:
        ServerPublisher(server.url, tmp_path).publish(tiny_model(), None, 1)
    for word in [f"POST {server.url}{route}", *words]:
        assert word in str(error.value)
    assert routes(server)[-1] == route  # in particular no /resume with half of the weights
    # Nobody believes that the server has it before it has.
    assert (tmp_path / "latest").exists() == (route == "/resume")


def test_a_server_that_keeps_no_version_is_published_to_all_the_same(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers["/update_weight_version"] = [(404, {"detail": "Not Found"})]
    ServerPublisher(server.url, tmp_path).publish(tiny_model(), None, 1)
    assert routes(server)[-1] == "/resume"
    assert "has no /update_weight_version, as vLLM before 0.32" in caplog.text


def test_a_server_that_was_started_anew_gets_the_latest_version(
    server: Server, tmp_path: Path
) -> None:
    model = trained(tiny_model())
    ServerPublisher(server.url, tmp_path).publish(model, None, 2)
    publisher = ServerPublisher(server.url, tmp_path)  # of a trainer that was started anew too
    before = len(server.calls)
    publisher.restore()
    assert len(server.calls) == before, "it has what it should"
    server.version, server.weights = "default", None
    publisher.restore()
    assert torch.equal(server.weights, model.model.norm.weight)
    assert version_of(server.version) == 2 and routes(server)[-1] == "/resume"
    before = len(server.calls)
    for answer in [(404, {"detail": "Not Found"}), (404, {"detail": "Not Found"})]:
        server.answers["/weight_info"] = [answer]
        publisher.restore()
    assert len(server.calls) == before
    ServerPublisher("http://127.0.0.1:1", tmp_path).restore()  # not there now: later, perhaps


def test_an_adapter_that_cannot_be_loaded(server: Server, tmp_path: Path) -> None:
    publisher = ServerPublisher(server.url, tmp_path, lora_name="policy")
    server.answers["/v1/load_lora_adapter"] = [(400, {"error": {"message": "rank 64 > 16"}})]
    with pytest.raises(PublishError, match="load_lora_adapter: status 400: rank 64 > 16$"):
        publisher.publish(lora_model("linear"), None, 1)
    server.answers["/v1/load_lora_adapter"] = [(404, {"error": {"message": "Not Found"}})]
    with pytest.raises(PublishError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING") as error:
        publisher.publish(lora_model("linear"), None, 2)
    assert error.value.status == 404
    assert "/v1/unload_lora_adapter" not in routes(server)
    publisher.publish(lora_model("linear"), None, 3)  # the server was repaired
    assert routes(server)[-1] == "/resume"


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    url = "http://127.0.0.1:1"
    with pytest.raises(PublishError, match=f"POST {url}/pause.*: no answer: .*refused") as error:
        ServerPublisher(url, tmp_path).publish(tiny_model(), None, 1)
    assert error.value.status is None


def test_a_server_that_comes_back_gets_the_version(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    publisher = ServerPublisher(server.url, tmp_path, retry_s=60.0)
    serve, left = publisher._serve, [2]

    def away(version: int) -> None:
        if left[0]:
            left[0] -= 1
            raise PublishError("POST /pause: no answer: refused")
        serve(version)

    monkeypatch.setattr(publisher, "_serve", away)
    monkeypatch.setattr("spo_ext.trainer.publish._PAUSE_S", 0.01)
    publisher.publish(tiny_model(), None, 1)
    assert (tmp_path / "latest").exists() and version_of(server.version) == 1
    assert caplog.text.count("no answer: refused; trying again for up to 60 s") == 1


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="url must be http://..., got 'localhost:8000'"):
        ServerPublisher("localhost:8000", tmp_path)
    with pytest.raises(ValueError, match="timeout_s must be > 0, got 0"):
        ServerPublisher("http://localhost:8000", tmp_path, timeout_s=0)
    publisher = ServerPublisher("http://localhost:8000", tmp_path, lora_name="policy")
    with pytest.raises(ValueError, match="must be a PeftModel .*, got Qwen2ForCausalLM"):
        publisher.publish(tiny_model(), None, 1)
