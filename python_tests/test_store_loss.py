"""A batch out of the store is what the loss takes."""

from __future__ import annotations

import torch
from store_cases import policy

import spo_ext
from spo_ext.store import (
    Prompt,
    PromptValue,
    Sampler,
    SamplerConfig,
    Trajectory,
    TrajectoryStore,
    reference_fingerprint,
)


def test_a_batch_gives_the_loss_of_its_trajectories(store: TrajectoryStore) -> None:
    """Scored once by a reference, stored, drawn in whatever order, and regressed."""
    reference = torch.nn.Embedding(11, 11)  # logits of the next token, given the last one
    key = reference_fingerprint(reference, None, 1.0)
    prompts = store.add_prompts([Prompt(f"{i}", token_ids=[i]) for i in range(3)])
    store.put_q0({p: PromptValue(-0.1 * p, n=4, beta=0.5, temperature=1.0) for p in prompts})
    rows = [
        Trajectory(p, torch.randint(11, (2 + p,)), -float(i), policy(), "eos", temperature=1.0)
        for p in prompts
        for i in range(2)
    ]
    ids = store.append(rows).ids

    def score(row: Trajectory) -> torch.Tensor:
        [prompt] = store.get_prompts([row.prompt_id])
        tokens = torch.tensor([*(prompt.token_ids or ()), *row.token_ids])
        logprobs = reference(tokens[:-1]).log_softmax(1)
        return logprobs.gather(1, tokens[1:, None])[:, 0].detach()

    store.put_ref_logprobs(key, {row.id: score(row) for row in store.trajectories()})
    config = SamplerConfig(6, run="run", group_size=2)
    with torch.device("meta"):  # a default device is the model's affair
        batch = Sampler(store, "learner", config).next_batch(policy_version=0)
        assert batch.rewards.device == batch.groups.device == torch.device("cpu")
        cached = store.ref_logprobs([row.id for row in batch.trajectories], key)
    assert {row.id for row in batch.trajectories} == set(ids)
    found = store.q0([row.prompt_id for row in batch.trajectories], beta=0.5, temperature=1.0)
    lengths = [len(row.token_ids) for row in batch.trajectories]
    ref_logprobs = torch.cat([values for values in cached if values is not None])
    q0 = torch.tensor([estimate.value for estimate in found if estimate is not None])
    losses = spo_ext.loss(
        ref_logprobs + 0.1,
        ref_logprobs,
        batch.rewards,
        q0,
        beta=0.5,
        objective="squared",
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        reduction="none",
    )
    # A log-ratio of 0.1 per token: Q_T = Q_0 + 0.5 * 0.1 * T.
    want = (q0 + 0.05 * torch.tensor(lengths) - batch.rewards) ** 2
    torch.testing.assert_close(losses, want)
    grouped = spo_ext.loss(
        ref_logprobs,
        ref_logprobs,
        batch.rewards,
        None,
        beta=0.5,
        objective="group",
        groups=batch.groups,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        reduction="none",
    )
    # Rewards of a prompt are 0 and -1, so its mean is 0.5 from both.
    torch.testing.assert_close(grouped, torch.full((6,), 0.25))
