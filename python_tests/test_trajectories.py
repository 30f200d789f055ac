"""Trajectories of several turns: what the store keeps, and that they are learned rightly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from store_cases import policy
from test_store_schema import back_to
from trainer_cases import VOCABULARY, make_model, make_tokenizer
from trainer_process import settings

from spo_ext.store import Origin, Prompt, Trajectory, TrajectoryStore
from spo_ext.trainer import SPOConfig, SPOTrainer
from spo_ext.trainer.batches import Tokens, collate, tokens_of
from spo_ext.trainer.model import HeadSettings, answer_logprobs, completion_logprobs

HUMAN = Origin("human")
PROMPT = (2, 5, 6, 7)
# The policy, a tool, the policy, a user; then a template that writes all of that anew.
IDS = (8, 9, 1, 10, 11, 12, 5, 1, 13, 6, 7, 1)
MASK = (True,) * 3 + (False,) * 3 + (True,) * 2 + (False,) + (True,) * 3
CONTEXTS = {9: (2, 5, 6, 7, 5, 13)}
PAID = (0, 0, 0.25, 0, 0, -0.5, 0, 0.125, 0, 0, 0, 0)
TURNS: dict[str, Any] = {"completion_mask": MASK, "contexts": CONTEXTS, "token_rewards": PAID}


def several(prompt_id: int, reward: float = 1.0, origin: Origin = HUMAN, **how: Any) -> Trajectory:
    return Trajectory(prompt_id, IDS, reward, origin, "eos", **{**TURNS, **how})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"completion_mask": (True,) * 3}, r"completion_mask must be \[12\], one for each token"),
        (
            {"completion_mask": (False,) * 12},
            "completion_mask must be .* with at least one of the policy's",
        ),
        ({"completion_mask": (2,) * 12}, "completion_mask must be true or false for each token"),
        ({"contexts": {0: (2,)}}, "contexts must be by places from 1 to 11, got 0"),
        ({"contexts": {12: (2,)}}, "contexts must be by places from 1 to 11, got 12"),
        ({"contexts": {3: ()}}, r"contexts\[3\] must be at least one token"),
        ({"contexts": {3: (-1,)}}, r"contexts\[3\]"),
        ({"contexts": [(3, (2,))]}, "contexts must be token ids by the place"),
        ({"token_rewards": (0.0,) * 3}, r"token_rewards must be \[12\], one per token, got \[3\]"),
        ({"token_rewards": (float("nan"),) * 12}, "token_rewards must be finite"),
        (
            {"completion_mask": (False, True) * 6, "token_rewards": (1.0,) + (0.0,) * 11},
            "token_rewards must be 0 before the policy's first token",
        ),
        ({"info": {1: 2}}, "info must be JSON"),
    ],
)
def test_turns_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Trajectory: .*{message}"):
        several(1, **fields)


def test_what_says_nothing_is_left_out() -> None:
    plain = several(1, completion_mask=[True] * 12, contexts={}, token_rewards=[0.0] * 12)
    assert (plain.completion_mask, plain.contexts, plain.token_rewards) == (None, None, None)
    assert (plain.num_policy_tokens, plain.num_turns) == (12, 1)


def test_turns_are_kept_as_they_came(store: TrajectoryStore) -> None:
    key = store.add_prompt(Prompt("a", PROMPT))
    given = several(key, behaviour_logprobs=[-1.0] * 12, info={"tools": ["search"]})
    others = [several(key, **{name: None}) for name in ("completion_mask", "contexts")]
    appended = store.append([given, *others])
    assert appended.new == 3, "who wrote what, and what was read, tell trajectories apart"
    assert store.append([several(key, token_rewards=None, info=None)]).duplicates == 1
    [got] = store.get(appended.ids[:1])
    assert (got.token_ids, got.completion_mask, got.contexts) == (IDS, MASK, CONTEXTS)
    assert torch.as_tensor(got.token_rewards).tolist() == list(PAID)
    assert got.info == {"tools": ["search"]}
    assert torch.as_tensor(got.behaviour_logprobs).tolist() == [-float(one) for one in MASK]
    assert (got.num_policy_tokens, got.num_turns, got.total_reward) == (8, 3, 0.875)
    with pytest.raises(ValueError, match=r"must be \[8\], one per token"):
        store.put_ref_logprobs("frozen", {got.id: torch.zeros(12)})
    store.put_ref_logprobs("frozen", {got.id: torch.zeros(8)})


def test_a_store_of_version_5_is_migrated_with_its_rows(store_target: str) -> None:
    with TrajectoryStore(store_target) as store:
        key = store.add_prompt(Prompt("a", PROMPT))
        store.append([Trajectory(key, IDS, 1.0, policy(), "eos")])
    back_to(5, store_target)
    with TrajectoryStore(store_target) as store:
        assert store.append([Trajectory(key, IDS, 1.0, policy(), "eos")]).duplicates == 1
        assert store.append([several(key, origin=policy())]).new == 1
        plain, turns = store.trajectories()
        assert (plain.completion_mask, plain.contexts, plain.info) == (None, None, None)
        assert turns.contexts == CONTEXTS


def filled(folder: Path) -> list[Trajectory]:
    """Two prompts with four trajectories each, of all kinds."""
    made = []
    with TrajectoryStore(folder / "store.db") as store:
        for i in range(2):
            key = store.add_prompt(Prompt(f"a{i}", [*PROMPT, 3 + i]))
            rows = [
                several(key, 1.0),
                several(key, 0.0, contexts=None),
                several(key, -1.0, completion_mask=None),
                Trajectory(key, IDS[: 4 + i], 0.5, HUMAN, "eos"),
            ]
            store.append(rows)
            made += rows
    return made


def logprobs_by_turn(model: Any, trajectory: Trajectory, prompt: tuple[int, ...]) -> torch.Tensor:
    """Of the policy's tokens, one context after the other, by plain PyTorch."""
    found, context = [], list(prompt)
    mask, contexts = trajectory.completion_mask, trajectory.contexts or {}
    for place, token in enumerate(trajectory.token_ids):
        context = list(contexts.get(place, context))
        if mask is None or mask[place]:
            logits = model(input_ids=torch.tensor([context])).logits[0, -1]
            found.append(logits.double().log_softmax(-1)[token])
        context.append(token)
    return torch.stack(found)


