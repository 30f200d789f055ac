"""Groups of online rows and rows of others: what is drawn, and the baseline that they share."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from store_cases import add_prompts, policy, trajectory

from spo_ext.store import Origin, Sampler, SamplerConfig, SampleShortfall, TrajectoryStore

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_cases import fill, make_model, make_tokenizer
from trainer_process import settings

from spo_ext.eager import loss as reference_loss
from spo_ext.trainer import SPOConfig, SPOTrainer
from spo_ext.trainer.batches import TokenBatch
from spo_ext.trainer.feed import MicroBatch
from spo_ext.trainer.weights import group_baseline, sequence_weights

HUMAN = Origin("human")
MIXED: dict[str, Any] = {"mixture": "half-online", "mixed_groups": True, "group_size": 4}


def write(store: TrajectoryStore, origin: Origin, prompts: list[int], each: int) -> None:
    rows = [(prompt, i) for prompt in prompts for i in range(each)]
    store.append([trajectory(prompt, 100 * prompt + i, origin) for prompt, i in rows])


def sampler(store: TrajectoryStore, batch_size: int, **options: Any) -> Sampler:
    return Sampler(store, "learner", SamplerConfig(batch_size, run="run", **(MIXED | options)))


def test_rows_of_others_join_the_prompts_of_online_ones(store: TrajectoryStore) -> None:
    prompts = add_prompts(store, 6)
    write(store, policy(0), prompts[:3], 2)
    write(store, HUMAN, prompts, 5)
    batch = sampler(store, 12).next_batch(policy_version=0)
    kinds = [(row.prompt_id, row.origin.kind) for row in batch.trajectories]
    both = {(prompt, kind) for prompt in prompts[:3] for kind in ("human", "policy")}
    assert Counter(kinds) == dict.fromkeys(both, 2)
    # A group lies together, so that it is never cut between micro-batches.
    assert batch.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_the_rows_that_join_are_those_drawn_least(store: TrajectoryStore) -> None:
    prompts = add_prompts(store, 2)
    write(store, HUMAN, prompts, 5)
    draw, counts = sampler(store, 8), Counter[int]()
    for version in range(10):
        write(store, policy(version), prompts, 2)
        rows = draw.next_batch(policy_version=version).trajectories
        counts.update(row.id for row in rows if row.origin.kind == "human")
        assert max(counts.values()) - min(counts.values()) <= 1
    assert list(counts.values()) == [4] * 10  # 20 draws for 5 rows of each prompt


def test_a_prompt_that_nobody_solved_makes_a_smaller_group(store: TrajectoryStore) -> None:
    prompts = add_prompts(store, 3)
    write(store, policy(0), prompts, 2)
    write(store, HUMAN, prompts[:1], 5)
    write(store, HUMAN, prompts[1:2], 1)
    batch = sampler(store, 12).next_batch(policy_version=0)
    kinds = Counter((row.prompt_id, row.origin.kind) for row in batch.trajectories)
    human = {(prompts[0], "human"): 2, (prompts[1], "human"): 1}
    assert kinds == {(prompt, "policy"): 2 for prompt in prompts} | human
    assert batch.shortfall == {"offline": (6, 3)}
    assert batch.metrics()["store/shortfall"] == 3.0


def test_a_pool_that_lacks_all_is_an_error(store: TrajectoryStore) -> None:
    prompts = add_prompts(store, 3)
    write(store, policy(0), prompts, 2)
    draw = sampler(store, 12)
    with pytest.raises(
        SampleShortfall, match=r"'offline': \(6, 0\).* mixed, .*'online': 2"
    ) as none:
        draw.next_batch(policy_version=0)
    assert none.value.pools == ("offline",)
    write(store, HUMAN, prompts[:1], 2)
    assert draw.next_batch(policy_version=0).step == 0
    with pytest.raises(SampleShortfall, match=r"'online': \(8, 6\)") as few:
        Sampler(store, "four", replace(draw.config, batch_size=16)).next_batch(policy_version=0)
    assert few.value.pools == ("online",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixture": "online"}, "mixture must be of online and others with mixed_groups"),
        ({"mixture": "offline"}, "mixture must be of online and others with mixed_groups"),
        ({"group_size": 3, "batch_size": 3}, r".*whole number of rows of a mixed group of 3, got"),
        ({"group_size": 1}, r"mixture\['offline'\] must be a whole number of rows"),
        ({"on_shortfall": "fill"}, "on_shortfall must be raise with mixed_groups, got 'fill'"),
    ],
)
def test_what_makes_no_mixed_groups_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"SamplerConfig: {words}"):
        SamplerConfig(**({"batch_size": 4, "run": "run"} | MIXED | options))


def test_a_sampler_stays_mixed_or_not(store: TrajectoryStore) -> None:
    prompts = add_prompts(store, 2)
    write(store, HUMAN, prompts, 4)
    write(store, policy(0), prompts, 4)
    plain = SamplerConfig(8, "half-online", "run", group_size=4)
    assert "mixed_groups" not in plain.as_json()  # as older versions stored it
    Sampler(store, "plain", plain).next_batch(policy_version=0)
    sampler(store, 8).next_batch(policy_version=0)
    Sampler(store, "plain", plain, resume=True)
    for name, other in (("plain", replace(plain, mixed_groups=True)), ("learner", plain)):
        with pytest.raises(ValueError, match=f"mixed_groups must be .* as when '{name}' drew"):
            Sampler(store, name, other, resume=True)


SIZES = [2, 1, 3, 2, 1, 2]
GROUPS = torch.tensor([7, 7, 7, 3, 3, 3])
REWARDS = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
ONLINE = torch.tensor([True, True, False, True, False, False])


def micro_batch(online: torch.Tensor) -> tuple[torch.Tensor, MicroBatch]:
    """Log-probabilities of the policy [11], and six rows in two groups."""
    torch.manual_seed(5)
    logprobs, ref = -torch.rand(11), -torch.rand(11)
    split = torch.tensor([0, *SIZES]).cumsum(0)
    tokens = TokenBatch({}, torch.arange(11), torch.zeros(11, dtype=torch.int64), split)
    unknown = torch.full((11,), torch.nan)
    cut = torch.zeros(6, dtype=torch.bool)
    turns = torch.ones(6, dtype=torch.int64)
    rows = (split, ref, REWARDS, None, turns, GROUPS)
    batch = MicroBatch(tokens, *rows, None, unknown, online, online, cut, 0.0, 1.0)
    return logprobs, batch


@pytest.mark.parametrize("online", [ONLINE, ONLINE & (GROUPS == 7)])
def test_the_baseline_is_the_mean_over_online_rows(tmp_path: Path, online: torch.Tensor) -> None:
    config = SPOConfig(**settings(tmp_path, **MIXED, beta=0.3))
    logprobs, batch = micro_batch(online)
    ratios = torch.stack([p.sum() for p in (logprobs - batch.ref_logprobs).double().split(SIZES)])
    gain = REWARDS.double() - 0.3 * ratios
    first = gain[:2].mean()
    second = gain[3] if online[3] else gain[3:].mean()  # where all online rows were too long
    found = group_baseline(config, logprobs, batch.ref_logprobs, batch)
    expected = torch.stack([first] * 3 + [second] * 3).float()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_rarity_looks_at_online_rows(tmp_path: Path) -> None:
    config = SPOConfig(**settings(tmp_path, **MIXED, rarity=2.0, taper=False))
    logprobs, batch = micro_batch(ONLINE)
    weights = sequence_weights(config, logprobs, REWARDS, batch)
    assert weights is not None and weights.tolist() == [0.25] * 3 + [1.0] * 3


def test_baselines_do_not_mix_with_leave_one_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave_one_out must be False with mixed_groups, got True"):
        SPOConfig(**settings(tmp_path, **MIXED, leave_one_out=True))


@pytest.fixture
def filled(tmp_path: Path) -> Any:
    with TrajectoryStore(tmp_path / "store.db") as made:
        fill(made)
        yield made


class Watched(SPOTrainer):
    """Keeps each micro-batch with its loss."""

    seen: list[tuple[MicroBatch, torch.Tensor, float]]

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *rest, **options)
        batch = inputs["micro_batch"]
        with torch.no_grad():
            logits = (
                model(**batch.tokens.inputs_on(torch.device("cpu"))).logits.double().flatten(0, 1)
            )
        logprobs = logits[batch.tokens.index].log_softmax(-1)
        taken = logprobs.gather(1, batch.tokens.targets[:, None])[:, 0]
        self.seen.append((batch, taken, float(loss.detach())))
        return loss


def test_the_trainer_learns_from_mixed_groups(filled: TrajectoryStore, tmp_path: Path) -> None:
    """Every loss is (Q_T - r)^2 by the reference implementation in float64."""
    options = {"num_generations": 2, "taper": False, "beta": 0.2, "learning_rate": 3e-3}
    config = SPOConfig(**settings(tmp_path, **MIXED, **options))
    trainer = Watched(make_model(), config, make_tokenizer())
    trainer.seen = []
    trainer.train()
    assert len(trainer.seen) == 4
    for batch, logprobs, loss in trainer.seen:
        assert batch.online.reshape(2, 4).sum(1).tolist() == [2, 2]
        sizes = batch.tokens.cu_seqlens.diff().tolist()
        ratios = torch.stack([p.sum() for p in (logprobs - batch.ref_logprobs).split(sizes)])
        gain = batch.rewards.double() - 0.2 * ratios
        q0 = [gain[(batch.groups == g) & batch.online].mean() for g in batch.groups]
        expected = reference_loss(
            logprobs,
            batch.ref_logprobs.double(),
            batch.rewards.double(),
            torch.stack(q0),
            beta=0.2,
            objective="squared",
            cu_seqlens=batch.tokens.cu_seqlens,
        )
        assert loss == pytest.approx(float(expected.mean()), rel=1e-4)
    assert trainer.seen[3][1].sub(trainer.seen[3][0].ref_logprobs).abs().max() > 1e-3
    assert sum(1 for _ in filled.trajectories(run="run")) == 4 * 4  # two of two prompts a step


@pytest.mark.parametrize("parts", [1, 2])
def test_groups_of_several_sizes(filled: TrajectoryStore, tmp_path: Path, parts: int) -> None:
    """A micro-batch has whole groups, and the loss is the mean over all rows of the step."""
    for prompt in list(filled.prompts("train")):
        filled.add_prompt(replace(prompt, content=f"{prompt.content} "))  # nobody solved these
    options = {"num_generations": 2, "per_device_train_batch_size": 16 // parts}
    config = SPOConfig(
        **settings(tmp_path, **MIXED, **options, gradient_accumulation_steps=parts, max_steps=4)
    )
    trainer = Watched(make_model(), config, make_tokenizer())
    trainer.seen = []
    trainer.train()
    sizes = Counter[int]()
    for first in range(0, 4 * parts, parts):
        step = [batch for batch, _, _ in trainer.seen[first : first + parts]]
        rows = sum(len(batch.rewards) for batch in step)
        assert [batch.share for batch in step] == [1 / rows] * parts
        groups = [batch.groups.unique(return_counts=True) for batch in step]
        assert [len(ids) for ids, _ in groups] == [4 // parts] * parts
        sizes.update(int(count) for _, counts in groups for count in counts)
    assert sizes.keys() == {2, 4} and sizes.total() == 16
