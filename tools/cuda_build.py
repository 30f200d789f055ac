"""What a CUDA build needs to know: the toolkit, the architectures, and where headers are.

setup.py and CMakeLists.txt both ask here, so that both build alike. A GPU is never asked for.
`python tools/cuda_build.py` prints the answer as CMake commands.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# cp.async and the bf16 matrix instructions of the kernels begin here.
OLDEST_ARCH = 80

# -DNDEBUG: CUTLASS asserts in its main loop else; what a kernel refuses it refuses either way.
# -Xptxas -v: registers and spills of every kernel, which tools/check_kernels.py reads.
# -lineinfo: profilers and cuobjdump show source lines; the code is the same without.
# -U: PyTorch switches the operators of half and bfloat16 off, and CUTLASS's headers use them.
NVCC_FLAGS = [
    "-O3",
    "-DNDEBUG",
    "-lineinfo",
    "-Xptxas=-v",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "--expt-relaxed-constexpr",
]


class BuildError(Exception):
    """One sentence for the builder."""


class Toolkit(NamedTuple):
    home: Path
    version: str
    archs: list[int]


def sources() -> list[str]:
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def find_nvcc() -> str | None:
    """CUDA_HOME comes first, as it does in torch.utils.cpp_extension."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


def ask(nvcc: str, *arguments: str) -> str:
    result = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{nvcc} {' '.join(arguments)} failed: {result.stderr.strip()[-200:]}")
    return result.stdout + result.stderr


def toolkit(nvcc: str) -> Toolkit:
    """nvcc itself is asked where it lives: the one on PATH may be a link or a script elsewhere."""
    version = re.search(r"release (\d+\.\d+)", ask(nvcc, "--version"))
    archs = [int(number) for number in re.findall(r"sm_(\d+)\b", ask(nvcc, "--list-gpu-code"))]
    if not version or not archs:
        raise BuildError(f"{nvcc} does not answer like nvcc; set CUDA_HOME to a CUDA toolkit")
    here = re.search(r"_HERE_=(\S+)", ask(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull))
    bin_folder = Path(here[1]) if here else Path(nvcc).resolve().parent
    return Toolkit(bin_folder.resolve().parent, version[1], sorted(archs))


def check_version(toolkit_version: str, torch_version: str) -> None:
    """The C++ runtime interface of CUDA may change with the major version only."""
    if toolkit_version.split(".")[0] != torch_version.split(".")[0]:
        raise BuildError(
            f"the CUDA toolkit is {toolkit_version} but torch was built for CUDA {torch_version}: "
            "install the toolkit of that major version, or set SPO_CUDA=0"
        )


def architectures(asked: str, known: list[int]) -> list[str]:
    """The list of TORCH_CUDA_ARCH_LIST, e.g. ["8.0", "9.0a", "12.1+PTX"].

    Unset: Ampere, Hopper with its own instructions, and the newest that the toolkit knows. The PTX
    of the first serves the GPUs between those, the PTX of the last those that come later.
    """
    if not asked.strip():
        default = [arch for arch in sorted({80, 90, known[-1]}) if arch in known]
        names = [f"{arch // 10}.{arch % 10}" + "a" * (arch == 90) for arch in default]
        # An "a" architecture has no later GPU, so its PTX would serve nobody.
        return [name if name.endswith("a") else name + "+PTX" for name in names]
    chosen: list[str] = []
    for name in re.split(r"[;,\s]+", asked.strip(" ;,")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        number = int(match[1] + match[2]) if match else 0
        if number not in known or number < OLDEST_ARCH:
            allowed = " ".join(f"{n // 10}.{n % 10}" for n in known if n >= OLDEST_ARCH)
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {name!r}; write numbers of this toolkit ({allowed}), "
                "as in '8.0 9.0a 12.0+PTX'"
            )
        if name not in chosen:
            chosen.append(name)
    return chosen


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def wheel_includes(home: Path) -> list[str]:
    """PyTorch's headers include those of cuBLAS and others, which a small toolkit lacks; PyTorch's
    own dependencies, the nvidia wheels, bring them."""
    if (home / "include" / "cublas_v2.h").exists():
        return []
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(path) for path in spec.submodule_search_locations or []] if spec else []
    return [str(path) for root in roots for path in sorted(root.glob("*/include"))]


