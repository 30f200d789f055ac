"""What is printed, logged or kept: no passwords, nothing that steers a terminal."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from spo_ext.cli import main
from spo_ext.commands import fail
from spo_ext.shown import hide_passwords, say, visible

SECRET = "hun/ter2"
FORMS = {
    f"postgresql://me:{SECRET}@host/db": "postgresql://me:***@host/db",
    "postgresql+psycopg://me:hun%2Fter2@host:5432/db": "postgresql+psycopg://me:***@host:5432/db",
    "postgresql://me:p@ss:w?rd#/ @host/db?x=1": "postgresql://me:***@host/db?x=1",
    "postgres://:secret@/db": "postgres://:***@/db",
    "POSTGRESQL://Me:secret@host": "POSTGRESQL://Me:***@host",
    "postgresql://me/x:secret@host/db": "postgresql://me/x:***@host/db",
    f"postgresql://me@host/db?password={SECRET}&x=1": "postgresql://me@host/db?password=***&x=1",
    "postgresql://host/db?x=1&pass%77ord=a@b": "postgresql://host/db?x=1&pass%77ord=***",
    "postgresql://host/db?sslpassword=two words": "postgresql://host/db?sslpassword=***",
    "postgresql://host/db?sslkey=secret&passfile=f": "postgresql://host/db?sslkey=***&passfile=f",
    "postgresql://host/db?oauth_client_secret=s": "postgresql://host/db?oauth_client_secret=***",
    "postgresql:///?conninfo=host%3Dh%20password%3Ds": "postgresql:///?conninfo=***",
    "postgresql:///?dbname=host%3Dh%20password%3Ds": "postgresql:///?dbname=***",
    "host=h password=secret user=me": "host=h password=*** user=me",
    r"host=h password = 'my \' secret' user=me": "host=h password = *** user=me",
    "{'api_key': 'sk-1', 'n': 4}": "{'api_key': ***, 'n': 4}",
    "no answer of http://me:secret@host/v1 (or me@host)": "no answer of http://me:***@host/v1 "
    "(or me@host)",
}
HARMLESS = (
    "postgresql://me@host:5432/db?sslmode=require",
    "sqlite:///file:/a/b.db?mode=ro&uri=true",
    "max_new_tokens=5 at http://localhost:8000/v1",
    'password authentication failed for user "me"',
)


@pytest.mark.parametrize("form", FORMS)
def test_passwords_are_hidden_in_every_form(form: str) -> None:
    assert hide_passwords(form) == FORMS[form]
    assert hide_passwords(FORMS[form]) == FORMS[form]


@pytest.mark.parametrize("words", HARMLESS)
def test_what_holds_no_password_stays(words: str) -> None:
    assert hide_passwords(words) == words


@pytest.mark.parametrize(
    "target",
    [
        f"mysql://me:{SECRET}@host/db",
        f"mysql://host/db?password={SECRET}",
        "postgresql://me:hun@ter2@host/db",
        f"postgresql://me/x:{SECRET}@host/db",
        f"postgresql://me:{SECRET}",
        "postgresql://host:hunter2/db",
        f"host=host password={SECRET}",
        f"postgresql://me:{SECRET}@127.0.0.1:1/db",
        f"postgresql://me@127.0.0.1:1/db?password={SECRET}&sslpassword={SECRET}",
        f"postgresql://127.0.0.1:1/db?passwort={SECRET}&password={SECRET}",
    ],
)
def test_no_error_of_a_store_shows_a_password(
    target: str,
    caplog: pytest.LogCaptureFixture,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setattr("spo_ext.store.database._FIRST_S", 0.3)
    from spo_ext.store import TrajectoryStore
    from spo_ext.store.database import Database

    caplog.set_level(logging.DEBUG)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        TrajectoryStore(target, retry_s=0.3)
    chain: BaseException | None = raised.value
    said = caplog.text
    while chain is not None:
        said, chain = said + repr(chain) + str(chain), chain.__cause__
    assert main(["export", "rows.jsonl", "--store", target]) == 1
    said += capsys.readouterr().err
    if "//" in target and "mysql" not in target and "hun@" not in target and "x:" not in target:
        try:
            made = Database(target, 1.0, 0.0)
            said += f"{made.shown}{made._engine!r}{made._engine.url!r}"
        except ValueError as error:
            said += str(error)
    assert "hun" not in said.replace("hung", "") and "ter2" not in said


def test_a_store_shows_itself_without_its_password_and_opens_again_with_it(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    from spo_ext.store import TrajectoryStore
    from spo_ext.store.database import Database

    store = TrajectoryStore.__new__(TrajectoryStore)
    store.database = Database(f"postgresql://me:{SECRET}@host/db?password={SECRET}", 1.0, 0.0)
    store._timeout_s = store._retry_s = 1.0
    assert repr(store) == "TrajectoryStore('postgresql+psycopg://me:***@host/db?password=***')"
    _, (target, *_) = store.__reduce__()  # type: ignore[misc]
    again = Database(target, 1.0, 0.0)
    assert again.url == store.database.url
    opened = again._engine.dialect.create_connect_args(again._engine.url)[1]
    assert opened["password"] == SECRET and "hun" not in repr(again._engine)


def test_settings_of_a_trainer_keep_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from spo_ext.trainer import SPOConfig, SPOTrainer

    where = f"postgresql://me:{SECRET}@host/db?sslpassword={SECRET}"
    config = SPOConfig(
        output_dir=str(tmp_path), store=where, max_steps=1, report_to=[], use_cpu=True
    )
    shown = [repr(config), str(config), config.to_json_string(), config.to_sanitized_dict()]
    assert "hun" not in str(shown)
    assert config.to_dict()["store"] == "postgresql://me:***@host/db?sslpassword=***"
    assert pickle.loads(pickle.dumps(config)).store == where  # for the processes of a run
    trainer = SPOTrainer.__new__(SPOTrainer)
    trainer.args = config
    saved: list[str | None] = []
    keep = lambda self, *_: saved.append(self.args.store)  # noqa: E731
    monkeypatch.setattr("transformers.Trainer._save", keep)
    trainer._save(str(tmp_path))  # which writes training_args.bin
    assert saved == [config.to_dict()["store"]] and config.store == where


STEERING = "a\x1b[31mb\x07\x9bc\u202ed\u2066e\u200ff\u2028g\x00\ud800\r"
SPELLED = r"a\x1b[31mb\x07\x9bc\u202ed\u2066e\u200ff\u2028g\x00\ud800\r"


def test_what_steers_a_terminal_is_spelled_out(capsys: Any) -> None:
    assert visible(STEERING) == SPELLED
    assert visible("a\tb\r\nc\n") == "a\tb\nc\n"
    assert visible("a\tb\n", line=True) == r"a\tb\n"
    assert visible("سلام, naïve, 👩‍🔬, x²") == "سلام, naïve, 👩‍🔬, x²"
    say(STEERING)
    assert fail(ValueError(STEERING)) == 1
    with pytest.raises(SystemExit):
        main([STEERING])
    printed = capsys.readouterr()
    assert printed.out == f"{SPELLED}\n" and printed.err.startswith(f"spo: error: {SPELLED}\n")
    assert not set(printed.err) & set("\x1b\x07\x9b\u202e\u2066\u200f\u2028\0")


def test_names_of_columns_reach_no_terminal_raw(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("sqlalchemy")
    row = {"prompt": "a", "completion": "b", "completion_mask\x1b[2J": [1], f"x{STEERING[:9]}": 1}
    rows = [row | {"reward": 1}, {"quest\x1bion": 1}, {"prompt": [{"role": "\x1bx"}]}]
    rows.append({"prompt": "p", "tests": {"kind": "\x1b[31m"}, "split": "\x1b"})
    (tmp_path / "rows\x1b.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    main(["import", str(tmp_path / "rows\x1b.jsonl"), "--store", str(tmp_path / "s.db")])
    printed = capsys.readouterr()
    assert printed.err and "\x1b" not in printed.out + printed.err


def test_a_report_shows_what_would_turn_it_around(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sqlalchemy")
    from spo_ext.store import Origin, Prompt, Trajectory, TrajectoryStore

    words = STEERING.replace("\ud800", "")
    name = f"rewards/{words}$x$\\alpha_/mean"
    lines = [{"step": 1, name: 0.5, f"other {words}": 1.0, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    config = {"run_name": f"r{words}", "store": f"postgresql://me@h/d?password={SECRET}", words: 1}
    (tmp_path / "spo_config.json").write_text(json.dumps(config))
    with TrajectoryStore(tmp_path / "s.db") as store:
        prompt = store.add_prompt(Prompt(f"p {words}".replace("\0", ""), [1]))
        origin = Origin("policy", run="r", policy_version=1)
        store.append([Trajectory(prompt, [1], 0.0, origin, "eos", f"why {words}")])
    arguments = ["report", str(tmp_path), "--store", str(tmp_path / "s.db"), "--run", "r"]
    assert main(arguments) == 0
    page = (tmp_path / "report.html").read_text()
    assert not set(page) & set(STEERING) - set("abcdefg[31m")
    assert "hun" not in page and r"why a\x1b[31mb" in page and r"<h1>SPO run ra\x1b[31m" in page
