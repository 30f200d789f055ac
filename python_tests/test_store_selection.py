"""What holds of every batch, whatever the store holds and the configuration asks for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_ext.store import SamplerConfig, SampleShortfall, Stratum
from spo_ext.store.selection import Columns, Index, Selection, select

MIXTURES = st.sampled_from(
    [
        {"online": 1.0},
        {"offline": 1.0},
        {"online": 0.5, "offline": 0.5},
        {"online": 0.7, "human": 0.25, "model:m": 0.05},
    ]
)
NOW = 4  # the learner's policy version


@st.composite
def mixed_configs(draw: Any) -> SamplerConfig:
    thirds: dict[str, float] = {"online": 1 / 3, "human": 1 / 3, "model:m": 1 / 3}
    size, mixture = draw(
        st.sampled_from(
            [
                (2, {"online": 0.5, "offline": 0.5}),
                (4, {"online": 0.25, "human": 0.75}),
                (3, thirds),
            ]
        )
    )
    return SamplerConfig(
        batch_size=size * draw(st.integers(1, 3)),
        mixture=mixture,
        run="run",
        seed=draw(st.integers(0, 3)),
        max_offpolicy_steps=draw(st.none() | st.integers(0, 3)),
        max_uses=draw(st.none() | st.integers(1, 3)),
        group_size=size,
        mixed_groups=True,
    )


@st.composite
def configs(draw: Any) -> SamplerConfig:
    if draw(st.booleans()) and draw(st.booleans()):
        return draw(mixed_configs())
    size = draw(st.sampled_from([1, 1, 2, 3]))
    strata = [Stratum(0.4, low=1.0), Stratum(0.2, high=0.5)]
    return SamplerConfig(
        batch_size=size * draw(st.integers(1, 5)),
        mixture=draw(MIXTURES),
        run="run",
        seed=draw(st.integers(0, 3)),
        max_offpolicy_steps=draw(st.none() | st.integers(0, 3)),
        max_uses=draw(st.none() | st.integers(1, 3)),
        strata=draw(st.sampled_from([[], strata])) if size == 1 else [],
        group_size=size,
        on_shortfall=draw(st.sampled_from(["raise", "fill"])),
    )


def make_index(config: SamplerConfig, count: int, seed: int) -> Index:
    """A store of `count` trajectories of up to eight prompts, as the index shows it."""
    random = torch.Generator().manual_seed(seed)

    def integers(high: int) -> torch.Tensor:
        return torch.randint(high, (count,), generator=random)

    index = Index(config)
    prompt = integers(8)
    index.columns = Columns(
        id=torch.arange(count) * 2 + 1,
        key=integers(2**62),
        prompt=prompt,
        prompt_key=prompt * 10**15,
        version=integers(NOW + 2),
        cell=integers(len(index.epochs)),
        uses=torch.zeros(count, dtype=torch.int64),
        epoch=torch.full((count,), -1),
    )
    return index


def check(config: SamplerConfig, index: Index, chosen: Selection) -> None:
    columns, rows = index.columns, chosen.rows
    assert len(rows) == len(set(rows.tolist()))
    if config.max_uses is not None:
        assert int(columns.uses[rows].max()) < config.max_uses
    pools = list(config.fractions)
    pool = columns.cell // index.strata
    if "online" in pools:
        versions = columns.version[rows][pool[rows] == pools.index("online")]
        assert bool((versions <= NOW).all())
        assert config.max_offpolicy_steps is None or bool(
            (versions >= NOW - config.max_offpolicy_steps).all()
        )
    if config.mixed_groups:
        check_mixed(config, index, chosen)
        return
    assert len(rows) == config.batch_size
    prompts = columns.prompt_key[rows].reshape(-1, config.group_size)
    assert bool((prompts == prompts[:, :1]).all())
    units = pool[rows].reshape(-1, config.group_size)
    assert bool((units == units[:, :1]).all())
    if config.group_size > 1:
        assert len(set(prompts[:, 0].tolist())) == len(prompts)
    drawn = Counter(pool[rows].tolist())
    short = {name for name in pools if name in chosen.shortfall}
    assert config.on_shortfall == "fill" or not short
    for i, (name, fraction) in enumerate(config.fractions.items()):
        exact = fraction * config.batch_size
        if not short:
            assert abs(drawn[i] - exact) < config.group_size
        if name in short:
            wanted, got = chosen.shortfall[name]
            assert got < wanted


def check_mixed(config: SamplerConfig, index: Index, chosen: Selection) -> None:
    """Every group has its online rows, and of the others its share or all that there are."""
    columns, rows = index.columns, chosen.rows
    prompts, pool = columns.prompt_key, columns.cell // index.strata
    allowed = columns.uses < (config.max_uses or len(rows) + 10**6)
    drawn = torch.unique_consecutive(prompts[rows])
    assert len(drawn) == len(set(drawn.tolist())) == config.batch_size // config.group_size
    for i, (name, share) in enumerate(config.rows_per_group.items()):
        total = 0
        for prompt in drawn:
            mine = rows[(prompts[rows] == prompt) & (pool[rows] == i)]
            others = (prompts == prompt) & (pool == i) & allowed
            assert len(mine) == (share if name == "online" else min(share, int(others.sum())))
            if name != "online" and len(mine) < int(others.sum()):
                others[mine] = False
                assert int(columns.uses[mine].max()) <= int(columns.uses[others].min())
            total += len(mine)
        wanted = share * len(drawn)
        assert chosen.shortfall.get(name) == ((wanted, total) if total < wanted else None)


@settings(max_examples=150)
@given(configs(), st.integers(0, 60), st.integers(0, 5))
def test_every_batch_is_what_was_asked_for(config: SamplerConfig, count: int, seed: int) -> None:
    index = make_index(config, count, seed)
    for step in range(8):
        try:
            chosen = select(config, index, step, NOW)
        except SampleShortfall as error:
            assert str(config.batch_size) in str(error)
            return
        check(config, index, chosen)
        again = select(config, index, step, NOW)
        assert chosen.rows.tolist() == again.rows.tolist()
        index.apply(index.columns.id[chosen.rows], chosen.epochs)


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(0, 20), st.integers(0, 5))
def test_no_trajectory_is_used_much_more_than_another(size: int, more: int, seed: int) -> None:
    config = SamplerConfig(size, "offline", seed=seed)
    index = make_index(config, size + more, seed)
    for step in range(10):
        chosen = select(config, index, step, None)
        index.apply(index.columns.id[chosen.rows], chosen.epochs)
        uses = index.columns.uses
        assert int(uses.max() - uses.min()) <= 1
