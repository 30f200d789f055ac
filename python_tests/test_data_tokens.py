"""Completions as the tokens that follow the prompt's, and ended as the policy ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_cases import CHAT, import_rows, write_rows

from spo_ext.data.exporter import export_rows
from spo_ext.data.records import RowError
from spo_ext.data.tokens import Tokenizer
from spo_ext.store import TrajectoryStore

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def save(folder: Path, model: Any, parts: Any, special: list[str], **how: Any) -> Tokenizer:
    """A tokenizer of these parts, in a folder with the end tokens of generation."""
    pre_tokenizer, decoder = parts
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    backend.add_special_tokens(special)
    template, generation = how.pop("template", None), how.pop("generation", None)
    if template is not None:
        ids = [(token, backend.token_to_id(token)) for token in special]
        processor = tokenizers.processors.TemplateProcessing(
            single=template, pair=f"{template} $B", special_tokens=ids
        )
        backend.post_processor = processor
    chat = how.pop("chat", None)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **how)
    fast.chat_template = chat
    fast.save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return Tokenizer(folder)


def llama(folder: Path, **how: Any) -> Tokenizer:
    """As those of Llama-2 and Mistral: a space before the first word, and words with theirs."""
    words = "0123456789+=abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127)), "\u2581"]
    vocabulary += [f"\u2581{word}" for word in words] + ["ab"]
    merges = [*(("\u2581", word) for word in words), ("a", "b")]
    ids = {token: place for place, token in enumerate(vocabulary)}
    model = tokenizers.models.BPE(ids, merges, unk_token="<unk>")
    space = {"replacement": "\u2581", "prepend_scheme": "first"}
    parts = tokenizers.pre_tokenizers.Metaspace(**space), tokenizers.decoders.Metaspace(**space)
    settings = {"template": "<s> $A", "bos_token": "<s>", "eos_token": "</s>", "chat": LLAMA_CHAT}
    return save(folder, model, parts, ["<unk>", "<s>", "</s>"], **settings | how)


def phi(folder: Path, **how: Any) -> Tokenizer:
    """As Phi-3's: a turn ends with <|end|>, which is not the tokenizer's end token."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"]
    settings = {"eos_token": "<|endoftext|>", "chat": CHAT}
    parts = split, tokenizers.decoders.ByteLevel()
    return save(folder, model, parts, special, **settings | how)


def tokens(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    found: list[str] = tokenizer._tokenizer.convert_ids_to_tokens(ids)
    return found


def test_a_completion_follows_its_prompt_without_a_space_of_its_own(tmp_path: Path) -> None:
    made = llama(tmp_path)
    assert tokens(made, made.prompt_ids("0+0=")) == ["<s>", "\u25810", "+", "0", "="]
    assert tokens(made, made.completion_ids("0+0=", "0", "eos")) == ["0", "</s>"]
    assert tokens(made, made.completion_ids("0+0=", " 0", "truncated")) == ["\u25810"]
    chat = [{"role": "user", "content": "0"}]
    reply = [{"role": "assistant", "content": "0"}]
    assert tokens(made, made.completion_ids(chat, reply, "eos")) == ["0", "</s>"]
    assert tokens(made, made.completion_ids(chat, reply, "truncated")) == ["0"]


@pytest.mark.parametrize("make", [llama, phi])
def test_a_completion_is_indented_as_it_was_written(tmp_path: Path, make: Any) -> None:
    made = make(tmp_path)
    for prompt, text in (("a", "    return x"), ("a", "  x"), ("a", "x  y"), ("ab", "0")):
        ids = made.completion_ids(prompt, text, "truncated")
        assert made.completion(prompt, tuple(ids)) == text


@pytest.mark.parametrize("make", [llama, phi])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("0+0=", "0"),
        ("0+0= ", "0"),  # "= 0" has its space with the 0, and the prompt has it already
        ("x = a", "b"),  # "ab" is one token
        ("x = a", "b ab a"),
        ("def f(x):\n", "    return x\n"),
        ("", "0"),
        ("0", ""),
    ],
)
def test_prompt_and_completion_are_the_tokens_of_the_text(
    tmp_path: Path, make: Any, prompt: str, completion: str
) -> None:
    made = make(tmp_path)
    before = made.prompt_ids(prompt)
    ids = made.completion_ids(prompt, completion, "truncated")
    both = made._tokenizer.decode([*before, *ids], skip_special_tokens=True)
    known = (prompt + completion).replace("\n", "") if make is llama else prompt + completion
    assert both.replace("<unk>", "") == known
    if "\n" not in prompt:
        assert made.completion(prompt, tuple(ids), before) == completion
        assert made.completion_ids(prompt, completion, "truncated", before) == ids


