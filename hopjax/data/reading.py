"""One call of `read`: what was asked for, what there is to say about it, and the care that all formats need."""

import contextlib
import hashlib
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hopjax.data.images import DataError

# More than this is never unpacked into memory on the word of a file's header; arrays larger than it can be mapped from a .npy file.
MAX_BYTES = 8 << 30
# Bytes asked for at a time: memory grows with what a file holds, not with what its header claims.
CHUNK = 1 << 20

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "t10k": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")

# What pip calls the packages whose modules have another name.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


class Content(NamedTuple):
    """What a format's reader finds: pixels (n, h, w, c), labels (n,) if any, names of the classes if known; places and files of `Images`.

    A batch or shard that cannot be read at all is not known to hold anything: it counts for no places.
    """

    pixels: np.ndarray
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    places: np.ndarray | None = None
    files: tuple[str, ...] | None = None


@dataclass
class Reading:
    """What one call of `read` asks for, and the remarks it gathers.

    Attributes:
        split: the part asked for; None for the default.
        size: (height, width) to resize to; None to leave images as they are.
        greyscale: one channel (True), three (False), or as it is (None).
        skip_bad: whether what cannot be read is left out rather than refused.
        limit: how many images at most.
        warnings, skipped: as in `Images`.
    """

    split: str | None = None
    size: tuple[int, int] | None = None
    greyscale: bool | None = None
    skip_bad: bool = False
    limit: int | None = None
    warnings: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def bad(self, file: Path | str, reason: str) -> None:
        """Refuse a part of the data, or write it down as skipped."""
        if not self.skip_bad:
            raise DataError(f"{file}: {reason} (skip_bad=True leaves it out)")
        self.skipped.append((str(file), reason))

    def wants(self, held: int) -> bool:
        """Whether more images are wanted than are held."""
        return self.limit is None or held < self.limit

    def at_most(self, count: int) -> int:
        """How many of `count` images are wanted."""
        return count if self.limit is None else min(count, self.limit)

    def choose(self, where: Path | str, splits: Iterable[str]) -> str:
        """The split to read, of those there are: the one asked for, else the training split, else the only one."""
        there = sorted(set(splits))
        wanted = SPLITS.get(self.split.lower(), self.split) if self.split else "train" if "train" in there else there[0]
        if wanted not in there:
            raise DataError(f"{where}: has no split {self.split!r}, only {', '.join(there)}")
        if self.split is None and wanted != "train" and len(there) > 1:
            raise DataError(f"{where}: say which split: {', '.join(there)}")
        return wanted

    def no_splits(self, where: Path | str) -> None:
        """Refuse `split` where the data are in one piece."""
        if self.split:
            raise DataError(f"{where}: is not divided into splits: leave split={self.split!r} out, or give the folder that holds them")

    def verify(self, file: Path, checksums: dict[str, str], name: str) -> None:
        """Warn if a file named like one of the official data set differs from it."""
        if expected := checksums.get(file.name):
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            if found != expected:
                self.warnings.append(f"{file}: is not the official {name} file (md5 {found}, not {expected}): altered, or another data set")


def library(module: str) -> Any:
    """A module of the `data` extra, imported when it is first needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"this needs {PACKAGES.get(package, package)}: pip install 'hopjax[data]' ({error})") from None


@contextlib.contextmanager
def decoding(file: Path | str, what: str) -> Iterator[None]:
    """Turn whatever a decoder raises on a broken file into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # decoders pass on what they stumble over: zlib.error, struct.error, KeyError, MemoryError and more
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"{file}: cannot be read as {what}, corrupt or cut short: {reason}") from None


def read_up_to(read: Callable[[int], bytes], size: int) -> tuple[bytes, str | None]:
    """At most `size` bytes of a (compressed) stream, and why there were fewer, if it broke off.

    Args:
        read: the stream's `read1`, which hands out what comes before a break; `read` loses it.
    """
    parts, held = [], 0
    try:
        while held < size and (part := read(min(CHUNK, size - held))):
            parts.append(part)
            held += len(part)
    except EOFError as error:
        return b"".join(parts), str(error)
    return b"".join(parts), None


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which img2 comes before img10."""
    return [(0, int(part), "") if part.isdecimal() and len(part) < 4000 else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def listing(folder: Path) -> list[Path]:
    """What is in a folder, in natural order, without hidden entries and what archives of other systems leave behind."""
    names = (path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX")))
    return sorted(names, key=lambda path: (natural(path.name), path.name))


def split_of(name: str) -> str | None:
    """The split that a word of a file's or folder's name stands for."""
    return next((SPLITS[word] for word in re.findall(r"[a-z]+(?:10k)?", name.lower()) if word in SPLITS), None)


def some(names: Sequence[object], most: int = 5) -> str:
    """The first few of many names."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
