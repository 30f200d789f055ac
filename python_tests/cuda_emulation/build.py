"""Compiles csrc/cuda for the host and loads it as torch.ops.spo_emulated.

The same .cu files that nvcc compiles go through the host's C++ compiler with SPO_EMULATE: see
emulate.h. SPO_EMULATE_SANITIZE=1 adds AddressSanitizer (python then needs LD_PRELOAD of libasan).
"""

import fcntl
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SANITIZE = os.environ.get("SPO_EMULATE_SANITIZE") == "1"
# PyTorch's headers take most of the time, so they are compiled once.
HEADERS = [f"ATen/ops/{name}.h" for name in ("empty", "empty_like", "full", "zeros")]
HEADERS += ["ATen/Dispatch.h", "torch/library.h"]
ONLY = os.environ.get("SPO_EMULATE_ONLY", "")  # stems of .cu files, to work on a few of them


def sources() -> list[Path]:
    """Every portable CUDA file; kernels of one architecture (*_sm90.cu) use its instructions."""
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    portable = [path for path in kernels if not path.stem.endswith("_sm90")]
    if ONLY:
        portable = [path for path in portable if path.stem in ONLY.split(",")]
    return [
        HERE / "schemas.cpp",
        HERE / "hopper.cpp",
        *(ROOT / "csrc" / name for name in ("checks.cpp", "kept.cpp")),
        *portable,
    ]


def _flags() -> list[str]:
    flags = [
        "-std=c++20",
        "-O2",  # with -O1 the tests take twice as long, which is more than it saves
        "-fPIC",
        "-DSPO_EMULATE",
        "-DSPO_CUTLASS",
        "-fvisibility=hidden",
        "-Wall",
    ]
    flags += ["-Wno-psabi", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", f"-I{HERE}"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    return [*flags, "-fsanitize=address", "-g1"] if SANITIZE else flags


def _ninja_file() -> str:
    lib = cpp_extension.library_paths()[0]
    compiler = os.environ.get("CXX", "g++")
    link = f"-shared -L{lib} -lc10 -ltorch_cpu" + (" -fsanitize=address" if SANITIZE else "")
    flags = f"-MMD -MF $out.d {' '.join(_flags())} -c $in -o $out"
    deps = "depfile = $out.d\n deps = gcc"
    lines = [
        f"rule headers\n command = {compiler} -x c++-header {flags}\n {deps}",
        f"rule compile\n command = {compiler} -x c++ -include torch.h {flags}\n {deps}",
        f"rule link\n command = {compiler} $in -o $out {link}",
    ]
    lines.append("build torch.h.gch: headers torch.h")
    objects = []
    for source in sources():
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source} | torch.h.gch")
    lines.append(f"build spo_emulated.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


@functools.cache
def load() -> Any:
    """Builds what changed (under build/, once per torch version), loads the library and returns
    its ops."""
    variant = ("-sanitize" if SANITIZE else "") + (f"-{ONLY}" if ONLY else "")
    folder = ROOT / "build" / f"cuda_emulation-{torch.__version__}{variant}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = _ninja_file()
        if not (folder / "build.ninja").exists() or (folder / "build.ninja").read_text() != text:
            (folder / "torch.h").write_text("".join(f"#include <{name}>\n" for name in HEADERS))
            (folder / "build.ninja").write_text(text)
        ninja = subprocess.run(
            ["ninja", "-C", str(folder), "-k", "0"], capture_output=True, text=True
        )
        if ninja.returncode != 0:
            raise RuntimeError(f"csrc/cuda does not compile for the host:\n{ninja.stdout}")
    torch.ops.load_library(str(folder / "spo_emulated.so"))
    return torch.ops.spo_emulated


if __name__ == "__main__":
    load()
    sys.stdout.write("loaded torch.ops.spo_emulated\n")
