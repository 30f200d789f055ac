"""What the examples train on, so that they run in seconds: put your own in its place.

A random model and random trajectories with rewards. A real run brings a model, the trajectories'
token ids, their rewards, and per prompt a value q0 (`spo_ext.prompt_value`).
"""

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 64
BETA = 0.1  # softness: reward per nat of divergence from the reference
TEMPERATURE = 0.8  # of the sampler that wrote the trajectories


def tiny_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = Qwen2Config(
        vocab_size=VOCABULARY, max_position_embeddings=64, **shape, **heads, **ends
    )
    return Qwen2ForCausalLM(config)


def trajectories(count: int = 8) -> dict[str, torch.Tensor]:
    """Prompts of 3 tokens and completions of 2 to 9, padded on the right.

    input_ids, attention_mask and labels int64 [count, 12], labels -100 but for the completions;
    rewards and q0 float32 [count].
    """
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, VOCABULARY, (count, 12), generator=generator)
    position = torch.arange(12)
    kept = position < 5 + torch.arange(count)[:, None] % 8
    return {
        "input_ids": input_ids.where(kept, 0),
        "attention_mask": kept.long(),
        "labels": input_ids.where(kept & (position >= 3), -100),
        "rewards": torch.rand(count, generator=generator),
        "q0": torch.full((count,), 0.5),
    }


@torch.no_grad()
def rows(model: Qwen2ForCausalLM, count: int = 8) -> list[dict[str, torch.Tensor]]:
    """One dict per trajectory, with `ref_logprobs`: the sum under the model as it is now, made the
    reference by that. Scored once; a store would keep it."""
    columns = trajectories(count)
    inputs = {name: columns[name] for name in ("input_ids", "attention_mask")}
    columns["ref_logprobs"] = model(**inputs, logprob_targets=columns["labels"]).sum(1)
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Of the words "w2" to "w63"."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    splitter = Tokenizer(WordLevel(words, unk_token="<pad>"))
    splitter.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def save_tiny_model(folder: str) -> str:
    """The folder, from which TRL loads policy and reference."""
    tiny_model().save_pretrained(folder)
    return folder


def prompts(count: int = 4) -> Dataset:
    return Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(2, 2 + count)]})
