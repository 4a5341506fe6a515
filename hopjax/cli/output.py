"""Files that are either complete or not there."""

import contextlib
import os
import tempfile
from collections.abc import Iterable
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


def check_apart(option: str, path: Path, sources: Iterable[str | Path]) -> None:
    """Raises UsageError for a file to write that is one of these, or lies in a folder among them: what is read is not written to."""
    for source in map(os.path.expanduser, sources):
        with contextlib.suppress(OSError, ValueError):  # what cannot be read is refused where it is read
            if path.exists() and os.path.samefile(path, source):
                raise UsageError(f"{option} {path} is what is read: name another file")
            if os.path.isdir(source) and path.resolve().is_relative_to(Path(source).resolve()):
                raise UsageError(f"{option} {path} is in the folder {source}, which is read: name a file outside it")


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
