"""spo report: a page that needs nothing else, of files that a Trainer and spo eval wrote."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("sqlalchemy")
transformers = pytest.importorskip("transformers")

from data_cases import save_tokenizer
from evaluation_cases import BAD, GOOD, Scripted, fill, judge

from spo_ext.cli import main
from spo_ext.evaluation import producers
from spo_ext.store import Origin, Prompt, Trajectory, TrajectoryStore

EVIL = "</pre><script src=\"http://x/y.js\">alert(1)</script><img src=x onerror='a()'>"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), name
            if name in ("src", "href"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def write_evaluation(folder: Path, passed: int, completion: str = "print(1)") -> None:
    folder.mkdir(parents=True)
    rows = [
        {"prompt_id": i, "prompt": f"prompt {i} {EVIL}", "completion": f"{completion} {i}.{j}"}
        | {"reward": 1.0 if j < passed else None if j == 3 else 0.0, "reason": EVIL}
        for i in range(12)
        for j in range(4)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    share = {"mean": passed / 3, "low": 0.125, "high": 0.5, "prompts": 12}
    result = {
        "settings": {"n": 4, "server": "http://me:secret@host/v1"},
        "success": 1.0,
        "values": {"pass@1": share},
        "unjudged": 12,
        "per_prompt": [{"prompt_id": i, "n": 3, "c": passed} for i in range(12)],
    }
    (folder / "evaluation.json").write_text(json.dumps(result))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has everything."""
    rows = [
        {"step": i, "loss": 1 / i, "reward": i / 30, "kl": 0.1 * i, "mine": 7.25}
        for i in range(1, 31)
    ]
    rows[3][EVIL] = 1.0
    rows[5]["kl"] = float("nan")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"run_name": f"first {EVIL}", "store": "postgresql://me:secret@host/db", "beta": 0.03}
    (tmp_path / "spo_config.json").write_text(json.dumps(config))
    write_evaluation(tmp_path / "evaluation-1", 1)
    write_evaluation(tmp_path / "evaluation-2", 2, f"better {EVIL}")
    return tmp_path


def test_the_page_needs_nothing_else_and_runs_nothing(run: Path, capsys: Any) -> None:
    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text())
    pngs = sorted((run / "report_curves").glob("*.png"))
    names = ["calibration", "divergence", "loss", "pass_at_k", "reward"]
    assert [path.stem for path in pngs] == names
    assert f"{run / 'report.html'}, and 5 charts" in capsys.readouterr().out
    embedded = [link.partition("data:image/png;base64,")[2] for link in page.links]
    images = [base64.b64decode(link) for link in embedded]
    assert sorted(images) == sorted(path.read_bytes() for path in pngs)
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert "script" not in page.tags and page.tags.count("img") == 5
    assert "secret" not in page.text and "postgresql://me:***@host/db" in page.text


def test_the_page_says_what_was_found(run: Path, capsys: Any) -> None:
    assert main(["report", str(run)]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "2", "change"] in printed and ["pass@1", "0.333", "0.667", "+0.333"] in printed
    text = Page((run / "report.html").read_text()).text
    assert f"SPO run first {EVIL}" in text
    assert "0.667 [0.125,\u00a00.500]" in text  # pass@1 of the second evaluation
    assert "mine7.2507.2507.2507.25030" in text  # of the table of other metrics
    assert "not in the curves: kl (1)" in text
    assert f"prompt 7 {EVIL}" in text and "prompt 8" not in text
    for name, passed, word in (("evaluation-1", 1, "print(1)"), ("evaluation-2", 2, "better")):
        assert f"{name}, {passed} of 3 passed; the first: reward 1" in text
        assert word in text
    assert "beta0.03" in text


