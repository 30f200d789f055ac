"""Modes of a module: in eval for a while, and without dropout for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode for a while, then each module as it was: some may have been frozen so."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def disable_dropout(model: nn.Module) -> None:
    """Sets dropout and layer drop of every module to 0, those of adapters included."""
    for module, name, _ in _dropout(model):
        setattr(module, name, 0.0)


def has_dropout(model: nn.Module) -> bool:
    return any(probability > 0 for *_, probability in _dropout(model))


def _dropout(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Find probabilities: models keep them in modules for dropout, or as numbers of their own."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            of_dropout = "drop" in name or (isinstance(module, _DropoutNd) and name == "p")
            if of_dropout and isinstance(value, float):
                yield module, name, value
