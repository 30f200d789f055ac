"""`spo rollout --follow`: policies that are published while it runs, and how it is stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from rollout_cases import (
    new_store,
    plain_prompts,
    rollout,
    rows,
    save_policy,
    save_reward,
    wait_for,
)

from spo_ext.store import TrajectoryStore


def publish(directory: Path, version: int) -> None:
    """As a trainer does: the folder first, then the pointer, both by renaming."""
    folder = directory / "new"
    save_policy(folder, seed=version, end_weight=1.0)
    folder.rename(directory / f"version-{version:07d}")
    (directory / "pointer").write_text(f"version-{version:07d}\n")
    (directory / "pointer").rename(directory / "latest")


def follow(path: Path, directory: Path, meanwhile: Callable[[TrajectoryStore], None]) -> int:
    """`spo rollout --follow` here, and a trainer in a thread."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with TrajectoryStore(path) as store:
                meanwhile(store)
        except BaseException as error:
            failures.append(error)
            (directory / "finished").touch()

    trainer = threading.Thread(target=work)
    trainer.start()
    options = ("--store", path, "--follow", directory, "--run", "live", "--n", 2)
    options += ("--max-new-tokens", 4, "--reward", save_reward(path.parent), "--batch-size", 3)
    status = rollout(*options, "--prompts-per-version", 6)
    trainer.join()
    assert not failures, failures
    return status


def versions(store: TrajectoryStore) -> dict[int, int]:
    """Completions drawn of each."""
    found: Counter[int] = Counter()
    for each in store.trajectories(run="live"):
        found[each.origin.policy_version or 0] += 1 + each.duplicates
    return dict(found)


def test_published_policies_are_followed(tmp_path: Path) -> None:
    directory = tmp_path / "policies"
    directory.mkdir()
    path = new_store(tmp_path / "store.db", plain_prompts(8))

    def train(store: TrajectoryStore) -> None:
        time.sleep(0.1)  # nothing is published yet
        publish(directory, 0)
        wait_for(lambda: versions(store) == {0: 12})
        publish(directory, 1)
        publish(directory, 2)  # 1 may be left out
        wait_for(lambda: versions(store).get(2) == 12)
        publish(directory, 3)
        (directory / "finished").touch()

    assert follow(path, directory, train) == 0
    with TrajectoryStore(path) as store:
        counts = versions(store)
        assert {v: n for v, n in counts.items() if v != 1} == {0: 12, 2: 12, 3: 12}
        of_version = {
            version: {
                t.prompt_id for t in store.trajectories() if t.origin.policy_version == version
            }
            for version in counts
        }
        # Versions 2 and 3 have items 12 to 23 of the stream, of which 16 to 23 are all prompts.
        assert len(of_version[0]) == 6 and len(of_version[2] | of_version[3]) == 8
        # Each version is another policy.
        drawn = [
            {t.token_ids for t in store.trajectories() if t.origin.policy_version == v}
            for v in (0, 2)
        ]
        assert drawn[0] != drawn[1]
        # Started again it adds nothing to what the latest version has.
        assert follow(path, directory, lambda _: None) == 0
        assert versions(store) == counts


def test_sigterm_ends_it_after_the_batch_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "policies"
    directory.mkdir()
    publish(directory, 0)
    path = new_store(tmp_path / "store.db", plain_prompts(8))
    monkeypatch.setenv("SLOWLY", "0.2")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def train(store: TrajectoryStore) -> None:
        wait_for(lambda: versions(store) == {0: 12})
        os.kill(os.getpid(), signal.SIGTERM)  # while it waits for the next policy

    assert follow(path, directory, train) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers

    def stop_early(store: TrajectoryStore) -> None:
        wait_for(lambda: store.counters()["trajectories"] > 0)
        os.kill(os.getpid(), signal.SIGINT)

    many = new_store(tmp_path / "many.db", plain_prompts(30))
    watcher = threading.Thread(target=lambda: stop_early(TrajectoryStore(many)))
    watcher.start()
    options = ("--store", many, "--model", directory / "version-0000000", "--run", "r", "--n", 1)
    options += ("--max-new-tokens", 2, "--reward", save_reward(path.parent), "--batch-size", 1)
    assert rollout(*options) == 130
    watcher.join()
    with TrajectoryStore(many) as store:
        assert 1 <= len(rows(store)) <= 10
