"""Texts and messages as token ids, by a tokenizer of transformers that lies in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from spo_ext.data.records import Content, RowError, Turn, shown
from spo_ext.store.records import Finish

_NONE: Mapping[str, Any] = MappingProxyType({})


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


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """A completion as text without special tokens, as transformers and TRL have it, but indented
    like the policy wrote it: of a text's first spaces some tokenizers leave out one.
    """
    words: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    if words.startswith(" "):
        start = tokenizer("a", add_special_tokens=False)["input_ids"]
        before = tokenizer.decode(start, skip_special_tokens=True)
        whole = tokenizer.decode([*start, *ids], skip_special_tokens=True)
        words = whole[len(before) :] if whole.startswith(before) else words
    return words


class Tokenizer:
    """What generation would have read and written, as far as text tells.

    Args:
        path: a folder that save_pretrained wrote; nothing is downloaded.

    Raises ValueError if there is no such folder or no tokenizer in it, ImportError without
    transformers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._tokenizer = load_tokenizer(path)
        self._ends = _generation_ends(Path(path))

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text: of those at which generation ends, the tokenizer's own.

        None if there is none.
        """
        own: int | None = self._tokenizer.eos_token_id
        return own if own in self._ends or not self._ends else self._ends[0]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All tokens at which generation ends, that of a text first."""
        ends = dict.fromkeys((self.eos_token_id, *self._ends))
        return tuple(end for end in ends if end is not None)

    def prompt_ids(self, content: Content, template: Mapping[str, Any] = _NONE) -> list[int]:
        """With the special tokens and the generation prompt that the tokenizer adds before what is
        to be written; an end token that it puts behind a text is left out. template: arguments of
        the chat template besides the messages, as `Prompt.template` has them."""
        if isinstance(content, str):
            plain, ids = self._ids(content, special=False), self._ids(content, special=True)
            for end in range(len(ids), len(plain) - 1, -1) if plain else ():
                if ids[end - len(plain) : end] == plain:
                    return ids[:end]
            return ids
        start = self._chat(list(content), template, "prompt")
        return self._ids(start, special=False)

    def completion_ids(
        self,
        prompt: Content,
        completion: Content,
        finish: Finish,
        prompt_ids: Sequence[int] | None = None,
    ) -> list[int]:
        """What follows the prompt's ids in the tokens of both texts, as if they were one.

        One that finished ends with one end token, at which the policy's generation ends: of the
        model's generation_config, else the tokenizer's, and of a message the one that the chat
        template writes after it. Where the text's tokens begin otherwise than with prompt_ids
        (default: the prompt's), others are taken that make the same text with them.

        Raises RowError.
        """
        if isinstance(prompt, str) != isinstance(completion, str):
            raise RowError("prompt and completion must both be text or both be messages")
        if not isinstance(completion, str):
            turns = self.turns(prompt, completion, finish, prompt_ids)
            if len(turns) != 1:
                raise RowError(f"completion must be of one turn, got {len(turns)}: see turns")
            return list(turns[0].token_ids)
        assert isinstance(prompt, str)
        given = self.prompt_ids(prompt) if prompt_ids is None else list(prompt_ids)
        return self._ended(self._following(prompt, completion, given), self.eos_token_id, finish)

    def turns(
        self,
        prompt: Content,
        messages: Sequence[Mapping[str, Any]],
        finish: Finish,
        prompt_ids: Sequence[int] | None = None,
        template: Mapping[str, Any] = _NONE,
        rewards: Sequence[float] | None = None,
    ) -> list[Turn]:
        """A turn for each message of the assistant, and one without tokens for what follows the
        last: what the chat template writes before it, and what it makes of it, as the policy would
        have written it.

        What others say in between is read behind the tokens so far, as long as the template leaves
        these as they are. A message of the assistant with `weight` 0 is not the policy's own.
        rewards: one for each message of the assistant.

        Raises RowError.
        """
        if isinstance(prompt, str):
            raise RowError("messages of several turns must have a prompt of messages")
        made: list[Turn] = []
        before, paid = list(prompt), list(rewards or ())
        said = [message.get("role") for message in messages].count("assistant")
        if rewards is not None and len(paid) != said:
            raise RowError(f"turn_rewards must be {said}, one for each turn, got {len(paid)}")
        start = self._chat(before, template, "prompt")
        tokens = self.prompt_ids(prompt, template) if prompt_ids is None else list(prompt_ids)
        for message in messages:
            if message.get("role") == "assistant":
                if len(before) > len(prompt):
                    start = self._chat(before, template, "answer")
                    tokens = self.continued(tokens, self._ids(start, special=False))
                whole = self._chat([*before, message], template, "whole")
                if not whole.startswith(start):
                    raise RowError(
                        "the chat template changes the prompt when the completion follows"
                    )
                rest, end = self._turn(whole[len(start) :], message)
                last = len(made) + 1 == said
                ids = self._following(start, rest, tokens)
                ids = self._ended(ids, end, finish if last else "eos")
                reward = float(paid[len(made)]) if paid else 0.0
                made.append(Turn(tokens, ids, reward=reward, own=message.get("weight") != 0))
                tokens = [*tokens, *ids]
            before.append(message)
        if made and before[-1].get("role") != "assistant":
            whole = self._chat(before, template, "whole")
            read = self.continued(tokens, self._ids(whole, special=False))
            made.append(Turn(read, ()))
        return made

    def continued(self, before: list[int], whole: list[int]) -> list[int]:
        """Ids of the text of `whole` that begin with those before, as the policy read and wrote
        them, where the text does; else `whole`, which a template wrote anew."""
        if whole[: len(before)] == before:
            return whole
        start, words = self._text(before), self._text(whole)
        if words.startswith(start):
            # A template's marks are tokens of their own, so that nothing merges over the border.
            rest = self.completion_ids("", words[len(start) :], "truncated", prompt_ids=[])
            if self._text([*before, *rest]) == words:
                return [*before, *rest]
        return whole

    def _ended(self, ids: list[int], end: int | None, finish: Finish) -> list[int]:
        if ids and ids[-1] == end:
            ids = ids[:-1]
        return ids if finish == "truncated" or end is None else [*ids, end]

    def completion(
        self, prompt: Content, ids: tuple[int, ...], prompt_ids: Sequence[int] | None = None
    ) -> Content:
        """Text without special tokens, or a message of the assistant if the prompt has messages.

        With prompt_ids it is what the text of both says after that of the prompt: a tokenizer may
        leave out a space at the start of a text.
        """
        words = decoded(self._tokenizer, ids)
        if prompt_ids is not None:
            start = self._text(prompt_ids, skip_special_tokens=True)
            whole = self._text([*prompt_ids, *ids], skip_special_tokens=True)
            words = whole[len(start) :] if whole.startswith(start) else words
        return words if isinstance(prompt, str) else [{"role": "assistant", "content": words}]

    def _turn(self, rest: str, message: Mapping[str, Any]) -> tuple[str, int | None]:
        """What a template wrote after the prompt as far as the policy writes it, without the end
        token, and the end token."""
        said = message.get("content")
        said = said.strip() if isinstance(said, str) else ""
        place = rest.find(said) + len(said) if said in rest else 0
        added = self._tokenizer.added_tokens_decoder.items()
        own = [self._tokenizer.eos_token_id] if self._tokenizer.eos_token_id is not None else []
        for ends in ([*self._ends, *own], [end for end, token in added if token.special]):
            found = [(rest.find(mark, place), end) for end in ends if (mark := self._text([end]))]
            found = [(where, end) for where, end in found if where >= 0]
            if found:  # A line end may follow, which no policy generates.
                where, end = min(found)
                return rest[:where], end
        return rest, self.eos_token_id

    def _following(self, start: str, rest: str, given: list[int]) -> list[int]:
        """Ids that make the text of start and rest, behind those given for start."""
        before, whole = self._ids(start, special=False), self._ids(start + rest, special=False)
        same = given[len(given) - len(before) :] == before
        if same and whole[: len(before)] == before:
            return whole[len(before) :]
        wanted = self._text(whole)
        # A merge goes over the border: behind something else, the same text may have none.
        for anchor in ("", start[-1:], *_ANCHORS):
            first, both = (self._ids(text, special=False) for text in (anchor, anchor + rest))
            ids = both[len(first) :]
            if both[: len(first)] == first and self._text([*before, *ids]) == wanted:
                if same or self._text([*given, *ids]).endswith(wanted):
                    return ids
        raise RowError(
            f"the completion must follow the prompt at the border of two tokens, got "
            f"{shown(start[-20:])} and {shown(rest[:20])}: give completion_ids"
        )

    def _text(self, ids: Sequence[int], **how: Any) -> str:
        how["clean_up_tokenization_spaces"] = False
        words: str = self._tokenizer.decode(list(ids), **how)
        return words

    def _ids(self, words: str, special: bool) -> list[int]:
        ids: list[int] = self._tokenizer(words, add_special_tokens=special)["input_ids"]
        return ids

    def _chat(
        self,
        messages: list[Mapping[str, Any]],
        template: Mapping[str, Any],
        purpose: Literal["prompt", "answer", "whole"],
    ) -> str:
        """purpose: "prompt" is continued if it ends in the assistant's words, as TRL has it; after
        "answer" the assistant begins to speak."""
        continued = purpose == "prompt" and messages[-1].get("role") == "assistant"
        how: dict[str, Any] = {"add_generation_prompt": purpose != "whole"}
        if continued:
            how = {"continue_final_message": True}
        rendered = list(map(_rendered, messages))
        try:
            words: str = self._tokenizer.apply_chat_template(
                rendered, tokenize=False, **template, **how
            )
        except Exception as error:  # a template is a program that raises what it likes
            raise RowError(f"the chat template failed: {error}") from None
        return words


def _rendered(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the arguments of calls as objects, which templates expect, and not as OpenAI's text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except ValueError:  # as the policy wrote it
        return call
    assert isinstance(function, Mapping)
    return {**call, "function": {**function, "arguments": parsed}}


_ANCHORS = ("\n", " ", ".", "0", "a")


def _generation_ends(folder: Path) -> tuple[int, ...]:
    """Tokens at which the model in this folder ends; () where no file of it says so."""
    for name in ("generation_config.json", "config.json"):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            found = config.get(
                "eos_token_id", (config.get("text_config") or {}).get("eos_token_id")
            )
        except (OSError, ValueError, AttributeError):
            continue
        ends = found if isinstance(found, list) else [found]
        if ends and all(type(end) is int for end in ends):
            return tuple(ends)
    return ()
