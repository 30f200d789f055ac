"""Small models, a tokenizer of characters and a filled store, for the tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spo_ext.store import Origin, Prompt, Trajectory, TrajectoryStore

LETTERS = "0123456789+= abc"
PAD, EOS, BOS = 0, 1, 2
VOCABULARY = 3 + len(LETTERS)


def make_tokenizer() -> Any:
    """One token a letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<bos>", *LETTERS]
    words = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def make_model(seed: int = 0, kind: str = "qwen2", **changes: Any) -> Any:
    import transformers as hf

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "tie_word_embeddings": False,
    } | changes
    kinds = {
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
        "gemma2": (hf.Gemma2Config, hf.Gemma2ForCausalLM),
        "cohere": (hf.CohereConfig, hf.CohereForCausalLM),
        "granite": (hf.GraniteConfig, hf.GraniteForCausalLM),
        "mamba": (hf.MambaConfig, hf.MambaForCausalLM),
    }
    config, model = kinds[kind]
    torch.manual_seed(seed)
    made = model(config(**shape))
    with torch.no_grad():  # far enough from uniform that a wrong scale shows
        made.get_output_embeddings().weight.mul_(20)
    return made.eval()


def with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, settings)


def fill(store: TrajectoryStore, prompts: int = 8, each: int = 4, seed: int = 0) -> None:
    """Prompts "a+b=" and completions by a person, one of each prompt right."""
    tokenizer = make_tokenizer()
    rng = torch.Generator().manual_seed(seed)
    human = Origin("human", run="demonstrations")
    for i in range(prompts):
        a, b = divmod(i, 3)
        text = f"{a}+{b}="
        prompt = Prompt(text, [BOS, *tokenizer(text)["input_ids"]], answer=str(a + b))
        key = store.add_prompt(prompt)
        rows = [Trajectory(key, [*tokenizer(str(a + b))["input_ids"], EOS], 1.0, human, "eos")]
        for j in range(1, each):
            length = int(torch.randint(2, 7, (1,), generator=rng))
            tokens = torch.randint(3, VOCABULARY, (length,), generator=rng).tolist()
            rows.append(Trajectory(key, [*tokens, 3 + j, EOS], 0.0, human, "eos"))
        store.append(rows)


def dev_prompts(store: TrajectoryStore) -> None:
    tokenizer = make_tokenizer()
    for text, answer in (("1+5=", "6"), ("4+4=", "8")):
        ids = [BOS, *tokenizer(text)["input_ids"]]
        store.add_prompt(Prompt(text, ids, answer=answer, split="dev"))


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
