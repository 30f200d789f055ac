"""Builds spo_ext._C from csrc/sources.txt: the CPU kernels always, the CUDA kernels where they can
be compiled.

CUDA is built when nvcc and a CUDA build of torch are there; whether a GPU is present never matters.
CONTRIBUTING.md lists the environment variables that change this.
"""

import os
import shutil
import sys
from pathlib import Path
from sysconfig import get_platform
from typing import NoReturn

VERSION = "0.2.0"
OLDEST_TORCH = (2, 11)  # as in pyproject.toml: what was tried
OLDEST_SETUPTOOLS = 77
INSTALL = "pip install --no-build-isolation ."

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import cuda_build  # noqa: E402  (the folder is not a package, and pip does not add it)


def fail(message: object) -> NoReturn:
    sys.exit(f"spo_ext: {message}")


try:
    import setuptools
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    if error.name not in ("torch", "setuptools"):
        fail(f"building needs PyTorch, which is installed but does not import: {error}")
    fail(
        "building needs PyTorch, setuptools and ninja where spo_ext will run, not in an "
        f"environment that pip makes for the build: pip install torch 'setuptools>="
        f"{OLDEST_SETUPTOOLS}' ninja, then {INSTALL}"
    )
except (ImportError, OSError) as error:  # a library that is missing, or of another version
    fail(f"building needs PyTorch, which is installed but does not import: {error}")
if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
    fail(
        f"building needs torch {'.'.join(map(str, OLDEST_TORCH))} or later, found "
        f"{torch.__version__}: install a later one first, then {INSTALL}"
    )
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    fail(
        f"building needs setuptools {OLDEST_SETUPTOOLS} or later, found {setuptools.__version__}: "
        f"pip install 'setuptools>={OLDEST_SETUPTOOLS}', then {INSTALL}"
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
    """Says once, when it compiles, what it compiles; an editable install compiles what changed."""

    def run(self) -> None:
        if self.editable_mode:  # setuptools would compile all anew, in a folder that goes away
            self.build_temp = f"build/temp.{get_platform()}-{sys.implementation.cache_tag}"
        super().run()

    def build_extensions(self) -> None:
        print(f"spo_ext: {plan.summary if plan else 'CPU kernels only'}", file=sys.stderr)
        super().build_extensions()


try:
    plan = cuda_build.plan(torch.version.cuda)
except cuda_build.BuildError as error:
    fail(error)
check_compiler()

setuptools.setup(version=VERSION, ext_modules=[extension(plan)], cmdclass={"build_ext": Build})
