"""Models from folders that save_pretrained wrote, nothing downloaded; and the modes of a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def load_model(
    folder: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
    **options: Any,
) -> Any:
    """A causal language model, or one with a PEFT adapter, in eval mode; also one that reads images
    and text, for text alone.

    device "auto" is the GPU if there is one; dtype "auto" that of the files; quiet leaves out the
    progress bar of transformers; options are those of from_pretrained.

    Raises ValueError if the folder holds none, ImportError without transformers or PEFT.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model must be an existing folder, got {str(folder)!r}")
    adapter = (folder / "adapter_config.json").is_file()
    try:
        loaders = _loaders(adapter)
    except ImportError as error:
        what = "peft" if adapter else "'transformers>=5'"
        raise ImportError(f"a model needs {what} ({error}): pip install {what}") from error
    options |= {"dtype": dtype, "local_files_only": True}
    try:
        with _bars(quiet):
            model = _load(loaders, str(folder), options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"no model can be read in {str(folder)!r}: {error}") from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def _loaders(adapter: bool) -> list[Any]:
    """Of a model that writes text, then of one that also reads images."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if not adapter:
        return [AutoModelForCausalLM, AutoModelForImageTextToText]
    from peft import AutoPeftModelForCausalLM

    class Images(AutoPeftModelForCausalLM):
        _target_class: Any = AutoModelForImageTextToText

    return [AutoPeftModelForCausalLM, Images]


def _load(loaders: list[Any], folder: str, options: dict[str, Any]) -> Any:
    for loader in loaders[:-1]:
        try:
            return loader.from_pretrained(folder, **options)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
    return loaders[-1].from_pretrained(folder, **options)


@contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    from transformers import utils

    logging: Any = utils.logging
    change = quiet and logging.is_progress_bar_enabled()
    if change:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if change:
            logging.enable_progress_bar()


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
    """Models keep the probability in modules for dropout, or as a number of their own."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            of_dropout = "drop" in name or (isinstance(module, _DropoutNd) and name == "p")
            if of_dropout and isinstance(value, float):
                yield module, name, value
