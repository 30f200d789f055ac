"""Builds spo_ext._C from csrc/sources.txt: the CPU kernels always, the CUDA kernels where they can
be compiled.

SPO_CUDA=1 insists on CUDA, SPO_CUDA=0 refuses it; otherwise CUDA is built when nvcc and a CUDA
build of torch are there. Whether a GPU is present never matters. TORCH_CUDA_ARCH_LIST picks the
architectures; CUTLASS headers come from CUTLASS_HOME or the package nvidia-cutlass.
SPO_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer (see `make sanitize`).
"""

import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

VERSION = "0.1.0"

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import cuda_build  # noqa: E402  (the folder is not a package, and pip does not add it)


def fail(message: object) -> NoReturn:
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


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if not (shutil.which(compiler.split()[0]) or shutil.which("g++") or shutil.which("clang++")):
        fail("building needs a C++17 compiler: install g++ (apt-get install g++) or set CXX")


def compiler_flags() -> tuple[list[str], list[str]]:
    """For compiling and for linking."""
    # OpenMP is compiled in but not linked: torch has loaded the one runtime that both must share.
    flags = ["-O3", "-fopenmp", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
    flags += ["-fvisibility=hidden"]
    if os.environ.get("SPO_SANITIZE") != "1":
        return flags, []
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
    flags += [*sanitize, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1"]
    return flags, sanitize


def extension(cuda: cuda_build.Plan | None) -> object:
    files = cuda_build.sources()
    flags, link = compiler_flags()
    macros = [("SPO_VERSION", f'"{VERSION}"')]
    if cuda is None:
        return cpp_extension.CppExtension(
            "spo_ext._C",
            [name for name in files if not name.endswith(".cu")],
            define_macros=macros,
            extra_compile_args={"cxx": flags},
            extra_link_args=link,
        )
    # torch takes the folder above nvcc, which is wrong where the nvcc on PATH is a script.
    cpp_extension.CUDA_HOME = str(cuda.home)
    built = cpp_extension.CUDAExtension(
        "spo_ext._C",
        files,
        define_macros=macros + cuda.macros,
        extra_compile_args={"cxx": flags, "nvcc": cuda.nvcc_flags},
        extra_link_args=link,
    )
    # After torch's and the toolkit's own: the wheels hold other releases of the same headers.
    built.include_dirs += cuda.includes
    return built


class Build(cpp_extension.BuildExtension):
    """Says once, when it compiles, what it compiles."""

    def build_extensions(self) -> None:
        print(f"spo_ext: {plan.summary if plan else 'CPU kernels only'}", file=sys.stderr)
        super().build_extensions()


try:
    plan = cuda_build.plan(torch.version.cuda)
except cuda_build.BuildError as error:
    fail(error)
check_compiler()

setup(version=VERSION, ext_modules=[extension(plan)], cmdclass={"build_ext": Build})