def test_what_spo_eval_wrote_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TrajectoryStore(tmp_path / "s.db") as store:
        fill(store, 3)
    model = save_tokenizer(tmp_path / "model")
    monkeypatch.setattr(producers, "make_generator", lambda *_: Scripted((GOOD, BAD)))
    monkeypatch.setattr(producers, "make_reward", lambda _: judge)
    out = tmp_path / "run" / "evaluation"
    command = ["eval", "--store", str(tmp_path / "s.db"), "--model", str(model), "--n", "4"]
    assert main([*command, "--k", "1,2", "--out", str(out)]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    text = Page((tmp_path / "run" / "report.html").read_text()).text
    result = json.loads((out / "evaluation.json").read_text())
    for name in ("pass@1", "pass@2", "reward", "num_tokens"):
        assert f"{result['values'][name]['mean']:.3f}" in text
    for i, row in enumerate(result["per_prompt"]):
        assert f"test {i} <&>evaluation, {row['c']} of 4 passed; the first: reward" in text
    assert (tmp_path / "run" / "report_curves" / "pass_at_k.png").exists()


def test_a_poor_run_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": -0.5}\n')
    out = tmp_path / "deep" / "page.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert page.tags.count("img") == 1 and (out.parent / "page_curves" / "loss.png").exists()
    assert "Evaluations" not in page.text and "Settings" not in page.text
    assert "Logged up to optimiser step 1." in page.text


def test_the_newest_trajectories_of_the_run_are_shown(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    with TrajectoryStore(tmp_path / "s.db") as store:
        prompt = store.add_prompt(Prompt([{"role": "user", "content": f"sum {EVIL}"}], [1]))
        for run, name in ((tmp_path.name, "mine"), ("other", "theirs")):
            for i in range(10):
                origin = Origin("policy", run=run, policy_version=i)
                words = [*range(40, 44), 30 + i]
                store.append([Trajectory(prompt, words, -i, origin, "eos", f"{name}.")])
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    command = ["report", str(tmp_path), "--store", str(tmp_path / "s.db")]
    assert main(command) == 0
    text = Page((tmp_path / "report.html").read_text()).text
    assert f"user: sum {EVIL}" in text
    shown = re.findall(r"policy version (\d): reward (\S+) \((\w+)\.\)", text)
    assert shown == [(str(i), f"{-i:g}", "mine") for i in range(9, 1, -1)]
    assert "40 41 42 43 39" in text
    assert main([*command, "--run", "other", "--tokenizer", str(tokenizer)]) == 0
    text = Page((tmp_path / "report.html").read_text()).text
    assert "theirs" in text and "mine" not in text
    decoded = transformers.AutoTokenizer.from_pretrained(tokenizer).decode([40, 41, 42, 43, 39])
    assert decoded in text and "40 41 42 43 39" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "RUN_DIR must be an existing folder, got 'nowhere'"),
        (["RUN", "--store", "no.db"], "there is no store no.db"),
        (["RUN", "--store", "STORE", "--tokenizer", "nowhere"], "tokenizer must be an existing"),
    ],
)
def test_what_cannot_work_is_said(
    run: Path, arguments: list[str], message: str, capsys: Any
) -> None:
    TrajectoryStore(run / "s.db").close()
    places = {"RUN": str(run), "STORE": str(run / "s.db")}
    assert main(["report", *(places.get(word, word) for word in arguments)]) == 1
    assert message in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_the_folder_of_a_real_trainer(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 1)

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            return {"loss": (self.linear(x)[:, 0] - labels).square().mean()}

    torch.manual_seed(0)
    rows = [{"x": torch.randn(2), "labels": torch.randn(())} for _ in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        logging_steps=1,
        save_steps=4,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=Model(), args=arguments, train_dataset=rows)
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 6 and (tmp_path / "checkpoint-6").is_dir()
    assert main(["report", str(tmp_path)]) == 0
    text = Page((tmp_path / "report.html").read_text()).text
    charts = {path.stem for path in (tmp_path / "report_curves").glob("*.png")}
    assert charts == {"loss", "grad_norm", "learning_rate"}
    assert f"loss{logged[-1]:.3f}was {logged[0]:.3f}" in text
    assert "Logged up to optimiser step 6. The last checkpoint is checkpoint-6." in text
