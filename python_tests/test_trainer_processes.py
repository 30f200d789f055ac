"""Two processes (gloo, CPU) learn what one learns: DDP, FSDP2, with online rollouts and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from conftest import relative_error
from processes import free_port
from trainer_cases import fill, make_model, make_tokenizer
from trainer_process import settings, spawn

from spo_ext.store import Origin, PromptValue, Trajectory, TrajectoryStore
from spo_ext.trainer.model import HeadSettings, answer_logprobs
from spo_ext.trainer.reference import Reference

OFFLINE = {"mixture": "offline", "rollouts": "none", "objective": "squared", "group_size": 1}
SHORT = 7  # prompt + completion of the right answers alone
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"],
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
    },
}


def make_folder(path: Path) -> Path:
    path.mkdir()
    with TrajectoryStore(path / "store.db") as store:
        fill(store)
        store.put_q0({p.id: PromptValue(0.3, 4, 0.5, 1.0) for p in store.prompts("train")})
    return path


def run(folder: Path, processes: int, **options: Any) -> dict[str, Any]:
    """What the first rank ends with."""
    port = free_port()
    out = folder / "end.pt"
    started = []
    for rank in range(processes):
        environment = {"ACCELERATE_USE_CPU": "true"}
        if processes > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        started.append(spawn(settings(folder, out=str(out), **options), environment))
    assert [process.wait(600) for process in started] == [0] * processes
    return dict(torch.load(out))


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for line, other in zip(found["log"], expected["log"], strict=True):
        # Adam divides by the gradient's size, so that the rounding of a small one moves a weight.
        first = line is found["log"][0]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6 if first else 1e-4)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert line.keys() == other.keys()
        for name in {"spo/residual", "kl", "entropy", "store/reward", "store/length"} & set(other):
            assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    for name, weight in expected["weights"].items():
        assert relative_error(found["weights"][name], weight) < 1e-3, name


@pytest.mark.parametrize("sharding", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_learn_what_one_learns(tmp_path: Path, sharding: dict[str, Any]) -> None:
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    alone = run_alone(tmp_path, **OFFLINE)
    found = run(make_folder(tmp_path / "a"), 2, **OFFLINE, **sizes, **sharding)
    assert found["sharded"] if sharding else found["wrapped"] == "DistributedDataParallel"
    check_same(found, alone)


ALONE: dict[str, dict[str, Any]] = {}


def run_alone(folder: Path, **options: Any) -> dict[str, Any]:
    """What one process ends with, which the tests of DDP and of FSDP2 compare with."""
    key = str(options)
    if key not in ALONE:
        ALONE[key] = run(make_folder(folder / "alone"), 1, **options)
    return ALONE[key]


@pytest.mark.parametrize("sharding", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_a_rank_whose_sequences_are_all_too_long(tmp_path: Path, sharding: dict[str, Any]) -> None:
    """Only the short half of one rank counts, and the other computes along for nothing."""
    short = {**OFFLINE, "max_tokens": SHORT}
    expected = run_alone(tmp_path, **short)
    found = run(make_folder(tmp_path / "b"), 2, **short, **sharding, per_device_train_batch_size=4)
    kept = kept_by_rank(tmp_path / "b", 4)
    assert [0] in [sorted(counts)[:1] for counts in kept]
    check_same(found, expected)
    too_long = [8.0 - sum(counts) for counts in kept]
    for log in (found["log"], expected["log"]):
        assert [line["store/too_long"] for line in log] == too_long


def kept_by_rank(folder: Path, size: int) -> list[list[int]]:
    """How many of its sequences each rank had to learn from, in every step."""
    import sqlalchemy as sa

    from spo_ext.store import schema

    counts: dict[int, list[int]] = {}
    with TrajectoryStore(folder / "store.db") as store, store.database.read() as connection:
        table = schema.draws.c
        for draw in connection.execute(sa.select(table.step, table.slot, table.trajectory_id)):
            [row] = store.get([draw.trajectory_id])
            [prompt] = store.get_prompts([row.prompt_id])
            fits = len(prompt.token_ids or ()) + len(row.token_ids) <= SHORT
            counts.setdefault(draw.step, [0, 0])[draw.slot // size] += fits
    return [counts[step] for step in sorted(counts)]


@pytest.mark.parametrize("sharding", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_mixed_precision_is_that_of_the_reference(tmp_path: Path, sharding: dict[str, Any]) -> None:
    """FSDP2 rounds the policy's weights too; its log-probabilities keep all their digits."""
    sizes = {"per_device_train_batch_size": 4, "max_steps": 2}
    found = run(make_folder(tmp_path / "a"), 2, **OFFLINE, **sharding, **sizes, bf16=True)
    first, second = found["log"]
    assert (first["spo/log_ratio"], first["kl"]) == (0.0, 0.0)
    assert second["kl"] > 0
    with TrajectoryStore(tmp_path / "a" / "store.db") as store:
        [fingerprint] = store.reference_fingerprints()
        assert fingerprint.startswith("bf16-")
        rows = [row.id for row in store.trajectories()]
        logprobs = [lp for lp in store.ref_logprobs(rows, fingerprint) if lp is not None]
    assert any(not torch.equal(lp, lp.bfloat16().float()) for lp in logprobs)


