"""Checkpoints of a training run with Orbax: each is whole or not there, and a damaged one gives way to the one before.

Nothing is unpickled. A checkpoint is written before `save` returns: the state is donated to the next step, so a write in the background
would need a copy. Beside it are the checksums of its files, because Orbax does not notice when bytes of an array are changed.
"""

import errno
import itertools
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from hopjax.cli.output import write

BROKEN = ".broken"
SUMS = "checksums.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message says what to do."""


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        step: its number.
        state: the training state, on the devices that were asked for.
        record: the JSON that was saved with it.
    """

    step: int
    state: Any
    record: dict[str, Any]


def size(state: Any) -> int:
    """Bytes of a state's arrays, real or abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


class Checkpoints:
    """The checkpoints in a folder, one for each step that was saved.

    Use as a context manager: it closes Orbax's files and threads.

    Args:
        keep: how many of the latest stay. None for a reader beside the run that writes them: nothing in the folder is touched.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int | None = None) -> None:
        self.folder = Path(folder).absolute()
        if keep is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._checkpointer = self._open()

    def _open(self) -> Any:
        from orbax.checkpoint import v1 as ocp  # takes seconds to import

        return ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=self._keep is not None,  # of a run that was killed while it wrote
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, the earliest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
        """Write a checkpoint, with JSON beside it, unless there is one of this step; it is on the disk on return.

        Raises: CheckpointError if it does not fit on the disk; earlier ones stay.
        """
        if step in self.steps:
            return
        needed, free = size(state), shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder}: a checkpoint needs {needed / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB left: make room and run the "
                f"same command again; it goes on from step {max(self.steps, default=0):,}"
            )
        try:
            self._checkpointer.save_checkpointables(step, {"state": state}, custom_metadata=dict(record), force=True)
            if jax.process_index() == 0:
                write(self.folder / str(step) / SUMS, json.dumps(_sums(self.folder / str(step))).encode())
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError) and os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise CheckpointError(f"{self.folder}: a checkpoint could not be written: {error}") from error

    def restore(self, state: Any) -> Restored | None:
        """The latest checkpoint that can be read; None if there is none at all.

        Args:
            state: what is expected: arrays, real or abstract, with their shardings.

        A damaged checkpoint gives way to the one before, with a warning, and is renamed to N.broken by the run that it belongs to.

        Raises: CheckpointError if there are checkpoints, but none can be read.
        """
        steps = self.steps[::-1]
        for step, earlier in itertools.zip_longest(steps, steps[1:]):
            try:
                _verify(self.folder / str(step))
                found = self._checkpointer.load_checkpointables(step, {"state": state})
                record = self._checkpointer.metadata(step).custom_metadata
            except Exception as error:  # whatever Orbax and tensorstore say of a file that is cut short
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                if earlier is None:
                    raise CheckpointError(
                        f"{self.folder / str(step)} cannot be read ({reason}), and there is no earlier checkpoint"
                    ) from error
                if self._keep is not None:
                    self._set_aside(step)
                warnings.warn(f"checkpoint {step} cannot be read ({reason}); going on from {earlier}", stacklevel=2)
                continue
            return Restored(step, found["state"], dict(record or {}))
        return None

    def _set_aside(self, step: int) -> None:
        self._checkpointer.close()
        multihost_utils.sync_global_devices("all processes have found the damage")
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(self.folder / f"{step}{BROKEN}")
        multihost_utils.sync_global_devices("the damaged checkpoint is set aside")
        self._checkpointer = self._open()


def _sums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS):
        with file.open("rb") as content:
            total = 0
            while block := content.read(1 << 20):
                total = zlib.crc32(block, total)
        found[file.relative_to(folder).as_posix()] = total
    return found


def _verify(folder: Path) -> None:
    """Whether the files are as they were written; nothing is said of those of a run that was killed before it noted the sums.

    Raises: ValueError naming one that is not.
    """
    if not (folder / SUMS).exists():
        return
    try:
        noted = json.loads((folder / SUMS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{SUMS} is not as it was written") from error
    found = _sums(folder)
    for file, total in noted.items():
        if found.get(file) != total:
            raise ValueError(f"{file} {'is not as it was written' if file in found else 'is missing'}")
