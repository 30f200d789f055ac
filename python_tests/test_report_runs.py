"""What spo report reads of a run: checkpoints, log lines of resumed runs, charts of metrics."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from spo_ext.evaluation import panels
from spo_ext.evaluation.panels import (
    PANELS,
    lines_of,
    smoothed,
    unplaced,
)
from spo_ext.evaluation.runs import Series, collect, last_checkpoint, read_run
from spo_ext.metrics import mean_pass_at_k


def write_state(folder: Path, step: int, values: list[float], **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = [{"step": i + 1, "epoch": 0.1, "loss": value} for i, value in enumerate(values)]
    state = {"global_step": step, "log_history": log, **more}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def write_metrics(folder: Path, *rows: dict[str, Any], end: str = "") -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + end)


def test_the_last_checkpoint_counts_by_its_number(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-9", 9, [9.0])
    write_state(tmp_path / "checkpoint-10", 10, [10.0], max_steps=30)
    (tmp_path / "checkpoint-11").mkdir()  # killed before its state was written
    (tmp_path / "checkpoint-best").mkdir()
    run = read_run(tmp_path)
    assert run.checkpoint == last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert run.series == {"loss": Series([1], [10.0])}
    assert run.settings == {"max_steps": 30}
    write_state(tmp_path, 12, [12.0, 12.5])  # by save_state at the end
    assert read_run(tmp_path).series["loss"].values == [12.0, 12.5]
    write_state(tmp_path, 8, [8.0])
    assert read_run(tmp_path).series["loss"].values == [10.0]


def test_metrics_count_from_their_first_step_on(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-4", 4, [1.0, 2.0, 3.0, 4.0])
    write_metrics(tmp_path, {"step": 3, "loss": 30.0, "reward": 0.5}, {"step": 6, "loss": 60.0})
    run = read_run(tmp_path)
    assert run.series["loss"] == Series([1, 2, 3, 6], [1.0, 2.0, 30.0, 60.0])
    assert run.series["reward"] == Series([3], [0.5])
    assert run.step == 6


def test_a_resumed_run_replaces_what_it_did_not_keep(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": float(i)} for i in (1, 2, 3, 4, 5)]
    held_out = [{"step": 2, "eval_loss": 0.2}]
    again = [{"step": 3, "loss": 30.0}, {"step": 3, "eval_loss": 0.3}]
    write_metrics(tmp_path, *rows[:2], *held_out, *rows[2:], *again, end='{"step": 4, "lo')
    run = read_run(tmp_path)
    assert run.series["loss"] == Series([1, 2, 3], [1.0, 2.0, 30.0])
    assert run.series["eval_loss"] == Series([2, 3], [0.2, 0.3])


def test_what_is_no_finite_number_is_left_out_and_counted() -> None:
    lines = [
        {"step": 2, "epoch": 1.0, "kl": math.nan, "words": "x", "all_lost": math.inf},
        {"step": 1, "epoch": 0.5, "kl": 2, "none": None},
        {"step": 3, "kl": 1.0},
    ]
    assert collect(lines) == {"kl": Series([1, 3], [2.0, 1.0], dropped=1)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"loss": 1}\n', "step of a log line must be an integer, got None"),
        ("metrics.jsonl", "loss\n", "line 1 must be a JSON object"),
        ("trainer_state.json", "{", "must be JSON"),
        ("evaluation/evaluation.json", "{}", "per_prompt must be a list, got None"),
        ("notes.txt", "", "must hold trainer_state.json, metrics.jsonl or evaluation"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RUN_DIR must be an existing folder"):
        read_run(tmp_path / "none")


def test_evaluations_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("evaluation-10", "evaluation-9", "evaluation"):
        (tmp_path / name).mkdir()
        counts = [{"n": 4, "c": 1}, {"n": 3, "c": 0}]
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"per_prompt": counts}))
    (tmp_path / "evaluation-11").mkdir()  # not finished
    found = read_run(tmp_path).evaluations
    assert [saved.name for saved in found] == ["evaluation", "evaluation-9", "evaluation-10"]
    assert found[0].counts == [(4, 1), (3, 0)] and found[0].samples is None


def test_panels_take_what_they_name() -> None:
    one = Series([1], [1.0])
    names = ["reward", "rewards/a/mean", "rewards/b/mean", "eval_pass@10", "mine", "rewards/a/std"]
    series = dict.fromkeys(names, one)
    by_name = {panel.name: lines_of(panel, series) for panel in PANELS}
    assert [line.label for line in by_name["reward"]] == [
        "rolled out",
        "rewards/a/mean",
        "rewards/b/mean",
    ]
    assert len({line.colour for line in by_name["reward"]}) == 3
    assert [line.label for line in by_name["pass_rate"]] == ["eval_pass@10"]
    assert by_name["loss"] == []
    assert [line.label for line in lines_of(PANELS[3], {"spo/log_ratio": one})] == [
        "log-ratio of a completion, mean"
    ]
    assert unplaced(series) == ["mine", "rewards/a/std"]
    assert len({panel.name for panel in PANELS}) == len(PANELS)


def test_smoothing_has_no_lag_and_no_bias_at_the_ends() -> None:
    assert smoothed([3.0] * 50, 4.0) == pytest.approx([3.0] * 50)
    line = smoothed([float(i) for i in range(100)], 3.0)
    assert line[20:80] == pytest.approx([float(i) for i in range(20, 80)])
    spike = smoothed([0.0] * 20 + [1.0] + [0.0] * 20, 2.0)
    assert spike == pytest.approx(spike[::-1])
    assert max(spike) == spike[20] == pytest.approx(1 / (2 * math.sqrt(2 * math.pi)), rel=1e-2)
    assert smoothed([1.0, 2.0], 5.0) == pytest.approx([1.5, 1.5], abs=0.02)


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The axes of a chart instead of its PNG."""
    monkeypatch.setattr(panels, "png_bytes", lambda figure: figure.axes[0])


