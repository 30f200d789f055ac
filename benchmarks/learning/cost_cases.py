"""What `learning.cost` measures: updates by the experiment's own code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from spo_ext.contests.vocabulary import TOKENS
from spo_ext.trainer.batches import Tokens, collate
from spo_ext.trainer.model import HeadSettings, answer_logprobs, completion_logprobs

from .feed import Rows
from .methods import METHODS
from .settings import SETTINGS
from .updates import Updater

Head = Literal["fused", "logits"]
_GROUP = 8
_TOTAL_STEPS = 100  # of the learning rate's schedule, which costs nothing


@dataclass(frozen=True)
class Size:
    """A policy, and rows of prompt_tokens and, evenly spread, shortest to longest tokens of
    completion."""

    about: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    rows: int
    prompt_tokens: int
    shortest: int
    longest: int

    @property
    def shape(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.prompt_tokens + self.longest,
            tie_word_embeddings=False,
        )


def _harness() -> Size:
    config = SETTINGS["standard"].config
    return Size(
        "policy and batch of the experiment",
        vocabulary=len(TOKENS),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.layers,
        heads=config.heads,
        rows=config.prompts_per_batch * config.num_generations,
        prompt_tokens=19,  # the mean over its problems
        shortest=8,
        longest=config.max_program_tokens,
    )


SIZES = {
    "harness": _harness(),
    "medium": Size("where the vocabulary weighs", 32768, 256, 704, 4, 4, 32, 32, 96, 96),
    "large": Size("where the body weighs as well", 32768, 512, 1408, 8, 8, 32, 32, 96, 96),
    "small": Size("for tests", 4096, 64, 96, 2, 2, 16, 4, 6, 12),
    "least": Size("before the memory of another is measured", 64, 16, 16, 1, 1, 8, 2, 1, 2),
}


@dataclass(frozen=True)
class Case:
    """A method of the experiment, and how its policy computes log-probabilities.

    "fused" is `spo_ext.token_logprobs`, as in the experiment; "logits" is log_softmax over the
    logits of the completions, as people have it who train with PPO or GRPO.
    """

    method: str
    head: Head


CASES = {
    "SPO": Case("group", "fused"),
    "GRPO": Case("grpo", "fused"),
    "PPO": Case("ppo", "fused"),
    "GRPO, logits": Case("grpo", "logits"),
    "PPO, logits": Case("ppo", "logits"),
}


class LogitsPolicy(Qwen2ForCausalLM):  # type: ignore[no-untyped-call]
    """Answers `completion_logprobs` out of logits [B, K, V] that it writes down."""

    def forward(
        self,
        *,
        logprob_index: Tensor | None = None,
        logprob_targets: Tensor | None = None,
        logprob_entropy: bool = False,
        **inputs: Any,
    ) -> Any:
        if logprob_index is None:
            return super().forward(**inputs)
        width = inputs["input_ids"].shape[1]
        row, column = logprob_index // width, logprob_index % width
        first = int(column.min())  # prompts need no logits
        output = super().forward(**inputs, use_cache=False, logits_to_keep=width - first)
        return output.logits.float().log_softmax(-1)[row, column - first, logprob_targets]


def make_policy(size: Size, head: Head, seed: int = 0) -> Qwen2ForCausalLM:
    """With random weights, float32; the same for both heads."""
    torch.manual_seed(seed)
    if head == "logits":
        return LogitsPolicy(size.shape)
    policy = Qwen2ForCausalLM(size.shape)
    answer_logprobs(policy, HeadSettings())
    return policy


def make_rows(size: Size, policy: Qwen2ForCausalLM, seed: int = 1) -> Rows:
    """Groups of eight with successes and failures. The reference is the policy as it is: its
    log-probabilities come out of the store, so no update holds its weights."""
    rng = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(size.vocabulary, (count,), generator=rng).tolist()

    lengths = torch.linspace(size.shortest, size.longest, size.rows).round().int().tolist()
    texts = [Tokens(draw(size.prompt_tokens), draw(length)) for length in lengths]
    tokens = collate(texts, "padded")
    with torch.no_grad():
        logprobs, _ = completion_logprobs(policy, tokens)
    return Rows(
        tokens=tokens,
        ref_logprobs=logprobs,
        behaviour_logprobs=logprobs.clone(),
        rewards=-torch.randint(2, (size.rows,), generator=rng).float(),
        groups=torch.arange(size.rows) // _GROUP,
        online=torch.ones(size.rows, dtype=torch.bool),
    )


def make_updater(case: Case, policy: Qwen2ForCausalLM) -> Updater:
    """That of the experiment, with its optimiser and, for PPO, its value network."""
    method, config = METHODS[case.method], SETTINGS["standard"].config
    return Updater(method, policy, config, _TOTAL_STEPS, None)


def held_bytes(updater: Updater) -> int:
    """Of parameters, their gradients and what the optimisers keep of them, after an update."""
    total = 0
    for optimizer in updater.optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            state = (value for value in optimizer.state[parameter].values())
            for held in (parameter, parameter.grad, *state):
                if isinstance(held, Tensor):
                    total += held.numel() * held.element_size()
    return total
