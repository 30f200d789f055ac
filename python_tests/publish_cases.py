"""Tiny models with random weights, some with adapters, for the tests of publication."""

from typing import Any

import torch
from torch import nn


def tiny_model(tied: bool = False) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<unk>", "<eos>", "ab", "ba"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def trained(model: nn.Module, only: str = "") -> Any:
    """Other weights where the name has `only` in it, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if only in name:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def lora_model(targets: str) -> Any:
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {
        "linear": {"target_modules": ["q_proj", "down_proj"]},
        "embedding_and_head": {
            "target_modules": ["embed_tokens", "v_proj"],
            "modules_to_save": ["lm_head"],
            "rank_pattern": {"v_proj": 2},
            "use_rslora": True,
        },
        "dora": {"target_modules": ["q_proj"], "use_dora": True},
        "bias": {"target_modules": ["q_proj"], "lora_bias": True},
        "tied": {"target_modules": ["embed_tokens"]},
    }[targets]
    config = LoraConfig(r=4, lora_alpha=8, **settings)
    model = get_peft_model(tiny_model(tied=targets == "tied"), config)
    trained(model, "modules_to_save")
    return trained(model, "lora_")
