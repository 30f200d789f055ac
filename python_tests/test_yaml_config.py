"""`spo train --config`: YAML and flags become dataclasses, and mistakes are named."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from spo_ext.trainer import yaml_config

transformers = pytest.importorskip("transformers")


@dataclass
class Config(transformers.TrainingArguments):
    """As SPOConfig extends them."""

    store: str = field(kw_only=True, metadata={"help": "file or URL of the trajectories"})
    beta: float = field(default=0.1, metadata={"help": "softness, about 10%% of the reward"})
    objective: Literal["cross_entropy", "squared"] = "cross_entropy"
    mixture: dict[str, float] | None = None
    stop_words: list[str] = field(default_factory=list)
    reference: str | None = None
    progress: bool = True
    top: int | None = 5
    out_of: Path = Path("runs")


def parse(tmp_path: Path, text: str, *flags: str) -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(f"use_cpu: true\nstore: s.db\noutput_dir: {tmp_path}/out\n{text}")
    (config,) = yaml_config.parse([Config], ["--config", str(path), *flags])
    return config


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, *flags: str) -> str:
    with pytest.raises(SystemExit) as error:
        parse(tmp_path, text, *flags)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_file_values_have_the_types_of_the_fields(tmp_path: Path) -> None:
    config = parse(
        tmp_path,
        "learning_rate: 1e-5\nmax_grad_norm: 1\nmax_steps: '7'\nbf16: no\neval_strategy: no\n"
        "run_name: 12\nreference: null\nmixture: {online: .5, human: 5e-1}\nbeta: 2\n"
        "fsdp_config: {version: 2, reshard_after_forward: true, eps: 1e-6}\n"
        "report_to: none\nstop_words: [no, 'yes']\nobjective: squared\ntop: ~\nout_of: a/../b\n",
    )
    assert config.learning_rate == 1e-5 and type(config.max_grad_norm) is float
    assert config.max_steps == 7 and config.bf16 is False and config.eval_strategy == "no"
    assert config.run_name == "12" and config.reference is None and config.top is None
    assert config.mixture == {"online": 0.5, "human": 0.5} and type(config.beta) is float
    assert config.fsdp_config["version"] == 2 and config.fsdp_config["eps"] == 1e-6
    assert config.fsdp_config["reshard_after_forward"] is True
    assert config.report_to == [] and config.stop_words == ["no", "yes"]
    assert config.objective == "squared" and str(config.out_of) == "a/../b"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    assert parse(tmp_path, "fsdp: true\n").fsdp is True
    assert parse(tmp_path, "", "--fsdp").fsdp is True
    assert not parse(tmp_path, "fsdp: true\n", "--fsdp", "false").fsdp
    config = parse(
        tmp_path,
        "learning_rate: 1e-3\nmixture: {online: 1.0}\nprogress: true\nbeta: 3\ntop: 2\n",
        *("--learning-rate", "1e-5", "--mixture", '{"online": 0.25, "human": 0.75}'),
        *("--no_progress", "--stop_words", "a", "b", "--top", "null", "--bf16", "false"),
        *("--report_to", "tensorboard", "trackio", "--fsdp_config", "{version: 2}"),
    )
    assert config.learning_rate == 1e-5 and config.mixture == {"online": 0.25, "human": 0.75}
    assert config.progress is False and config.stop_words == ["a", "b"] and config.top is None
    assert config.bf16 is False and config.beta == 3.0
    assert config.report_to == ["tensorboard", "trackio"] and config.fsdp_config["version"] == 2


def test_what_is_nowhere_keeps_its_default(tmp_path: Path) -> None:
    path = f"{tmp_path}/out"
    flags = ["--store", "x", "--output_dir", path, "--use_cpu", "--stop_words", "[a, b]"]
    (config,) = yaml_config.parse([Config], flags)
    plain = transformers.TrainingArguments(output_dir=path, use_cpu=True)
    assert config.learning_rate == plain.learning_rate and config.beta == 0.1
    assert config.use_cpu is True and config.progress is True and config.stop_words == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1e-5", ["run.yaml", "learning_rat", "did you mean learning_rate"]),
        ("beta: soft", ["run.yaml: beta", "float", "'soft'"]),
        ("max_steps: 1.5", ["max_steps", "int", "1.5"]),
        ("max_steps: .inf", ["max_steps", "int", "inf"]),
        ("max_steps: true", ["max_steps", "int", "True"]),
        ("beta: [1]", ["beta", "float", "[1]"]),
        ("bf16: maybe", ["bf16", "bool", "'maybe'"]),
        ("progress: 3", ["progress", "bool", "3"]),
        ("objective: hinge", ["objective", "one of cross_entropy, squared", "'hinge'"]),
        ("mixture: {online: much}", ["mixture", "mapping or null", "much"]),
        ("stop_words: {a: b}", ["stop_words", "list"]),
        ("beta: null", ["beta", "float", "None"]),
        ("beta: 1\nbeta: 2", ["run.yaml", "beta stands twice", "line 5"]),
        ("beta: [", ["run.yaml", "line"]),
        ("eval_strategy: sometimes", ["Config", "sometimes"]),
        ("env: 3", ["run.yaml", "env must be a mapping"]),
    ],
)
def test_mistakes_in_the_file_are_named(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, tmp_path, text)
    assert all(word in said for word in words), said
    assert len(said) < 1000  # not the usage of 150 flags


def test_mistakes_in_flags_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, tmp_path, "", "--learning_rte=1e-5")
    assert "--learning_rte" in said and "did you mean learning_rate" in said
    assert "--beta must be float, got 'soft'" in refused(capsys, tmp_path, "", "--beta", "soft")
    # An abbreviation may become ambiguous with the next release of transformers.
    assert "did you mean learning_rate" in refused(capsys, tmp_path, "", "--learning_r", "1")


def test_missing_fields_files_and_mappings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        yaml_config.parse([Config], [])
    assert "no value for store (Config)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        yaml_config.parse([Config], ["--config", str(tmp_path / "absent.yaml")])
    assert "absent.yaml" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- beta\n")
    with pytest.raises(SystemExit):
        yaml_config.parse([Config], ["--config", str(tmp_path / "list.yaml")])
    assert "list.yaml must be a mapping" in capsys.readouterr().err


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPO_TEST_OLD", "shell")
    monkeypatch.setenv("SPO_TEST_NEW", "")
    path = tmp_path / "run.yaml"
    path.write_text("env: {SPO_TEST_NEW: 1, SPO_TEST_OLD: file}\nstore: s.db\n")
    yaml_config.set_environment(["--config", str(path), "--unknown", "3"])
    assert os.environ["SPO_TEST_NEW"] == "1" and os.environ["SPO_TEST_OLD"] == "file"
    monkeypatch.setenv("SPO_TEST_NEW", "")
    yaml_config.parse([Config], [f"--config={path}", "--output_dir", str(tmp_path), "--use_cpu"])
    assert os.environ["SPO_TEST_NEW"] == "1"
    yaml_config.set_environment(["--config"])  # parse will say what is wrong
    yaml_config.set_environment(["--config", str(tmp_path / "absent.yaml")])


def test_two_dataclasses_share_a_field() -> None:
    @dataclass
    class Other:
        store: str = "none"
        count: int = 1

    one, two = yaml_config.parse([Other, Other], ["--store", "s.db", "--count", "4"])
    assert one == two == Other("s.db", 4)


def test_help_lists_own_fields_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        yaml_config.parse([Config], ["--help"])
    text = capsys.readouterr().out
    assert error.value.code == 0
    assert text.index("--store") < text.index("--beta") < text.index("--learning_rate")
    assert "file or URL of the trajectories (required)" in text
    assert "softness, about 10% of the reward (default: 0.1)" in text
    assert text.index("Config:") < text.index("TrainingArguments:")


def test_old_names_of_options_are_read_with_a_warning(tmp_path: Path) -> None:
    from spo_ext.trainer import SPOConfig

    path = tmp_path / "run.yaml"
    path.write_text(
        f"use_cpu: true\nstore: s.db\noutput_dir: {tmp_path}/run\nmax_steps: 1\nmax_age: 3\n"
    )
    with pytest.warns(FutureWarning, match="max_age is called max_offpolicy_steps now"):
        (config,) = yaml_config.parse(
            [SPOConfig], ["--config", str(path), "--samples_per_prompt", "7"]
        )
    assert (config.num_generations, config.max_offpolicy_steps) == (7, 3)
    assert config.samples_per_prompt is None and config.max_age is None
