"""An evaluation on prompts of a store, which continues where a killed one stopped."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from spo_ext.checks import check_integer, refuse
from spo_ext.data.tokens import Tokenizer
from spo_ext.durable import read_json, read_json_lines, write_json
from spo_ext.evaluation.evaluate import evaluate
from spo_ext.evaluation.records import Evaluation, Sample, summary
from spo_ext.rollout.generation import Generation, Generator, Judgement, Reward, Sampling, Turns
from spo_ext.rollout.rewards import judged_by, named_split
from spo_ext.rollout.rollouts import as_trajectory
from spo_ext.store import Origin, StoredPrompt, TrajectoryStore
from spo_ext.store.loading import Ready, load
from spo_ext.store.records import Split
from spo_ext.store.rows import prompt_row

SETTINGS, SAMPLES = "settings.json", "samples.jsonl"


class Journal:
    """Opens both files in the folder `out`, which is created; keeps other processes out.

    Args:
        settings: everything that decides what is drawn and how it is judged, as JSON.
        n: samples of each prompt.

    Attributes:
        finished: the samples of the first prompts, as an earlier process wrote them. A prompt that
            it did not finish is cut off the file.

    Raises ValueError if `out` holds samples of other settings or a line that cannot be read, and
    OSError if another process writes there.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], n: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._n = n
        self._file = (out / SAMPLES).open("a+b")
        try:
            _lock(self._file.fileno(), out)
            _check_settings(out, settings)
            self.finished, end = _read(out / SAMPLES, n)
            self._file.truncate(end)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def write(self, prompt: StoredPrompt, samples: Sequence[Sample]) -> None:
        """All samples of the next prompt; they survive the death of this process."""
        lines = [json.dumps(_line(prompt, sample)) + "\n" for sample in samples]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _lock(file: int, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"{out}: another process evaluates into this folder") from None


def _check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    path = out / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if not path.exists():
        if (out / SAMPLES).stat().st_size:
            raise ValueError(f"{out}: samples.jsonl must lie beside its settings.json, got none")
        write_json(path, wanted)
        return
    found = read_json(path)
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if names:
        got = ", ".join(f"{name} {wanted.get(name)!r}" for name in names)
        old = ", ".join(f"{name} {found.get(name)!r}" for name in names)
        raise ValueError(f"{out} holds an evaluation with {old}; to continue it got {got}")


def _line(prompt: StoredPrompt, sample: Sample) -> dict[str, Any]:
    judgement, generation = sample.judgement, sample.generation
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.content,
        "completion": sample.text,
        "reward": None if judgement is None else judgement.reward,
        "reason": None if judgement is None else judgement.reason,
        **({"rewards": dict(judgement.parts)} if judgement is not None and judgement.parts else {}),
        "finish": generation.finish,
        "token_ids": generation.token_ids,
        "logprobs": generation.logprobs,
        **({} if generation.turns is None else {"turns": _turns_line(generation.turns)}),
    }


def _turns_line(turns: Turns) -> dict[str, Any]:
    return {
        "completion_mask": turns.completion_mask,
        "contexts": list((turns.contexts or {}).items()),
        "token_rewards": turns.token_rewards,
        "info": turns.info,
    }


def _turns(row: Mapping[str, Any], judgement: Judgement | None) -> Turns:
    paid = row["token_rewards"]
    return Turns(
        tuple(row["completion_mask"]),
        judgement,
        {start: tuple(ids) for start, ids in row["contexts"]} or None,
        None if paid is None else tuple(paid),
        row["info"],
    )


def _read(path: Path, n: int) -> tuple[list[tuple[Sample, ...]], int]:
    """The samples of prompts that have all n, and how many bytes they take."""
    rows: list[Sample] = [_sample(row) for row in read_json_lines(path)]
    rows = rows[: len(rows) - len(rows) % n]
    with path.open("rb") as file:
        end = sum(len(file.readline()) for _ in rows)
    return [tuple(rows[i : i + n]) for i in range(0, len(rows), n)], end


