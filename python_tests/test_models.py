"""Models of many kinds, tiny, against their own logits of one sequence at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_models import randomised, tiny_config, tiny_model

from spo_ext.integrations.agreement import check_agreement, rope_limit
from spo_ext.integrations.huggingface import add_token_logprobs
from spo_ext.rollout import Sampling
from spo_ext.rollout.embedded import ModelGenerator
from spo_ext.store import reference_fingerprint
from spo_ext.store.records import Prompt
from spo_ext.trainer.batches import Tokens, collate
from spo_ext.trainer.model import (
    HeadSettings,
    answer_logprobs,
    choose_layout,
    completion_logprobs,
)

# How sequences are laid out, which prompts share a batch of rollouts, and what is special.
FAMILIES = {
    "llama": ("shared", "any"),
    "gemma2": ("rows", "any"),  # a softcap; a window of 4096
    "cohere": ("shared", "any"),  # a scale
    "qwen3_moe": ("shared", "any"),
    "gpt2": ("shared", "any"),  # learned positions
    "opt": ("shared", "any"),  # positions from a mask of two dimensions
    "bloom": ("padded", "any"),  # ALiBi, from the mask
    "mpt": ("padded", "any"),
    "mamba": ("padded", "any"),
    "mamba2": ("padded", "any"),
    "rwkv": ("padded", "none"),  # generate mixes equal prompts
    "bart": ("padded", "equal"),  # positions count padding
    "recurrent_gemma": ("padded", "equal"),  # another name of the softcap
    "xlstm": ("padded", "equal"),
    "falcon_h1": ("padded", "any"),
    "bert": ("shared", "any"),  # a transform before the head
    "roberta": ("padded", None),  # generate counts its positions from another number
    "inkling_text": ("padded", "any"),  # states are scaled before the head
    "llama4_text": ("rows", "any"),  # base_model_prefix names no attribute
    "mllama": ("shared", "any"),
    "deepseek_v4": ("equal", None),  # packed rows leak into compressed attention, and the choice of
    # blocks among equal ones depends on how many there are
    "phi3": ("shared", "any"),
    "moshi": ("shared", None),  # fewer logits than embeddings; its cache is wrong behind a window
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


@pytest.mark.parametrize("kind", ["xlm", "xlnet", "cpmant"])
def test_a_model_that_looks_ahead_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="hidden states of .* must not depend on later tokens"):
        add_token_logprobs(tiny_model(kind))


def test_another_logit_map_is_refused_before_it_shows() -> None:
    """Fresh weights give logits near 0, where no cap shows."""
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))
    plain = type(model).forward

    class Capped(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = plain(self, *args, **kwargs)
            output.logits = 30 * (output.logits / 30).tanh()
            return output

    model.__class__ = Capped
    with pytest.raises(ValueError, match="logits of Capped must be those of one call of its head"):
        add_token_logprobs(model)


@pytest.mark.parametrize("mean", [0, -30, -100])
def test_rounding_is_no_reason_to_refuse(mean: int) -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # a direction that all states share
        model.model.embed_tokens.weight[:, 0] = 8
        model.lm_head.weight[:, 0] += mean / 4.8
    answer_logprobs(model.bfloat16(), HeadSettings())
    assert choose_layout("auto", model) == "shared"
    model.config.logits_scaling = 2.0  # which this model ignores
    answer_logprobs(model, HeadSettings())
    plain = model.lm_head.forward
    model.lm_head.forward = lambda states: plain(states)  # Accelerate's hooks look like this
    answer_logprobs(model, HeadSettings())


ROPES = {
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 8.0,
                 "original_max_position_embeddings": 16},
    "dynamic": {"factor": 4.0},
}  # fmt: skip


def with_rope(kind: str) -> Any:
    config = tiny_config("phi3" if kind == "longrope" else "llama")
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    config.max_position_embeddings = 128 if kind == "longrope" else 16
    if kind == "longrope":
        config.original_max_position_embeddings = 16
    return randomised(transformers.AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("layout", ["shared", "rows", "padded"])
def test_company_beyond_a_rope_limit_changes_nothing(kind: str, layout: Any) -> None:
    model = with_rope(kind)
    sequences = draw((3, 9), (7, 33), (2, 15), (7, 33), (4, 12))
    fresh = [own(copy.deepcopy(model), tokens, 1.0) for tokens in sequences]
    assert rope_limit(model.config) == 16
    answer_logprobs(model, HeadSettings())
    batch = collate(sequences, layout)
    logprobs, entropy = completion_logprobs(model, batch, entropy=True)
    torch.testing.assert_close(logprobs.double(), torch.cat(fresh), rtol=0, atol=1e-4)
    assert entropy is not None and entropy.shape == logprobs.shape
    short = completion_logprobs(model, collate(sequences[:1], layout))[0]
    torch.testing.assert_close(short, logprobs[:9], rtol=0, atol=1e-5)


def test_an_infinity_in_the_config_has_a_fingerprint() -> None:
    model = tiny_model("mamba2")
    assert model.config.time_step_limit[1] == float("inf")
    model.config.time_step_limit = (0.0, 5.0)
    other = reference_fingerprint(model, None, 1.0)
    model.config.time_step_limit = (0.0, float("inf"))
    assert reference_fingerprint(model, None, 1.0) != other


def test_nothing_is_left_behind() -> None:
    model = tiny_model("gpt2")
    add_token_logprobs(model)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state, hooks = torch.random.get_rng_state(), len(model.transformer.wte._forward_hooks)
    check_agreement(model, ("shared", "rows"), training=False)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(model.transformer.wte._forward_hooks) == hooks


def test_dropout_is_off_in_training() -> None:
    for name, changes in (
        ("gpt2", {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}),
        ("opt", {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.1}),
    ):
        config = tiny_config(name)
        for key, value in changes.items():
            setattr(config, key, value)
        model = transformers.AutoModelForCausalLM.from_config(config)
        noisy = copy.deepcopy(model)
        answer_logprobs(model, HeadSettings())
        assert choose_layout("auto", model, training=True) in ("shared", "padded")
        answer_logprobs(noisy, HeadSettings(disable_dropout=False))
        with pytest.raises(ValueError, match="same log-probabilities in training mode"):
            choose_layout("auto", noisy, training=True)


def test_a_model_without_weights_is_compared_when_it_has_them() -> None:
    whole = tiny_model("recurrent_gemma")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(whole.config)
    add_token_logprobs(model)
    model.to_empty(device="cpu").eval()
    model.load_state_dict(whole.state_dict())
    for name, buffer in whole.named_buffers():
        model.get_buffer(name).copy_(buffer)
    tokens = draw((3, 9))[0]
    found, _ = completion_logprobs(model, collate([tokens], "padded"))
    torch.testing.assert_close(found.double(), own(whole, tokens, 1.0), rtol=0, atol=1e-4)
