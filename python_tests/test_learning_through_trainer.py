"""The harness's recipe by the trainer, on problems that take seconds."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from learning.settings import setting_named  # noqa: E402
from learning.through_trainer import run  # noqa: E402


def test_the_trainer_samples_half_and_moves(sandbox, tmp_path: Path) -> None:
    found = run(setting_named("tiny"), 0, 0, 4, tmp_path)
    assert found["sampled"] == 4 * 3 * 2  # steps, problems, half of a group of four
    assert len(found["after"]["pass_at"]) == 4
    assert found["after"]["entropy"] != found["before"]["entropy"]
    again = run(setting_named("tiny"), 0, 0, 4, tmp_path)
    assert again["after"] == found["after"]
