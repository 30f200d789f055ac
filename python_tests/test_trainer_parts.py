"""Parts of the trainer by themselves: the feed, the producer, the reference, prompt values."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import Accelerator
from trainer_cases import fill, make_model, make_tokenizer
from trainer_process import settings

from spo_ext.rollout import Generation, Judgement
from spo_ext.rollout.values import PromptValues
from spo_ext.store import Origin, PromptValue, SampleShortfall, Trajectory, TrajectoryStore
from spo_ext.trainer import SPOConfig, feed, reference
from spo_ext.trainer.feed import Feed
from spo_ext.trainer.model import HeadSettings, answer_logprobs
from spo_ext.trainer.producer import Producer
from spo_ext.trainer.reference import Reference


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with TrajectoryStore(tmp_path / "store.db") as made:
        fill(made)
        yield made


class Writer:
    """Writes what it is told the number of: one completion, again and again, or another each."""

    def __init__(self, other_each_time: bool) -> None:
        self.other, self.asked = other_each_time, list[int]()

    def generate(self, prompts: Any, sampling: Any) -> list[list[Generation]]:
        found = []
        for prompt in prompts:
            self.asked.append(prompt.id)
            last = len(self.asked) if self.other else 0
            found.append([Generation((3, 4, k * self.other, last), "eos") for k in range(4)])
        return found


def make_producer(store: TrajectoryStore, folder: Path, writer: Writer, **changes: Any) -> Producer:
    config = SPOConfig(**settings(folder, **changes))
    reward = lambda prompts, texts, ids: [Judgement(0.0) for _ in ids]  # noqa: E731
    return Producer(
        config, store, writer, reward, lambda ids: "", Accelerator(cpu=True), replicated=False
    )


def test_versions_go_through_the_prompts(store: TrajectoryStore, tmp_path: Path) -> None:
    """8 prompts; 8 rows a step, 4 completions each: 2 prompts a step, 4 a version of 2 steps."""
    writer = Writer(other_each_time=True)
    producer = make_producer(store, tmp_path, writer, sync_every=2)
    producer.round(0)
    first = list(writer.asked)
    producer.round(1)
    assert len(first) == 4 and len(set(writer.asked)) == 8
    producer.round(1)  # a resumed run has it already
    assert len(writer.asked) == 8
    half = Writer(other_each_time=True)
    make_producer(store, tmp_path, half, mixture="half-online", run="half").round(0)
    assert len(half.asked) == 1
    again = Writer(other_each_time=True)
    make_producer(store, tmp_path, again, sync_every=4, replay_ratio=4.0, run="again").round(0)
    assert len(again.asked) == 2  # the four steps of the version learn from one batch
    last = Writer(other_each_time=True)
    changes = {"sync_every": 4, "max_steps": 5, "run": "last"}
    made = make_producer(store, tmp_path, last, **changes)
    made.round(0)
    made.round(1)
    assert len(last.asked) == 8 + 2  # one step is left for the second version


def test_more_rounds_end(store: TrajectoryStore, tmp_path: Path) -> None:
    writer = Writer(other_each_time=False)
    producer = make_producer(store, tmp_path, writer)
    producer.round(0)
    assert [producer.more(0) for _ in range(9)] == [True] * 8 + [False]
    assert len(writer.asked) == 2 * 9  # its own round and 8 more, each of 2 prompts
    assert producer.more(1)


def make_feed(store: TrajectoryStore, folder: Path, produce: Any = None, **changes: Any) -> Feed:
    model = make_model()
    answer_logprobs(model, HeadSettings())
    found = Reference.of_model(store, model, make_tokenizer(), 1.0, layout="padded")
    made = Feed(SPOConfig(**settings(folder, **changes)), store, found, None, "padded", produce)
    made.start(0, resume=False)
    return made


def add_online(store: TrajectoryStore, version: int, logprobs: list[float] | None) -> None:
    origin = Origin("policy", run="run", policy_version=version)
    for prompt in store.prompts("train"):
        rows = [
            Trajectory(prompt.id, [3 + k, 4], -k / 4, origin, "eos", behaviour_logprobs=logprobs)
            for k in range(4)
        ]
        store.append(rows)


def test_external_rollouts_are_waited_for(
    store: TrajectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "_POLL_SECONDS", 0.05)
    made = make_feed(store, tmp_path, rollouts="external", wait_seconds=0.2)
    looked_after = []
    monkeypatch.setattr(made, "_waiting", lambda: looked_after.append(1))
    with pytest.raises(SampleShortfall, match="waited 0.2 s for spo rollout to add some"):
        made.next_step(0)
    assert looked_after, "the server that the trajectories are waited from"
    add_online(store, 1, None)
    with pytest.raises(SampleShortfall):
        made.next_step(0)  # of a later version than the learner's
    assert made.next_step(1)[0]["store/age_versions"] == 0
    late = make_feed(store, tmp_path, rollouts="external", wait_seconds=60.0, run="late")
    origin = Origin("policy", run="late", policy_version=0)

    def later() -> None:
        time.sleep(0.3)
        with TrajectoryStore(tmp_path / "store.db") as other:
            for prompt in list(other.prompts("train"))[:2]:
                rows = [Trajectory(prompt.id, [k, 4], 0.0, origin, "eos") for k in range(4)]
                other.append(rows)

    thread = threading.Thread(target=later)
    thread.start()
    metrics, [part] = late.next_step(0)
    thread.join()
    assert metrics["store/offline_share"] == 0 and len(part.rewards) == 8


def test_offline_data_is_not_waited_for(store: TrajectoryStore, tmp_path: Path) -> None:
    made = make_feed(store, tmp_path, mixture="offline", rollouts="none", max_uses=1, max_steps=9)
    for _ in range(4):
        made.next_step(0)
    with pytest.raises(SampleShortfall, match="must hold enough for a batch of 8") as caught:
        made.next_step(0)
    assert "waited" not in str(caught.value)


def test_micro_batches_are_cut_between_groups(store: TrajectoryStore, tmp_path: Path) -> None:
    add_online(store, 0, [-0.5, -0.25])
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    made = make_feed(store, tmp_path, mixture="half-online", rollouts="external", **sizes)
    metrics, parts = made.next_step(0)
    assert len(parts) == 3
    rewards = torch.cat([part.rewards for part in parts])
    for part in parts:
        assert len(set(part.groups.tolist())) == 1 and len(part.rewards) == 4
        assert part.share == 1 / 12 and part.floor == float(rewards.min())
    sums = torch.cat([part.behaviour_sums for part in parts])
    online = round(12 * (1 - metrics["store/offline_share"]))
    assert int((sums == -0.75).sum()) == online and int(sums.isnan().sum()) == 12 - online
    assert float(rewards.min()) < float(rewards.max())


def test_scoring_is_cut_by_tokens(store: TrajectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    answer_logprobs(model, HeadSettings())
    found = Reference.of_model(
        store, model, make_tokenizer(), 1.0, layout="padded", batch_tokens=30
    )
    sizes: list[int] = []
    plain = reference.score_tokens

    def counted(model: Any, batch: Any) -> Any:
        sizes.append(int(batch.model_inputs["attention_mask"].sum()))
        return plain(model, batch)

    monkeypatch.setattr(reference, "score_tokens", counted)
    rows = list(store.trajectories())
    prompts = {prompt.id: prompt.token_ids for prompt in store.prompts("train")}
    found.logprobs(rows, prompts)
    # Nothing is predicted from the last token of a row.
    total = sum(len(prompts[row.prompt_id]) + len(row.token_ids) - 1 for row in rows)
    assert sum(sizes) == total and max(sizes) <= 30 and len(sizes) < len(rows) / 2
    read = found.scored_tokens
    assert read >= total
    found.logprobs(rows, prompts)
    assert sum(sizes) == total and found.scored_tokens == read  # from the store


def test_the_value_of_this_reference_comes_first(store: TrajectoryStore) -> None:
    rows = list(store.trajectories())
    first, second = (prompt.id for prompt in list(store.prompts("train"))[:2])
    store.put_q0({key: PromptValue(0.1, 4, 0.5, 1.0) for key in (first, second)})
    store.put_q0({first: PromptValue(0.7, 4, 0.5, 1.0, reference="mine")})
    store.put_q0({second: PromptValue(0.9, 4, 0.5, 1.0, reference="other")})
    values = PromptValues(
        store, beta=0.5, temperature=1.0, top_p=1.0, reference="mine", estimate=None
    )
    chosen = [next(row for row in rows if row.prompt_id == key) for key in (second, first)]
    assert values.of(chosen).tolist() == pytest.approx([0.1, 0.7])