def _sample(row: Mapping[str, Any]) -> Sample:
    logprobs, judgement = row["logprobs"], None
    if row["reward"] is not None:
        parts = tuple(row.get("rewards", {}).items())
        judgement = Judgement(row["reward"], row["reason"], parts)
    generation = Generation(
        tuple(row["token_ids"]),
        row["finish"],
        None if logprobs is None else tuple(logprobs),
        _turns(row["turns"], judgement) if "turns" in row else None,
    )
    return Sample(generation, row["completion"], judgement)


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and how.

    Args:
        policy, reward: what tells one from another, as JSON.
        limit: the first so many prompts of the split; None for all.
        batch_size: completions drawn in one call of the generator, at least one prompt's.
        run, policy_version: samples go to the store too, as those of the run "RUN/eval".

    Raises ValueError if they do not fit together.
    """

    split: Split
    sampling: Sampling
    ks: tuple[int, ...]
    success: float
    reward: dict[str, Any]
    policy: dict[str, Any]
    limit: int | None = None
    batch_size: int = 64
    run: str | None = None
    policy_version: int | None = None

    def __post_init__(self) -> None:
        owner = "eval"
        for k in self.ks:
            check_integer(owner, "--k", k, 1)
            if k > self.sampling.n:
                refuse(owner, "--k", f"at most --n = {self.sampling.n}", k)
        check_integer(owner, "--batch-size", self.batch_size, 1)
        if self.limit is not None:
            check_integer(owner, "--prompts", self.limit, 1)
        if (self.run is None) != (self.policy_version is None):
            missing = "--run" if self.run is None else "--policy-version"
            refuse(owner, missing, "given, as the other of --run and --policy-version is", None)
        if self.run is not None and self.split == "train":
            refuse(owner, "--split", "dev or test with --run: samplers draw from train", "train")
        _ = self.origin  # which checks the run and its version

    @property
    def origin(self) -> Origin | None:
        if self.run is None:
            return None
        return Origin("policy", run=f"{self.run}/eval", policy_version=self.policy_version)

    def settings(self, prompts: Sequence[StoredPrompt]) -> dict[str, Any]:
        """What must be equal for samples of two processes to belong together.

        Not k and success, which only read the samples, and not the size of a batch.
        """
        state = hashlib.blake2b(digest_size=16)
        for prompt in prompts:
            state.update(prompt_row(prompt)["hash"])
        return {
            **self.policy,
            "split": self.split,
            "prompts": len(prompts),
            "prompts_hash": state.hexdigest(),
            **dataclasses.asdict(self.sampling),
            **self.reward,
            "run": self.run,
            "policy_version": self.policy_version,
        }


def evaluate_stored(
    store: TrajectoryStore,
    plan: Plan,
    out: Path,
    tokenizer: Tokenizer,
    make_generator: Callable[[], Generator],
    reward: Reward,
    on_prompt: Callable[[int, int], None],
    ids: Sequence[int] | None = None,
) -> Evaluation:
    """Writes settings.json, samples.jsonl and evaluation.json into `out`.

    ids: of the prompts, which are of the plan's split; None: all of the split.

    The generator is made if something is left to draw. on_prompt hears how many prompts are done,
    and of how many.

    Raises ValueError if the split is empty or `out` holds another evaluation, OSError if it cannot
    be written, and whatever generator and reward raise.
    """
    if plan.run is not None:
        store.require_writable("eval --run")
    every = store.prompts(plan.split) if ids is None else store.get_prompts(ids)
    stored = list(islice(judged_by(reward, every), plan.limit))
    if not stored:
        which = named_split(plan.split, reward)
        raise ValueError(f"the store has no prompts of split {which}")
    prompts = [_tokenised(prompt, tokenizer) for prompt in stored]
    settings = plan.settings(prompts)
    with Journal(out, settings, plan.sampling.n) as journal:
        for prompt, samples in zip(stored, journal.finished, strict=False):
            _keep(store, plan, prompt, samples)  # the last one may lack in the store
        on_prompt(len(journal.finished), len(stored))

        def keep(index: int, samples: Sequence[Sample]) -> None:
            journal.write(stored[index], samples)
            _keep(store, plan, stored[index], samples)
            on_prompt(index + 1, len(stored))

        left = len(journal.finished) < len(prompts)
        result = evaluate(
            prompts,
            make_generator() if left else _Nothing(),
            reward,
            sampling=plan.sampling,
            ks=plan.ks,
            decode=lambda ids: str(tokenizer.completion("", tuple(ids))),
            success=plan.success,
            prompts_per_call=max(1, plan.batch_size // plan.sampling.n),
            finished=journal.finished,
            on_samples=keep,
        )
        write_json(out / "evaluation.json", summary(result, settings, stored))
    return result


class _Nothing:
    def generate(self, *_arguments: object) -> Any:
        raise AssertionError("all prompts are finished")


def _tokenised(prompt: StoredPrompt, tokenizer: Tokenizer) -> StoredPrompt:
    if prompt.token_ids is not None:
        return prompt
    return dataclasses.replace(
        prompt, token_ids=tokenizer.prompt_ids(prompt.content, prompt.template)
    )


def _keep(
    store: TrajectoryStore, plan: Plan, prompt: StoredPrompt, samples: Sequence[Sample]
) -> None:
    """Into the store; what is there already stays as it is and counts no duplicate."""
    if plan.origin is None:
        return
    trajectories = []
    seen = Counter[tuple[int, ...]]()
    for sample in samples:
        ids = tuple(sample.generation.token_ids)
        if sample.judgement is not None and ids:
            who = (plan.origin, plan.sampling, seen[ids])  # equal completions are a row each
            trajectories.append(as_trajectory(prompt, sample.generation, sample.judgement, *who))
            seen[ids] += 1
    load(store, [Ready.of(prompt, trajectories)])
