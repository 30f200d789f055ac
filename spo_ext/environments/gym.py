"""reasoning-gym: prompts of its procedural data sets, and its scores as rewards.

The package's item i of seed s is its item i - 1 of seed s + 1. Every split of every seed here has
STRIDE of the package's seeds to itself, and no more items than that, so that no two share an item
(`seed_of`). Where numbers are small an item may still come twice by chance: test keeps it, then
dev, and train goes without.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spo_ext.store.records import Prompt, Split

STRIDE = 1_000_000
MAX_SEED = 1_000  # some data sets give theirs to NumPy, which takes 32 bits
INSTRUCTION = "Give the answer alone between <answer> and </answer>."
SCORE_SECONDS = 10.0
_SPLITS = ("train", "dev", "test")
_EXTRACT = ("strict", "flexible")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def seed_of(split: str, seed: int) -> int:
    """The package's seed of a split's first item; the next item's is one more."""
    return STRIDE * (len(_SPLITS) * seed + _SPLITS.index(split))


def answer_of(completion: str, extract: str = "strict") -> str:
    """What is scored: behind the last "</think>", what stands in the last <answer></answer>, else
    the final answer as `AnswerReward` reads it: of a \\boxed{}, behind "####", else all of it.

    extract: "flexible" takes the last number instead, where there is one (verl's names).
    """
    from spo_ext.rollout.answers import final_answer

    said = completion.rpartition("</think>")[2]
    tagged = _TAGGED.findall(said)
    found = tagged[-1].strip() if tagged else final_answer(said)
    numbers = _NUMBER.findall(found) if extract == "flexible" else []
    return numbers[-1] if numbers else found


class ReasoningGym:
    """Prompts of a data set, each with its answer, and in columns all that scoring needs.

    Args:
        dataset: its name, as in reasoning_gym.create_dataset.
        size: items of train, at most STRIDE.
        eval_size: items of dev, and of test.
        seed: another one has other items in all splits; at most MAX_SEED.
        instruction: stands behind each question, after an empty line; "" for nothing.
        chat: whether a prompt is a message of the user, or text.
        extract: what of a completion is its answer, see `answer_of`.
        config: more settings of the data set.

    Raises ValueError, and ImportError without reasoning-gym.
    """

    def __init__(
        self,
        dataset: str,
        *,
        size: int = 1000,
        eval_size: int = 100,
        seed: int = 0,
        instruction: str = INSTRUCTION,
        chat: bool = True,
        extract: str = "strict",
        **config: Any,
    ) -> None:
        from spo_ext.checks import check_integer, check_one_of, refuse

        owner = "--environment-args"
        for name, value in (("size", size), ("eval_size", eval_size)):
            check_integer(owner, name, value, 1)
            if value > STRIDE:
                refuse(owner, name, f"at most {STRIDE}, how far apart splits lie", value)
        check_integer(owner, "seed", seed, 0)
        if seed > MAX_SEED:
            refuse(owner, "seed", f"at most {MAX_SEED}", seed)
        if not isinstance(instruction, str):
            refuse(owner, "instruction", "text", instruction)
        if not isinstance(chat, bool):
            refuse(owner, "chat", "true or false", chat)
        check_one_of(owner, "extract", extract, _EXTRACT)
        known = sorted(_package().factory.DATASETS)
        if dataset not in known:
            refuse("--environment", "DATASET", f"one of {', '.join(known)}", dataset)
        self._dataset, self._config = dataset, config
        self._sizes = {"train": size, "dev": eval_size, "test": eval_size}
        self._seed, self._instruction, self._chat = seed, instruction, chat
        self._more = {} if extract == "strict" else {"extract": extract}
        try:
            Scorer.dataset_of(dataset, {**config, "size": 1, "seed": 0})
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"{owner}: {dataset} must know its settings: {error}") from error

    reward = staticmethod(lambda **columns: score(**columns))

    def prompts(self, split: Split) -> Iterator[Prompt]:
        """Those of a split, but for what test or dev has already; equal items once."""
        from spo_ext.store.records import Prompt

        seen: set[str] = set()
        for before in reversed(_SPLITS[_SPLITS.index(split) + 1 :]):
            seen.update(item["question"] for item in self._items(before))
        for item in self._items(split):
            if item["question"] in seen:
                continue
            seen.add(item["question"])
            words = item["question"] + (f"\n\n{self._instruction}" if self._instruction else "")
            entry = {name: value for name, value in item.items() if name != "answer"}
            yield Prompt(
                [{"role": "user", "content": words}] if self._chat else words,
                answer=item["answer"],
                split=split,
                columns={
                    "dataset": self._dataset,
                    "config": self._config,
                    "entry": packed(entry),
                    **self._more,
                },
            )

    def _items(self, split: str) -> Iterable[Mapping[str, Any]]:
        size, seed = self._sizes[split], seed_of(split, self._seed)
        made = Scorer.dataset_of(self._dataset, {**self._config, "size": size, "seed": seed})
        return (made[index] for index in range(size))


