"""A run of many processes in which everything breaks in turn, and what was lost by it.

    make vllm
    PYTHONPATH=benchmarks:python_tests python benchmarks/rehearsal.py --minutes 30 \\
        --vllm .venv-vllm/bin/vllm --out rehearsal.json

PostgreSQL behind a relay, a vLLM server, two ranks of `spo train` under torchrun, two producers
with the policy in their own memory and two that ask the server, all of a tiny model. What ends is
started again with the same words, as a cluster would. Without --vllm all four producers have the
policy in memory; full disks are left out where no file system can be mounted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import machine
import postgres_server
import psycopg
import yaml
from data_cases import save_tokenizer, write_rows
from end_to_end_cases import REWARD, SAME, contents, metrics
from processes import descendants, free_port
from rollout_cases import tiny_model, wait_for

from spo_ext.store import TrajectoryStore

_BIN = Path(sys.executable).parent
_ROWS = 4  # of a step, on each of the ranks
_RANKS = 2
_PROMPTS = 64
_RESTART_S = 2.0  # until what ended is started again
_QUIET_S = 90.0  # before the first fault and after the last


class Part:
    """A process that is started again whenever it ends."""

    def __init__(self, folder: Path, name: str, words: Sequence[object], **environment: str):
        self.name, self._words = name, [str(word) for word in words]
        self._log, self._environment = folder / f"{name}.log", environment
        self.ends: list[int] = []  # exit codes
        self._again = 0.0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self._environment},
                start_new_session=True,
            )

    def look(self) -> None:
        """Starts it again, a little after it has ended."""
        code, now = self.process.poll(), time.monotonic()
        if code is None:
            return
        if not self._again:
            self.ends.append(code)
            self.kill()  # what it has left behind
            self._again = now + _RESTART_S
        elif now >= self._again:
            self._again = 0.0
            self.process = self._start()

    def kill(self) -> None:
        """With everything that it has started."""
        for pid in (*descendants(self.process.pid), self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def last_words(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


class Rehearsal:
    """The whole run in a folder."""

    def __init__(self, folder: Path, vllm: Path | None) -> None:
        self.folder, self.vllm = folder, vllm
        self.disks = [name for name in ("run", "database") if _mount(folder / name)]
        self.parts: dict[str, Part] = {}
        (folder / "database" / "server").mkdir()
        self._database = postgres_server.Server(folder / "database" / "server")
        self._database.start()
        with psycopg.connect(f"{self._database.url}/postgres", autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET max_wal_size = '96MB'")  # the disk is small
            connection.execute("SELECT pg_reload_conf()")
        self._relay_port, self._server_port = free_port(), free_port()
        self.store = f"postgresql://postgres@127.0.0.1:{self._relay_port}/postgres"
        self._looking, self._lock = True, threading.Lock()

    def start(self) -> None:
        add = self._add
        port = self._database.url.rpartition(":")[2]
        add("relay", sys.executable, __file__, "--relay", self._relay_port, port)
        model = self.folder / "policy"
        shape = {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        tiny_model(0, 1.0, **shape).save_pretrained(model)
        save_tokenizer(model)
        (self.folder / "rewards.py").write_text(REWARD)
        rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(_PROMPTS)]
        prompts = write_rows(self.folder / "prompts.jsonl", *rows)
        command = [_BIN / "spo", "import", prompts, "--store", self.store, "--tokenizer", model]
        subprocess.run(list(map(str, command)), check=True)
        (self.folder / "train.yaml").write_text(yaml.safe_dump(self._settings(model)))
        if self.vllm is not None:
            add(
                *("server", self.vllm, "serve", model, "--served-model-name", "policy"),
                *("--host", "127.0.0.1", "--port", self._server_port),
                *("--logprobs-mode", "processed_logprobs", "--max-num-batched-tokens", 32768),
                *("--gpu-memory-utilization", 0.15, "--dtype", "float32"),
                VLLM_SERVER_DEV_MODE="1",
            )
            wait_for(self._answers, 600)
        self._train()
        for i in range(4):
            where = ("--store", self.store, "--follow", self._policies, "--run", "learner")
            how = ("--n", 2, "--max-new-tokens", 8, "--prompts-per-version", 16)
            batch = ("--batch-size", 2, "--reward", f"{self.folder / 'rewards.py'}:odd")
            words = [_BIN / "spo", "rollout", *where, *how, *batch, "--quiet", "--seed", i]
            served = self._server is not None and i >= 2
            if served:
                words += ["--server", self._server, "--served-model", "policy"]
                words += ["--server-logprobs", "--tokenizer", model]
            add(f"producer {i}" + (" (server)" if served else ""), *words)
        threading.Thread(target=self._look, daemon=True).start()

    @property
    def _server(self) -> str | None:
        return None if self.vllm is None else f"http://127.0.0.1:{self._server_port}/v1"

    @property
    def _policies(self) -> Path:
        return self.folder / "policies"

    def _settings(self, model: Path) -> dict[str, Any]:
        return {
            "model": str(model),
            "store": self.store,
            "output_dir": str(self.folder / "run"),
            "run": "learner",
            "rollouts": "external",
            "publish_to": str(self._policies),
            "sync_every": 8,
            "max_offpolicy_steps": 1,
            "wait_seconds": 1200,
            "max_steps": 10**6,
            "lr_scheduler_type": "constant",
            "learning_rate": 1e-4,
            "save_strategy": "steps",
            "save_steps": 20,
            "save_total_limit": 3,
            "logging_steps": 1,
            "per_device_train_batch_size": _ROWS,
            "group_size": 2,
            "beta": 0.5,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "publish_url": self._server,
        }

    def _train(self, *more: object) -> None:
        self._add(
            *("trainer", _BIN / "torchrun", "--nproc-per-node", _RANKS, "--max-restarts", 99),
            *("--standalone", "-m", "spo_ext.cli", "train"),
            *("--config", self.folder / "train.yaml", "--resume", *more),
            ACCELERATE_USE_CPU="true",
            # Else ranks that torchrun has restarted may read addresses of those before, and wait.
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )

    def _add(self, name: str, *words: object, **environment: str) -> None:
        self.parts[name] = Part(self.folder, name, words, **environment)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._server_port)):
            return True
        return False

    def _look(self) -> None:
        while self._looking:
            with self._lock:
                for part in self.parts.values():
                    part.look()
            time.sleep(0.2)

    def lines(self) -> dict[int, list[dict[str, Any]]]:
        return metrics(self.folder / "run")

    def step(self) -> int:
        return max(self.lines(), default=0)

    def stored(self) -> dict[int, Any]:
        with TrajectoryStore(self.store) as store:
            return contents(store)

    def faults(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Each with what brings it about, and ends it."""
        for name in self.parts:
            if name.startswith(("producer 0", "producer 3", "server")):
                yield f"{name} killed", self.parts[name].kill
        for rank in range(_RANKS):
            yield f"rank {rank} killed", lambda rank=rank: self._kill_rank(rank)
        yield "PostgreSQL killed, away for 10 s", lambda: self._database_away(10)
        yield "network to PostgreSQL cut for 20 s", lambda: self._cut(20)
        yield "all connections to PostgreSQL reset", self.parts["relay"].kill
        if "run" in self.disks:
            yield "disk of the trainer full for 20 s", lambda: self._full(self.folder / "run", 20)
        if "database" in self.disks:
            yield "disk of PostgreSQL full for 20 s", self._database_full
        yield "power cut: everything killed", self._power_cut

    def _kill_rank(self, rank: int) -> None:
        for pid in descendants(self.parts["trainer"].process.pid):
            with suppress(OSError):
                given = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in given:
                    os.kill(pid, signal.SIGKILL)
                    return
        raise RuntimeError(f"there is no rank {rank}")

    def _database_away(self, seconds: float) -> None:
        self._database.stop("immediate")
        time.sleep(seconds)
        self._database.start()

    def _cut(self, seconds: float) -> None:
        """Nothing arrives any more, and nobody is told."""
        relay = self.parts["relay"].process.pid
        os.kill(relay, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(relay, signal.SIGCONT)

    def _full(self, disk: Path, seconds: float) -> None:
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(seconds)
        filler.unlink()

    def _database_full(self) -> None:
        self._full(self.folder / "database", 20)
        with suppress(RuntimeError):  # unless it has ended itself
            self._database.stop("immediate")
        self._database.start()

    def _power_cut(self) -> None:
        with self._lock:
            for part in self.parts.values():
                part.kill()
            self._database.stop("immediate")
            self._database.start()

    def finish(self) -> int:
        """Lets the run come to an end by itself; how many steps it had."""
        with self._lock:
            before = self.parts.pop("trainer")
            before.kill()
        steps = 20 * (self.step() // 20 + 2)
        with self._lock:
            self._looking = False
            self._train("--max_steps", steps)
        code = self.parts["trainer"].process.wait(600)
        self.parts["trainer"].ends = [*before.ends, code]
        if code:
            raise RuntimeError(self.parts["trainer"].last_words())
        return steps

    def end(self) -> None:
        self._looking = False
        with self._lock:
            for part in self.parts.values():
                part.kill()
                part.process.wait()
        self._database.stop()
        for name in self.disks:
            subprocess.run(["umount", "--lazy", str(self.folder / name)], check=True)


def rehearse(folder: Path, vllm: Path | None, minutes: float) -> dict[str, Any]:
    """Everything that breaks in turn for so many minutes; what came of it, as plain data."""
    run = Rehearsal(folder, vllm)
    try:
        run.start()
        wait_for(lambda: run.step() >= 5, 900)
        before = _steps_a_minute(run, _QUIET_S)
        deadline = time.monotonic() + 60 * minutes - 2 * _QUIET_S
        held: dict[int, Any] = {}
        table: list[dict[str, Any]] = []
        while time.monotonic() < deadline:
            for name, fault in run.faults():
                if time.monotonic() >= deadline:
                    break
                held |= run.stored()
                table.append(_fault(run, name, fault))
                print(json.dumps(table[-1]), flush=True)
        after = _steps_a_minute(run, _QUIET_S)
        steps, lines = run.finish(), run.lines()
        found = run.stored()
        with TrajectoryStore(run.store) as store:
            draws = store.counters()["draws"]
        again = [taken for taken in lines.values() if len(taken) > 1]
        return {
            "faults": table,
            "steps": steps,
            "steps_without_a_line": sorted({*range(1, steps + 1)} - set(lines)),
            "steps_taken_again": len(again),
            "of_these_with_other_values": sum(
                any(one[name] != taken[0][name] for one in taken for name in SAME)
                for taken in again
            ),
            "trajectories": len(found),
            "lost_or_changed": sum(found.get(key) != row for key, row in held.items()),
            "draws": draws,
            "draws_of_the_steps": steps * _RANKS * _ROWS,
            "largest_logp_difference": max(
                line.get("sampling/sampling_logp_difference/max", 0.0)
                for taken in lines.values()
                for line in taken
            ),
            "steps_a_minute": {"before": before, "after": after},
            "ends": {name: part.ends for name, part in run.parts.items()},
        }
    except BaseException:
        for part in run.parts.values():
            print(f"--- {part.name}\n{part.last_words()}", file=sys.stderr)
        raise
    finally:
        run.end()


def _fault(run: Rehearsal, name: str, fault: Callable[[], None]) -> dict[str, Any]:
    """Brings it about, and waits until the run has gone on for a while."""
    ends = {part.name: len(part.ends) for part in run.parts.values()}
    step, began = run.step(), time.monotonic()
    fault()
    over = time.monotonic()
    wait_for(lambda: run.step() >= step + 20, 900)  # past a checkpoint
    ended = {
        part.name: part.ends[ends[part.name] :]
        for part in run.parts.values()
        if part.ends[ends[part.name] :]
    }
    seconds = {"fault": over - began, "until_20_steps_later": time.monotonic() - over}
    return {"what": name, "step": step, "seconds": seconds, "ended": ended}


def _steps_a_minute(run: Rehearsal, seconds: float) -> float:
    step = run.step()
    time.sleep(seconds)
    return 60 * (run.step() - step) / seconds


def _mount(folder: Path, mebibytes: int = 400) -> bool:
    """A file system of its own in the new folder, which can be filled."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=755", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(words, capture_output=True).returncode == 0


def relay(port: int, to: int) -> None:
    """Passes on bytes between connections to `port` and ones to `to`, until it is killed."""
    import asyncio

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other = await asyncio.open_connection("127.0.0.1", to)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, other[1]), copy(other[0], writer))

    async def serve() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", port)
        await server.serve_forever()

    asyncio.run(serve())


@contextmanager
def _workplace() -> Iterator[Path]:
    """A folder that the user of the database may enter."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)
        yield Path(name)


def main() -> None:
    if sys.argv[1:2] == ["--relay"]:
        relay(*map(int, sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=30.0)
    add("--vllm", type=Path, help="its command, as make vllm installs it")
    add("--out", type=Path, required=True, help="a .json file")
    options = parser.parse_args()
    why_not = postgres_server.missing()
    if why_not is not None:
        parser.error(why_not)
    with _workplace() as folder:
        found = rehearse(folder, options.vllm, options.minutes)
    found |= {"minutes": options.minutes, "commit": machine.commit()}
    found |= {"processor": machine.processor(), "cpus": os.cpu_count()}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "faults"}, indent=1))


if __name__ == "__main__":
    main()
