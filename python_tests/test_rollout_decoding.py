"""The cache with room holds what transformers' own cache holds."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache, Qwen2Config

from spo_ext.rollout.embedded import roomy_cache

CONFIG = Qwen2Config(num_hidden_layers=2)


def states(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, tokens, 5)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("room", [0, 1, 20])
def test_it_holds_the_same_whatever_is_done_to_it(room: int) -> None:
    caches = [roomy_cache(CONFIG, room), DynamicCache(config=CONFIG)]

    def add(batch: int, tokens: int, seed: int) -> None:
        for layer in range(2):
            keys, values = states(batch, tokens, seed + layer)
            found, wanted = (cache.update(keys, values, layer) for cache in caches)
            for one, other in zip(found, wanted, strict=True):
                assert torch.equal(one, other)
        assert caches[0].get_seq_length() == caches[1].get_seq_length()

    add(4, 7, seed=0)
    for cache in caches:
        cache.batch_repeat_interleave(3)
    for indices in ([0, 2, 3, 11], [3, 1]):  # at once after the repetition, and reordered
        for cache in caches:
            cache.batch_select_indices(torch.tensor(indices))
        for step in range(3):
            add(len(indices), 1, seed=10 * step)
    add(2, 4, seed=50)


def test_rows_that_were_taken_twice_go_their_own_ways() -> None:
    cache = roomy_cache(CONFIG, 4)
    cache.update(*states(2, 3, 0), 0)
    cache.batch_select_indices(torch.tensor([1, 1]))
    keys, values = states(2, 1, 1)
    found, _ = cache.update(keys, values, 0)
    assert torch.equal(found[0, :, :3], found[1, :, :3])
    assert torch.equal(found[:, :, 3:], keys) and not torch.equal(keys[0], keys[1])
