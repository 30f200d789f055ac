"""Runs as files, and sweeps that were cut short."""

import json
from concurrent.futures import Executor, Future
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sqlalchemy")

from learning import runs as runs_module
from learning import sweep as sweep_module
from learning.evaluation import evaluate
from learning.judging import Grade
from learning.methods import method_named
from learning.references import make_reference, write_whole
from learning.runs import Run, perform, restore
from learning.settings import SETTINGS
from learning.sweep import plan, sweep
from sandbox_cases import WHY_NOT

from spo_ext.contests.supervised import make_policy

TINY = SETTINGS["tiny"]
needs_sandbox = pytest.mark.skipif(WHY_NOT["bwrap"] is not None, reason="needs bubblewrap")


class Here(Executor):
    """A pool that does everything at once, in this process."""

    def __init__(self, workers, mp_context=None):
        self.workers = workers

    def submit(self, call, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(call(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


def without_times(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    return [
        {name: value for name, value in point.items() if name != "training_seconds"}
        for point in record["curve"]
    ]


@needs_sandbox
def test_the_same_run_gives_the_same_curve_and_another_seed_another(tmp_path, cache):
    run = Run("tiny", "half-near", 0, 0, 2, "development")
    first = perform(run, tmp_path / "a", cache)
    torch.manual_seed(99)  # whatever the caller did before
    again = perform(run, tmp_path / "b", cache)
    other = perform(Run("tiny", "half-near", 0, 1, 2, "development"), tmp_path / "a", cache)
    assert without_times(first) == without_times(again)
    assert without_times(first) != without_times(other)
    record = json.loads(first.read_text(encoding="utf-8"))
    assert [point["step"] for point in record["curve"]] == [0, 1, 2]
    assert [point["sampled"] for point in record["curve"]] == [0, 6, 12]
    assert len(record["curve"][-1]["pass_at"]) == TINY.config.evaluation_samples
    assert record["commit"] and record["method_settings"]["offline_share"] == 0.5
    stages = {"sampling", "judging", "store", "scoring", "update", "evaluation"}
    assert set(record["seconds"]) == stages
    assert len(list(cache.glob("reference-*.pt"))) == 1, "it was made once"
    changed = first.stat().st_mtime_ns
    assert perform(run, tmp_path / "a", cache) == first
    assert first.stat().st_mtime_ns == changed, "a finished run is not run again"


@needs_sandbox
def test_a_reference_is_read_back_as_it_was_made(cache):
    facts = make_reference(TINY, 0, cache)
    assert facts == make_reference(TINY, 0, cache)
    assert len(facts["pass_at"]) == TINY.config.evaluation_samples


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file"
    write_whole(path, lambda file: file.write(b"old"))

    def die(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, die)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_killed_sweep_continues_with_what_is_missing(tmp_path, monkeypatch):
    done = []

    def fake(run, results, cache):
        if len(done) == 2 and not any(results.glob("killed")):
            (results / "killed").touch()
            raise KeyboardInterrupt
        done.append(str(run))
        write_whole(run.file(results), lambda file: file.write(b"{}"))

    monkeypatch.setattr(sweep_module, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(sweep_module, "make_reference", lambda *_: None)
    monkeypatch.setattr(sweep_module, "perform", fake)
    planned = plan(["tiny"], ["group", "ppo"], [0], [0, 1], 2, "development")
    with pytest.raises(KeyboardInterrupt):
        sweep(planned, tmp_path, tmp_path, 1, None, quiet=True)
    assert done == ["tiny group r0 s0", "tiny ppo r0 s0"]
    outcome = sweep(planned, tmp_path, tmp_path, 1, None, quiet=True)
    assert done == [str(run) for run in planned], "each once"
    assert outcome.files == [run.file(tmp_path) for run in planned]
    assert not outcome.left and not outcome.failed


def test_a_sweep_ends_within_its_budget_and_survives_a_failing_run(tmp_path, monkeypatch):
    now = [0.0]

    def fake(run, results, cache):
        now[0] += 60
        if run.method == "ppo":
            raise RuntimeError("no")
        write_whole(run.file(results), lambda file: file.write(b"{}"))

    monkeypatch.setattr(sweep_module, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(sweep_module, "make_reference", lambda *_: None)
    monkeypatch.setattr(sweep_module, "perform", fake)
    monkeypatch.setattr(sweep_module.time, "monotonic", lambda: now[0])
    planned = plan(["tiny"], ["ppo", "group"], [0], [0, 1, 2], 2, "test")
    outcome = sweep(planned, tmp_path, tmp_path, 1, budget_minutes=4.5, quiet=True)
    assert now[0] == 4 * 60
    assert list(outcome.failed.values()) == ["RuntimeError: no"] * 2
    assert len(outcome.files) == 2 and outcome.left == planned[4:]


def test_a_plan_takes_whole_rows_of_methods_and_refuses_unknown_names():
    planned = plan(["tiny"], ["group", "ppo"], [0, 1], [0, 1], 2, "test")
    assert [run.method for run in planned[:2]] == ["group", "ppo"]
    assert [(run.reference_seed, run.seed) for run in planned[::2]] == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    lengths = plan(["tiny"], ["group:beta=0.1@5", "ppo"], [0], [0], 2, "test")
    assert [(run.method, run.steps) for run in lengths] == [("group:beta=0.1", 5), ("ppo", 2)]
    for wrong in ("ppo@", "ppo@0", "ppo@many"):
        with pytest.raises(ValueError, match="must be followed by a number of steps"):
            plan(["tiny"], [wrong], [0], [0], 2, "test")
    for settings, methods in ((["huge"], ["ppo"]), (["tiny"], ["magic"])):
        with pytest.raises(ValueError, match="must be one of"):
            plan(settings, methods, [0], [0], 2, "test")


def test_a_changed_method_is_another_run(tmp_path):
    files = {Run("tiny", name, 0, 0, 2, "test").file(tmp_path) for name in
             ("group", "group:beta=0.1", "group:beta=0.2")}  # fmt: skip
    assert len(files) == 3
    assert all(file.name == Path(file.name).name and ":" not in file.name for file in files)


def test_an_evaluation_depends_on_its_seed_alone():
    class Never:
        def grade(self, problems, programs):
            return [Grade("", 0, 1) for _ in programs]

    torch.manual_seed(0)
    policy, other, config = make_policy(TINY.config), make_policy(TINY.config), TINY.config
    problems = TINY.problems("development", 0)
    found = []
    for state, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(state)
        expected = torch.rand(1)
        torch.manual_seed(state)
        found.append(evaluate(policy, policy, other, problems, Never(), config, seed, 0.1))
        assert torch.equal(torch.rand(1), expected), "and leaves the random state alone"
    assert found[0] == found[1] != found[2]
    assert found[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert found[0]["calibration"]["residual_rms"] > 0.001, "which is that of the loss's reference"


def test_curve_keeps_means_since_the_last_evaluation():
    clock, curve = runs_module.Clock(), runs_module.Curve()
    curve.note({"loss": 1.0})
    curve.note({"loss": 3.0, "pass_rate": 0.5})
    curve.add(2, clock, {})
    curve.note({"loss": 7.0})
    curve.add(3, clock, {})
    assert [point["training"] for point in curve.points] == [
        {"loss": 2.0, "pass_rate": 0.5},
        {"loss": 7.0},
    ]


def test_committed_runs_count_as_done_while_their_settings_are_the_same(tmp_path):
    run = Run("tiny", "group:beta=0.3", 1, 2, 5, "test")
    method = asdict(method_named(run.method))
    del method["final_beta"]  # a setting that there was not when it ran
    record = {**asdict(run), "method_settings": method, "setting_settings": asdict(TINY)}
    record["curve"] = [{"step": 0}]
    others = [
        {**record, "seed": 3, "method_settings": {**method, "beta": 0.2}},
        {**record, "seed": 4, "setting_settings": {**asdict(TINY), "offline_solutions": 9}},
    ]
    config = {**asdict(TINY.config), "layers": 9}
    others.append({**record, "seed": 5, "setting_settings": {**asdict(TINY), "config": config}})
    assert restore([record, *others], tmp_path) == 1
    assert json.loads(run.file(tmp_path).read_text(encoding="utf-8")) == record
    assert restore([record], tmp_path) == 0
    assert perform(run, tmp_path, tmp_path) == run.file(tmp_path)
