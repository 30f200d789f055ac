"""What a step of the trainer holds in memory, each measured in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import trainer_memory
from trainer_cases import BOS, EOS
from trainer_process import settings, start

from spo_ext.store import Origin, Prompt, PromptValue, Trajectory, TrajectoryStore

VOCABULARY = 80_000
ROWS, LENGTH = 8, 128
TOKENS = ROWS * LENGTH
SQUARED = {"mixture": "offline", "rollouts": "none", "objective": "squared", "group_size": 1}
SMALL_BODY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
WIDE_HEAD = {"vocab_size": VOCABULARY, **SMALL_BODY}
# 64 MiB of weights, so that a second model stands out from the interpreter's own memory.
LARGE = {**SMALL_BODY, "vocab_size": 32768, "hidden_size": 256, "num_attention_heads": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with TrajectoryStore(tmp_path / "store.db") as store:
        key = store.add_prompt(Prompt("1+1=", [BOS, 4, 13, 4]))
        store.put_q0({key: PromptValue(0.3, 4, 0.5, 1.0)})
        human = Origin("human", run="demonstrations")
        for i in range(ROWS):
            tokens = [3 + (i * 7 + j * 5) % 15 for j in range(LENGTH - 1)]
            store.append([Trajectory(key, [*tokens, EOS], float(i % 2), human, "eos")])
    return tmp_path


def measure(folder: Path, run: str, **options: Any) -> dict[str, Any]:
    changes = {"max_steps": 1, "output_dir": str(folder / run), "run": run, **SQUARED, **options}
    out = folder / f"{run}.json"
    process = start(trainer_memory.measure, settings(folder, **changes, out=str(out)))
    assert process.wait(600) == 0
    return dict(json.loads(out.read_text()))


def test_no_tensor_of_tokens_by_vocabulary(folder: Path) -> None:
    """Policy forward and backward, reference and entropy; and the same step through logits."""
    ours = measure(folder, "ours", shape=WIDE_HEAD, per_device_train_batch_size=ROWS)
    whole = TOKENS * VOCABULARY
    assert ours["largest"] < whole / 4
    assert ours["peak_growth"] < whole * 4 / 2
    logits = measure(
        folder, "logits", shape=WIDE_HEAD, per_device_train_batch_size=ROWS, logits=True
    )
    assert logits["largest"] >= whole
    assert logits["peak_growth"] > whole * 4
    # The reference has no rounding of logits; the loss squares what theirs is off by.
    assert logits["loss"] == pytest.approx(ours["loss"], rel=1e-4)


def test_models_in_memory(folder: Path) -> None:
    """Two with a reference of its own, one with cached log-probabilities, and one with trained
    adapters, of which alone the reference has copies."""
    pytest.importorskip("peft")
    options = {"shape": LARGE, "per_device_train_batch_size": 1}
    two = measure(folder, "two", reference="model", **options)
    model = two["one_model"]
    assert model > 60 << 20
    assert two["held"] == 2 * model

    cached = measure(folder, "cached", reference="cached", **options)
    assert cached["held"] == model
    assert two["peak"] - cached["peak"] > model / 2
    assert cached["loss"] == pytest.approx(two["loss"], rel=1e-5)

    adapters = measure(folder, "adapters", adapters=True, **options)
    assert adapters["one_model"] < adapters["held"] < 1.01 * model
