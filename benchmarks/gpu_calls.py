"""Runs what needs a GPU, each item in a process of its own that is killed at its time limit.

    python benchmarks/gpu_calls.py a|b FOLDER [--seconds 145]

Call a: is every kernel right, and how fast is the headline? Call b: the tests marked `cuda`,
memcheck, and the benchmarks of the other shapes and of the peers. One line of JSON an item is
appended to FOLDER/gpu_a.jsonl (or gpu_b.jsonl) and flushed as soon as the item has ended, with
commit, GPU and driver; what the items printed is in gpu_a.log. An item that hangs, faults or is
wrong loses its own line only. Needs nothing but Python; `benchmarks/gpu.sh` installs the rest.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "python_tests"
Row = dict[str, Any]

KERNEL_ITEMS = [
    f"{path}/{kernel}/{size}"
    for path in ("hopper", "portable")
    for kernel in ("statistics", "gradient", "hidden-grad", "weight-grad")
    for size in ("small", "large")
]
OTHER_ITEMS = ["fp32", "fp16", "sparse", "frozen", "logits", "loss"]
HEADLINES = ["forward", "portable-forward", "exact-64", "exact-512", "frozen", "sparse"]
# Peers have a process each; every other shape has one for spo_ext and eager PyTorch.
SHAPES = ["Gemma-2-2B", "Qwen2.5-0.5B", "32000 entries", "GPT-2"]
PEERS = ["liger-rl", "cce", "quack", "trl", "chunked", "compile", "liger-ce", "cce-exact"]
OURS = "spo_ext,spo_ext-512MiB,spo_ext-stored,spo_ext-frozen,spo_ext-sparse10,spo_ext-sparse8,eager"
OTHER_BENCHES = ["soft_q", "cumulative_loss", "logprobs_from_logits"]
# A test is for a GPU if its module or itself says so.
FOR_GPU = re.compile(r'mark\.cuda\b|usefixtures\("device"\)|def test_\w+\([^)]*\bdevice\b')


@dataclass(frozen=True)
class Item:
    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    must_check: bool = False  # right only if it compared something


@dataclass
class Call:
    """Where the lines of one call go, and when it must be over."""

    name: str
    folder: Path
    deadline: float
    about: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self, row: Row, log: str = "") -> None:
        row = {**row, **self.about}
        with self.lock:
            self.rows.append(row)
            with open(self.folder / f"gpu_{self.name}.log", "a") as out:
                out.write(f"===== {row['item']}: {row['status']}\n{log}\n")
            with open(self.folder / f"gpu_{self.name}.jsonl", "a") as out:
                out.write(json.dumps(row) + "\n")
                out.flush()
                os.fsync(out.fileno())
            print(summary(row), flush=True)


def used(check: Row) -> float:
    """Return the share of its limit that an error takes; no number (a NaN) is above every limit."""
    error, limit = check.get("error"), check.get("limit")
    numbers = isinstance(error, float | int) and isinstance(limit, float | int)
    return error / limit if numbers and limit else math.inf


def worst(row: Row) -> Row | None:
    return max(row.get("checks", []), key=used, default=None)


def summary(row: Row) -> str:
    parts = [f"{row['item']:32s} {row['status']:8s} {row.get('seconds', 0):6.1f} s"]
    if check := worst(row):
        parts.append(f"{check['check']}: {used(check):.2g} of its limit")
    parts += [f"{key} {row[key]:.4g}" for key in ("ms", "over_gemm", "gemm_tflops") if key in row]
    parts += [row["error"][:160]] if row.get("error") else []
    return "  ".join(parts)


def parsed(lines: Iterable[str]) -> Iterator[Row]:
    """Yield the lines that are JSON: that at which a process was killed may be half a one."""
    for line in lines:
        try:
            fact = json.loads(line)
        except ValueError:
            continue
        if isinstance(fact, dict):
            yield fact


def merged(lines: Iterable[str]) -> Row:
    """Gather what an item printed as lines of JSON: its checks in a list, the rest as it is."""
    row: Row = {"checks": []}
    for fact in parsed(lines):
        row["checks"].append(fact) if "check" in fact else row.update(fact)
    return row


def status_of(code: int, row: Row, over_time: bool) -> str:
    if over_time:
        return "hung"
    if code < 0 or code > 128:
        return "crashed"
    if any(used(check) > 1 for check in row.get("checks", [])):
        return "wrong"
    return "ok" if code == 0 else "failed"


def execute(item: Item, seconds: float) -> tuple[int, bool, str, str]:
    """Return exit code, whether it ran over its time, and what it wrote to both outputs.

    `timeout` kills it and whatever it started, also if this process is gone. A process that the
    driver holds even then is left behind.
    """
    command = ["timeout", "-s", "KILL", f"{seconds:.1f}", *item.command]
    paths = [Path(f"{os.environ['SPO_WORK']}/{item.name.replace('/', '-')}.{n}") for n in "oe"]
    with open(paths[0], "w") as out, open(paths[1], "w") as err:
        began = time.monotonic()
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env={**os.environ, **item.environment}
        )
        try:
            code = process.wait(seconds + 2)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        over_time = abs(code) in (signal.SIGKILL, 128 + signal.SIGKILL)
        over_time = over_time and time.monotonic() - began >= seconds - 0.5
    written = [path.read_text(errors="replace")[-100_000:] for path in paths]
    return code, over_time, written[0], written[1]


def run(call: Call, item: Item) -> None:
    """Write the line of one item, whatever becomes of it."""
    seconds = min(item.limit_s, call.left())
    if seconds < 3:
        call.write({"item": item.name, "status": "no time"})
        return
    began = time.monotonic()
    code, over_time, out, err = execute(item, seconds)
    row = merged(out.splitlines())
    status = status_of(code, row, over_time)
    if status == "ok" and item.must_check and not row["checks"]:
        status, err = "failed", err + "\nnothing was checked"
    if status != "ok":
        said = [line for line in err.splitlines() if line.strip()]
        row["error"] = f"over {seconds:.0f} s" if over_time else (said or [f"exit {code}"])[-1]
    row |= {"item": item.name, "status": status, "exit": code}
    row["seconds"] = round(time.monotonic() - began, 1)
    call.write(row, out + err)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def check_item(name: str, limit_s: float) -> Item:
    portable = {"SPO_HOPPER": "0"} if "portable" in name else {}
    command = python(str(HERE / "gpu_items.py"), name)
    return Item(name, command, limit_s, portable, must_check=name != "machine")


def look_at_gpu(call: Call, seconds: float) -> None:
    """The first line, and what all others have of it."""
    fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.draw"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    item = Item("nvidia-smi", query, seconds)
    code, over_time, out, err = execute(item, seconds)
    values = [value.strip() for value in out.strip().split(",")]
    known = code == 0 and len(values) == len(fields.split(","))
    row = dict(zip(fields.split(","), values, strict=True)) if known else {}
    call.about |= {"gpu": row.get("name"), "driver": row.get("driver_version")}
    status = "ok" if known else status_of(code or 1, {}, over_time)
    error = {} if known else {"error": (err or out).strip()[-200:] or f"exit {code}"}
    call.write({"item": "nvidia-smi", "status": status, "exit": code, **row, **error}, out + err)


def call_a(call: Call, limit_s: float, jobs: int, only: list[str]) -> None:
    """Right first, several at a time; then what is timed, alone."""

    def wanted(names: list[str]) -> list[Item]:
        return [check_item(n, limit_s) for n in names if not only or n in only]

    for item in wanted(["machine", "gemm"]):
        run(call, item)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda item: run(call, item), wanted(KERNEL_ITEMS + OTHER_ITEMS)))
    for item in wanted([f"headline/{name}" for name in HEADLINES]):
        run(call, item)


def gpu_test_files() -> list[Path]:
    return [p for p in sorted(TESTS.glob("test_*.py")) if FOR_GPU.search(p.read_text())]


def run_test_file(call: Call, path: Path, limit_s: float) -> None:
    """Go on after a test that hung or lost the GPU, in a new process, with the tests after it.
    `gpu_pytest` writes a line when a test begins and when it ends."""
    log = Path(os.environ["SPO_WORK"]) / f"{path.stem}.tests"
    log.touch()
    rows: dict[str, Row] = {}
    began, tail, code = time.monotonic(), "", 0
    options = ["-m", "cuda", "-p", "gpu_pytest", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
    options += ["--capture=sys", "--tb=short", "-q", str(path)]
    environment = {"SPO_TEST_LOG": str(log), "PYTHONPATH": f"{HERE}:{os.environ['PYTHONPATH']}"}
    item = Item(path.stem, python("-m", "pytest", *options), limit_s, environment)
    while "all" not in rows and (left := min(began + limit_s - time.monotonic(), call.left())) > 3:
        before = len(rows)
        code, _, out, err = execute(item, left)
        tail += out[-20_000:] + err[-20_000:]
        rows = {fact["test"]: fact for fact in parsed(log.read_text().splitlines())}  # the last
        if len(rows) == before:
            break
    finished = rows.pop("all", None) is not None
    bad = {name: row for name, row in rows.items() if row["outcome"] not in ("passed", "skipped")}
    passed = sum(row["outcome"] == "passed" for row in rows.values())
    row: Row = {"item": path.stem, "exit": code, "passed": passed, "bad": bad}
    row["status"] = "wrong" if bad else "ok" if finished and passed else "failed"
    names = ", ".join(name.split("::")[-1] for name in bad)
    if bad:
        row["error"] = f"{len(bad)} of {len(rows)} tests: {names}"
    elif row["status"] != "ok":
        row["error"] = "not finished" if passed else "no test ran"
    call.write({**row, "seconds": round(time.monotonic() - began, 1)}, tail)


def bench_items(work: str) -> list[Item]:
    """Each writes a file of pytest-benchmark of its own."""
    options = ["-m", "pytest", "--benchmark-only", "-q", "-p", "no:cacheprovider", "--tb=short"]

    def item(name: str, file: str, limit_s: float, **environment: str) -> Item:
        path = f"{work}/bench-{name.replace('/', '-').replace(' ', '-')}.json"
        command = python(*options, f"--benchmark-json={path}", str(HERE / f"test_bench_{file}.py"))
        return Item(f"bench/{name}", command, limit_s, environment)

    head = "token_logprobs"
    shapes = {"SPO_BENCH_SHAPES": "Llama-3-8B"}
    items = [item("Llama-3-8B", head, 90, **shapes, SPO_BENCH_PEERS=OURS)]
    items += [
        item(s, head, 60, SPO_BENCH_SHAPES=s, SPO_BENCH_PEERS=f"{OURS},cce,liger-rl")
        for s in SHAPES
    ]
    items += [item(peer, head, 40, **shapes, SPO_BENCH_PEERS=peer) for peer in PEERS]
    return items + [item(name, name, 40) for name in OTHER_BENCHES]


def gather_benches(call: Call, work: Path) -> None:
    """One file like that of a single run, for report.py."""
    texts = [path.read_text() for path in sorted(work.glob("bench-*.json"))]
    found = [part for part in parsed(texts) if "benchmarks" in part and "spo" in part]
    if not found:
        return
    whole = found[0] | {"benchmarks": [row for part in found for row in part["benchmarks"]]}
    skipped = [part["spo"].get("skipped", {}) for part in found]
    whole["spo"]["skipped"] = {name: why for part in skipped for name, why in part.items()}
    path = call.folder / "gpu_bench.json"
    path.write_text(json.dumps(whole))
    report = python(str(HERE / "report.py"), str(path), "--plots", str(call.folder))
    with open(call.folder / "gpu_report.md", "w") as out:
        subprocess.run(report, stdout=out, timeout=60)


def call_b(call: Call, jobs: int, only: list[str]) -> None:
    work = Path(os.environ["SPO_WORK"])
    files = [path for path in gpu_test_files() if not only or path.stem in only]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda path: run_test_file(call, path, 100), files))
    # Only our kernels: those of PyTorch would take minutes. Without its cache, an access past the
    # end of a tensor is one past the end of an allocation.
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    sanitizer += ["--kernel-name", "kns=spo", *python(str(HERE / "small_case.py"))]
    items = [Item("memcheck", sanitizer, 100, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})]
    for item in items + bench_items(str(work)):
        if not only or item.name in only:
            run(call, item)
    gather_benches(call, work)


def table(rows: list[Row]) -> str:
    """Markdown: a line an item, and the kernels of each headline."""
    about = rows[0]
    head = [f"- commit {about['commit']}, {about['gpu']}, driver {about['driver']}", ""]
    lines = ["| item | | s | worst error / limit | ms | / product | extra MiB |", "|---" * 7 + "|"]
    for row in rows:
        check = worst(row)
        numbers = [used(check) if check else None]
        numbers += [row.get(key) for key in ("ms", "over_gemm", "extra_mib")]
        cells = [row["item"], row["status"], f"{row.get('seconds', 0):.0f}"]
        cells += ["" if n is None else f"{n:.3g}" for n in numbers]
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        kernels = row.get("kernels", [])
        if kernels:
            lines += ["", f"{row['item']}, per call:", ""]
            lines += ["| kernel | launches | ms |", "|---|---|---|"]
        lines += [f"| `{k['kernel']}` | {k['calls']:g} | {k['ms']:.3f} |" for k in kernels]
    return "\n".join(head + lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("call", choices=["a", "b"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=145)
    parser.add_argument("--item-seconds", type=float, default=18, help="limit of an item of call a")
    parser.add_argument("--jobs", type=int, default=6, help="items at a time that are not timed")
    parser.add_argument("--only", default="", help="names of items, separated by commas")
    given = parser.parse_args()
    call = Call(given.call, given.folder, time.monotonic() + given.seconds)
    call.about["commit"] = os.environ.get("SPO_COMMIT", "unknown")
    only = [name for name in given.only.split(",") if name]
    look_at_gpu(call, min(10, given.item_seconds))
    if given.call == "a":
        call_a(call, given.item_seconds, given.jobs, only)
    else:
        call_b(call, given.jobs, only)
    (call.folder / f"gpu_{call.name}.md").write_text(table(call.rows))
    good = sum(row["status"] == "ok" for row in call.rows)
    print(f"{good} of {len(call.rows)} items are right", flush=True)
    sys.exit(good < len(call.rows))


if __name__ == "__main__":
    main()
