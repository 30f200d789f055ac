"""Models of many kinds, tiny, against their own logits of one sequence at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from tiny_models import tiny_model  # noqa: E402

from spo_ext.rollout import Sampling  # noqa: E402
from spo_ext.rollout.embedded import ModelGenerator  # noqa: E402
from spo_ext.store.records import Prompt  # noqa: E402
from spo_ext.trainer.batches import Tokens, collate  # noqa: E402
from spo_ext.trainer.model import (  # noqa: E402
    HeadSettings,
    answer_logprobs,
    choose_layout,
    completion_logprobs,
)

# How sequences are laid out, which prompts share a batch of rollouts, and what is special.
FAMILIES = {
    "llama": ("rows", "any"),
    "gemma2": ("rows", "any"),  # a softcap
    "cohere": ("rows", "any"),  # a scale
    "qwen3_moe": ("rows", "any"),
    "gpt2": ("rows", "any"),  # learned positions
    "opt": ("padded", "any"),  # positions from the mask
    "bloom": ("padded", "any"),  # ALiBi, from the mask
    "mpt": ("padded", "any"),
    "mamba": ("padded", "any"),
    "mamba2": ("padded", "any"),
    "rwkv": ("padded", "none"),  # generate mixes equal prompts
    "bart": ("padded", "equal"),  # positions count padding
    "recurrent_gemma": ("padded", "equal"),  # another name of the softcap
    "xlstm": ("padded", "equal"),
    "falcon_h1": ("padded", "any"),
    "bert": ("padded", "any"),  # a transform before the head
    "roberta": ("padded", None),  # generate counts its positions from another number
    "inkling_text": ("padded", "any"),  # states are scaled before the head
    "llama4_text": ("rows", "any"),  # base_model_prefix names no attribute
    "mllama": ("rows", "any"),
    "deepseek_v4": ("equal", None),  # packed rows leak into compressed attention, and the choice of
    # blocks among equal ones depends on how many there are
    "phi3": ("rows", "any"),
    "moshi": ("rows", None),  # fewer logits than embeddings; its cache is wrong behind a window
    "doge": ("equal", "any"),
}
SIZES = ((7, 33), (3, 12), (20, 25), (1, 4), (5, 1))
TEMPERATURE = 0.7


def draw(*sizes: tuple[int, int], seed: int = 0) -> list[Tokens]:
    rng = torch.Generator().manual_seed(seed)
    take = lambda n: torch.randint(6, 250, (n,), generator=rng).tolist()  # noqa: E731
    return [Tokens(take(prompt), take(size)) for prompt, size in sizes]


@torch.no_grad()
def own(model: Any, tokens: Tokens, temperature: float = TEMPERATURE) -> torch.Tensor:
    ids = torch.tensor([tokens.all])
    logits = model(input_ids=ids, use_cache=False).logits[0].double() / temperature
    logprobs = logits[len(tokens.prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(tokens.completion)[:, None])[:, 0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_agrees_with_its_own_logits(kind: str) -> None:
    model, sequences = tiny_model(kind), draw(*SIZES)
    expected = torch.cat([own(model, tokens) for tokens in sequences])
    answer_logprobs(model, HeadSettings(TEMPERATURE))
    layout = choose_layout("auto", model, training=True)
    batch = collate(sequences, layout)
    with torch.no_grad():
        logprobs, _ = completion_logprobs(model.train(), batch)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-4)
    model.eval()
    generator = ModelGenerator(model)
    assert layout == FAMILIES[kind][0]
    prompts = [Prompt(str(i), tokens.prompt) for i, tokens in enumerate(sequences)]
    if FAMILIES[kind][1] is None:
        with pytest.raises(ValueError, match="must draw from the logits that it gives a prompt"):
            generator.generate(prompts, Sampling())
        return
    drawn = generator.generate(prompts, Sampling(1, TEMPERATURE, max_new_tokens=6))
    for prompt, (new,) in zip(prompts, drawn, strict=True):
        found = own(model, Tokens(prompt.token_ids, new.token_ids)).float()
        torch.testing.assert_close(torch.tensor(new.logprobs), found, rtol=0, atol=1e-4)
    assert generator._shared == FAMILIES[kind][1]
