"""The cost of updates: what is measured is what it says, and shares are of the right numbers."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from learning import cost
from learning.cost_cases import (
    CASES,
    SIZES,
    held_bytes,
    make_policy,
    make_rows,
    make_updater,
)

from spo_ext.trainer.model import completion_logprobs

LEAST, SMALL = SIZES["least"], SIZES["small"]


def test_both_heads_compute_the_same():
    grads = []
    for head in ("fused", "logits"):
        policy = make_policy(SMALL, head)
        rows = make_rows(SMALL, policy)
        logprobs, _ = completion_logprobs(policy, rows.tokens)
        assert logprobs.shape == (int(rows.tokens.cu_seqlens[-1]),)
        weights = torch.linspace(-1, 1, len(logprobs))
        (logprobs * weights).sum().backward()
        grads.append((logprobs.detach(), policy.lm_head.weight.grad, rows.ref_logprobs))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_rows_are_those_of_the_size():
    rows = make_rows(SMALL, make_policy(SMALL, "fused"))
    lengths = rows.tokens.cu_seqlens.diff()
    assert len(lengths) == SMALL.rows and {int(lengths.min()), int(lengths.max())} == {6, 12}
    assert rows.tokens.model_inputs["input_ids"].shape == (16, 4 + 12 - 1)
    assert set(rows.rewards.tolist()) == {0.0, -1.0} and rows.groups.tolist() == [0] * 8 + [1] * 8


@pytest.mark.parametrize("name", CASES)
def test_held_bytes_are_weights_gradients_and_moments(name):
    policy = make_policy(LEAST, CASES[name].head)
    rows, updater = make_rows(LEAST, policy), make_updater(CASES[name], policy)
    before = policy.lm_head.weight.detach().clone()
    updater.update(rows, 1)
    assert not torch.equal(policy.lm_head.weight, before)
    sizes = [p.numel() for p in policy.parameters()]
    if CASES[name].method == "ppo":  # a value network: the body again, and a head of one number
        sizes += [p.numel() for p in policy.model.parameters()] + [LEAST.hidden, 1]
    expected = 4 * 4 * sum(sizes) + 4 * len(sizes)  # AdamW also counts its steps
    assert held_bytes(updater) == expected


def test_memory_of_a_process_holds_what_an_update_holds():
    spo = cost.memory_apart("small", "SPO")
    ppo = cost.memory_apart("small", "PPO, logits")
    for found in (spo, ppo):  # pages are whole, and a little of the heap is reused
        assert found["held_mib"] - 1 < found["peak_mib"] < 3 * found["held_mib"] + 40
    logits = SMALL.rows * SMALL.longest * SMALL.vocabulary * 4 / 2**20
    more = ppo["held_mib"] - spo["held_mib"] + logits
    assert ppo["peak_mib"] - spo["peak_mib"] > 0.8 * more


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(cost.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="SPO at size small failed"):
        cost.memory_apart("small", "SPO")


def test_every_case_is_timed_in_every_round():
    found = cost.times("least", 2)
    assert list(found) == list(CASES)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in found.values())


def test_shares_are_of_spo_over_the_other(monkeypatch, tmp_path, capsys):
    memory = {name: {"peak_mib": 10.0 * i, "held_mib": 4.0 * i} for i, name in enumerate(CASES, 1)}
    seconds = {name: [1.0, 3.0, 6.0 * i] for i, name in enumerate(CASES, 1)}
    monkeypatch.setattr(cost, "memory_apart", lambda size, name: dict(memory[name]))
    monkeypatch.setattr(cost, "times", lambda size, rounds: seconds)
    monkeypatch.setattr(cost.machine, "report", lambda: {"commit": "abc"})
    assert cost.main(["--sizes", "small", "--out", str(tmp_path / "a" / "cost.json")]) == 0
    result = json.loads((tmp_path / "a" / "cost.json").read_text())
    small = result["sizes"]["small"]
    ppo = small["cases"]["PPO"]
    assert small["machine"] == {"commit": "abc"} and small["vocabulary"] == 4096
    assert ppo["spo_share_of_peak_mib"] == pytest.approx(1 / 3)
    assert ppo["spo_share_of_held_mib"] == pytest.approx(1 / 3)
    assert ppo["spo_share_of_seconds"] == 1.0 and ppo["seconds"] == [1.0, 3.0, 18.0]
    assert cost.main(["--sizes", "least", "--out", str(tmp_path / "a" / "cost.json")]) == 0
    again = json.loads((tmp_path / "a" / "cost.json").read_text())["sizes"]
    assert again.keys() == {"small", "least"} and again["small"] == small
    printed = capsys.readouterr().out
    assert "| PPO | 30.0 | 12.0 | 3 | 0.33 | 0.33 | 1.00 |" in printed
    assert "SPO's peak is 0.33 of PPO's" in printed


def test_rounds_must_be_a_number_of_rounds(capsys):
    with pytest.raises(SystemExit):
        cost.main(["--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
