"""Tables and the report of made-up runs."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from learning import figures  # noqa: E402
from learning.__main__ import main  # noqa: E402
from learning.evaluation import calibrate  # noqa: E402
from learning.report import read_records, save_records, write_report  # noqa: E402
from learning.sensitivity import sensitivities  # noqa: E402
from learning.tables import (  # noqa: E402
    Series,
    by_method,
    columns_of,
    difference,
    mean,
    mean_curve,
    samples_to_reach,
    series_named,
    shown,
)

from spo_ext.evaluation.records import Estimate  # noqa: E402


def record(method, seed, final, **changes):
    """A run whose pass@1 goes from .1 to `final` and pass@2 from .2 to final + .1."""

    def point(step, passed):
        return {
            "step": step, "sampled": 100 * step, "updates": step, "training_seconds": 3.0 * step,
            "pass_at": [passed, passed + 0.1], "distinct_correct": 2.0, "entropy": 5.0, "kl": 0.5,
            "mean_tokens": 12.0, "training": {},
            "calibration": None if method == "sft" else
            {"ranked": 0.7, "residual_rms": 0.3, "bins": [[-0.9, -0.95], [-0.2, -0.1]]},
        }  # fmt: skip

    return {
        "setting": "tiny", "method": method, "reference_seed": 0, "seed": seed, "steps": 4,
        "split": "test", "curve": [point(0, 0.1), point(4, final)], "commit": "abc",
        "processor": "one", "torch": "2", "transformers": "5",
        "seconds": {"sampling": 1.0, "update": 2.0},
        "setting_settings": {"config": {"evaluation_k": 2}},
        "method_settings": {"family": "spo" if method == "group" else method}, **changes,
    }  # fmt: skip


RECORDS = [
    record("group", 0, 0.5), record("group", 1, 0.3), record("ppo", 0, 0.4), record("ppo", 1, 0.4),
    record("sft", 0, 0.2),
]  # fmt: skip


def test_means_intervals_and_paired_differences():
    group, ppo, sft = by_method(RECORDS)
    first = columns_of(2)[0]
    found = mean(group, first)
    assert (found.mean, found.low, found.high) == pytest.approx((0.4, 0.3, 0.5))
    same = mean(ppo, first)
    assert (same.low, same.mean, same.high) == pytest.approx((0.4, 0.4, 0.4))
    assert shown(same, 3) == "0.400", "no interval where there is no spread"
    assert shown(Estimate(-1e-9, -0.004, 0.3, 2), 2) == "0.00 [0.00, 0.30]"
    paired = difference(group, ppo, first)
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.0, -0.1, 0.1))
    alone = difference(sft, ppo, first)
    assert (alone.mean, alone.low) == (pytest.approx(-0.2), None), "one pair has no interval"
    moved = record("sft", 0, 0.2)
    moved["curve"][0]["pass_at"] = [0.15, 0.2]
    assert difference(Series("sft", (moved,)), ppo, first) is None, "of another reference"
    assert difference(group, Series("other", (record("other", 7, 1.0),)), first) is None
    assert mean(sft, columns_of(2)[6]) is None, "without a beta there is no Q_T"


def test_samples_to_reach_a_level_along_the_curve():
    group = by_method(RECORDS)[0]  # pass@2: .2 at 0 samples, .5 at 400
    assert samples_to_reach(group, 0.35, 2) == pytest.approx(200)
    assert samples_to_reach(group, 0.1, 2) == 0
    assert samples_to_reach(group, 0.6, 2) is None


def test_runs_of_several_lengths_share_a_table(tmp_path):
    short = [{**made, "steps": 2} for made in RECORDS[:2]]
    methods = by_method([*RECORDS, *short])
    assert [one.method for one in methods] == ["group@4", "ppo@4", "sft@4", "group@2"]
    assert series_named(methods, "group") is methods[0], "the longest"
    assert series_named(methods, "group@2") is methods[3]
    assert series_named(methods, "grpo") is None
    text = write_report([*RECORDS, *short], tmp_path, "ppo")
    assert text.count("## tiny, test problems") == 1 and "Differences to ppo@4, paired" in text
    before = next(line for line in text.splitlines() if line.startswith("| reference"))
    assert before.split("|")[2].strip() == "2", "every pair of seeds once, whatever was run of it"
    # The short runs reach the control's .5 with their last samples.
    row = next(line for line in text.splitlines() if line.startswith("| group@2"))
    assert row.split("|")[-2].strip() == "400"


def test_a_mean_curve_has_the_steps_that_all_runs_evaluated():
    group = by_method(RECORDS)[0]
    first, *rest = group.runs
    start, end = first["curve"]
    longer = {**first, "curve": [start, {**start, "step": 1, "sampled": 13}, end]}
    found = mean_curve(Series("group", (longer, *rest)), "sampled", lambda point: point["kl"])
    assert found == [(0, 0.5), (400, 0.5)]


def stale(method, seed, final, sync_every, rate=1e-3):
    settings = {"config": {"evaluation_k": 2}, "name": f"stale-{sync_every}", "about": "of runs"}
    return record(
        method, seed, final, setting=f"stale-{sync_every}",
        setting_settings={**settings, "sync_every": None if sync_every == 1 else sync_every},
        method_settings={"family": "spo", "name": method, "learning_rate": rate},
    )  # fmt: skip


def test_sensitivity_is_over_pairs_that_all_methods_have_at_all_values(tmp_path):
    group = [stale("group", seed, 0.5 - k / 100, k) for seed in (0, 1) for k in (1, 10, 40)]
    ppo = [stale("ppo", seed, 0.4, k) for seed, k in ((0, 1), (0, 10), (0, 40), (1, 1), (1, 10))]
    twice = [stale("grpo", seed, 0.4, k) for seed in (0, 1) for k in (1, 40)]
    # As it is by default, where the others, made before there was such a field, say nothing.
    group[0]["setting_settings"]["skipped_problems"] = 0
    (found,) = sensitivities([*ppo, *group, *twice])
    assert (found.title, list(found.curves)) == ("Stale behaviour, test problems", ["ppo", "group"])
    assert [(x, len(one.runs)) for x, one in found.curves["group"]] == [(1, 1), (10, 1), (40, 1)]
    text = write_report([*ppo, *group, *twice], tmp_path, "ppo")
    row = next(line for line in text.splitlines() if line.startswith("| group  | 40"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:8] == ["1", "0.100", "0.200", "2.00", "-0.390"]
    assert (tmp_path / "stale-behaviour-test-problems.png").exists()


def test_sensitivity_to_the_learning_rate_needs_three_values_and_all_else_equal():
    rates = [stale("ppo" if k == 2 else f"ppo:learning_rate={k}", 0, 0.4, 1, k) for k in (3, 2, 1)]
    (found,) = sensitivities(rates)
    assert (found.quantity, [x for x, _ in found.curves["ppo"]]) == ("learning rate", [1, 2, 3])
    short = [{**made, "steps": 2} for made in rates]
    (both,) = sensitivities([*rates, *short])
    assert list(both.curves) == ["ppo", "ppo (stale-1, 2 steps)"]
    assert sensitivities(rates[:2]) == []
    rates[0]["method_settings"]["beta"] = 0.7
    assert sensitivities(rates) == []
    rates[0]["method_settings"]["beta"] = 0.03  # as it is by default, where the others say nothing
    assert len(sensitivities(rates)) == 1


def test_report_of_made_up_runs(tmp_path):
    files = []
    for index, made in enumerate(RECORDS):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps(made), encoding="utf-8")
    text = write_report(read_records(files), tmp_path / "out", "ppo")
    lines = [line for line in text.splitlines() if line.startswith("| group")]
    assert "0.400 [0.300, 0.500]" in lines[0] and "400" in lines[0]
    assert "+0.000 [-0.100, +0.100]" in lines[1]
    row = next(line for line in text.splitlines() if line.startswith("| reference"))
    assert "0.100" in row
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "0.400 [0.300, 0.500]" in page and "://" not in page
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert len(pictures) == page.count("data:image/png") == 6
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    save_records(RECORDS, tmp_path / "all.jsonl")
    assert read_records([tmp_path / "all.jsonl", files[0]]) == [*RECORDS, RECORDS[0]]
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path, "ppo")


def test_charts_leave_out_what_was_run_too_seldom_and_tell_spo_from_controls(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "trade_off", lambda methods, k: drawn.extend(methods))
    more = [record("group", seed, 0.5) for seed in (2, 3)]
    write_report([*RECORDS, *more], tmp_path, "ppo")
    assert [(one.method, len(one.runs)) for one in drawn] == [("group", 4), ("ppo", 2)]
    assert [figures._style(one, "red")["ls"] for one in drawn] == ["-", "--"]


def test_the_command_reports_on_files_that_are_there(tmp_path, monkeypatch, capsys):
    save_records(RECORDS, tmp_path / "all.jsonl")
    out = ["--out", str(tmp_path / "out"), "--save", str(tmp_path / "again.jsonl")]
    monkeypatch.setattr(sys, "argv", ["learning", "--records", str(tmp_path / "all.jsonl"), *out])
    assert main() == 0
    assert "0.400 [0.300, 0.500]" in capsys.readouterr().out
    assert read_records([tmp_path / "again.jsonl"]) == RECORDS
    monkeypatch.setattr(sys, "argv", ["learning", "--records", str(tmp_path / "none.json")])
    assert main() == 2 and "learning: --records:" in capsys.readouterr().err


def test_calibration_by_hand():
    ratios = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    rewards = torch.tensor([[0.0, -1.0], [-1.0, -1.0]])
    found = calibrate(ratios, rewards, 0.5)
    # Q_0 of the first: mean of (0 - .5, -1 + .5) = -.5; so Q_T = 0 and -1, just the rewards. Of the
    # second: mean of (-1, -2) = -1.5; Q_T = -1.5 and -.5, both off by .5.
    assert found["residual_rms"] == pytest.approx((0.5 / 4) ** 0.5)
    assert found["ranked"] == 1.0
    assert [b for bin_ in found["bins"] for b in bin_] == pytest.approx(
        [-1.5, -1, -1, -1, -0.5, -1, 0, 0]
    )
    assert calibrate(ratios, torch.zeros(2, 2), 0.5)["ranked"] is None
