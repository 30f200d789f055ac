"""docs/bring_your_own.md, followed to the letter: every block that it does not mark is executed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("trl")

import warm
from processes import free_port
from sandbox_cases import WHY_NOT
from store_cases import ROOT

from spo_ext.data.formats import parse_row
from spo_ext.data.records import Defaults
from spo_ext.store import TrajectoryStore

PAGE = (ROOT / "docs" / "bring_your_own.md").read_text()
NOT_RUN = "# not run here: "
SECONDS = 900


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return make_clone(tmp_path)


def make_clone(tmp_path: Path) -> Path:
    """What the page needs of a clone: examples/, and .venv/ whose `spo` and `python` are these."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    fake = f"'{Path(__file__).parent / 'fake_vllm.py'}' "
    forked = f"-S -E '{Path(warm.__file__)}' "
    for name, words in {"python": forked, "spo": forked + "spo ", "vllm": fake}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (programs / name).chmod(0o755)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    return tmp_path


def follow(clone: Path, script: str) -> str:
    """What the commands say; the first that fails ends them, and none outlives the test."""
    warm.address()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert process.returncode == 0, said[-6000:]
    return said


@pytest.mark.skipif(all(WHY_NOT[level] for level in ("bwrap", "unshare")), reason="no sandbox here")
def test_the_page_works(clone: Path) -> None:
    run = [block for block in blocks("sh") if not block.startswith(NOT_RUN)]
    assert len(run) >= 10
    said = follow(clone, "".join(run))
    mine = clone / "mine"
    assert "stored 55 prompts and 132 trajectories" in said
    assert "6 trajectories of 3 prompts (0 drawn before, 0 without a reward)" in said
    assert "Q_0 of 33 prompts for beta 0.03" in said
    assert "trajectories scored by reference" in said
    check_rows(mine)
    check_runs(mine)
    check_results(mine)


def test_the_commands_with_a_server_work(clone: Path) -> None:
    """Those that need vLLM, with one that behaves as it."""
    mine = run_served(clone)
    with TrajectoryStore(mine / "store.db") as store:
        rows = list(store.trajectories(run="served"))
    found = {(row.origin.policy_version, row.token_ids[3] - 1) for row in rows}
    assert found == {(0, 0), (1, 1)}, "the weights of each version wrote what is stored under it"
    assert all(row.behaviour_logprobs is not None for row in rows)
    assert "version 1: 64 trajectories of 8 prompts" in (mine / "served.log").read_text()


def run_served(clone: Path) -> Path:
    """Follows the block with `vllm serve`; the folder of what it made."""
    needed = (
        "make_tiny_model",
        "spo import mine/prompts",
        "cat > mine/rewards",
        "cat > mine/train",
    )
    before = [block for block in blocks("sh") if any(words in block for words in needed)]
    # Of the block that trains, the file alone.
    before = [block.split("spo train")[0] for block in before]
    [served] = [block for block in blocks("sh") if "vllm serve" in block]
    assert served.startswith(NOT_RUN) and shutil.which("curl") is not None
    port = free_port()
    activate = ". .venv/bin/activate\n"
    follow(clone, "".join([activate, *before, served.replace("8000", str(port))]))
    return clone / "mine"


def check_rows(mine: Path) -> None:
    """The page shows rows as they are, of columns that import knows."""
    [shown] = blocks("json")
    names = ("prompts", "trajectories", "programs")
    files = [(mine / f"{name}.jsonl").read_text().splitlines() for name in names]
    for row, lines in zip(shown.splitlines(), files, strict=True):
        assert row in lines
        parse_row(json.loads(row), "auto", Defaults())


def check_runs(mine: Path) -> None:
    for name, steps in {"first": 30, "second": 20, "external": 8}.items():
        lines = [json.loads(line) for line in (mine / name / "metrics.jsonl").open()]
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        assert sorted(losses) == list(range(1, steps + 1))
        assert (mine / name / "model.safetensors").is_file()
    with TrajectoryStore(mine / "store.db") as store:
        versions = {row.origin.policy_version for row in store.trajectories(run="external")}
        assert versions >= {0, 1}
        rewards = [row.reward for row in store.trajectories(run="first")]
        started = [row.reward for row in store.trajectories(run="second")][: len(rewards) // 4]
    early, late = rewards[: len(rewards) // 4], rewards[-len(rewards) // 4 :]
    assert sum(late) / len(late) > 2 * sum(early) / len(early), "training raises the reward"
    assert sum(started) / len(started) > 2 * sum(early) / len(early), "and so does a better start"


def check_results(mine: Path) -> None:
    for name in ("before", "after"):
        [folder] = (mine / "first").glob(f"evaluation-*-{name}")
        values = json.loads((folder / "evaluation.json").read_text())["values"]
        assert 0 <= values["pass@1"]["mean"] <= values["pass@8"]["mean"] <= 1
    page = (mine / "first" / "report.html").read_text()
    assert "evaluation-0-before" in page and "evaluation-1-after" in page
    assert "data:image/png;base64," in page and "Newest trajectories" in page
    with TrajectoryStore(mine / "store.db") as store:
        count = store.counters()["trajectories"]
    rows = (json.loads(line) for line in (mine / "all.jsonl").open())
    assert sum("completion" in row for row in rows) == count


def test_every_setting_on_the_page_exists() -> None:
    """Those of commands that are not run here, and of the FSDP2 file, too."""
    from spo_ext.trainer.commands import ModelArguments
    from spo_ext.trainer.config import SPOConfig

    fields = {*SPOConfig.__dataclass_fields__, *ModelArguments.__dataclass_fields__}
    commands = re.findall(r"(?:cli|^spo) train [^\n]*(?:\\\n[^\n]*)*", PAGE, re.M)
    flags = re.findall(r"--(\w+)", "\n".join(commands))
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE, re.M)
    settings = [name for row in table for name in re.findall(r"\w+", row)]
    [file] = blocks("yaml")
    settings += re.findall(r"^(\w+):", file, re.M)
    assert len(flags) >= 10 and len(settings) >= 12
    assert {*flags, *settings} - fields == {"config"}