@pytest.mark.parametrize("packing", ["padded", "packed", "shared"])
@pytest.mark.parametrize("objective", ["group", "squared"])
def test_the_loss_is_that_of_a_loop_over_turns(
    tmp_path: Path, objective: str, packing: str
) -> None:
    """And so is its gradient; process rewards and turns that were rendered anew are among them."""
    made = filled(tmp_path)
    beta, q0 = 0.5, 0.3
    given = settings(
        tmp_path,
        mixture="offline",
        rollouts="none",
        objective=objective,
        beta=beta,
        packing=packing,
        group_size=4,
        per_device_train_batch_size=8,
        max_steps=1,
        taper=False,
    )
    if objective == "squared":
        given |= {"q0_samples": 0}
        with TrajectoryStore(tmp_path / "store.db") as store:
            from spo_ext.store import PromptValue

            store.put_q0({one.id: PromptValue(q0, 4, beta, 1.0) for one in store.prompts()})
    model = make_model()
    plain, reference = make_model(), make_model()
    trainer = SPOTrainer(model, SPOConfig(**given), make_tokenizer())
    torch.manual_seed(3)
    for parameter, copied in zip(model.parameters(), plain.parameters(), strict=True):
        with torch.no_grad():
            parameter += 0.02 * torch.randn_like(parameter)
            copied.copy_(parameter)
    trainer._feed.start(0, resume=False)
    metrics, [batch] = trainer._feed.next_step(0)
    assert batch.turns.sum() == 2 * (3 + 3 + 2 + 1)
    loss = trainer.compute_loss(trainer.model, {"micro_batch": batch})
    loss.backward()

    ratios, returns = [], []
    for i, row in enumerate(made):
        prompt = (*PROMPT, 3 + i // 4)
        now = logprobs_by_turn(plain, row, prompt).sum()
        ratios.append(now - logprobs_by_turn(reference, row, prompt).sum().detach())
        returns.append(row.total_reward)
    gains = beta * torch.stack(ratios).reshape(2, 4) - torch.tensor(returns).reshape(2, 4)
    start = -gains.detach().mean(1, keepdim=True) if objective == "group" else q0
    expected = (start + gains).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    expected.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("layout", ["padded", "rows", "shared"])
def test_tokens_of_others_have_no_gradient_and_no_row_of_the_head(layout: Any) -> None:
    model = make_model()
    answer_logprobs(model, HeadSettings())
    states = []
    model.model.norm.register_forward_hook(lambda *given: states.append(given[2]))
    batch = collate(tokens_of(several(1, contexts=None), PROMPT), layout)
    logprobs, _ = completion_logprobs(model, batch)
    assert len(logprobs) == sum(MASK)
    states[0].retain_grad()
    logprobs.sum().backward()
    moved = states[0].grad.flatten(0, 1).abs().sum(1).nonzero()[:, 0]
    assert moved.tolist() == sorted(batch.index.tolist())
    read = batch.model_inputs["input_ids"].flatten()[batch.index]
    after = [token for token, own in zip(IDS, MASK, strict=True) if own]
    before = [([PROMPT[-1], *IDS])[i] for i, own in enumerate(MASK) if own]
    assert (read.tolist(), batch.targets.tolist()) == (before, after)


MODEL = make_model()
answer_logprobs(MODEL, HeadSettings())


@given(st.data())
def test_where_a_trajectory_is_cut_changes_nothing(data: st.DataObject) -> None:
    """With equal contexts; and packed, padded and shared sequences are as alone."""
    size = data.draw(st.integers(2, 9))
    ids = data.draw(st.lists(st.integers(3, VOCABULARY - 1), min_size=size, max_size=size))
    mask = data.draw(
        st.lists(st.booleans(), min_size=size, max_size=size).filter(any), label="mask"
    )
    cuts = data.draw(st.sets(st.integers(1, size - 1)), label="cuts")
    contexts = {cut: (*PROMPT, *ids[:cut]) for cut in cuts}
    whole = Trajectory(1, ids, 0.0, HUMAN, "eos", completion_mask=mask)
    cut = Trajectory(1, ids, 0.0, HUMAN, "eos", completion_mask=mask, contexts=contexts)
    assert cut.num_policy_tokens == sum(mask)
    with torch.no_grad():
        alone = [
            completion_logprobs(MODEL, collate([one], "padded"))[0]
            for one in tokens_of(whole, PROMPT)
        ]
        for layout in ("padded", "rows", "shared"):
            parts = [*tokens_of(cut, PROMPT), *tokens_of(whole, PROMPT)]
            both, _ = completion_logprobs(MODEL, collate(parts, layout))
            expected = torch.cat([*alone, *alone])
            torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
    assert sum(len(one.places) for one in tokens_of(cut, PROMPT)) == sum(mask)


def test_rewards_of_the_environment_go_to_the_policys_last_token(tmp_path: Path) -> None:
    from spo_ext.trainer.feed import _token_rewards

    row: Any = several(1)
    #      8 9 1 | (10 11 12) | 5 1 | (13) | 6 7 1
    assert _token_rewards(row).tolist() == [0, 0, 0.25 - 0.5, 0, 0.125, 0, 0, 0]


def test_too_long_counts_all_that_is_read(tmp_path: Path) -> None:
    made = filled(tmp_path)
    sizes = [sum(map(len, tokens_of(row, (*PROMPT, 3)))) for row in made[:4]]
    assert sizes == [5 + 8 + 6 + 3, 5 + 12, 5 + 9 + 6 + 3, 5 + 4]


def test_tokens_know_their_places() -> None:
    tokens = Tokens([2, 3], [4, 5, 6], [False, True, True])
    assert (tokens.places.tolist(), len(tokens), tokens.read) == ([1, 2], 5, [2, 3, 4, 5])
    assert copy.copy(tokens) == tokens


def test_the_report_shows_who_wrote_what(store: TrajectoryStore) -> None:
    from spo_ext.evaluation.report import stored_samples

    key = store.add_prompt(Prompt("a", PROMPT))
    store.append([several(key, origin=policy())])
    [article] = stored_samples(store, "run", None)
    expected = (
        "[policy, reward +0.25] 8 9 1\n[environment, reward -0.5] 10 11 12\n"
        "[policy, reward +0.125] 5 1\n[environment] 13\n"
        "[the policy reads anew] 2 5 6 7 5 13\n[policy] 6 7 1"
    )
    assert expected in article