def cutlass_includes() -> list[str]:
    """From CUTLASS_HOME, else from the PyPI package nvidia-cutlass, else none."""
    home = os.environ.get("CUTLASS_HOME")
    if home:
        if not Path(home, "include", "cutlass", "version.h").exists():
            raise BuildError(
                f"CUTLASS_HOME={home} has no include/cutlass/version.h: "
                "set it to a CUTLASS source tree, or unset it"
            )
        root = Path(home)
    else:
        spec = importlib.util.find_spec("cutlass_library")
        if not spec or not spec.origin:
            return []
        root = Path(spec.origin).parent / "source"
    folders = [root / "include", root / "tools" / "util" / "include"]
    if not (folders[0] / "cutlass" / "version.h").exists():
        return []
    return [str(folder) for folder in folders if folder.exists()]


def cutlass_version(includes: list[str]) -> str:
    text = Path(includes[0], "cutlass", "version.h").read_text() if includes else ""
    return ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) +(\d+)", text))


class Plan(NamedTuple):
    home: Path
    includes: list[str]  # after those of torch and the toolkit
    macros: list[tuple[str, str]]  # for every file, so that module, dispatch and kernels agree
    nvcc_flags: list[str]
    summary: str


def plan(torch_cuda: str | None) -> Plan | None:
    """The CUDA build for a torch of that CUDA version, or None for a CPU build."""
    asked = os.environ.get("SPO_CUDA", "")
    if asked not in ("", "0", "1"):
        raise BuildError(f"SPO_CUDA must be 0, 1 or unset, got {asked!r}")
    nvcc = find_nvcc()
    if asked == "1" and not nvcc:
        raise BuildError(
            "SPO_CUDA=1 needs nvcc: install the CUDA toolkit and put nvcc on PATH, "
            "or set CUDA_HOME to where bin/nvcc is"
        )
    if asked == "1" and not torch_cuda:
        raise BuildError("SPO_CUDA=1 needs a CUDA build of torch, found a CPU build")
    if asked == "0" or not nvcc or not torch_cuda:
        return None
    kit = toolkit(nvcc)
    check_version(kit.version, torch_cuda)
    archs = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), kit.archs)
    # CUTLASS serves the Hopper kernel alone, which exists as sm_90a code only.
    hopper = any(arch.startswith("9.0a") for arch in archs)
    cutlass = cutlass_includes() if hopper else []
    version = cutlass_version(cutlass)
    macros = [("SPO_CUDA_TOOLKIT", f'"{kit.version}"'), ("SPO_CUDA_ARCHS", f'"{" ".join(archs)}"')]
    if cutlass:
        macros += [("SPO_CUTLASS", "1"), ("SPO_CUTLASS_VERSION", f'"{version}"')]
    if cutlass:
        note = f"CUTLASS {version}"
    elif hopper:
        note = "no CUTLASS headers (pip install nvidia-cutlass, or set CUTLASS_HOME), so Hopper "
        note += "gets the general kernels"
    else:
        note = "no 9.0a, so Hopper gets the general kernels"
    return Plan(
        kit.home,
        wheel_includes(kit.home) + cutlass,
        macros,
        NVCC_FLAGS + gencode(archs),
        f"CUDA {kit.version} kernels for {' '.join(archs)}; {note}",
    )


def cmake_commands() -> str:
    import torch
    from torch.utils import cpp_extension

    cuda = plan(torch.version.cuda)
    libraries = ["torch", "torch_cpu", "c10"] + (["torch_cuda", "c10_cuda"] if cuda else [])
    folders = cpp_extension.include_paths()[:2]
    answer = {
        "SPO_INCLUDES": folders + ([str(cuda.home / "include"), *cuda.includes] if cuda else []),
        "SPO_LIBRARIES": [f"{cpp_extension.TORCH_LIB_PATH}/lib{name}.so" for name in libraries],
        "SPO_DEFINITIONS": [f"_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"],
        "SPO_NVCC": [str(cuda.home / "bin" / "nvcc")] if cuda else [],
        "SPO_NVCC_FLAGS": cuda.nvcc_flags if cuda else [],
        "SPO_SUMMARY": [cuda.summary if cuda else "CPU kernels only"],
    }
    if cuda:
        answer["SPO_DEFINITIONS"] += [f"{name}={value}" for name, value in cuda.macros]
    return "\n".join(f"set({name} [[{';'.join(values)}]])" for name, values in answer.items())


if __name__ == "__main__":
    try:
        print(cmake_commands())
    except (BuildError, ImportError) as error:
        sys.exit(f"spo_ext: {error}")
