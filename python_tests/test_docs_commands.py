"""Every `spo` command of the pages has the flags that it is shown with."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from store_cases import ROOT

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from spo_ext.cli import _COMMANDS
from spo_ext.trainer.commands import ModelArguments
from spo_ext.trainer.config import SPOConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))


def flags_of_commands() -> dict[str, set[str]]:
    parser = argparse.ArgumentParser()
    made = parser.add_subparsers()
    for add in _COMMANDS:
        add(made)
    found = {name: set(one._option_string_actions) for name, one in made.choices.items()}
    fields = {*SPOConfig.__dataclass_fields__, *ModelArguments.__dataclass_fields__, "config"}
    return found | {"train": {f"--{name}" for name in fields}}


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda path: path.name)
def test_flags_exist(page: Path) -> None:
    known = flags_of_commands()
    text = page.read_text().replace("\\\n", " ")
    shown = re.findall(r"^[^\n`#]*?\b(?:spo|spo_ext\.cli) ([a-z]+)( [^\n`#]*)?$", text, re.M)
    for command, words in shown:
        if command in known:
            flags = set(re.findall(r"(?<!\S)--[\w-]+", words.split(" > ")[0]))
            assert flags <= known[command], (command, flags - known[command])
    if page.name in ("bring_your_own.md", "scale.md", "real_model.md", "run.sh"):
        assert len(shown) >= 3
