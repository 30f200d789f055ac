"""Recipes of the trainer on problems that take seconds, their settings, and runs in a budget."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from learning import recipes
from learning.baselines import padded
from learning.controls import PPO, known
from learning.evaluation import evaluate
from learning.recipes import RECIPES, Run, main, perform, settings
from learning.references import code_only, load_reference
from learning.settings import SETTINGS
from learning.tables import read_records

from spo_ext.contests.recipe import SPO_STEPS, Contest, spo_settings
from spo_ext.contests.vocabulary import EOS, TOKENS, encode_prompt
from spo_ext.metrics import mean_pass_at_k
from spo_ext.rollout import Generation
from spo_ext.rollout.embedded import ModelGenerator
from spo_ext.trainer import SPOConfig
from spo_ext.trainer.model import HeadSettings, answer_logprobs

STANDARD, TINY = SETTINGS["standard"], SETTINGS["tiny"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("references")


def run(name: str, cache: Path, steps: int = 2) -> dict:
    return perform(Run(name, "tiny", "development", 0, 0, steps), cache)


def test_the_quickstart_is_the_recipe_of_that_name(tmp_path: Path) -> None:
    ours = settings(RECIPES["quickstart"], STANDARD, tmp_path, "", SPO_STEPS, 0)
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
            old, mask = padded(known(rows), rows.cu_seqlens)
            new = padded(logprobs.detach(), rows.cu_seqlens)[0]
            seen.append((float(found[0].detach()), float(((new - old) * mask).abs().max())))
            assert self.critic.optimizer.param_groups[0]["lr"] <= self.value_learning_rate
            return found

    monkeypatch.setitem(RECIPES, "ppo", replace(RECIPES["ppo"], trainer=Watched))
    torch.manual_seed(0)
    run("ppo", cache)
    assert len(seen) == 2
    assert seen[0][0] == pytest.approx(0, abs=1e-4) and seen[0][1] < 1e-4


def test_an_evaluation_is_of_the_policy_at_the_temperature(
    sandbox, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entropy and KL against the models' own logits on what was drawn."""
    drawn, generate = [], ModelGenerator.generate

    def keep(self, prompts, sampling):
        found = generate(self, prompts, sampling)
        drawn.extend(found)
        return found

    monkeypatch.setattr(ModelGenerator, "generate", keep)
    origin = load_reference(TINY, 0, cache)
    policy = copy.deepcopy(origin)
    policy.lm_head.weight.mul_(1.5)
    answer_logprobs(origin, HeadSettings())
    problems = TINY.problems("test", 0)
    n = TINY.evaluation_samples
    found = evaluate(policy, origin, problems, TINY, 3, temperature=0.5)
    assert len(drawn) == len(problems) and {len(row) for row in drawn} == {n}
    ids = [list(one.token_ids) for row in drawn for one in row]
    assert found["mean_tokens"] == sum(map(len, ids)) / len(ids)
    prompts = [encode_prompt(problem) for problem in problems for _ in range(n)]
    of_policy, of_origin = [], []
    for prompt, program in zip(prompts, ids, strict=True):
        tokens = torch.tensor([prompt + program])
        for sums, model, scale in ((of_policy, policy, 2.0), (of_origin, origin, 1.0)):
            with torch.no_grad():
                logits = scale * model(input_ids=tokens).logits[0, len(prompt) - 1 : -1]
            chosen = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])
            sums.append(float(chosen.sum()))
    assert found["entropy"] == pytest.approx(-sum(of_policy) / len(ids), rel=1e-5)
    kept = TINY.kl_problems * n
    kl = (sum(of_policy[:kept]) - sum(of_origin[:kept])) / kept
    assert kl > 0.1 and found["kl"] == pytest.approx(kl, rel=1e-4)


