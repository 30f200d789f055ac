"""Models and tokenizers from folders that save_pretrained wrote; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def load_model(
    folder: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    quiet: bool = False,
    **options: Any,
) -> Any:
    """A causal language model, or one with a PEFT adapter, in eval mode.

    device "auto" is the GPU if there is one; dtype "auto" that of the files; quiet leaves out the
    progress bar of transformers; options are those of from_pretrained.

    Raises ValueError if the folder holds none, ImportError without transformers or PEFT.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model must be an existing folder, got {str(folder)!r}")
    adapter = (folder / "adapter_config.json").is_file()
    try:
        loader = _loader(adapter)
    except ImportError as error:
        what = "peft" if adapter else "'transformers>=5'"
        raise ImportError(f"a model needs {what} ({error}): pip install {what}") from error
    try:
        with _bars(quiet):
            model = loader.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, **options
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"no model can be read in {str(folder)!r}: {error}") from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def _loader(adapter: bool) -> Any:
    if adapter:
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


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
