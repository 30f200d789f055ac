"""Is a prompt, or much of it, among the prompts of another split?"""

from __future__ import annotations

import re
import unicodedata
from itertools import chain

import torch
from torch import Tensor

from spo_ext.store import TrajectoryStore
from spo_ext.store.codec import content_hash, encode_json
from spo_ext.store.records import Prompt, Split

NGRAM = 13  # words, as language models' test sets are usually checked
_WORD = re.compile(r"\w+")
_UNSORTED = 2**18


def prompt_text(prompt: Prompt) -> str:
    """The text, or that of all messages, one after the other."""
    if isinstance(prompt.content, str):
        return prompt.content
    return "\n".join(_text(message.get("content")) for message in prompt.content)


def _text(content: object) -> str:
    if isinstance(content, list):  # parts, of which some are text
        return "\n".join(_text(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def normalised(prompt: Prompt) -> str:
    """Without differences of case, white space and Unicode form."""
    words = unicodedata.normalize("NFKC", prompt_text(prompt)).casefold().split()
    return " ".join(words) or encode_json(prompt.content)


def ngrams(prompt: Prompt) -> set[int]:
    """A 64-bit hash of each run of NGRAM words; the same only within one process."""
    words = _WORD.findall(normalised(prompt))
    return {hash(tuple(words[i : i + NGRAM])) for i in range(len(words) - NGRAM + 1)}


class Contamination:
    """Prompts of the store by split, and those added since.

    Memory: some 200 bytes per prompt, and 8 per word of the splits that are compared with.
    """

    def __init__(self, store: TrajectoryStore) -> None:
        self._store = store
        self._splits: dict[bytes, Split] = {}
        self._ngrams: dict[Split, _Hashes] = {}
        self._waiting: list[Prompt] = []
        for prompt in store.contents():
            self._splits.setdefault(_key(prompt), prompt.split)

    def exact(self, prompt: Prompt) -> Split | None:
        """The other split that has the same prompt but for case and white space."""
        split = self._splits.get(_key(prompt))
        return None if split == prompt.split else split

    def overlap(self, prompt: Prompt) -> tuple[float, Split | None]:
        """The largest share of its runs of words that another split has, and that split."""
        mine = ngrams(prompt)
        if not mine:
            return 0.0, None
        wanted = torch.tensor(sorted(mine), dtype=torch.int64, device="cpu")
        others: list[Split] = ["train", "dev", "test"]
        others.remove(prompt.split)
        shares = [(self._hashes(split).count(wanted) / len(mine), split) for split in others]
        return max(shares, key=lambda pair: pair[0])

    def add(self, prompt: Prompt) -> None:
        """A prompt that will be in the store."""
        self._waiting.append(prompt)
        self._splits.setdefault(_key(prompt), prompt.split)
        if prompt.split in self._ngrams:
            self._ngrams[prompt.split].add(ngrams(prompt))

    def stored(self) -> None:
        """All that were added are in the store now, or will never be."""
        self._waiting.clear()

    def _hashes(self, split: Split) -> _Hashes:
        """Made when first asked for: the split that is imported is never compared with."""
        if split not in self._ngrams:
            self._ngrams[split] = hashes = _Hashes()
            for prompt in chain(self._store.contents(split), self._waiting):
                if prompt.split == split:
                    hashes.add(ngrams(prompt))
        return self._ngrams[split]


class _Hashes:
    """A growing set of 64-bit integers: sorted ones, and a few new ones that are not yet."""

    def __init__(self) -> None:
        self._sorted = torch.empty(0, dtype=torch.int64, device="cpu")
        self._recent: set[int] = set()

    def add(self, hashes: set[int]) -> None:
        self._recent |= hashes
        if len(self._recent) > _UNSORTED:
            self._merge()

    def count(self, wanted: Tensor) -> int:
        found = torch.searchsorted(self._sorted, wanted)
        inside = found < self._sorted.numel()
        equal = torch.zeros_like(inside)
        equal[inside] = self._sorted[found[inside]] == wanted[inside]
        recent = torch.tensor([item in self._recent for item in wanted.tolist()], device="cpu")
        return int((equal | recent).sum())

    def _merge(self) -> None:
        recent = torch.tensor(list(self._recent), dtype=torch.int64, device="cpu")
        self._sorted = torch.cat([self._sorted, recent]).sort().values
        self._recent.clear()


def _key(prompt: Prompt) -> bytes:
    return content_hash(encode_json(normalised(prompt)))
