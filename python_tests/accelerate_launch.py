"""Starts a script in several processes that train together, as torchrun does: gloo on loopback."""

import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import warm

_LOOPBACK = {
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
}


def launch(
    script: Path,
    arguments: Sequence[str] = (),
    *,
    processes: int = 2,
    timeout_s: float = 600.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """What each rank wrote, as JSON, to the file named by its variable OUT; None if nothing.

    Raises RuntimeError with the end of the standard errors as soon as one rank fails, or when the
    time is up; no process of any rank is left then.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = []
        try:
            shared = {
                **os.environ,
                **_LOOPBACK,
                "MASTER_PORT": str(_free_port()),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
            }
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OUT": str(folder / f"{rank}")}
                with open(folder / f"stderr-{rank}", "wb") as stderr:
                    ranks.append(
                        warm.Process(  # a group of its own, killed as one
                            [str(script), *arguments],
                            env={**shared, **own, **(environment or {})},
                            stdout=stderr,
                            stderr=stderr,
                        )
                    )
            _wait(ranks, folder, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                _kill(process)
        outputs = [folder / f"{rank}" for rank in range(processes)]
        return [json.loads(out.read_text()) if out.exists() else None for out in outputs]


def _wait(ranks: Sequence[warm.Process], folder: Path, end: float) -> None:
    while True:
        statuses = [process.poll() for process in ranks]
        failed = [rank for rank, status in enumerate(statuses) if status]
        late = time.monotonic() > end
        if failed or (late and None in statuses):
            what = f"ranks {failed} failed" if failed else "time is up"
            texts = [(folder / f"stderr-{rank}").read_text()[-4000:] for rank in range(len(ranks))]
            report = "".join(f"\n--- rank {rank}\n{text}" for rank, text in enumerate(texts))
            raise RuntimeError(f"{what} (exit statuses {statuses}){report}")
        if None not in statuses:
            return
        time.sleep(0.05)


def _kill(process: warm.Process) -> None:
    """The rank and whatever it started, even where the rank itself has ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
