"""What a model's head reads, and what becomes of its logits, tried out on the model itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from spo_ext.head import HeadOptions
from spo_ext.integrations.adapters import head_device, plain_layer
from spo_ext.models import evaluating

_OWNER = "add_token_logprobs"
_LENGTH = 16
_FLOOR = 1e-4
_RANGE = 100.0  # logits between which a softcap shows


@dataclass(frozen=True, slots=True)
class Reading:
    """How log-probabilities come out of a model's own code.

    of_base: its head reads the last hidden state of its base model as it is. Else, as where a
        transform or a scale lies between, the whole model is called until it reaches its head.
    vocabulary: words that have a logit; the head may have more rows.
    scales: what becomes of the head's logits.
    """

    of_base: bool
    vocabulary: int
    scales: HeadOptions


class _Reached(Exception):
    """The head has been called."""


@torch.no_grad()
def read_head(model: Any, forward: Callable[..., Any], scales: HeadOptions) -> Reading:
    """Calls the model twice on a few tokens, in eval mode.

    Args:
        forward: of the model, without log-probabilities.
        scales: what the config says of the map from the head's logits to the model's. A model may
            apply it before its head, or not at all.

    Raises:
        ValueError: if the model cannot be called with input_ids alone, looks ahead, does not call
            its head once, or makes something else of its logits.
    """
    head = model.get_output_embeddings()
    layer, device = plain_layer(head), head_device(head)
    tokens = ordinary_tokens(model)
    length = min(_LENGTH, longest(model))
    tokens = tokens[:: max(1, len(tokens) // length)][:length].to(device)
    start, end = tokens.tensor_split(2)
    inputs = {"input_ids": tokens[None], "use_cache": False}
    name = type(model).__name__
    ramp = torch.linspace(-_RANGE, _RANGE, layer.out_features, device=device)
    double = getattr(getattr(layer, "weight", None), "dtype", None) == torch.float64
    ramp = ramp.double() if double else ramp
    read: list[Tensor] = []

    def answer(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        read.append(hidden)
        return ramp.expand(*hidden.shape[:-1], -1).clone()

    try:
        with evaluating(model), _replaced(head, answer):
            logits: Any = getattr(forward(**inputs), "logits", None)
            forward(**(inputs | {"input_ids": torch.cat([start, end.flip(0)])[None]}))
        with evaluating(model):
            of_base = _is_of_base(model, inputs, read[0])
    except Exception as error:  # whatever the code of a model may raise
        raise ValueError(
            f"{_OWNER}: {name} must answer input_ids alone, got {type(error).__name__}: {error}"
        ) from error
    if len(read) != 2 or read[0].dim() != 3 or not isinstance(logits, Tensor):
        _refuse(name, f"{len(read) / 2:g} calls of the head, on {list(read[0].shape)}")
    theirs = logits[0, -1].double()
    maps: tuple[HeadOptions, ...] = (scales, {})
    sizes = [_largest(_map(ramp.double(), one)[: len(theirs)] - theirs) for one in maps]
    allowed = 8 * torch.finfo(logits.dtype).eps * _largest(theirs)
    if not min(sizes) <= allowed:
        _refuse(name, f"a difference of {sizes[0]:.3g} between -{_RANGE:g} and {_RANGE:g}")
    ahead = _largest(read[0][:, : len(start)] - read[1][:, : len(start)]) / _largest(read[0])
    if not ahead <= max(_FLOOR, 2 * torch.finfo(read[0].dtype).eps):
        raise ValueError(
            f"{_OWNER}: the hidden states of {name} must not depend on later tokens, got a change "
            f"of {ahead:.3g} of their size"
        )
    return Reading(of_base, len(theirs), scales if sizes[0] <= allowed else {})


def head_input(model: Any, forward: Callable[..., Any], *args: Any, **inputs: Any) -> Tensor:
    """What the head reads, [B, T, d], in a call that goes no further."""
    read: list[Tensor] = []

    def stop(hidden: Tensor, *_: Any, **__: Any) -> NoReturn:
        read.append(hidden)
        raise _Reached

    try:
        with _replaced(model.get_output_embeddings(), stop):
            forward(*args, **inputs)
    except _Reached:
        pass
    return read[0]


def router_loss(
    model: Any, forward: Callable[..., Any], *args: Any, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """What the head reads, and the load-balancing loss by the model's own formula, in one call of
    the whole model without its head.

    Raises ValueError for a model that has no such loss.
    """
    read: list[Tensor] = []

    def keep(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        read.append(hidden)
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    with _replaced(model.get_output_embeddings(), keep):
        output = forward(*args, **inputs, output_router_logits=True)
    loss = getattr(output, "aux_loss", None)
    if loss is None:
        raise ValueError(
            f"{_OWNER}: output_router_logits must be left out for a model without a "
            f"load-balancing loss, got {type(model).__name__}"
        )
    return read[0], loss


def _is_of_base(model: Any, inputs: dict[str, Any], read: Tensor) -> bool:
    if model.base_model is model:  # of a prefix that names no attribute
        return False
    states = getattr(model.base_model(**inputs), "last_hidden_state", None)
    if not isinstance(states, Tensor) or states.shape != read.shape:
        return False
    return _largest(states - read) <= 8 * torch.finfo(read.dtype).eps * _largest(read)


def _map(logits: Tensor, scales: HeadOptions) -> Tensor:
    logits = logits * scales.get("logit_scale", 1.0)
    cap = scales.get("softcap")
    return logits if cap is None else cap * (logits / cap).tanh()


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _refuse(name: str, got: str) -> NoReturn:
    raise ValueError(
        f"{_OWNER}: the logits of {name} must be those of one call of its head, with a scale and a "
        f"softcap that its config names, got {got}"
    )


@contextmanager
def _replaced(head: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The head does something else; on the instance, where Accelerate may have put its own."""
    own = vars(head).get("forward")
    vars(head)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(head)["forward"]
        else:
            vars(head)["forward"] = own


def inside(model: Any) -> Any:
    """The model of transformers inside PEFT's, or itself."""
    get = getattr(model, "get_base_model", None)
    return model if get is None else get()


def longest(model: Any) -> int:
    """Tokens that the model has positions for."""
    config = inside(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def ordinary_tokens(model: Any) -> Tensor:
    """Ids that the model embeds and its head knows, without those that its config gives a role."""
    model = inside(model)
    sizes = [model.config.get_text_config().vocab_size]
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if getattr(layer, "weight", None) is not None:
            sizes.append(len(layer.weight))
    roles = set(_roles(model.config.to_dict()))
    ids = [token for token in range(min(sizes)) if token not in roles]
    return torch.tensor(ids or [0])


def _roles(config: Any, name: str = "") -> Iterator[int]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _roles(value, key)
    elif isinstance(config, list):
        for value in config:
            yield from _roles(value, name)
    elif isinstance(config, int) and name.endswith(("token_id", "token_ids", "_index")):
        yield config
