"""Checkpoints of a training run with Orbax: each is whole or not there, and a damaged one gives way to the one before.

Nothing is unpickled. A checkpoint is written before `save` returns: the state is donated to the next step, so a write in the background
would need a copy.
"""

import errno
import itertools
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

BROKEN = ".broken"


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
    """The checkpoints in a folder, one for each step that was saved; the latest `keep` are kept.

    Use as a context manager: it closes Orbax's files and threads.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._checkpointer = self._open()

    def _open(self) -> Any:
        from orbax.checkpoint import v1 as ocp  # takes seconds to import

        return ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,  # of a run that was killed while it wrote
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
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError) and os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise CheckpointError(f"{self.folder}: a checkpoint could not be written: {error}") from error

    def restore(self, state: Any) -> Restored | None:
        """The latest checkpoint that can be read; None if there is none at all.

        Args:
            state: what is expected: arrays, real or abstract, with their shardings.

        A damaged checkpoint is renamed to N.broken, with a warning that says which one took its place.

        Raises: CheckpointError if there are checkpoints, but none can be read.
        """
        steps = self.steps[::-1]
        for step, earlier in itertools.zip_longest(steps, steps[1:]):
            try:
                found = self._checkpointer.load_checkpointables(step, {"state": state})
                record = self._checkpointer.metadata(step).custom_metadata
            except Exception as error:  # whatever Orbax and tensorstore say of a file that is cut short
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                if earlier is None:
                    raise CheckpointError(
                        f"{self.folder / str(step)} cannot be read ({reason}), and there is no earlier checkpoint"
                    ) from error
                self._checkpointer.close()
                (self.folder / str(step)).rename(self.folder / f"{step}{BROKEN}")
                self._checkpointer = self._open()
                warnings.warn(f"checkpoint {step} cannot be read ({reason}); going on from {earlier}", stacklevel=2)
                continue
            return Restored(step, found["state"], dict(record or {}))
        return None
