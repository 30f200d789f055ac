"""What it saves to share a prompt's forward pass: tokens and time of a step, by layout.

    python benchmarks/shared_prompts.py OUT.json

A small Llama with random weights, 8 completions of 40 tokens behind each of two prompts of 400;
forward and backward, rounds interleaved.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import machine
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spo_ext.trainer.batches import Layout, TokenBatch, Tokens, collate
from spo_ext.trainer.model import HeadSettings, answer_logprobs, choose_layout, completion_logprobs

LAYOUTS: tuple[Layout, ...] = ("padded", "rows", "shared")
PROMPTS, PROMPT, COMPLETIONS, COMPLETION = 2, 400, 8, 40
ROUNDS = 5


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(shape)
    answer_logprobs(model, HeadSettings())
    return model


def make_sequences() -> list[Tokens]:
    rng = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randint(10, 4096, (size,), generator=rng).tolist()  # noqa: E731
    prompts = [draw(PROMPT) for _ in range(PROMPTS)]
    return [Tokens(prompt, draw(COMPLETION)) for prompt in prompts for _ in range(COMPLETIONS)]


def step(model: LlamaForCausalLM, batch: TokenBatch) -> tuple[float, torch.Tensor]:
    """Seconds of forward and backward, and the gradient of the embeddings."""
    model.zero_grad()
    started = time.perf_counter()
    logprobs, _ = completion_logprobs(model, batch)
    logprobs.mean().backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - started
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    return seconds, gradient.clone()


def main(out: Path) -> None:
    model, sequences = make_model(), make_sequences()
    assert choose_layout("auto", model) == "shared"
    batches = {layout: collate(sequences, layout) for layout in LAYOUTS}
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    gradients = {layout: step(model, batch)[1] for layout, batch in batches.items()}
    for _ in range(ROUNDS):
        for layout, batch in batches.items():
            seconds[layout].append(step(model, batch)[0])
    largest = float(gradients["padded"].abs().max())
    found: dict[str, Any] = {
        layout: {
            "tokens": batch.model_inputs["input_ids"].numel(),
            "seconds": statistics.median(seconds[layout]),
            "gradient_error": float((gradients[layout] - gradients["padded"]).abs().max())
            / largest,
        }
        for layout, batch in batches.items()
    }
    for layout, row in found.items():
        tokens = row["tokens"] / found["padded"]["tokens"]
        spent = row["seconds"] / found["padded"]["seconds"]
        print(f"{layout}: {tokens:.3f} of the tokens, {spent:.3f} of the time of padded")
    report = {"rounds": ROUNDS, "threads": torch.get_num_threads(), "spo": machine.report()}
    out.write_text(json.dumps(report | {"layouts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
