"""The model's answers as log-probabilities, and sequences packed or padded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_cases import VOCABULARY, make_model, with_adapters

import spo_ext
from spo_ext.trainer.batches import Layout, Tokens, collate
from spo_ext.trainer.model import (
    HeadSettings,
    answer_logprobs,
    choose_layout,
    completion_logprobs,
)

LAYOUTS: tuple[Layout, ...] = ("row", "rows", "padded")  # of any attention
# Lengths that leave room in rows, fill them, and differ.
SIZES = ((3, 9), (1, 4), (5, 1), (2, 2), (6, 3))


def make_sequences() -> list[Tokens]:
    rng = torch.Generator().manual_seed(3)
    draw = lambda size: torch.randint(3, VOCABULARY, (size,), generator=rng).tolist()  # noqa: E731
    return [Tokens(draw(prompt), draw(completion)) for prompt, completion in SIZES]


def by_logits(model: Any, tokens: Tokens, temperature: float) -> Tensor:
    ids = torch.tensor([[*tokens.prompt, *tokens.completion]])
    logits = model(input_ids=ids).logits[0].double() / temperature
    first = len(tokens.prompt) - 1
    logprobs = logits[first:-1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(tokens.completion)[:, None]).squeeze(-1)


def answer(model: Any, layout: Layout) -> Tensor:
    batch = collate(make_sequences(), layout)
    return completion_logprobs(model, batch)[0]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "shared"])
def test_equals_the_softmax_of_the_logits(kind: str, layout: Layout) -> None:
    changes = {
        "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 3.0},
    }
    if layout == "shared" and kind == "gemma2":
        pytest.skip("its eager attention adds the mask")
    model = make_model(kind=kind, **changes.get(kind, {}))
    expected = torch.cat([by_logits(model, tokens, 0.7) for tokens in make_sequences()])
    answer_logprobs(model, HeadSettings(temperature=0.7))
    torch.testing.assert_close(answer(model, layout).double(), expected, rtol=1e-5, atol=2e-5)


def test_adapters_count_and_can_be_switched_off() -> None:
    plain = make_model()
    model = with_adapters(copy.deepcopy(plain))
    expected = torch.cat([by_logits(model, tokens, 1.0) for tokens in make_sequences()])
    for one in (plain, model):
        answer_logprobs(one, HeadSettings())
    torch.testing.assert_close(answer(model, "rows").double(), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(answer(model, "rows"), answer(plain, "rows"))
    assert (answer(model, "rows") - answer(plain, "rows")).abs().max() > 1e-2


def prompts_with_several() -> list[Tokens]:
    """Prompts of 3, 7, 11 and 15 tokens with up to four completions each, interleaved."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randint(3, VOCABULARY, (size,), generator=rng).tolist()  # noqa: E731
    groups = ((5, 1, 7, 3), (2, 9, 4), (6,), (1, 1))
    prompts = [draw(3 + 4 * number) for number in range(len(groups))]
    pairs = [(place, size) for place, group in enumerate(groups) for size in group]
    pairs.sort(key=lambda pair: pair[1])
    return [Tokens(prompts[place], draw(size)) for place, size in pairs]


def loss_and_gradients(
    layout: Layout, sequences: list[Tokens] | None = None
) -> tuple[Tensor, list[Tensor]]:
    model = make_model().double()
    answer_logprobs(model, HeadSettings())
    sequences = make_sequences() if sequences is None else sequences
    batch = collate(sequences, layout)
    logprobs, _ = completion_logprobs(model, batch)
    loss = spo_ext.loss(
        logprobs,
        torch.full_like(logprobs, -2.0).detach(),
        torch.arange(len(sequences)).double() / 5,
        0.3,
        beta=0.1,
        objective="squared",
        cu_seqlens=batch.cu_seqlens,
    )
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("layout", ["row", "rows", "shared"])
def test_packed_is_padded(layout: Layout) -> None:
    loss, gradients = loss_and_gradients(layout)
    padded, expected = loss_and_gradients("padded")
    torch.testing.assert_close(loss, padded, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def test_completions_that_share_a_prompt_are_padded_ones() -> None:
    several = prompts_with_several()
    shared, padded = collate(several, "shared"), collate(several, "padded")
    assert shared.model_inputs["input_ids"].numel() < padded.model_inputs["input_ids"].numel() / 2
    assert torch.equal(shared.targets, padded.targets)
    assert torch.equal(shared.cu_seqlens, padded.cu_seqlens)
    loss, gradients = loss_and_gradients("shared", several)
    expected_loss, expected = loss_and_gradients("padded", several)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)  # the head is float32
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_long_completions_do_not_share_a_short_prompt() -> None:
    """To see each other's places costs more than the prompt."""
    several = [Tokens([3, 4], [5] * 500)] * 8
    assert collate(several, "shared").model_inputs["input_ids"].shape == (8, 501)
    few = [Tokens([3] * 400, [5] * 40)] * 8
    assert collate(few, "shared").model_inputs["input_ids"].shape == (1, 400 + 8 * 39)


