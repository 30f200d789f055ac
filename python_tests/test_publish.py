"""Policies published to a folder: whole or not there, loadable, equal to the model in memory."""

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from publish_cases import lora_model, tiny_model, tiny_tokenizer, trained

from spo_ext.durable import exchange_folders
from spo_ext.trainer.model import policy_state
from spo_ext.trainer.publish import DirectoryPublisher

transformers = pytest.importorskip("transformers")
IDS = torch.arange(12).view(2, 6)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def latest(directory: Path) -> Any:
    folder = directory / (directory / "latest").read_text()
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_published_model_is_the_model(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    publisher = DirectoryPublisher(tmp_path / "policies")
    publisher.publish(model, tokenizer, 12)
    assert names(publisher.directory) == ["latest", "version-0000012"]
    assert (publisher.directory / "latest").read_text() == "version-0000012"
    assert torch.equal(logits(latest(publisher.directory)), logits(model))
    folder = publisher.directory / "version-0000012"
    assert (folder / "model.safetensors").is_file()
    loaded = type(tokenizer).from_pretrained(folder)
    assert loaded("ab ba")["input_ids"] == tokenizer("ab ba")["input_ids"]


def test_only_the_newest_versions_stay(tmp_path: Path) -> None:
    publisher = DirectoryPublisher(tmp_path, keep=2)
    model = tiny_model()
    for version in (8, 9, 10):
        publisher.publish(model, None, version)
    assert names(tmp_path) == ["latest", "version-0000009", "version-0000010"]
    publisher.finish()
    assert (tmp_path / "finished").read_text() == "version-0000010"
    publisher.publish(model, None, 9)  # a resumed run
    assert names(tmp_path) == ["latest", "version-0000009", "version-0000010"]
    assert (tmp_path / "latest").read_text() == "version-0000009"


def test_a_version_published_again_is_kept_or_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "spo_ext.trainer.publish")
    publisher, model = DirectoryPublisher(tmp_path), tiny_model()
    publisher.publish(model, None, 1)
    inode = (tmp_path / "version-0000001").stat().st_ino
    publisher.publish(model, None, 1)
    assert (tmp_path / "version-0000001").stat().st_ino == inode
    assert "with the same files" in caplog.messages[-1]
    changed = trained(tiny_model())
    publisher.publish(changed, None, 1)
    assert "replaces other weights" in caplog.messages[-1]
    assert torch.equal(logits(latest(tmp_path)), logits(changed))
    assert names(tmp_path) == ["latest", "version-0000001"]


def test_exchange_leaves_no_moment_without_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    renames: list[object] = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *ends: (renames.append(ends), rename(*ends)))
    exchange_folders(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "who").read_text() == "a" and renames == []
    monkeypatch.setattr("spo_ext.durable._exchange_at_once", lambda *_: False)
    exchange_folders(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "who").read_text() == "b" and len(renames) == 3
    assert names(tmp_path) == ["a", "b"]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        exchange_folders(tmp_path / "absent", tmp_path / "b")


@pytest.mark.parametrize("moment", ["save", "before_rename", "latest", "prune"])
def test_a_killed_publisher_leaves_the_old_version(tmp_path: Path, moment: str) -> None:
    publisher, old, new = DirectoryPublisher(tmp_path, keep=1), tiny_model(), trained(tiny_model())
    publisher.publish(old, None, 1)

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        if moment == "save":
            new.generation_config.save_pretrained = die
        elif moment == "before_rename":
            publisher._move = die  # type: ignore[method-assign]
        elif moment == "latest":
            os.replace = die
        else:
            publisher._remove_old = die  # type: ignore[method-assign]
        publisher.publish(new, None, 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    expected = new if moment == "prune" else old
    assert torch.equal(logits(latest(tmp_path)), logits(expected))
    assert len(names(tmp_path)) > 2  # something was left over
    publisher.publish(new, None, 2)
    assert names(tmp_path)[0] == "latest" and names(tmp_path)[-1] == "version-0000002"
    assert not [name for name in names(tmp_path) if "tmp" in name or name == "version-0000001"]
    assert torch.equal(logits(latest(tmp_path)), logits(new))


def test_a_gathered_state_dict_is_what_is_written(tmp_path: Path) -> None:
    model, source = tiny_model(), trained(tiny_model())
    gathered = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    DirectoryPublisher(tmp_path).publish(model, None, 0, gathered)
    assert torch.equal(logits(latest(tmp_path)), logits(source))
    assert gathered.keys() == source.state_dict().keys()  # the caller's mapping is only read


@pytest.mark.parametrize("targets", ["linear", "embedding_and_head"])
@pytest.mark.parametrize("gathered", [False, True])
def test_lora_is_merged_into_a_copy(tmp_path: Path, targets: str, gathered: bool) -> None:
    model = lora_model(targets)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    DirectoryPublisher(tmp_path).publish(model, None, 3, before if gathered else None)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = latest(tmp_path)
    assert type(loaded).__name__ == "Qwen2ForCausalLM"
    assert (logits(loaded) - expected).abs().max() < 1e-6
    with model.disable_adapter():
        assert (logits(loaded) - logits(model)).abs().max() > 1e-3


def test_merged_weights_are_rounded_once() -> None:
    model = lora_model("linear").to(torch.bfloat16)
    merged = policy_state(model)
    name = "model.layers.0.self_attn.q_proj"
    state = model.state_dict()
    a, b, weight = (
        state[f"base_model.model.{name}.{leaf}"].double()
        for leaf in ("lora_A.default.weight", "lora_B.default.weight", "base_layer.weight")
    )
    exact = weight + 2.0 * (b @ a)  # lora_alpha / r = 8 / 4
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    assert torch.equal(merged[f"{name}.weight"], exact.to(torch.float32).to(torch.bfloat16))
    assert merged.keys() == tiny_model().state_dict().keys()


def test_the_adapter_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = lora_model("linear")
    DirectoryPublisher(tmp_path, merge_adapter=False).publish(model, None, 1)
    folder = tmp_path / "version-0000001"
    assert not (folder / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(tiny_model(), folder)
    assert torch.equal(logits(loaded), logits(model))


def test_adapters_that_are_no_sum_are_refused(tmp_path: Path) -> None:
    for targets in ("dora", "bias", "tied"):
        publisher = DirectoryPublisher(tmp_path / targets)
        with pytest.raises(ValueError, match="cannot be merged.*merge_adapter=False"):
            publisher.publish(lora_model(targets), None, 1)
        assert not (publisher.directory / "latest").exists()


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be an integer >= 1, got 0"):
        DirectoryPublisher(tmp_path, keep=0)
    with pytest.raises(ValueError, match="version must be an integer >= 0, got -1"):
        DirectoryPublisher(tmp_path).publish(tiny_model(), None, -1)
    with pytest.raises(ValueError, match="state_dict must have .*lora_A.default.weight"):
        model = lora_model("linear")
        policy_state(model, {k: v for k, v in model.state_dict().items() if "lora_A" not in k})
