"""Writes a tiny random model, its tokenizer and small data files: what docs/bring_your_own.md uses.

python examples/make_tiny_model.py FOLDER   # FOLDER/model, prompts.jsonl, trajectories.jsonl, ...
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


def tokenizer() -> PreTrainedTokenizerFast:
    """Ids of bytes, then <end>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>")


def model(vocabulary: int, end: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    # Heads of 32, the least that vLLM's attention knows on a CPU.
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    ends = {"eos_token_id": end, "pad_token_id": end, "bos_token_id": None}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **shape, **heads, **ends))


def sums() -> list[dict[str, str]]:
    """Prompts with an answer of one digit; every fifth is for tests, every fifth for choices."""
    splits = ("train", "train", "train", "dev", "test")
    pairs = [(a, b) for a in range(10) for b in range(10 - a)]
    return [
        {"prompt": f"{a}+{b}=", "answer": str(a + b), "split": splits[i % 5]}
        for i, (a, b) in enumerate(pairs)
    ]


def attempts(prompts: list[dict[str, str]]) -> list[dict[str, object]]:
    """Completions of the train prompts, as people and other models leave them."""
    rows: list[dict[str, object]] = []
    for row in (row for row in prompts if row["split"] == "train"):
        for text, reward in ((row["answer"], 1.0), (row["prompt"], 0.3), ("?", 0.0), ("no", 0.0)):
            rows.append({**row, "completion": text, "reward": reward, "model": "older"})
    return rows


def programs() -> list[dict[str, object]]:
    """Prompts with tests and a solution, in the columns of MBPP."""
    return [
        {
            "task_id": k,
            "text": f"Write a function add_{k} that adds {k} to a number.",
            "code": f"def add_{k}(x):\n    return x + {k}",
            "test_list": [f"assert add_{k}(1) == {1 + k}", f"assert add_{k}(5) == {5 + k}"],
        }
        for k in (1, 2, 3)
    ]


def main(folder: Path) -> None:
    ours = tokenizer()
    ours.save_pretrained(folder / "model")
    model(len(ours), ours.eos_token_id).save_pretrained(folder / "model")
    prompts = sums()
    files = {"prompts": prompts, "trajectories": attempts(prompts), "programs": programs()}
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
