"""benchmarks/gpu.sh, rehearsed without a GPU: whatever one item does, every other line comes.

The script and its items are the real ones and compute on the CPU; gpu_stub spoils some of them.
SPO_REHEARSE=145 spoils every item of call a in every way, in calls of 145 seconds (an idle machine;
more if it is busy).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "benchmarks"

import gpu_calls

import spo_ext

STATUS = {
    "hang": "hung",
    "hang backward": "hung",
    "segfault": "crashed",
    "exit": "failed",
    "leave": "failed",
    "error": "failed",
    "garbage": "wrong",
    "lie": "wrong",
    "lie backward": "wrong",
    "nan": "wrong",
    "": "ok",
}
SMI = "NVIDIA H200, 580.1, 143771 MiB, 1980 MHz, 1980 MHz, 3201 MHz, 100 W"
FORWARD_ONLY = "statistics", "gemm", "headline/forward", "headline/portable-forward"
ITEMS = [
    "gemm",
    *gpu_calls.KERNEL_ITEMS,
    *gpu_calls.OTHER_ITEMS,
    *(f"headline/{name}" for name in gpu_calls.HEADLINES),
]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Where gpu.sh finds spo_ext and the stub, as if installed from wheels, and an nvidia-smi."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "spo_ext").symlink_to(Path(spo_ext.__file__).parent)
    shutil.copy(Path(__file__).parent / "gpu_stub" / "sitecustomize.py", folder)
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n$SMI_FAULT\necho '{SMI}'\n")
    smi.chmod(0o755)
    return folder


def call_a(
    site: Path, faults: dict[str, str], seconds: int, *options: str, smi: str = ""
) -> dict[str, Any]:
    """Return the rows of one call by their item."""
    out = site.parent / "out"
    result = subprocess.run(
        ["bash", str(SCRIPTS / "gpu.sh"), "a", "0123abc"],
        env=os.environ
        | {
            "OUT": str(out),
            "PATH": f"{site}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SMI_FAULT": smi,
            "SPO_SITE": str(site),
            "SPO_STUB": json.dumps(faults),
            "SPO_BENCH_DEVICE": "cpu",
            "SPO_BENCH_ROUNDS": "1",
            "SPO_GPU_SECONDS": str(seconds),
            "SPO_GPU_OPTIONS": " ".join(options),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    lines = (out / "gpu_a.jsonl").read_text().splitlines()
    rows = {row["item"]: row for row in map(json.loads, lines)}
    assert len(rows) == len(lines)  # a line each
    assert all(row["commit"] == "0123abc" for row in rows.values())
    right = all(row["status"] == "ok" for row in rows.values())
    assert (result.returncode == 0) == right, result.stdout + result.stderr
    assert result.stdout.endswith("items are right\n"), result.stdout + result.stderr
    table = (out / "gpu_a.md").read_text()
    assert all(f"| {name} | {row['status']} |" in table for name, row in rows.items())
    return rows


@pytest.fixture(scope="module")
def patience() -> float:
    """Seconds that a good item never needs, however busy this machine is."""
    began = time.monotonic()
    command = [sys.executable, str(SCRIPTS / "gpu_items.py"), "machine"]
    subprocess.run(command, check=True, env=os.environ | {"SPO_BENCH_DEVICE": "cpu"})
    return max(10.0, 5 * (time.monotonic() - began))


def test_whatever_one_item_does_the_others_have_their_lines(site, patience):
    faults = {
        "hopper/statistics/small": "hang",
        "hopper/gradient/small": "segfault",
        "hopper/hidden-grad/small": "lie backward",
        "portable/hidden-grad/small": "error",
        "headline/forward": "",
    }
    only = f"--only={','.join(faults)}"
    rows = call_a(site, faults, 600, only, f"--item-seconds={patience}", "--jobs=3")
    for name, fault in faults.items():
        assert rows[name]["status"] == STATUS[fault], rows[name]
        assert rows[name]["gpu"] == "NVIDIA H200" and rows[name]["driver"] == "580.1"
    assert rows["nvidia-smi"]["status"] == "ok"
    failed = rows["portable/hidden-grad/small"]
    assert failed["error"].startswith("RuntimeError: CUDA error: an illegal memory access")
    checked = {c["check"]: c for c in rows["hopper/hidden-grad/small"]["checks"]}
    assert (
        gpu_calls.used(checked["small logprob"]) <= 1 < gpu_calls.used(checked["small grad_hidden"])
    )
    timed = rows["headline/forward"]
    assert timed["ms"] > 0 and timed["gemm_ms"] > 0 and timed["kernels"][0]["ms"] > 0


def test_no_line_waits_for_the_gpu_past_the_deadline(site):
    """Every process hangs from its start, nvidia-smi too."""
    (site / "sitecustomize.py").write_text(
        "import sys, time\ntime.sleep(99 * sys.orig_argv[-2].endswith('gpu_items.py'))"
    )
    began = time.monotonic()
    rows = call_a(site, {}, 14, "--item-seconds=1", "--jobs=8", smi="sleep 99")
    assert set(rows) == {"nvidia-smi", "machine", *ITEMS}
    assert {row["status"] for row in rows.values()} <= {"hung", "no time"}
    assert time.monotonic() - began < 14 + 40  # for what else this machine is busy with


@pytest.mark.skipif("SPO_REHEARSE" not in os.environ, reason="SPO_REHEARSE is not set")
@pytest.mark.parametrize("first", range(len(STATUS)))
def test_every_fault_in_every_item(first, site):
    kinds = list(STATUS)
    faults = {name: kinds[(i + first) % len(kinds)] for i, name in enumerate(ITEMS)}
    for name, fault in faults.items():
        if fault.endswith("backward") and any(part in name for part in FORWARD_ONLY):
            faults[name] = fault.removesuffix(" backward")
    seconds = int(os.environ["SPO_REHEARSE"])
    began = time.monotonic()
    rows = call_a(site, faults, seconds, f"--item-seconds={seconds / 8}", "--jobs=4")
    assert time.monotonic() - began < seconds + 5
    assert {n: rows[n]["status"] for n in faults} == {n: STATUS[f] for n, f in faults.items()}


MARK = "cuda"  # so that this file has no mark itself
HEAD = f"import pytest\npytestmark = pytest.mark.{MARK}\n"
TORCH = """
class cuda:
    broken = False
    is_initialized = staticmethod(lambda: True)
    def synchronize():
        if cuda.broken:
            raise RuntimeError("CUDA error")
