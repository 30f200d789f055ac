"""Trajectories that are too long: drawn, counted, and not learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_cases import fill, make_model
from trainer_process import settings, train

import spo_ext
from spo_ext.store import PromptValue, StoredTrajectory, TrajectoryStore
from spo_ext.trainer.batches import Tokens, collate
from spo_ext.trainer.model import HeadSettings, answer_logprobs, completion_logprobs

WHOLE = {"mixture": "offline", "rollouts": "none", "per_device_train_batch_size": 32}
MOST = 9  # of 7 to 13 tokens; prompts have 5
VALUE = 0.3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with TrajectoryStore(tmp_path / "store.db") as store:
        fill(store)
        store.put_q0({p.id: PromptValue(VALUE, 4, 0.5, 1.0) for p in store.prompts("train")})
    return tmp_path


def rows_of(folder: Path) -> list[tuple[StoredTrajectory, list[int]]]:
    """All trajectories with the tokens of their prompts."""
    with TrajectoryStore(folder / "store.db") as store:
        prompts = {prompt.id: list(prompt.token_ids or ()) for prompt in store.prompts("train")}
        return [(row, prompts[row.prompt_id]) for row in store.trajectories()]


def eager_first_step(folder: Path, objective: str) -> tuple[float, float]:
    """Loss and gradient norm of the rows that are kept, from one batch of them."""
    rows = [
        (row, prompt) for row, prompt in rows_of(folder) if len(prompt) + len(row.token_ids) <= MOST
    ]
    assert 8 < len(rows) < 24
    model = make_model()
    answer_logprobs(model, HeadSettings())
    batch = collate([Tokens(prompt, row.token_ids) for row, prompt in rows], "padded")
    logprobs, _ = completion_logprobs(model, batch)
    grouped = objective == "group"
    loss = spo_ext.loss(
        logprobs,
        logprobs.detach(),
        torch.tensor([row.reward for row, _ in rows]),
        None if grouped else VALUE,
        beta=0.5,
        objective=objective,  # type: ignore[arg-type]
        groups=torch.tensor([row.prompt_id for row, _ in rows]) if grouped else None,
        cu_seqlens=batch.cu_seqlens,
    )
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return float(loss), float(norm)


@pytest.mark.parametrize("objective", ["squared", "group"])
def test_the_loss_is_that_of_the_kept_rows(folder: Path, objective: str) -> None:
    size = 4 if objective == "group" else 1
    options = settings(folder, **WHOLE, objective=objective, group_size=size, max_tokens=MOST)
    [line] = train(options | {"max_steps": 1})["log"]
    loss, norm = eager_first_step(folder, objective)
    assert line["loss"] == pytest.approx(loss, rel=1e-6)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_what_is_counted(folder: Path) -> None:
    found = rows_of(folder)
    kept = [row for row, prompt in found if len(prompt) + len(row.token_ids) <= MOST]
    options = settings(folder, **WHOLE, objective="squared", group_size=1, max_tokens=MOST)
    [line] = train(options | {"max_steps": 1})["log"]
    assert line["store/too_long"] == 32 - len(kept)
    mean = sum(len(row.token_ids) for row in kept) / len(kept)
    assert line["store/length"] == pytest.approx(mean)
    assert line["store/reward"] == pytest.approx(sum(row.reward for row in kept) / len(kept))


def test_an_empty_micro_batch_changes_nothing(folder: Path) -> None:
    options = settings(folder, **WHOLE, objective="squared", group_size=1, max_tokens=7)
    whole = train(dict(options))
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 32}
    one_each = train(options | parts | {"output_dir": str(folder / "parts"), "run": "parts"})
    for line, other in zip(one_each["log"], whole["log"], strict=True):
        for name in ("loss", "kl", "entropy", "spo/residual", "store/length", "store/too_long"):
            assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(one_each["weights"][name], weight, rtol=1e-4, atol=1e-6)


def test_a_limit_that_cuts_nothing_changes_nothing(folder: Path) -> None:
    options: dict[str, Any] = settings(folder, **WHOLE, objective="squared", group_size=1)
    free = train(dict(options))
    limited = train(options | {"output_dir": str(folder / "b"), "run": "b", "max_tokens": 13})
    assert all(torch.equal(w, free["weights"][name]) for name, w in limited["weights"].items())
    assert {line["store/too_long"] for line in limited["log"]} == {0.0}
    assert not any("store/too_long" in line for line in free["log"])


def test_nothing_left_is_an_error(folder: Path) -> None:
    options = settings(folder, **WHOLE, objective="squared", group_size=1, max_tokens=6)
    with pytest.raises(ValueError, match="SPO: max_tokens must be at least 7, .* got 6"):
        train(options)


def test_the_limit_must_have_room_for_a_completion(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens must be an integer >= 2"):
        train(settings(folder, **WHOLE, max_tokens=1))
