"""The key of cached reference log-probabilities changes when they would, and only then."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from spo_ext.store import fingerprint, reference_fingerprint

transformers = pytest.importorskip("transformers")


def small_model(**changes: Any) -> Any:
    torch.manual_seed(3)
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(**{**shape, **heads, **changes})
    return transformers.Qwen2ForCausalLM(config)


class Words:
    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def test_the_same_content_has_the_same_fingerprint(tmp_path: Any) -> None:
    model, words = small_model(), Words("a", "b")
    want = reference_fingerprint(model, words, 1.0)
    assert len(want) == 64
    assert reference_fingerprint(copy.deepcopy(model), Words("a", "b"), 1) == want
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert reference_fingerprint(loaded, words, 1.0) == want
    wrapped = nn.ModuleDict({"module": model})  # as DDP names it
    wrapped.config = model.config
    assert reference_fingerprint(wrapped, words, 1.0) == want


def test_anything_that_changes_a_logprob_changes_it() -> None:
    model, words = small_model(), Words("a", "b")
    seen = {reference_fingerprint(model, words, 1.0)}

    def check_new(*arguments: Any) -> None:
        before = len(seen)
        seen.add(reference_fingerprint(*arguments))
        assert len(seen) == before + 1

    check_new(model, words, 0.7)
    check_new(model, Words("b", "a"), 1.0)
    check_new(model, None, 1.0)
    check_new(small_model(rope_theta=5000.0, rope_parameters=None), words, 1.0)
    check_new(copy.deepcopy(model).bfloat16(), words, 1.0)
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 2**-20
    check_new(model, words, 1.0)


def test_large_and_strided_weights_are_hashed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(30, 50)
    layer.register_buffer("empty", torch.zeros(0, 4))
    layer.register_buffer("scale", torch.tensor(2.0))
    want = reference_fingerprint(layer, None, 1.0)
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", 100)
    assert reference_fingerprint(layer, None, 1.0) == want
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    assert not layer.weight.is_contiguous()
    assert reference_fingerprint(layer, None, 1.0) == want
    with torch.no_grad():
        layer.weight[49, 29] += 1
    assert reference_fingerprint(layer, None, 1.0) != want


def test_what_a_tokenizer_remembers_of_its_last_call_does_not_count() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="?")
    model = small_model()
    want = reference_fingerprint(model, tokenizer, 1.0)
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=1)
    assert reference_fingerprint(model, tokenizer, 1.0) == want
    tokenizer.chat_template = "{{ messages }}"
    assert reference_fingerprint(model, tokenizer, 1.0) != want


class LoraLinear(nn.Module):
    """Named as PEFT names its layers."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"one": nn.Linear(4, 2), "two": nn.Linear(4, 2)})
        self.lora_B = nn.ModuleDict({"one": nn.Linear(2, 3), "two": nn.Linear(2, 3)})
        self.scaling = {"one": 2.0, "two": 2.0}
        self.active_adapters = ["one"]
        self.disable_adapters = False
        self.merged = False

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.disable_adapters = True
        yield
        self.disable_adapters = False


def test_only_active_adapters_count() -> None:
    base = nn.Sequential(nn.Linear(4, 3))
    plain = reference_fingerprint(base, None, 1.0)
    layer = LoraLinear(base[0])
    model = nn.Sequential(layer)
    one = reference_fingerprint(model, None, 1.0)
    with torch.no_grad():
        layer.lora_B["two"].weight += 1
    assert reference_fingerprint(model, None, 1.0) == one != plain
    with torch.no_grad():
        layer.lora_B["one"].weight += 1
    trained = reference_fingerprint(model, None, 1.0)
    layer.scaling["one"] = 1.0
    assert len({plain, one, trained, reference_fingerprint(model, None, 1.0)}) == 4
    with layer.disabled():
        assert reference_fingerprint(model, None, 1.0) == plain
    layer.merged = True
    with pytest.raises(ValueError, match="reference_fingerprint: 0 must be without merged"):
        reference_fingerprint(model, None, 1.0)


def test_weights_that_are_not_there_are_refused() -> None:
    with torch.device("meta"):
        layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="bias must be a whole tensor with data"):
        reference_fingerprint(layer, None, 1.0)
    with pytest.raises(ValueError, match="temperature must be a number > 0.0, got 0"):
        reference_fingerprint(nn.Linear(2, 2), None, 0)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_peft_models_have_the_fingerprint_of_what_they_compute(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    base = small_model()
    plain = reference_fingerprint(base, None, 1.0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    before = reference_fingerprint(model, None, 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.requires_grad
    assert reference_fingerprint(model, None, 1.0) not in (plain, before)
    with model.disable_adapter():
        assert reference_fingerprint(model, None, 1.0) == plain
    model.merge_adapter()
    with pytest.raises(ValueError, match="must be without merged adapters"):
        reference_fingerprint(model, None, 1.0)
