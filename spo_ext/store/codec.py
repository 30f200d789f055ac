"""Records as bytes: token ids, masks, log-probabilities, JSON, and the hashes of content.

Hashes cover content alone, never an id or a time, so that the same trajectory has the same hash in
every store and in whatever order it came.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_NARROW, _WIDE = b"H", b"I"  # codes of `array`: 2 and 4 bytes per token


def encode_tokens(ids: Sequence[int]) -> bytes:
    """A byte that says how wide ids are, then the ids, little-endian."""
    code = _NARROW if max(ids, default=0) < 2**16 else _WIDE
    return code + _little_endian(array(code.decode(), ids)).tobytes()


def decode_tokens(data: bytes) -> tuple[int, ...]:
    ids = array(data[:1].decode())
    ids.frombytes(data[1:])
    return tuple(_little_endian(ids))


def encode_floats(values: Tensor | Sequence[float]) -> bytes:
    """[T] as float32, little-endian."""
    numbers = values.tolist() if isinstance(values, Tensor) else values
    return _little_endian(array("f", numbers)).tobytes()


def decode_floats(data: bytes) -> Tensor:
    """float32 [T]."""
    values = array("f")
    values.frombytes(data)
    return torch.tensor(_little_endian(values), dtype=torch.float32, device="cpu")


def encode_mask(mask: Sequence[bool]) -> bytes:
    """A bit for each, the first the lowest of the first byte."""
    bits = "".join("1" if one else "0" for one in reversed(mask))
    return int(bits or "0", 2).to_bytes((len(mask) + 7) // 8, "little")


def decode_mask(data: bytes, size: int) -> tuple[bool, ...]:
    bits = format(int.from_bytes(data, "little"), f"0{size}b")
    return tuple(bit == "1" for bit in reversed(bits))


def encode_contexts(contexts: Mapping[int, Sequence[int]]) -> bytes:
    """Where each begins, how many tokens it has, and these."""
    return encode_tokens([n for start, ids in contexts.items() for n in (start, len(ids), *ids)])


def decode_contexts(data: bytes) -> dict[int, tuple[int, ...]]:
    numbers, found, place = decode_tokens(data), {}, 0
    while place < len(numbers):
        start, size = numbers[place : place + 2]
        found[start] = numbers[place + 2 : place + 2 + size]
        place += 2 + size
    return found


def _little_endian(values: array[Any]) -> array[Any]:
    if sys.byteorder == "big":
        values.byteswap()
    return values


def encode_json(value: object) -> str:
    """One text per value: sorted keys, and ASCII, because PostgreSQL's text holds no NUL.

    Raises TypeError or ValueError for what JSON cannot say: nan, infinity, and keys that are not
    text, which json.dumps would make text of.
    """
    _check_keys(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _check_keys(value: object) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r}, which is not text")
            _check_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_keys(inner)


def content_hash(*parts: bytes | str | None) -> bytes:
    """32 bytes; each part is hashed with its length, so that no two lists of parts collide."""
    state = hashlib.blake2b(digest_size=32)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(b"none" if data is None else len(data).to_bytes(8, "little") + data)
    return state.digest()


def shuffle_key(digest: bytes) -> int:
    """The first 8 bytes of a hash as a signed integer, which is what a tensor can hold."""
    return int.from_bytes(digest[:8], "little", signed=True)