def test_a_far_window_keeps_its_own_mask() -> None:
    model = make_model(use_sliding_window=True, sliding_window=1000, max_window_layers=0)
    answer_logprobs(model, HeadSettings())
    assert choose_layout("auto", model) == "rows"
    with pytest.raises(ValueError, match="take the place of a far window's"):
        choose_layout("shared", model)


def test_packing_is_tried_out() -> None:
    model = make_model()
    answer_logprobs(model, HeadSettings())
    assert choose_layout("packed", model) == "rows"
    recurrent = make_model(kind="mamba", state_size=4)
    answer_logprobs(recurrent, HeadSettings())
    # Its state runs on into the next sequence.
    assert choose_layout("auto", recurrent) == "padded"
    with pytest.raises(ValueError, match="packing must be auto or padded for this model"):
        choose_layout("packed", recurrent)


def test_the_layout_follows_from_the_model() -> None:
    model = make_model()
    answer_logprobs(model, HeadSettings())
    assert choose_layout("auto", model) == choose_layout("shared", model) == "shared"
    assert choose_layout("auto", model, sharing=False) == choose_layout("packed", model) == "rows"
    assert choose_layout("padded", model) == "padded"
    model.config._attn_implementation = "flash_attention_2"
    with pytest.MonkeyPatch.context() as patch:  # the kernel itself needs a GPU
        patch.setattr("spo_ext.trainer.model.check_agreement", lambda _, ways, **__: ways[0])
        assert choose_layout("auto", model) == "row"


def test_entropy_is_for_the_log_alone() -> None:
    model = make_model()
    answer_logprobs(model, HeadSettings())
    logprobs, entropy = completion_logprobs(model, collate(make_sequences(), "rows"), entropy=True)
    assert logprobs.requires_grad and entropy is not None and not entropy.requires_grad


def test_rows_are_no_longer_than_the_longest() -> None:
    tokens = [Tokens([3], [4] * size) for size in (9, 5, 4, 3, 3, 2, 1)]
    ids = collate(tokens, "rows").model_inputs["input_ids"]
    assert ids.shape == (3, 9)
    assert collate(tokens, "row").model_inputs["input_ids"].shape == (1, 27)
    assert collate(tokens, "padded").model_inputs["input_ids"].shape == (7, 9)


def test_a_model_that_changes_its_logits_is_refused() -> None:
    model = make_model()
    plain = type(model).forward

    class Shifted(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = plain(self, *args, **kwargs)
            output.logits = output.logits + torch.arange(VOCABULARY) / 10
            return output

    model.__class__ = Shifted
    with pytest.raises(
        ValueError, match="logits of Shifted must be those of .* got a difference of"
    ):
        answer_logprobs(model, HeadSettings())


def test_other_calls_stay_as_they_were() -> None:
    model = make_model()
    ids = torch.tensor([[2, 5, 7, 9]])
    before = model(input_ids=ids).logits
    drawn = model.generate(ids, max_new_tokens=5, do_sample=False)
    answer_logprobs(model, HeadSettings())
    answer_logprobs(model, HeadSettings(temperature=0.5))  # a second trainer replaces the first
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), drawn)


def test_tokens_must_not_be_empty() -> None:
    with pytest.raises(ValueError, match="SPO: prompt must be at least one token"):
        Tokens([], [3])
    with pytest.raises(ValueError, match="SPO: completion must be at least one token"):
        Tokens([3], [])
