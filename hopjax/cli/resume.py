"""Finished blocks of a long computation, kept beside the file that they will become."""

import contextlib
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hopjax.cli.output import write


class Partial:
    """The folder FILE.partial, with a folder of blocks for each setting: a setting never meets another's blocks.

    Args:
        out: the file that is being computed.
        settings: all that its numbers depend on, the data's content included.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.folder = out.with_name(f"{out.name}.partial")
        self._blocks = self.folder / fingerprint[:16]

    def load(self, stage: str) -> list[dict[str, np.ndarray]]:
        """The stage's blocks from the first row on, as far as there is no gap. A block that cannot be read counts as missing."""
        found: list[dict[str, np.ndarray]] = []
        done = 0
        while True:
            try:
                with self._file(stage, done).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                    block = dict(stored)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile):
                return found
            found.append(block)
            done += rows(block)

    def save(self, stage: str, start: int, block: Mapping[str, np.ndarray]) -> None:
        """Keeps a block; killed while it is written, there is none."""
        buffer = io.BytesIO()
        np.savez(buffer, **block)  # type: ignore[arg-type]
        write(self._file(stage, start), buffer.getvalue())

    def discard(self) -> None:
        """To be called when the file is there: what other settings have begun is kept."""
        shutil.rmtree(self._blocks, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _file(self, stage: str, start: int) -> Path:
        return self._blocks / f"{stage}-{start:012d}.npz"


def rows(block: Mapping[str, np.ndarray]) -> int:
    """How many samples a block is about."""
    return len(next(iter(block.values())))


def joined(blocks: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Blocks one after the other."""
    blocks = list(blocks)
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