def chart(name: str, **series: list[float]) -> Any:
    panel = next(panel for panel in PANELS if panel.name == name)
    points = {key: Series(list(range(len(row))), row) for key, row in series.items()}
    return panels.draw_panel(panel, points)


def test_many_values_are_drawn_raw_and_smoothed(axes: Any) -> None:
    values = [1.0 + i % 2 for i in range(200)]
    raw, smooth = chart("entropy", entropy=values).lines
    assert list(raw.get_ydata()) == values
    assert list(smooth.get_ydata())[20:180] == pytest.approx([1.5] * 160, abs=0.01)
    assert raw.get_alpha() < 1 and raw.get_color() == smooth.get_color()
    (alone,) = chart("entropy", entropy=values[:10]).lines
    assert list(alone.get_ydata()) == values[:10]
    (exact,) = chart("learning_rate", learning_rate=values).lines
    assert list(exact.get_ydata()) == values


def test_axes_are_logarithmic_only_where_it_helps(axes: Any) -> None:
    assert chart("loss", loss=[100.0, 1.0]).get_yscale() == "log"
    assert chart("loss", loss=[10.0, 1.0]).get_yscale() == "linear"
    assert chart("loss", loss=[100.0, 0.0]).get_yscale() == "linear"
    assert chart("entropy", entropy=[100.0, 1.0]).get_yscale() == "linear"
    assert chart("bounds", clipped=[0.0, 0.5]).get_ylim() == (0, pytest.approx(0.575))
    assert chart("bounds", clipped=[1.0, 1.0]).get_ylim() == (0, 1.02)
    # What is smoothed on a logarithmic axis is the logarithm.
    loss = [10.0 ** (2 * (i % 2)) for i in range(300)]
    smooth = chart("loss", loss=loss).lines[1].get_ydata()
    assert list(smooth)[100:200] == pytest.approx([10.0] * 100, rel=0.02)


def test_nothing_logged_is_no_chart(axes: Any) -> None:
    assert chart("loss", reward=[1.0]) is None
    assert panels.draw_pass_curves([]) is None


def test_pass_curves_come_from_the_counts(axes: Any, tmp_path: Path) -> None:
    correct = [0, 3, 8, 1]
    for name in ("evaluation-1", "evaluation-2"):
        (tmp_path / name).mkdir()
        rows = [{"n": 8, "c": c} for c in correct] + [{"n": 2, "c": 1}]  # six were not judged
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"per_prompt": rows}))
    drawn = panels.draw_pass_curves(read_run(tmp_path).evaluations)
    first, _ = drawn.lines
    assert list(first.get_xdata()) == list(range(1, 9))
    expected = [mean_pass_at_k(8, correct, k) for k in range(3, 9)]
    assert list(first.get_ydata())[2:] == pytest.approx(expected)
    assert first.get_ydata()[0] == pytest.approx((12 / 8 + 1 / 2) / 5)
    labels = [text.get_text() for text in drawn.get_legend().get_texts()]
    assert labels == ["evaluation-1", "evaluation-2"]


# What the trainer logs and no panel shows: the report has it in a table.
IN_THE_TABLE = {
    "frac_reward_zero_std", "reward_std", "store/reward_std", "rewards/*/std",
    "rollout/*", "store/online_*", "store/behaviour_entropy",
    "store/turns", "sampling/share_above_0.1", "store/age_seconds", "store/duplicates",
    "store/length", "store/shortfall", "store/too_long",
    "spo/weight", "health/warnings", "eval_num_tokens", "eval_truncated", "eval_rewards/*/mean",
    "eval_distinct_correct", "train_*",
}  # fmt: skip
# What panels show of trainers that are not ours: TRL's, with `SPOMixin`.
OF_OTHERS = {"eval_loss", "step_time"}


def short(completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


def test_panels_and_the_trainer_know_the_same_names(tmp_path: Path) -> None:
    for package in ("torch", "transformers", "accelerate", "sqlalchemy"):
        pytest.importorskip(package)
    from trainer_cases import dev_prompts, fill, make_model, make_tokenizer
    from trainer_process import settings

    from spo_ext.store import PromptValue, TrajectoryStore
    from spo_ext.trainer import SPOConfig, SPOTrainer

    with TrajectoryStore(tmp_path / "store.db") as store:
        fill(store)
        dev_prompts(store)
        store.put_q0({p.id: PromptValue(0.3, 4, 0.5, 1.0) for p in store.prompts("train")})
    everything = {
        "mixture": "half-online", "objective": "squared", "rarity": 1.0, "max_tokens": 60,
        "max_new_tokens": 40, "reward": ["answer", "test_report_runs:short"],
        "eval_strategy": "steps", "eval_steps": 1, "eval_samples": 2, "eval_k": [1, 2],
        "eval_success": -100.0, "max_steps": 2,
    }  # fmt: skip
    config = SPOConfig(**settings(tmp_path, **everything))
    SPOTrainer(make_model(), config, make_tokenizer()).train()
    logged = read_run(tmp_path / "run").series
    unseen = unplaced(logged)
    assert [n for n in unseen if not any(fnmatchcase(n, known) for known in IN_THE_TABLE)] == []
    assert [known for known in IN_THE_TABLE if not any(fnmatchcase(n, known) for n in unseen)] == []
    patterns = {curve.pattern for panel in PANELS for curve in panel.curves}
    names = [name.removeprefix("spo/") for name in logged]
    nobody = {one for one in patterns if not any(fnmatchcase(name, one) for name in names)}
    assert nobody == OF_OTHERS