def test_an_evaluation_counts_what_passes(sandbox, cache: Path, monkeypatch) -> None:
    problems, wanted = TINY.problems("test", 0), [0, 1, 2, 3, 4, 0]
    solutions = TINY.solutions(problems)

    def generate(self, prompts, sampling):
        rows = []
        for right, count in zip(solutions, wanted, strict=True):
            ids = [*(right[k % len(right)] for k in range(count)), *[[EOS]] * (4 - count)]
            rows.append([Generation(tuple(one), "eos", (-1.0,) * len(one)) for one in ids])
        return rows

    monkeypatch.setattr(ModelGenerator, "generate", generate)
    origin = load_reference(TINY, 0, cache)
    answer_logprobs(origin, HeadSettings())
    found = evaluate(origin, origin, problems, TINY, 0)
    assert found["correct"] == wanted
    expected = [mean_pass_at_k(4, wanted, k) for k in (1, 2, 3, 4)]
    assert found["pass_at"] == pytest.approx(expected)
    different = [min(count, len(right)) for right, count in zip(solutions, wanted, strict=True)]
    assert found["distinct_correct"] == pytest.approx(sum(different) / 4)  # four are solved


def test_a_sweep_ends_with_its_budget_and_goes_on_where_it_was(
    sandbox, tmp_path: Path, capsys, monkeypatch
) -> None:
    # In threads: to start a process takes longer than all of these runs.
    monkeypatch.setattr(recipes, "ProcessPoolExecutor", lambda n, *_, **__: ThreadPoolExecutor(n))
    out = tmp_path / "new" / "runs.jsonl"
    words = ["--setting", "tiny", "--steps", "2", "--recipes", "ppo", "spo", "--seeds", "0"]
    words += ["--reference-seeds", "0", "--workers", "1", "--split", "test", "--out", str(out)]
    words += ["--cache", str(tmp_path)]
    main([*words, "--budget", "0"])
    text = capsys.readouterr().out  # the reference was made all the same
    assert text.endswith("no time for 2 runs: ppo r0 s0, spo r0 s0\n") and not out.exists()
    main([*words, "--recipes", "ppo"])
    first = read_records([out])
    main(words)
    assert "no time" not in capsys.readouterr().out
    records = read_records([out])
    assert records[:1] == first and [one["recipe"] for one in records] == ["ppo", "spo"]
    main([*words, "--budget", "0"])
    text = capsys.readouterr().out
    assert text.startswith("## tiny, test problems") and "| spo " in text.partition("paired")[2]
    assert read_records([out]) == records


def test_splits_share_no_specification_and_seeds_change_training_problems_only() -> None:
    small = replace(STANDARD, train_problems=60, evaluation_problems=30)
    found = {
        split: {problem.specification for problem in small.problems(split, 0)}
        for split in ("train", "development", "test")
    }
    assert not found["train"] & found["development"]
    assert not (found["train"] | found["development"]) & found["test"]

    def texts(split, seed):
        return [problem.description for problem in TINY.problems(split, seed)]

    assert texts("train", 0) == texts("train", 0) != texts("train", 1)
    assert texts("test", 0) == texts("test", 1)


def test_solutions_are_different_short_enough_and_mostly_in_the_first_style() -> None:
    """That they are correct is what the evaluation of them above says."""
    problems = STANDARD.problems("train", 0)[:100]
    found = STANDARD.solutions(problems)
    assert found == STANDARD.solutions(problems)
    assert all(1 <= len(group) == len(set(map(tuple, group))) <= 8 for group in found)
    programs = [program for group in found for program in group]
    assert max(map(len, programs)) <= STANDARD.max_program_tokens
    lambdas = sum("lambda v:" in [TOKENS[token] for token in program] for program in programs)
    assert 0 < lambdas / len(programs) < 0.5
    with pytest.raises(ValueError, match="must leave room for a solution"):
        replace(STANDARD, max_program_tokens=2).solutions(problems)


def test_a_reference_is_known_by_its_code_not_by_its_words() -> None:
    source = '"""Words."""\ndef f(x):\n    """Words."""\n    return x  # words\n'
    same = '"""Others."""\n\n\ndef f(x):\n    """Others."""\n    return (x)\n'
    assert code_only(source) == code_only(same) != code_only(source.replace("return x", "return 1"))
