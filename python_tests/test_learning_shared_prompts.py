"""The rows that share a prompt say what rows of their own would say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from learning.settings import setting_named  # noqa: E402
from learning.shared_prompts import collate_shared  # noqa: E402

from spo_ext.quickstart.policy import make_policy  # noqa: E402
from spo_ext.trainer.batches import Tokens, collate  # noqa: E402
from spo_ext.trainer.model import HeadSettings, answer_logprobs, completion_logprobs  # noqa: E402


def draw(groups: list[tuple[int, ...]]) -> list[Tokens]:
    """A prompt for each tuple, with programs of its lengths; those of all prompts interleaved."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 90, (count,), generator=generator).tolist()

    prompts = [ids(3 + 4 * number) for number in range(len(groups))]
    pairs = [(place, length) for place, group in enumerate(groups) for length in group]
    pairs.sort(key=lambda pair: pair[1])
    return [Tokens(prompts[place], ids(length)) for place, length in pairs]


@pytest.mark.parametrize(
    ("groups", "shared"),
    [([(5, 1, 7, 3), (2, 9, 4)], True), ([(30, 30, 30), (1,), (2,), (4,)], False)],
)
def test_same_logprobs_and_gradients(groups: list[tuple[int, ...]], shared: bool) -> None:
    torch.manual_seed(0)
    policy = make_policy(setting_named("tiny").config).double()
    answer_logprobs(policy, HeadSettings())
    sequences = draw(groups)
    factors = torch.randn(sum(len(tokens.completion) for tokens in sequences)).double()
    found = []
    for batch in (collate_shared(sequences), collate(sequences, "padded")):
        logprobs, _ = completion_logprobs(policy, batch)
        policy.zero_grad()
        (logprobs * factors).sum().backward()
        gradients = {name: weight.grad for name, weight in policy.named_parameters()}
        found.append((batch, logprobs.detach(), gradients))
    (batch, logprobs, gradients), (plain, expected, expected_gradients) = found
    assert (
        batch.model_inputs["input_ids"].shape == plain.model_inputs["input_ids"].shape
    ) != shared
    assert torch.equal(batch.cu_seqlens, plain.cu_seqlens)
    assert torch.equal(batch.targets, plain.targets)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)  # the head is float32
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
