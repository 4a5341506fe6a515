"""Results of long computations, kept by what they were computed from: the same question is answered once.

A result lies in NAME-HASH.npz, where the hash is of all that the result depends on, as JSON. Files are whole or not there.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hopjax.cli.output import write


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that differ where any of the inputs does."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


class Stages:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, inputs: Mapping[str, Any], make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays that `make` gives, or gave when it was last asked with these inputs.

        A file that is damaged counts as missing.

        Args:
            inputs: all that the result depends on, the data's content and the models' included: plain JSON.
        """
        file = self.folder / f"{name}-{fingerprint(inputs)}.npz"
        try:
            with file.open("rb") as stored, np.load(stored, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            pass  # missing, or damaged
        made = {key: np.asarray(array) for key, array in make().items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **made)  # type: ignore[arg-type]
        write(file, buffer.getvalue())
        return made