def test_a_border_inside_a_token_is_refused_where_nothing_else_makes_the_text(
    tmp_path: Path,
) -> None:
    vocabulary = {"<unk>": 0, "no": 1, "nothing": 2, "</s>": 3}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    parts = tokenizers.pre_tokenizers.Whitespace(), None
    made = save(tmp_path, model, parts, ["</s>"], eos_token="</s>")
    with pytest.raises(RowError, match="border of two tokens, got 'no' and 'thing': give"):
        made.completion_ids("no", "thing", "eos")
    with pytest.raises(RowError, match="border of two tokens"):
        made.completion_ids("no", "no", "eos", [2])


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>"])
def test_an_end_token_behind_a_prompt_is_no_part_of_it(tmp_path: Path, template: str) -> None:
    made = llama(tmp_path, template=template)
    assert tokens(made, made.prompt_ids("0+0="))[-1] == "="
    assert tokens(made, made.completion_ids("0+0=", "0", "eos")) == ["0", "</s>"]


REPLY = [{"role": "assistant", "content": "end"}]
ASKED = [{"role": "user", "content": "0+0="}]


@pytest.mark.parametrize("generation", [[256, 257, 259], 257, None])
@pytest.mark.parametrize("content", ["0", "end", "a<|end|>b", "", " x "])
def test_a_turn_ends_with_the_one_token_that_the_policy_ends_with(
    tmp_path: Path, generation: Any, content: str
) -> None:
    made = phi(tmp_path, generation=generation)
    reply = [{"role": "assistant", "content": content}]
    ids = made.completion_ids(ASKED, reply, "eos")
    text = made._tokenizer.decode(ids)
    assert text == f"{content}<|end|>" and ids[-1] == 257
    cut = made.completion_ids(ASKED, reply, "truncated")
    assert cut == ids[:-1]


def test_a_text_ends_with_the_tokenizers_end_token_if_generation_ends_there(
    tmp_path: Path,
) -> None:
    for name, generation, end in (("a", None, 256), ("b", [257, 256], 256), ("c", [257], 257)):
        made = phi(tmp_path / name, generation=generation)
        assert made.completion_ids("a", "b", "eos")[1:] == [end] == [made.eos_token_id]
        assert made.end_ids[0] == end
    assert phi(tmp_path / "d", generation=[257, 259, 256]).end_ids == (256, 257, 259)
    folder = tmp_path / "e"
    phi(folder)
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": 257}}')
    assert Tokenizer(folder).end_ids == (257,)


def test_a_template_without_an_end_gets_that_of_a_text(tmp_path: Path) -> None:
    made = phi(tmp_path, chat="{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert made._tokenizer.decode(made.completion_ids(ASKED, REPLY, "eos")) == "end\n<|endoftext|>"


def test_a_prompt_that_ends_in_the_assistants_words_is_continued(tmp_path: Path) -> None:
    made = phi(tmp_path)
    ids = made.prompt_ids([*ASKED, {"role": "assistant", "content": "It is"}])
    assert made._tokenizer.decode(ids).endswith("<|assistant|>It is")


def test_import_and_export_of_texts_are_the_same(tmp_path: Path) -> None:
    made = llama(tmp_path / "tokenizer")
    rows = [
        {"prompt": "0+0=", "completion": "0", "reward": 1.0},
        {"prompt": "0+0=", "completion": " 0", "reward": 0.0},
        {"prompt": ASKED, "completion": [{"role": "assistant", "content": "0"}], "reward": 1.0},
    ]
    store = TrajectoryStore(tmp_path / "a.db")
    _, problems = import_rows(store, write_rows(tmp_path / "in.jsonl", *rows), tokenizer=made)
    assert problems == [] and store.counters()["trajectories"] == 3
    export_rows(store, tmp_path / "out.jsonl", tokenizer=made)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in rows[0]} for row in written] == rows
