"""Tables of made-up runs, and of the records that docs/learning.md shows."""

import gzip
import json
from pathlib import Path

import pytest
from learning.tables import at_step, by_name, columns, difference, read_records, shown, tables

from spo_ext.evaluation.records import Estimate, estimate

ROOT = Path(__file__).parents[1]


def record(name, seed, final, start=0.1, steps=4, **changes):
    """A run whose pass@1 goes from `start` over .2 to `final`, pass@2 always .1 higher."""

    def point(passed):
        return {
            "pass_at": [passed, passed + 0.1],
            "distinct_correct": 2.0,
            "entropy": 5.0,
            "kl": 0.5,
        }

    return {
        "recipe": name, "setting": "tiny", "split": "test", "reference_seed": 0, "seed": seed,
        "steps": steps, "sampled": 100 * steps, "before": point(start), "after": point(final),
        "curve": [{"step": 2, "sampled": 200, **point(0.2)}], **changes,
    }  # fmt: skip


SPO = [record("spo", 0, 0.5), record("spo", 1, 0.3)]
PPO = [record("ppo", 0, 0.4), record("ppo", 1, 0.4)]


def passed(run):
    return columns([run])["pass@1"](run)


def test_means_and_paired_differences():
    found = estimate([passed(run) for run in SPO])
    assert (found.mean, found.low, found.high) == pytest.approx((0.4, 0.3, 0.5))
    paired = difference(SPO, PPO, passed)
    assert (paired.mean, paired.low, paired.high) == pytest.approx((0.0, -0.1, 0.1))
    alone = difference([record("sft", 0, 0.2)], PPO, passed)
    assert (alone.mean, alone.low) == (pytest.approx(-0.2), None), "one pair has no interval"
    assert difference([record("sft", 0, 0.2, start=0.15)], PPO, passed) is None, "another reference"
    assert difference(SPO, [record("other", 7, 1.0)], passed) is None
    assert shown(Estimate(-1e-9, -0.004, 0.3, 2)) == "0.000 [-0.004, 0.300]"
    assert shown(Estimate(0.4, 0.4, 0.4, 2), "+") == "+0.400", "no interval without a spread"


def test_a_table_has_a_row_for_each_recipe_and_length():
    short = [record("ppo", 0, 0.25, steps=2, curve=[])]
    old = record("", 0, 0.2, method="group-0.1")
    text = tables([*short, *PPO, *SPO, old], "ppo")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert lines[0] == [] and text.startswith("## tiny, test problems")
    assert lines[2][:5] == ["", "pairs", "sampled", "pass@1", "pass@2"]
    rows = {row[0]: row[1:] for row in lines if len(row) == 8}
    assert list(rows)[2:] == ["ppo@2", "ppo@4", "spo", "group-0.1"]
    assert rows["spo"] == ["2", "400", "0.400 [0.300, 0.500]", "0.500 [0.400, 0.600]", "2.000",
                           "0.500", "5.000"]  # fmt: skip
    differences = {row[0]: row[1:] for row in lines if len(row) == 7}
    assert list(differences)[0] == "paired, to ppo@4", "which has more pairs"
    assert differences["spo"][:2] == ["2", "+0.000 [-0.100, +0.100]"]
    assert differences["ppo@2"][:2] == ["1", "-0.150"]
    assert "paired" not in tables(SPO, "ppo")


def test_runs_as_they_were_on_the_way():
    found = at_step([*SPO, record("ppo", 0, 0.7, steps=2, curve=[])], 2)
    assert [passed(run) for run in found] == [0.2, 0.2, 0.7]
    assert [run["sampled"] for run in found] == [200, 200, 200]
    assert at_step(SPO, 3) == []


def test_files_are_read_packed_or_not(tmp_path):
    text = "".join(json.dumps(run) + "\n" for run in SPO)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert read_records([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]) == SPO + SPO


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("sft", "SFT"),
        ("sft-group", "**SFT, then SPO** (`sft-group`: the defaults of the trainer)"),
        ("sft-ppo", "SFT, then PPO"),
        ("expert", "expert iteration"),
    ],
)
def test_the_page_says_what_the_records_say(method, words):
    """Of one of its tables; pass@1, pass@10 and different correct programs with their intervals."""
    records = read_records([ROOT / "benchmarks/results/learning/test.jsonl.gz"])
    runs = by_name([run for run in records if run["setting"] == "standard"])[method]
    page = (ROOT / "docs/learning.md").read_text().replace("*", "")
    row = next(x for x in page.splitlines() if x.startswith(f"| {words.replace('*', '')} |"))
    said = [float(x) for x in row.replace("[", " ").replace("]", " ").replace(",", " ").split()
            if x.replace(".", "").isdigit()][-9:]  # fmt: skip
    names = ("pass@1", "pass@10", "distinct correct")
    found = [estimate([columns(runs)[name](run) for run in runs]) for name in names]
    assert len(runs) == 10
    for i, one in enumerate(found):
        mean, *bounds = said[3 * i : 3 * i + 3]
        unit = 0.01 if i == 2 else 0.001  # of the page's last digit
        assert mean == pytest.approx(one.mean, abs=0.51 * unit)
        # A bootstrap's bounds depend on the order of the runs too.
        assert bounds == pytest.approx([one.low, one.high], abs=2 * unit)
