"""The supervised start: from random weights to a reference policy, by transformers' Trainer."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import IterableDataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from spo_ext.contests.programs import demonstrate
from spo_ext.contests.recipe import Contest
from spo_ext.contests.vocabulary import EOS, GO, PAD, TOKENS, encode_prompt
from spo_ext.trainer.metrics import show_progress

_MAX_PROMPT_TOKENS = 32
_WARMUP_STEPS = 50
_FINAL_RATE = 0.05  # share of the peak learning rate left at the end of the cosine
_BATCHES_PER_SORT = 4

Example = tuple[list[int], list[int]]  # prompt ids, program ids


def make_policy(contest: Contest) -> Qwen2ForCausalLM:
    """A policy with random weights from torch's current random state."""
    shape = Qwen2Config(
        vocab_size=len(TOKENS),
        hidden_size=contest.hidden_size,
        intermediate_size=contest.intermediate_size,
        num_hidden_layers=contest.layers,
        num_attention_heads=contest.heads,
        num_key_value_heads=contest.heads,
        max_position_embeddings=_MAX_PROMPT_TOKENS + contest.max_program_tokens,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=GO,
    )
    return Qwen2ForCausalLM(shape)


def train_reference(contest: Contest, folder: Path, *, quiet: bool = False) -> Qwen2ForCausalLM:
    """Trains on demonstrations, each of a fresh problem and most of them wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(contest.seed)
        policy = make_policy(contest)
    steps = contest.sft_steps
    if not steps:
        return policy

    def schedule(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        warmup = min(1.0, (step + 1) / _WARMUP_STEPS)
        return warmup * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)

    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=contest.sft_learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,  # of the batches
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        disable_tqdm=quiet,
        remove_unused_columns=False,
        use_cpu=True,
    )
    trainer = Trainer(
        policy,
        settings,
        data_collator=_collate,
        train_dataset=_Demonstrations(contest),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)),
    )
    show_progress(trainer)
    trainer.train()
    return policy


class _Demonstrations(IterableDataset[list[Example]]):
    """Batches of rows of similar length: a third less padding to compute."""

    def __init__(self, contest: Contest) -> None:
        self._contest = contest

    def __iter__(self) -> Iterator[list[Example]]:
        contest, size = self._contest, self._contest.sft_batch
        rng = random.Random(f"{contest.seed} demonstrations")
        while True:
            examples = [_demonstration(contest, rng) for _ in range(_BATCHES_PER_SORT * size)]
            examples.sort(key=lambda example: sum(map(len, example)))
            batches = [examples[i : i + size] for i in range(0, len(examples), size)]
            rng.shuffle(batches)
            yield from reversed(batches)


def _demonstration(contest: Contest, rng: random.Random) -> Example:
    problem = contest.draw_one(rng, "train", hidden_tests=0)
    program = demonstrate(
        rng,
        problem.specification,
        corruption=contest.corruption,
        token_noise=contest.token_noise,
        max_tokens=contest.max_program_tokens,
    )
    return encode_prompt(problem), program


def _collate(batches: Sequence[Sequence[Example]]) -> dict[str, torch.Tensor]:
    """Padded on the right, which a causal model reads without a mask; labels as of transformers."""
    width = max(len(prompt) + len(program) for prompt, program in batches[0])
    ids = torch.full((len(batches[0]), width), PAD)
    labels = torch.full_like(ids, -100)
    for row, (prompt, program) in enumerate(batches[0]):
        end = len(prompt) + len(program)
        ids[row, :end] = torch.tensor([*prompt, *program])
        labels[row, len(prompt) : end] = torch.tensor(program)
    return {"input_ids": ids, "labels": labels}
