"""Publication of the behaviour policy: every k batches the producers get the current weights.

What a folder of policies holds is said in `spo_ext.rollout.follow`, which reads it.
"""

from __future__ import annotations

import filecmp
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spo_ext.durable import exchange_folders, fsync, fsync_tree, write_text
from spo_ext.rollout.follow import FINISHED, LATEST, RUN, VERSION, check_run, version_name
from spo_ext.trainer.policy_weights import is_peft, policy_state

logger = logging.getLogger(__name__)


class DirectoryPublisher:
    """Publishes to a folder, from which any process or machine that shares it may read.

    A version appears whole or not at all, whenever this process is killed. One process may write
    into a folder. To publish a version again, as a resumed run does, is harmless.

    Args:
        directory: made if missing.
        keep: versions that stay, >= 1. A reader may be loading the one before the latest: use >= 2.
        merge_adapter: a PeftModel is written as a whole model with the adapter merged into a copy,
            for AutoModelForCausalLM. False: the adapter only, for PeftModel and vLLM.
        run: whose policies they are; the folder must have those of no other run.

    Raises:
        ValueError: for an argument outside what is said, or an adapter that cannot be merged.
        OSError: if the folder cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 2,
        merge_adapter: bool = True,
        run: str | None = None,
    ) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"DirectoryPublisher: keep must be an integer >= 1, got {keep!r}")
        self.directory = Path(directory)
        self._keep = keep
        self._merge_adapter = merge_adapter
        self._run = run
        if run is not None:
            check_run(self.directory, run)
        self.directory.mkdir(parents=True, exist_ok=True)

    def publish(
        self,
        model: nn.Module,
        tokenizer: Any,
        version: int,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Returns when producers that ask get this version.

        Args:
            model: a PreTrainedModel or PeftModel, not wrapped by DDP. It is only read.
            tokenizer: of transformers, or None.
            version: >= 0, kept with every trajectory that this policy draws.
            state_dict: of `model`, with whole tensors, where `model.state_dict()` has only shards
                (FSDP2).

        Logs whether a version that was there was kept or replaced.
        """
        self.write(model, tokenizer, version, state_dict)
        self.announce(version)

    def write(
        self,
        model: nn.Module,
        tokenizer: Any,
        version: int,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """The folder of the version, complete, but not yet named by `latest`."""
        target = self.path(version)
        self._remove_temporary()
        (self.directory / FINISHED).unlink(missing_ok=True)  # of the run that this one resumes
        if self._run is not None:
            write_text(self.directory / RUN, self._run)
        temporary = self.directory / f"{target.name}.tmp-{os.getpid()}"
        temporary.mkdir()
        self._save(temporary, model, state_dict)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        fsync_tree(temporary)
        self._move(temporary, target)
        return target

    def announce(self, version: int) -> None:
        """Names the version in `latest`, and removes those that are too old."""
        write_text(self.directory / LATEST, self.path(version).name)
        self._remove_old(version)

    def finish(self) -> None:
        """Writes `finished`, which holds what `latest` holds: this version was the last."""
        latest = self.directory / LATEST
        write_text(self.directory / FINISHED, latest.read_text() if latest.is_file() else "")

    def path(self, version: int) -> Path:
        """Where a version is or will be."""
        return self.directory / version_name(version)

    def _save(self, folder: Path, model: Any, state_dict: Mapping[str, Tensor] | None) -> None:
        # save_pretrained takes tensors out of the mapping that it is given, hence the copies.
        if not is_peft(model):
            if getattr(model, "_hf_peft_config_loaded", False):
                raise ValueError(
                    "publish: model has adapters that were added without PEFT's get_peft_model; "
                    "wrap it as a PeftModel"
                )
            model.save_pretrained(folder, state_dict=None if state_dict is None else {**state_dict})
        elif self._merge_adapter:
            merged = policy_state(model, state_dict)
            model.get_base_model().save_pretrained(folder, state_dict=merged)
        else:
            given = {} if state_dict is None else {"state_dict": {**state_dict}}
            model.save_pretrained(folder, selected_adapters=list(model.active_adapters), **given)

    def _move(self, temporary: Path, target: Path) -> None:
        if not target.exists():
            os.rename(temporary, target)
            fsync(self.directory)
            logger.info("published %s", target)
            return
        if _same_files(temporary, target):
            logger.info("published %s: it was there already, with the same files", target)
        else:
            exchange_folders(temporary, target)
            logger.info("published %s: it replaces other weights of this version", target)
        shutil.rmtree(temporary)

    def _remove_old(self, version: int) -> None:
        """Versions after this one stay: a run that was resumed writes them again."""
        found = [
            (int(match[1]), path)
            for path in self.directory.iterdir()
            if (match := VERSION.fullmatch(path.name)) and int(match[1]) <= version
        ]
        for _, path in sorted(found)[: -self._keep]:
            # Renamed first: no reader may find a version with some of its files.
            doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)

    def _remove_temporary(self) -> None:
        for path in self.directory.glob("version-*.tmp-*"):
            logger.info("removed %s, left over by a process that was killed", path)
            shutil.rmtree(path)


def _same_files(first: Path, second: Path) -> bool:
    files = [
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (first, second)
    ]
    filecmp.clear_cache()
    return files[0] == files[1] and all(
        filecmp.cmp(first / name, second / name, shallow=False) for name in files[0]
    )
