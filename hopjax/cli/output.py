"""Files that are either complete or not there."""

import contextlib
import os
import tempfile
from pathlib import Path

from hopjax.cli.options import UsageError

TABLES = (".parquet", ".csv", ".npz")


def check_suffix(path: Path) -> None:
    """Raises UsageError for a table's name that says no format."""
    if path.suffix not in TABLES:
        raise UsageError(f"{path}: a table's name ends in one of {', '.join(TABLES)}, such as {path.with_suffix('.parquet')}")


def check_writable(option: str, path: Path) -> None:
    """Finds out before the work, not after it; makes the folder."""
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder", str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be written ({error.strerror}): name a file that can") from None


def write(path: Path, content: bytes) -> None:
    """All of the file or none of it: readers see the old content until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