def score(
    completions: Sequence[Any],
    answer: Sequence[Any],
    dataset: Sequence[str | None],
    config: Sequence[Mapping[str, Any] | None],
    entry: Sequence[Any],
    extract: Sequence[str | None] | None = None,
    **_: object,
) -> list[float | None]:
    """The reward, by what is stored with the prompts: `--reward spo_ext.environments.gym:score`
    judges them again in any later process.

    An answer that the data set cannot score in SCORE_SECONDS, or that makes it raise, is worth 0. A
    prompt of something else has no judgement.
    """
    texts = [said if isinstance(said, str) else said[-1]["content"] for said in completions]
    how = extract or [None] * len(texts)
    rows = zip(texts, answer, dataset, config, entry, how, strict=True)
    calls = [
        None
        if name is None
        else (name, settings or {}, {"answer": right, "entry": kept}, answer_of(text, of or ""))
        for text, right, name, settings, kept, of in rows
    ]
    asked = list(filter(None, calls))
    found = iter(_scorers().map("score", asked))
    scores = [None if call is None else next(found) for call in calls]
    return [None if one is None else one if isinstance(one, float) else 0.0 for one in scores]


@functools.cache
def _scorers() -> Any:
    from spo_ext.environments.worker import Workers

    return Workers(f"{__file__}:Scorer", {}, SCORE_SECONDS)


class Scorer:
    """Scores answers; in a process of its own, since an answer can make a data set hang."""

    @staticmethod
    @functools.cache
    def _made(dataset: str, config: str) -> Any:
        import json

        return Scorer.dataset_of(dataset, {**json.loads(config), "size": 1, "seed": 0})

    @staticmethod
    def dataset_of(dataset: str, config: Mapping[str, Any]) -> Any:
        """A data set. Raises what its settings raise, ImportError without the package."""
        return _package().create_dataset(dataset, **config)

    @staticmethod
    def score(dataset: str, config: Mapping[str, Any], item: Mapping[str, Any], said: str) -> float:
        """The data set's own score of an answer."""
        import json

        made = Scorer._made(dataset, json.dumps(config))
        entry = {**unpacked(item["entry"]), "answer": item["answer"]}
        return float(made.score_answer(said, entry))


def packed(value: Any) -> Any:
    """The value as JSON that `unpacked` makes the same of; texts of what JSON cannot hold."""
    if isinstance(value, Mapping):
        if all(isinstance(name, str) and not name.startswith("py:") for name in value):
            return {name: packed(each) for name, each in value.items()}
        return {"py:dict": [[packed(name), packed(each)] for name, each in value.items()]}
    if isinstance(value, tuple):
        return {"py:tuple": [packed(each) for each in value]}
    if isinstance(value, list):
        return [packed(each) for each in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return packed(value.item()) if hasattr(value, "item") else str(value)


def unpacked(value: Any) -> Any:
    """See `packed`."""
    if isinstance(value, list):
        return [unpacked(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "py:tuple" in value:
        return tuple(unpacked(each) for each in value["py:tuple"])
    if "py:dict" in value:
        return {unpacked(name): unpacked(each) for name, each in value["py:dict"]}
    return {name: unpacked(each) for name, each in value.items()}


def _package() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise ImportError(
            f"--environment reasoning_gym needs reasoning-gym ({error}): pip install reasoning-gym"
        ) from error
    return reasoning_gym
