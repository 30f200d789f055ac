"""Settings, offline data and methods by name."""

from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sqlalchemy")

from learning.judging import Grader
from learning.methods import method_named
from learning.offline import write_solutions
from learning.references import code_only
from learning.settings import SETTINGS, setting_named
from sandbox_cases import WHY_NOT

from spo_ext.contests.vocabulary import TOKENS
from spo_ext.sandbox import Sandbox

TINY = SETTINGS["tiny"]


def test_splits_share_no_specification_and_seeds_change_training_problems_only():
    for name in ("standard", "sparse"):
        small = replace(SETTINGS[name].config, train_problems=60, evaluation_problems=30)
        setting = replace(SETTINGS[name], config=small)
        found = {
            split: {p.specification for p in setting.problems(split, 0)}
            for split in ("train", "development", "test")
        }
        assert not found["train"] & found["development"]
        assert not (found["train"] | found["development"]) & found["test"]
        least, most = small.least_operations, small.most_operations
        sizes = {len(s.steps) for group in found.values() for s in group}
        assert sizes == set(range(least, most + 1))

    def texts(split, seed):
        return [problem.description for problem in TINY.problems(split, seed)]

    assert texts("train", 0) == texts("train", 0) != texts("train", 1)
    assert texts("test", 0) == texts("test", 1)


@pytest.mark.parametrize(("name", "known", "count"), [
    ("fresh", "standard", 960), ("fresh-few", "few", 640),
])  # fmt: skip
def test_fresh_problems_are_none_of_the_known_ones(name, known, count):
    before, fresh = (
        [problem.description for problem in SETTINGS[n].problems("test", 0)] for n in (known, name)
    )
    assert (len(before), len(set(fresh)), set(before) & set(fresh)) == (160, count, set())
    same = {"name": "", "about": "", "skipped_problems": 0, "evaluations": 4}
    config = replace(SETTINGS[name].config, evaluation_problems=160)
    assert replace(SETTINGS[name], config=config, **same) == replace(SETTINGS[known], **same)


@pytest.mark.skipif(WHY_NOT["bwrap"] is not None, reason="needs bubblewrap")
@pytest.mark.parametrize("style", ["diverse", "near"])
def test_offline_solutions_are_correct_different_and_short_enough(style):
    config = replace(SETTINGS["sparse"].config, train_problems=8)
    problems = replace(SETTINGS["sparse"], config=config).problems("train", 0)
    found = write_solutions(problems, style, 4, config.max_program_tokens, 0)
    with Sandbox(workers=1) as sandbox:
        pairs = [
            (problem, p) for problem, group in zip(problems, found, strict=True) for p in group
        ]
        asked, programs = zip(*pairs, strict=True)
        assert all(grade.correct for grade in Grader(sandbox).grade(asked, programs))
    assert all(1 <= len(p) == len(set(map(tuple, p))) <= 4 for p in found)
    assert max(map(len, programs)) <= config.max_program_tokens
    assert found == write_solutions(problems, style, 4, config.max_program_tokens, 0)


def test_diverse_solutions_use_all_styles_and_near_ones_mostly_the_first():
    problems = SETTINGS["standard"].problems("train", 0)[:100]
    share = {}
    for style in ("diverse", "near"):
        programs = [p for group in write_solutions(problems, style, 1, 36, seed=0) for p in group]
        share[style] = sum("lambda v:" in _text(program) for program in programs) / len(programs)
    assert share["diverse"] > 0.15 > share["near"] > 0.0


def _text(program):
    return " ".join(TOKENS[token] for token in program)


def test_methods_by_name_and_their_variations():
    found = method_named("group:beta=0.5,updates=4,taper=False,max_age=3,offline=near")
    assert (found.beta, found.updates, found.taper, found.max_age) == (0.5, 4, False, 3)
    assert (found.offline, found.family) == ("near", "spo")
    assert setting_named("stale-7").sync_every == 7
    for text, words in {
        "nothing": "method must be one of",
        "group:colour=red": "must change one of",
        "group:updates=many": "updates must be a int",
        "group:updates=0": "updates must be at least 1",
        "group:offline_share=0.5": "offline must be diverse, near or own",
        "group:baseline=smoothed": "baseline must be group",
        "sft:offline_share=0.5": "offline_share must be 1 for sft",
        "group:offline=near,offline_share=1": "baseline must be reference or smoothed",
    }.items():
        with pytest.raises(ValueError, match=words):
            method_named(text)
    with pytest.raises(ValueError, match="setting must be one of"):
        setting_named("stale-0")


def test_a_reference_is_known_by_its_code_not_by_its_words():
    source = '"""Words."""\ndef f(x):\n    """Words."""\n    return x  # words\n'
    same = '"""Others."""\n\n\ndef f(x):\n    """Others."""\n    return (x)\n'
    assert code_only(source) == code_only(same) != code_only(source.replace("return x", "return 1"))
