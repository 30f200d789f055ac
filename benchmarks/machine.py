"""What a result was measured on."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from measure import DEVICE, ON_GPU, roof

import spo_ext

HERE = Path(__file__).parent


def output_of(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=20)
    return result.stdout.strip() if result.returncode == 0 else ""


def commit() -> str:
    """With "-dirty" if tracked files differ from it; SPO_COMMIT where there is no repository, as on
    a lent machine."""
    found = output_of("git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    return os.environ.get("SPO_COMMIT") or found or "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def gpu() -> dict[str, object]:
    """As found: nothing here sets a clock. Read right after a product, so the clocks are working
    ones."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw"
    asked = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
    answers = [answer.strip() for answer in asked.split(",")] if asked else []
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_mib": found.total_memory >> 20,
        **dict(zip(fields.split(","), answers, strict=False)),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def report() -> dict[str, object]:
    ceilings = roof()
    return {
        "commit": commit(),
        "device": DEVICE,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu() if ON_GPU else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": versions(),
        "build": spo_ext.build_info(),
        "roof": ceilings,
    }