"""
TEST_FILES = {
    "test_fine": "def test_a(): pass",
    "test_hangs": """
import time
def test_a(): pass
def test_b(): time.sleep(99)
def test_c(): pass""",
    "test_crashes": """
import os
def test_a(): os.abort()
def test_b(): pass""",
    "test_fails": """
def test_a(): assert 0
def test_b(): pass""",
    "test_loses_the_gpu": """
import torch
def test_a():
    torch.cuda.broken = True
    assert 0
def test_b(): assert not torch.cuda.broken""",
    "test_of_nothing": "@pytest.mark.skip(reason='no GPU')\ndef test_a(): pass",
    "test_not_imported": "import nothing_like_it",
}


def test_a_test_that_hangs_or_loses_the_gpu_costs_its_own_line_only(tmp_path):
    """Call b, on files of tests that need no torch."""
    for folder, names in (("benchmarks", ["gpu_calls.py", "gpu_pytest.py"]), ("python_tests", [])):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(SCRIPTS / name, tmp_path / folder)
    (tmp_path / "python_tests" / "torch.py").write_text(TORCH)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = cuda\n")
    for name, text in TEST_FILES.items():
        (tmp_path / "python_tests" / f"{name}.py").write_text(HEAD + text)
    only = ",".join([*TEST_FILES, "memcheck"])
    command = [sys.executable, "benchmarks/gpu_calls.py", "b", str(tmp_path), f"--only={only}"]
    environment = {"SPO_WORK": str(tmp_path), "SPO_TEST_LIMIT_S": "4", "PYTHONPATH": ""}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # quicker
    subprocess.run(command, cwd=tmp_path, env=os.environ | environment)
    lines = (tmp_path / "gpu_b.jsonl").read_text().splitlines()
    rows = {row["item"]: row for row in map(json.loads, lines)}
    outcomes = {
        name: (row["status"], row["passed"], [bad["outcome"] for bad in row["bad"].values()])
        for name, row in rows.items()
        if name in TEST_FILES
    }
    assert outcomes == {
        "test_fine": ("ok", 1, []),
        "test_hangs": ("wrong", 2, ["hung or crashed"]),
        "test_crashes": ("wrong", 1, ["hung or crashed"]),
        "test_fails": ("wrong", 1, ["failed"]),
        "test_loses_the_gpu": ("wrong", 1, ["failed"]),
        "test_of_nothing": ("failed", 0, []),
        "test_not_imported": ("failed", 0, []),
    }
    assert (
        rows["memcheck"]["status"] == "failed" and "compute-sanitizer" in rows["memcheck"]["error"]
    )


# What the tests need that no image with PyTorch and a GPU has.
ABSENT = ["sqlalchemy", "psycopg", "trl", "datasets", "openai", "fastapi", "uvicorn", "trackio"]


def test_the_files_for_a_gpu_need_no_more_than_a_gpu_image_has():
    files = [str(path) for path in gpu_calls.gpu_test_files()]
    code = f"import sys, pytest\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    code += f"sys.exit(pytest.main(['--collect-only', '-q', '-m', 'cuda', *{files}]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    assert [name for name in files if f"{Path(name).name}: " not in result.stdout] == []


def test_no_file_with_tests_for_a_gpu_is_left_out(request):
    """Of those collected in this run: all, in that of the whole suite."""
    marked = {item.path for item in request.session.items if item.get_closest_marker("cuda")}
    assert marked <= set(gpu_calls.gpu_test_files())
