"""The trajectory store: what was tried, by whom, and what came of it, across runs and machines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import get_ident
from typing import get_args
from uuid import uuid4

import sqlalchemy as sa
from torch import Tensor

from spo_ext.checks import check_name, check_one_of, refuse
from spo_ext.store import queries, rows, schema, scores
from spo_ext.store.database import Database
from spo_ext.store.records import (
    Appended,
    Prompt,
    PromptValue,
    Split,
    StoredPrompt,
    StoredTrajectory,
    Trajectory,
)


class TrajectoryStore:
    """Prompts, trajectories and cached reference log-probabilities in a database.

    Args:
        target: a file (SQLite, made if missing; on a local disk, for processes of one machine), or
            postgresql://user@host/database for several machines. A file that cannot be written,
            or lies where nothing can be, is opened for reading.
        timeout_s: how long a writer waits for the others before it raises.
        retry_s: how long a database that went away (a restart, a broken network) is asked again
            before a method raises. Nothing is lost or done twice then. One that was never reached
            is asked for 10 s at most, unless it says that it is starting.

    Any number of processes may read and write. Whatever a method returned for survives the death
    of its process, and a batch is stored whole or not at all. An older database is brought to the
    current schema when it is opened.

    Raises:
        ValueError: for an argument outside what is said, before anything is written.
        PermissionError: by what writes, if the store was opened for reading.
        SchemaError: if the database was written by a newer spo_ext.
        sqlalchemy.exc.OperationalError: if the database cannot be reached or is locked for longer.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        timeout_s: float = 60.0,
        retry_s: float = 300.0,
    ) -> None:
        self._timeout_s, self._retry_s = timeout_s, retry_s
        self._name = uuid4().hex
        self.database = Database(target, timeout_s, retry_s)
        self.database.open(schema.migrate, schema.require_current)

    def __repr__(self) -> str:
        return f"TrajectoryStore({self.database.shown!r})"

    def __reduce__(self) -> tuple[Callable[..., TrajectoryStore], tuple[object, ...]]:
        # For workers of a DataLoader: they open connections of their own.
        target = self.database.url.render_as_string(hide_password=False)
        return _reopen, (target, self._timeout_s, self._retry_s)

    def require_writable(self, who: str) -> None:
        """Raises PermissionError, in the name of `who`, if the store was opened for reading."""
        self.database.require_writable(who)

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> TrajectoryStore:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def add_prompt(self, prompt: Prompt) -> int:
        """The id of the prompt, the old one if it is there already."""
        return self.add_prompts([prompt])[0]

    def add_prompts(self, prompts: Sequence[Prompt]) -> list[int]:
        """All in one transaction; ids in the order of the arguments.

        Raises ValueError if the same text or messages are stored in another split: a test prompt
        that is also trained on tests nothing.
        """
        new = [rows.prompt_row(prompt) for prompt in prompts]

        def add(connection: sa.Connection) -> list[int]:
            queries.check_splits(connection, new)
            return queries.insert_missing(connection, schema.prompts, new)[0]

        return self.database.writing(add)

    def append(self, trajectories: Sequence[Trajectory]) -> Appended:
        """Stores a batch in one transaction.

        A trajectory with the prompt, token ids, origin, finish, temperature and top_p of a stored
        one is that one: it keeps its id, reward and log-probabilities, and counts a duplicate, and
        a conflict if the reward differs.

        Raises ValueError if a prompt is not stored; then nothing is.
        """
        for index, item in enumerate(trajectories):
            if not isinstance(item, Trajectory):
                refuse("append", f"trajectories[{index}]", "a Trajectory", item)
        # Of one thread of one process, which makes one append at a time.
        writer = f"{self._name}-{os.getpid()}-{get_ident()}"
        batch = uuid4().hex

        def add(connection: sa.Connection) -> Appended:
            hashes = rows.prompt_hashes(connection, {item.prompt_id for item in trajectories})
            for index, item in enumerate(trajectories):
                if item.prompt_id not in hashes:
                    raise ValueError(
                        f"append: trajectories[{index}].prompt_id must be the id of a stored "
                        f"prompt, got {item.prompt_id}"
                    )
            new = [rows.trajectory_row(item, hashes[item.prompt_id]) for item in trajectories]
            ids, *counts = queries.append(connection, new, writer, batch)
            return Appended(tuple(ids), *counts)

        return self.database.writing(add)

    def get(self, ids: Sequence[int]) -> list[StoredTrajectory]:
        """In the order of ids. Raises ValueError for an id that is not stored."""
        found = self.database.reading(lambda c: queries.by_id(c, "get", schema.trajectories, ids))
        return [rows.stored_trajectory(row) for row in found]

    def get_prompts(self, ids: Sequence[int]) -> list[StoredPrompt]:
        """In the order of ids. Raises ValueError for an id that is not stored."""
        found = self.database.reading(
            lambda c: queries.by_id(c, "get_prompts", schema.prompts, ids)
        )
        return [rows.stored_prompt(row) for row in found]

    def prompts(self, split: Split | None = None) -> Iterator[StoredPrompt]:
        """Those stored when the iteration starts, by id, a page in memory at a time."""
        where = []
        if split is not None:
            check_one_of("prompts", "split", split, get_args(Split))
            where.append(schema.prompts.c.split == split)
        return map(rows.stored_prompt, queries.stream(self.database, schema.prompts, where))

    def contents(self, split: Split | None = None) -> Iterator[Prompt]:
        """Iterates over the prompts without their tests, which are far longer."""
        table = schema.prompts.c
        columns = sa.select(table.id, table.content, table.split).subquery()
        where = [] if split is None else [columns.c.split == split]
        for row in queries.stream(self.database, columns, where):
            yield Prompt(json.loads(row.content), split=row.split)

    def newest(self, run: str, count: int) -> list[StoredTrajectory]:
        """Returns the newest trajectories of a run, from the newest on."""
        table = schema.trajectories.c
        query = sa.select(table.id).where(table.run == run).order_by(table.id.desc()).limit(count)
        return self.get(self.database.reading(lambda c: list(c.execute(query).scalars())))

    def trajectories(
        self,
        *,
        prompt_id: int | None = None,
        run: str | None = None,
        without_reference: str | None = None,
    ) -> Iterator[StoredTrajectory]:
        """Iterates over those stored when it starts, by id, with a page in memory at a time.

        Args:
            prompt_id: only of this prompt.
            run: only of this run.
            without_reference: only those without log-probabilities of the reference with this
                fingerprint, which remain to be scored.
        """
        table = schema.trajectories.c
        where = [table.prompt_id == prompt_id] if prompt_id is not None else []
        where += [table.run == run] if run is not None else []
        if without_reference is not None:
            cache = schema.ref_logprobs.c
            scored = sa.exists().where(
                cache.trajectory_id == table.id, cache.fingerprint == without_reference
            )
            where.append(~scored)
        found = queries.stream(self.database, schema.trajectories, where)
        return map(rows.stored_trajectory, found)

    def put_ref_logprobs(self, fingerprint: str, logprobs: Mapping[int, Tensor]) -> None:
        """Caches log-probabilities [T] in nats of the reference, by trajectory id, as float32.

        fingerprint comes from `reference_fingerprint`. Those that are cached already are kept.

        Raises ValueError unless each has one finite number per token of a stored trajectory.
        """
        self.database.writing(lambda c: scores.put_ref_logprobs(c, fingerprint, logprobs))

    def ref_logprobs(self, ids: Sequence[int], fingerprint: str) -> list[Tensor | None]:
        """float32 [T] for each trajectory id, None where this reference's are not cached."""
        return self.database.reading(lambda c: scores.ref_logprobs(c, ids, fingerprint))

    def reference_fingerprints(self) -> dict[str, int]:
        """How many trajectories each reference has scored."""
        return self.database.reading(scores.fingerprints)

    def put_q0(self, values: Mapping[int, PromptValue]) -> None:
        """Stores estimates of Q_0 by prompt id; each replaces one of the same beta, temperature,
        top_p and reference.

        Raises ValueError for a prompt that is not stored.
        """
        self.database.writing(lambda c: scores.put_q0(c, values))

    def q0(
        self,
        prompt_ids: Sequence[int],
        *,
        beta: float,
        temperature: float,
        top_p: float = 1.0,
        reference: str = "",
    ) -> list[PromptValue | None]:
        """The estimate for each prompt id, None where there is none under these conditions."""
        key = (reference, beta, temperature, top_p)
        return self.database.reading(lambda c: scores.q0(c, prompt_ids, key))

    def put_refusals(self, run: str, refused: Mapping[int, tuple[int, str]]) -> None:
        """Remembers prompts that a server refused, by id: tokens of prompt and completion together
        that were too many, and the server's reason. A later one replaces an earlier one.
        """
        check_name("put_refusals", "run", run)
        self.database.writing(lambda c: queries.put_refusals(c, run, refused))

    def refusals(self, run: str) -> dict[int, tuple[int, str]]:
        """What `put_refusals` has stored for a run."""
        return self.database.reading(lambda c: queries.refusals(c, run))

    def samplers(self) -> list[str]:
        """Names of the samplers that have drawn."""
        return self.database.reading(queries.samplers)

    def forget_sampler(self, name: str) -> None:
        """Deletes the records of what a sampler drew; its name is new again."""
        self.database.writing(lambda c: queries.forget_sampler(c, name))

    def counters(self) -> dict[str, int]:
        """Rows of the store, duplicates and conflicts of `append`, draws of all samplers."""
        return self.database.reading(queries.counters)


def _reopen(target: str, timeout_s: float, retry_s: float) -> TrajectoryStore:
    return TrajectoryStore(target, timeout_s=timeout_s, retry_s=retry_s)