@pytest.mark.parametrize("sharding", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_online(tmp_path: Path, sharding: dict[str, Any]) -> None:
    """Both ranks roll out, publish and draw; the policies that are published can be loaded."""
    from transformers import AutoModelForCausalLM

    options = {"per_device_train_batch_size": 4, "sync_every": 2, "publish_to": f"{tmp_path}/p"}
    found = run(make_folder(tmp_path / "a"), 2, **options, **sharding)
    assert [line["step"] for line in found["log"]] == [1, 2, 3, 4]
    with TrajectoryStore(tmp_path / "a" / "store.db") as store:
        rows = list(store.trajectories(run="run"))
        counters = store.counters()
    assert {row.origin.policy_version for row in rows} == {0, 1}
    # 2 versions of 16 completions, each stored or a duplicate, none by both ranks.
    assert len(rows) + counters["duplicates"] == 32
    AutoModelForCausalLM.from_pretrained(tmp_path / "p" / "version-0000001")


@pytest.mark.parametrize("sharding", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_adapters_with_ranks_that_need_unlike_work(
    tmp_path: Path, sharding: dict[str, Any]
) -> None:
    """Half of the prompts are scored already, so that a rank may have nothing to score in a step;
    and the values of prompts come from the base, which the ranks hold in parts."""
    options = {**OFFLINE, "model": "adapters", "reference": "adapter"}
    options |= {"group_size": 4, "q0_samples": 2, "beta": 0.25}
    ends = []
    for processes, extra in ((1, {}), (2, {"per_device_train_batch_size": 4, **sharding})):
        folder = make_folder(tmp_path / str(processes))
        score_half(folder)
        ends.append(run(folder, processes, **options, **extra))
        with TrajectoryStore(folder / "store.db") as store:
            prompts = [prompt.id for prompt in store.prompts("train")]
            [reference] = store.reference_fingerprints()
            found = store.q0(prompts, beta=0.25, temperature=1.0, reference=reference)
            values = [value for value in found if value is not None]
            assert len(values) == 8 and all(value.n == 2 for value in values)
    check_same(ends[1], ends[0])


def score_half(folder: Path) -> None:
    """The first prompts' trajectories, by the base of the adapters."""
    model = make_model()
    with TrajectoryStore(folder / "store.db") as store:
        answer_logprobs(model, HeadSettings())
        reference = Reference.of_model(store, model, make_tokenizer(), 1.0, layout="padded")
        prompts = {prompt.id: prompt.token_ids for prompt in store.prompts("train")}
        rows = list(store.trajectories())
        reference.score(rows[: len(rows) // 2], prompts)


def test_mixed_groups_of_several_sizes(tmp_path: Path) -> None:
    """Each rank has whole groups, as many as the other, if not as many rows."""
    options = {"mixture": "half-online", "mixed_groups": True, "rollouts": "external"}
    ends = []
    for processes, rows in ((1, 16), (2, 8)):
        folder = make_folder(tmp_path / str(processes))
        add_online(folder)
        ends.append(run(folder, processes, **options, per_device_train_batch_size=rows))
    check_same(ends[1], ends[0])
    short = [line["store/shortfall"] for line in ends[0]["log"]]
    assert sum(short) == 8 * 2  # half of the prompts have nothing of others


def add_online(folder: Path) -> None:
    """Two rows by the policy for each prompt, and for as many prompts that nobody solved."""
    online = Origin("policy", run="run", policy_version=0)
    with TrajectoryStore(folder / "store.db") as store:
        for prompt in list(store.prompts("train")):
            other = replace(prompt, content=f"{prompt.content} ")
            for key in (prompt.id, store.add_prompt(other)):
                made = [([5 + key % 7, 4], 0.0), ([3 + key % 9, 6, 1], 1.0)]
                store.append([Trajectory(key, ids, reward, online, "eos") for ids, reward in made])
