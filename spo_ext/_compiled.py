"""Loads the compiled module spo_ext._C, or says in one sentence why it does not load."""

import importlib
import mmap
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

BUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."
MARK = b"spo_ext was built with torch "  # kBuiltWith of csrc/bindings.cpp


def built_with(library: Path) -> str:
    """Return the version of torch that a compiled module was built with, or "" if it does not say.

    It is read from the file: with another torch the module may not load, or worse, load.
    """
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start = text.find(MARK) + len(MARK)
        return text[start : text.find(b"\0", start)].decode() if start >= len(MARK) else ""


def why_missing(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if others:
        return f"{folder} has a module for another Python ({others[0]}): {BUILD}"
    return (
        f"{folder} is the source, without a compiled module, and hides an installed spo_ext: "
        "start Python in another folder, or build in this one: "
        "pip install --no-build-isolation --no-deps -e ."
    )


def load() -> ModuleType:
    """Return spo_ext._C.

    Raises:
        ImportError: naming what was found, what it was built with, and how to build it anew.
    """
    folder = Path(__file__).parent  # nowhere else: not that of another clone's editable install
    spec = PathFinder.find_spec("spo_ext._C", [str(folder)])
    if spec is None or spec.origin is None:
        raise ImportError(f"spo_ext: {why_missing(folder)}")
    built, running = built_with(Path(spec.origin)), torch.__version__
    if built and built.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"spo_ext was built with torch {built} and does not run with torch {running}: "
            f"in the source folder of spo_ext, build it for this torch: {BUILD}"
        )
    try:
        return importlib.import_module("spo_ext._C")
    except ImportError as error:
        raise ImportError(
            f"spo_ext was built with torch {built or 'of an unknown version'} and does not load "
            f"with torch {running} ({error}): in the source folder of spo_ext, build it for this "
            f"torch: {BUILD}"
        ) from error
