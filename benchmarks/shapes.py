"""The sizes that are measured. SPO_BENCH_SHAPES=name,name picks some of them."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeadShape:
    """hidden [tokens, depth] times weight [vocabulary, depth]."""

    name: str
    tokens: int
    vocabulary: int
    depth: int
    dtype: torch.dtype
    every_peer: bool = False  # else only the peers that are fast to set up
    noise_tokens: int = 0  # tokens scored for the noise of Q_T, if more than `tokens`
    states: str = ""  # a set of SPO_HEAD_STATES (states.py); else synthetic
    sharpness: float = 1.0  # factor on hidden

    @property
    def flop(self) -> int:
        """Of the one matrix product that the forward pass cannot avoid."""
        return 2 * self.tokens * self.vocabulary * self.depth


@dataclass(frozen=True)
class TokenShape:
    """[sequences, length] per-token numbers, in float32."""

    name: str
    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True)
class LogitsShape:
    name: str
    tokens: int
    vocabulary: int
    dtype: torch.dtype


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# The first is the one that the targets are set for; the others are heads of real models.
HEADS = {
    "cuda": [
        HeadShape("Llama-3-8B", 8192, 128256, 4096, BF16, every_peer=True, noise_tokens=65536),
        HeadShape("Llama-3-8B, sharp", 8192, 128256, 4096, BF16, sharpness=1.25),  # 0.7 nats
        HeadShape("Gemma-2-2B", 8192, 256000, 2304, BF16),
        HeadShape("Qwen2.5-0.5B", 8192, 151936, 896, BF16, noise_tokens=65536),
        HeadShape("32000 entries, fp16", 8192, 32000, 2048, FP16, noise_tokens=65536),
        HeadShape("GPT-2, ragged", 8191, 50257, 768, BF16),
    ],
    "cpu": [
        HeadShape("0.85 nats", 4096, 24576, 256, FP32, every_peer=True, states="samp2"),
        HeadShape("0.37 nats", 4096, 24576, 256, FP32, states="samp3"),
        HeadShape("1.5 nats", 4096, 24576, 256, FP32, states="samp1.5"),
        HeadShape("4 nats", 4096, 24576, 256, FP32, states="samp2", sharpness=0.5),
        HeadShape("0.85 nats, bf16", 2048, 24576, 1024, BF16, states="samp2"),
        HeadShape("tiny", 300, 1003, 64, FP32, every_peer=True, noise_tokens=1024),
        HeadShape("tiny, bf16", 256, 2048, 64, BF16, every_peer=True, noise_tokens=1024),
    ],
}
TOKENS = {
    "cuda": [TokenShape("1 M tokens", 1024, 1024), TokenShape("64 M tokens", 8192, 8192)],
    "cpu": [TokenShape("1 M tokens", 1024, 1024), TokenShape("tiny", 16, 64)],
}
LOGITS = {
    "cuda": [
        LogitsShape("Llama-3-8B", 8192, 128256, BF16),
        LogitsShape("odd vocabulary, float32", 4096, 50257, FP32),
    ],
    "cpu": [LogitsShape("states", 512, 24576, FP32), LogitsShape("tiny", 64, 1003, FP32)],
}


def chosen(shapes: list) -> list:  # type: ignore[type-arg]
    """Those that SPO_BENCH_SHAPES names; without it all but the tiny ones."""
    asked = os.environ.get("SPO_BENCH_SHAPES", "")
    if asked:
        return [
            shape for shape in shapes if any(shape.name.startswith(a) for a in asked.split(","))
        ]
    return [shape for shape in shapes if not shape.name.startswith("tiny")]
