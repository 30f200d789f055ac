"""Recipes of the trainer, on problems that take seconds."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from learning.baselines import padded
from learning.controls import PPO, known
from learning.recipes import RECIPES, perform, settings
from learning.settings import setting_named

from spo_ext.contests.recipe import SPO_STEPS, Contest, spo_settings
from spo_ext.trainer import SPOConfig

TINY = setting_named("tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("references")


def run(name: str, cache: Path, steps: int = 2) -> dict:
    return perform(name, TINY, 0, 0, steps, cache, "development")


def test_the_quickstart_is_the_recipe_of_that_name(tmp_path: Path) -> None:
    ours = settings(RECIPES["quickstart"], setting_named("standard"), tmp_path, "", SPO_STEPS, 0)
    theirs = SPOConfig(**spo_settings(Contest(), tmp_path))
    differ = {f.name for f in fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)}
    assert differ <= {"logging_strategy", "disable_tqdm", "run"}


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "half-online"])
def test_every_recipe_learns_something(name: str, sandbox, cache: Path) -> None:
    found = run(name, cache, steps=4)
    online = 0 if name == "sft" else 4 - round(4 * RECIPES[name].sft_share)
    assert found["sampled"] == 3 * 4 * online  # problems, programs, batches
    assert found["before"]["kl"] == pytest.approx(0, abs=1e-4)
    moved = found["after"]["entropy"] != found["before"]["entropy"]
    # The tiny reference writes no correct program that expert iteration could learn from, and
    # rewards that all agree are no news to groups.
    assert moved or name in ("expert", "grpo", "spo", "quickstart")


def test_half_online_samples_half_and_repeats_with_the_seed(sandbox, cache: Path) -> None:
    found = run("half-online", cache, steps=4)
    assert found["sampled"] == 4 * 3 * 2  # steps, problems, half of a group of four
    assert found["after"]["entropy"] != found["before"]["entropy"]
    assert run("half-online", cache, steps=4)["after"] == found["after"]


def test_ppo_hands_its_parts_to_the_loss(sandbox, cache: Path, monkeypatch) -> None:
    """Ratios are 1 on the policy's own rows, so the loss is minus the mean of white advantages."""
    seen = []

    class Watched(PPO):
        def loss_of(self, logprobs, rows):
            found = super().loss_of(logprobs, rows)
            old, mask = padded(known(rows), rows.tokens.cu_seqlens)
            new = padded(logprobs.detach(), rows.tokens.cu_seqlens)[0]
            seen.append((float(found[0].detach()), float(((new - old) * mask).abs().max())))
            assert self.critic.optimizer.param_groups[0]["lr"] <= self.value_learning_rate
            return found

    monkeypatch.setitem(RECIPES, "ppo", replace(RECIPES["ppo"], trainer=Watched))
    torch.manual_seed(0)
    run("ppo", cache)
    assert len(seen) == 2
    assert seen[0][0] == pytest.approx(0, abs=1e-4) and seen[0][1] < 1e-4
