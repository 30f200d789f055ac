"""Builds spo_ext._C from csrc/sources.txt: the CPU kernels always, the CUDA kernels where they can
be compiled.

SPO_CUDA=1 insists on CUDA, SPO_CUDA=0 refuses it; otherwise CUDA is built when nvcc and a CUDA
build of torch are
there. Whether a GPU is present never matters. TORCH_CUDA_ARCH_LIST picks the architectures.
SPO_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer (see `make sanitize`).
"""

import os
import shutil
import sys
from pathlib import Path

VERSION = "0.1.0"
ROOT = Path(__file__).parent


def fail(message: str) -> None:
    sys.exit(f"spo_ext: {message}")


try:
    import torch
    from setuptools import setup
    from torch.utils import cpp_extension
except ImportError:
    fail(
        "building needs PyTorch, setuptools and ninja: pip install torch setuptools ninja, "
        "then pip install --no-build-isolation ."
    )


def sources() -> list[str]:
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def wants_cuda(files: list[str]) -> bool:
    asked = os.environ.get("SPO_CUDA", "")
    if asked not in ("", "0", "1"):
        fail(f"SPO_CUDA must be 0, 1 or unset, got {asked!r}")
    has_kernels = any(name.endswith(".cu") for name in files)
    nvcc = shutil.which("nvcc") or os.environ.get("CUDA_HOME")
    if asked == "1":
        if not has_kernels:
            fail("SPO_CUDA=1, but this version has no CUDA kernels; unset SPO_CUDA")
        if not nvcc:
            fail("SPO_CUDA=1 needs nvcc: install the CUDA toolkit or set CUDA_HOME")
        if torch.version.cuda is None:
            fail("SPO_CUDA=1 needs a CUDA build of torch, found a CPU build")
    return asked != "0" and has_kernels and bool(nvcc) and torch.version.cuda is not None


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if not (shutil.which(compiler.split()[0]) or shutil.which("g++") or shutil.which("clang++")):
        fail("building needs a C++17 compiler: install g++ (apt-get install g++) or set CXX")


def extension() -> object:
    files = sources()
    cuda = wants_cuda(files)
    check_compiler()
    macros = [("SPO_VERSION", f'"{VERSION}"')]
    # OpenMP is compiled in but not linked: torch has loaded the one runtime that both must share.
    flags = [
        "-O3",
        "-fopenmp",
        "-Wall",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
        "-fvisibility=hidden",
    ]
    link: list[str] = []
    if os.environ.get("SPO_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
        flags += [*sanitize, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1"]
        link += sanitize
    if not cuda:
        return cpp_extension.CppExtension(
            "spo_ext._C",
            [name for name in files if not name.endswith(".cu")],
            define_macros=macros,
            extra_compile_args={"cxx": flags},
            extra_link_args=link,
        )
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "default")
    macros += [("SPO_CUDA_TOOLKIT", f'"{torch.version.cuda}"'), ("SPO_CUDA_ARCHS", f'"{archs}"')]
    return cpp_extension.CUDAExtension(
        "spo_ext._C",
        files,
        define_macros=macros,
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--expt-relaxed-constexpr"]},
        extra_link_args=link,
    )


setup(
    version=VERSION,
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
)
