"""Checkpoints: complete ones are found, torn ones never, whenever the writer is killed."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import warm

from spo_ext.trainer import checkpoints
from spo_ext.trainer.checkpoints import CheckpointError

FILES = {"model.safetensors": 5000, "optimizer.pt": 9000, "rank/shard.pt": 10}


def save(output_dir: Path, step: int, mark: bool = True, fill: bytes = b"x") -> Path:
    """As the Trainer does: in place, trainer_state.json last."""
    checkpoint = output_dir / f"checkpoint-{step}"
    checkpoints.begin(checkpoint)
    for name, size in {**FILES, "trainer_state.json": 20}.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        with open(checkpoint / name, "wb", buffering=0) as file:
            file.write(fill * (size // 2))
            file.write(fill * (size - size // 2))
    if mark:
        checkpoints.mark_complete(checkpoint, {"global_step": step, "fill": fill.decode()})
    return checkpoint


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A folder in memory where there is one: death by a signal loses nothing that was written, and
    thousands of flushes take a disk minutes."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def killed_at(operation: int, write: Callable[[], object]) -> bool:
    """Runs `write` in a child that is killed at its n-th system call on files; whether it was."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status in (signal.SIGKILL, 0), status
        return status != 0
    done = 0

    def watch(_frame: object, event: str, function: object) -> None:
        nonlocal done
        name = getattr(function, "__name__", "")
        if event == "c_call" and name in ("open", "write", "fsync", "replace", "unlink", "mkdir"):
            done += 1
            if done == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.setprofile(watch)
        write()
        sys.setprofile(None)
        os._exit(0)
    finally:
        os._exit(1)


def test_a_writer_killed_at_any_operation_leaves_no_torn_checkpoint(memory_path: Path) -> None:
    old = save(memory_path, 9)
    new = memory_path / "checkpoint-10"
    operation, torn = 1, 0
    while killed_at(operation, lambda: save(memory_path, 10)):
        found = checkpoints.last_complete(memory_path)
        assert found in (old, new)
        if found == old and new.exists():
            assert checkpoints.remove_torn(memory_path) == [new] and not new.exists()
            torn += 1
        else:
            assert checkpoints.remove_torn(memory_path) == []
        operation += 1
    assert torn >= 15  # it was killed while it wrote, flushed and marked
    assert checkpoints.last_complete(memory_path) == new


def test_writing_over_a_checkpoint_takes_its_mark_away_first(memory_path: Path) -> None:
    save(memory_path, 9)
    save(memory_path, 10, fill=b"a")
    operation = 1
    while killed_at(operation, lambda: save(memory_path, 10, fill=b"b")):
        found = checkpoints.last_complete(memory_path)
        assert found is not None
        written = {(found / name).read_bytes()[:1].decode() for name in FILES}
        written |= {(found / name).read_bytes()[-1:].decode() for name in FILES}
        assert written == {checkpoints.read_state(found)["fill"]}  # of one save, not of two
        operation += 1
        save(memory_path, 10, fill=b"a")
    assert operation > 15


def test_a_process_killed_from_outside(tmp_path: Path) -> None:
    """A writer in a process of its own, killed by the clock while it saves over and over."""
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from test_checkpoints import save\nprint(flush=True)\n"
        "for step in range(1, 100000): save(Path(sys.argv[1]), step)"
    )
    with warm.Process(["-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.kill()
    found = checkpoints.last_complete(tmp_path)
    assert found is not None
    step = checkpoints.read_state(found)["global_step"]
    assert found.name == f"checkpoint-{step}"
    assert all((found / name).stat().st_size == size for name, size in FILES.items())
    checkpoints.remove_torn(tmp_path)
    assert not (tmp_path / f"checkpoint-{step + 1}").exists()


def test_everything_is_flushed_before_the_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save(tmp_path, 1, mark=False)
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        events.append(f"mark {target}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    checkpoints.mark_complete(checkpoint, {})
    marked = events.index(f"mark {checkpoint / checkpoints.MARK}")
    names = [*FILES, "trainer_state.json", "rank", "."]
    assert {str(checkpoint / name) for name in names} <= set(events[:marked])
    assert events[marked - 1].startswith(str(checkpoint / checkpoints.MARK))  # the mark's content
    assert events[marked + 1 :] == [str(checkpoint), str(tmp_path)]


def test_state_comes_back(tmp_path: Path) -> None:
    state = {"global_step": 3, "run": "a", "sampler": "mixture", "settings": {"beta": 0.1}}
    checkpoint = save(tmp_path, 3, mark=False)
    checkpoints.mark_complete(checkpoint, state)
    assert checkpoints.read_state(checkpoint) == state
    checkpoints.mark_complete(checkpoint, state)  # the mark is none of the files it vouches for
    assert checkpoints.read_state(checkpoint) == state


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    old, new = save(tmp_path, 2), save(tmp_path, 10)
    assert checkpoints.last_complete(tmp_path) == new  # 10 comes after 2
    os.truncate(new / "optimizer.pt", 8999)
    assert checkpoints.last_complete(tmp_path) == old
    with pytest.raises(CheckpointError, match=r"optimizer.pt must have 9000 bytes, got 8999"):
        checkpoints.read_state(new)
    (new / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer.pt is missing"):
        checkpoints.read_state(new)
    (new / checkpoints.MARK).write_text('{"state": {}')
    with pytest.raises(CheckpointError, match=r"spo_state.json is not a mark"):
        checkpoints.read_state(new)
    (new / checkpoints.MARK).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-10 was not written to its end"):
        checkpoints.read_state(new)
    assert checkpoints.remove_torn(tmp_path) == [new]
    assert checkpoints.last_complete(tmp_path) == old


def test_remove_torn_leaves_what_is_not_torn(tmp_path: Path) -> None:
    assert checkpoints.last_complete(tmp_path / "absent") is None
    assert checkpoints.remove_torn(tmp_path / "absent") == []
    foreign = save(tmp_path, 5, mark=False)  # complete, of a Trainer that marks nothing
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.remove_torn(tmp_path) == [tmp_path / "checkpoint-6"]
    assert foreign.exists() and (tmp_path / "checkpoint-best").exists()
    marked = save(tmp_path, 7)
    os.truncate(marked / "trainer_state.json", 1)
    assert checkpoints.remove_torn(tmp_path) == [marked]
    older = save(tmp_path, 8, mark=False)
    newest = save(tmp_path, 9)
    (tmp_path / "checkpoint-11").symlink_to(older)
    assert checkpoints.remove_torn(tmp_path) == []
    assert checkpoints.last_complete(tmp_path) == newest


def test_mark_complete_refuses(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="checkpoint must have files, got '.*checkpoint-1'"):
        checkpoints.mark_complete(tmp_path / "checkpoint-1", {})
    checkpoint = save(tmp_path, 2, mark=False)
    for state in ({"store": tmp_path}, {"loss": float("nan")}):
        with pytest.raises(ValueError, match="state must be JSON"):
            checkpoints.mark_complete(checkpoint, state)
        assert checkpoints.last_complete(tmp_path) is None
