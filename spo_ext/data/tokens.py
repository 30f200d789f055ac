"""Texts and messages as token ids, by a tokenizer of transformers that lies in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from spo_ext.data.records import Content, RowError
from spo_ext.store.records import Finish


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of transformers in a folder that save_pretrained wrote; nothing is downloaded.

    Raises ValueError if there is no such folder or no tokenizer in it, ImportError without
    transformers.
    """
    if not os.path.isdir(path):
        raise ValueError(f"tokenizer must be an existing folder, got {os.fspath(path)!r}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"a tokenizer needs transformers ({error}): pip install 'transformers>=5'"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers has no class of its own for a bad folder
        raise ValueError(f"no tokenizer can be read in {os.fspath(path)!r}: {error}") from error


class Tokenizer:
    """What generation would have read and written, as far as text tells.

    Args:
        path: a folder that save_pretrained wrote; nothing is downloaded.

    Raises ValueError if there is no such folder or no tokenizer in it, ImportError without
    transformers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._tokenizer = load_tokenizer(path)

    @property
    def eos_token_id(self) -> int | None:
        """The end token; None if the tokenizer has none."""
        found: int | None = self._tokenizer.eos_token_id
        return found

    def prompt_ids(self, content: Content) -> list[int]:
        """With the special tokens and the generation prompt that the tokenizer adds."""
        if isinstance(content, str):
            return self._ids(content, special=True)
        return self._ids(self._chat(list(content), generate=True), special=False)

    def completion_ids(self, prompt: Content, completion: Content, finish: Finish) -> list[int]:
        """Ends with the end token if it finished. Raises RowError."""
        if isinstance(prompt, str) or isinstance(completion, str):
            if not isinstance(completion, str):
                raise RowError("prompt and completion must both be text or both be messages")
            return self._ended(self._ids(completion, special=False), finish)
        start = self._chat(list(prompt), generate=True)
        whole = self._chat([*prompt, *completion], generate=False)
        if not whole.startswith(start):
            raise RowError("the chat template changes the prompt when the completion follows")
        ids = self._ids(whole[len(start) :], special=False)
        end = self._tokenizer.eos_token_id
        if end in ids:  # a template may write a line end after it, which no policy generates
            ids = ids[: len(ids) - ids[::-1].index(end)]
        return self._ended(ids, finish)

    def completion(self, prompt: Content, ids: tuple[int, ...]) -> Content:
        """Text without special tokens, or a message of the assistant if the prompt has messages."""
        words: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return words if isinstance(prompt, str) else [{"role": "assistant", "content": words}]

    def _ended(self, ids: list[int], finish: Finish) -> list[int]:
        end = self._tokenizer.eos_token_id
        if finish == "truncated":
            return ids[:-1] if ids and ids[-1] == end else ids
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _ids(self, words: str, special: bool) -> list[int]:
        ids: list[int] = self._tokenizer(words, add_special_tokens=special)["input_ids"]
        return ids

    def _chat(self, messages: list[Mapping[str, Any]], generate: bool) -> str:
        try:
            words: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # a template is a program that raises what it likes
            raise RowError(f"the chat template failed: {error}") from None
        return words
