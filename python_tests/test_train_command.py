"""`spo train` and `spo score`: what they say when something is wrong, and what they load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate_launch import launch
from trainer_cases import fill, make_model, make_tokenizer, save, with_adapters
from trainer_process import settings

from spo_ext.cli import main
from spo_ext.store import TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer
from spo_ext.trainer.commands import ModelArguments, make_trainer

OFFLINE = {"mixture": "offline", "rollouts": "none"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with TrajectoryStore(tmp_path / "store.db") as store:
        fill(store)
    save(tmp_path / "model", make_model())
    return tmp_path


def arguments(folder: Path, **changes: Any) -> list[str]:
    found = ["--model", "model"]
    for name, value in settings(folder, **{**OFFLINE, "max_steps": 2, **changes}).items():
        found += [f"--{name}", str(value)]
    return found


def test_trains_scores_and_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = arguments(folder, save_strategy="steps", save_steps=1)
    assert main(["train", *options]) == 0
    assert (folder / "run" / "model.safetensors").is_file()
    # A checkpoint by its name, as transformers has it, is not passed over.
    more = arguments(folder, resume_from_checkpoint=str(folder / "run" / "checkpoint-1"))
    assert main(["train", *more]) == 0
    capsys.readouterr()
    assert main(["score", "--store", "store.db", "--model", "model", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("16 trajectories scored by reference ")
    assert main(["score", "--store", "store.db", "--model", "model", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("0 trajectories")


def test_several_processes_end_their_group(folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(
        "import json, os, sys, torch\n"
        "from spo_ext.cli import main\n"
        "status = main(['train', *sys.argv[1:]])\n"
        "with open(os.environ['OUT'], 'w') as file:\n"
        "    json.dump([status, torch.distributed.is_initialized()], file)\n"
        "sys.stderr.flush()\n"
        "os._exit(0)  # see publish_sharded.py\n"
    )
    assert launch(script, arguments(folder)) == [[0, False], [0, False]]
    assert (folder / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["train", "--store", "typo.db"], "there is no store typo.db: spo import makes one"),
        (["train", "--model", "nothing"], "must be an existing folder, got 'nothing'"),
        (["train", "--store", "postgresql://nobody@127.0.0.1:1/x"], "127.0.0.1"),
        (["train", "--reward", "rewards:missing"], "has no attribute 'missing'"),
        (["score", "--store", "typo.db"], "there is no store typo.db: spo import makes one"),
        (["score", "--model", "nothing"], "must be an existing folder, got 'nothing'"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_failures_say_what_is_wrong(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    words: str,
) -> None:
    monkeypatch.setattr("spo_ext.store.database._FIRST_S", 0.3)
    (folder / "rewards.py").write_text("def good(completions):\n    return [1.0] * 4\n")
    given = dict(zip(command[1::2], command[2::2], strict=True))
    if command[0] == "train":
        options = arguments(folder, **({"mixture": "online", "rollouts": "embedded"}))
    else:
        options = ["--model", "model", "--store", "store.db"]
    options = [part for pair in given.items() for part in pair] + _without(options, set(given))
    assert main([command[0], *options]) == 1
    error = capsys.readouterr().err.rpartition("spo: error: ")[2]
    assert words in error and "Traceback" not in error
    assert not (folder / "typo.db").exists()


def _without(options: list[str], names: set[str]) -> list[str]:
    pairs = zip(options[::2], options[1::2], strict=True)
    return [part for name, value in pairs if name not in names for part in (name, value)]


def test_a_reward_of_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a console script sees it: sys.path has not the folder it was called in."""
    import sys

    monkeypatch.setattr(sys, "path", [part for part in sys.path if part not in ("", str(folder))])
    (folder / "spo_test_rewards.py").write_text(
        "def first(completions):\n    return [float(len(c)) for c in completions]\n"
    )
    options = arguments(
        folder, mixture="online", rollouts="embedded", reward="spo_test_rewards:first"
    )
    assert main(["train", *options]) == 0
    with TrajectoryStore(folder / "store.db") as store:
        assert {row.reward for row in store.trajectories(run="run")} - {0.0, 1.0}


def test_new_adapters_follow_from_the_seed(folder: Path) -> None:
    """Every rank draws them for itself, so that they must not depend on what was drawn before."""
    import torch

    found = []
    for name in ("one", "two"):
        torch.rand(len(found) + 1)
        config = SPOConfig(**settings(folder, **OFFLINE, run=name, seed=3))
        trainer = make_trainer(config, ModelArguments("model", lora_r=2))
        found.append(dict(trainer.model.named_parameters()))
    assert any(bool(p.ne(0).any()) for name, p in found[0].items() if "lora_A" in name)
    for name, parameter in found[0].items():
        assert torch.equal(parameter, found[1][name]), name


def test_an_adapter_alone_is_refused(folder: Path) -> None:
    with_adapters(make_model()).save_pretrained(folder / "adapter")
    config = SPOConfig(**settings(folder, **OFFLINE))
    with pytest.raises(ValueError, match="whole weights, got an adapter in .*: merge it into"):
        make_trainer(config, ModelArguments("adapter", tokenizer="model"))


def test_an_adapter_in_a_reference_counts(folder: Path) -> None:
    """reference model: as the policy starts, adapters included; adapter: the base alone."""
    fingerprints = {}
    for kind in ("model", "adapter"):
        config = SPOConfig(**settings(folder, **OFFLINE, run=kind, reference=kind))
        trainer = SPOTrainer(with_adapters(make_model()), config, make_tokenizer())
        fingerprints[kind] = trainer.reference.fingerprint
        rows = list(trainer.store.trajectories())[:4]
        prompts = {p.id: p.token_ids for p in trainer.store.prompts("train")}
        for row in rows:
            model = with_adapters(make_model())
            if kind == "adapter":
                model = model.unload()
            ids = [*prompts[row.prompt_id], *row.token_ids]
            expected = _by_logits(model, ids)[-len(row.token_ids) :]
            found = trainer.reference.logprobs([row], prompts)[0]
            assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert len(set(fingerprints.values())) == 2
    base = SPOConfig(**settings(folder, **OFFLINE, run="base"))
    plain = SPOTrainer(make_model(), base, make_tokenizer())
    assert plain.reference.fingerprint == fingerprints["adapter"]


def _by_logits(model: Any, ids: list[int]) -> list[float]:
    import torch

    with torch.no_grad():
        logprobs = model.eval()(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
