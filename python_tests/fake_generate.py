"""A server with vLLM's POST /inference/v1/generate, for a tokenizer of bytes and Qwen3's marks.

python fake_generate.py TOKENIZER: prints its port. It calls the tool `tools_go` with what the user
said, and when the tool has answered says "done". "broken" gets no second answer, and the model
"text" no token ids.
"""

from __future__ import annotations

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
OTHERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
ROOM = 6000


def save_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(MARKS))
    tokenizer.add_tokens([*OTHERS, "<think>", "</think>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    tokenizer: Any = None

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "policy", "max_model_len": ROOM}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/inference/v1/generate":
            self._send(404, {"detail": "Not Found"})
            return
        text = self.tokenizer.decode(body["token_ids"])
        said = re.findall(r"<\|im_start\|>user\n(\w+)<\|im_end\|>", text)[0]
        answered = "<tool_response>" in text.rpartition("<|im_end|>\n<|im_start|>user")[2]
        if answered and said == "broken":
            self._send(500, {"error": {"message": "the engine is dead"}})
            return
        call = json.dumps({"name": "tools_go", "arguments": {"what": said}})
        words = "done" if answered else f"<tool_call>\n{call}\n</tool_call>"
        ids = self.tokenizer(words)["input_ids"] + [257]
        most = body["sampling_params"]["max_tokens"]
        finish, ids = "length" if len(ids) > most else "stop", ids[:most]
        known = [{"token": f"token_id:{token}", "logprob": -0.25} for token in ids]
        choice = {"index": 0, "finish_reason": finish, "logprobs": {"content": known}}
        if body["model"] != "text":
            choice["token_ids"] = ids
        else:
            choice["logprobs"] = {"content": []}
        self._send(200, {"request_id": "r", "choices": [choice]})

    def _send(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_arguments: object) -> None:
        pass


if __name__ == "__main__":
    from transformers import AutoTokenizer

    Handler.tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
