"""CIFAR-10 as its authors give it out: Python pickles or binary records; CIFAR-100's pickles too. Pixels become (n, 32, 32, 3)."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hopjax.data.images import DataError
from hopjax.data.pickles import load
from hopjax.data.reading import MAX_BYTES, Content, Reading, listing

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VALUES = 3 * 32 * 32
RECORD = 1 + VALUES

# md5 of the official files; the binary batches' are not published one by one.
CHECKSUMS = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}


class Batch(NamedTuple):
    """Pixels (n, 32, 32, 3) and labels (n,) of one file, and which of its `held` images they are."""

    pixels: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    held: int


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins like this is a pickle of protocol 2 to 5."""
    return len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def are_records(file: Path) -> bool:
    """Whether a file's size is that of CIFAR-10's binary records: a label, then the red, green and blue planes."""
    size = file.stat().st_size
    return size > 0 and size % RECORD == 0


def parts(folder: Path) -> dict[str, list[Path]]:
    """The batch files of a folder by split; none if it is not one of CIFAR's folders."""
    files = [path for path in listing(folder) if path.is_file()]
    suffix = ".bin" if any(path.name.endswith("_batch.bin") or path.match("data_batch_*.bin") for path in files) else ""
    found = {
        "train": [path for path in files if path.match(f"data_batch_*{suffix}") and path.suffix == suffix],
        "test": [path for path in files if path.name == f"test_batch{suffix}"],
    }
    if not any(found.values()) and (folder / "meta").is_file():  # CIFAR-100
        found = {name: [path for path in files if path.name == name] for name in found}
    return {name: paths for name, paths in found.items() if paths}


def read_parts(folder: Path, found: dict[str, list[Path]], reading: Reading) -> Content:
    """The batches of one split, one after the other.

    Raises: DataError if one cannot be read, unless `skip_bad` and another can.
    """
    return _batches(found[reading.choose(folder, found)], folder, reading)


def read_file(file: Path, reading: Reading) -> Content:
    """One batch."""
    reading.no_splits(file)
    return _batches([file], file, reading)


def _batches(files: Sequence[Path], where: Path, reading: Reading) -> Content:
    batches: list[Batch] = []
    before = 0
    for file in files:
        held = sum(len(batch.pixels) for batch in batches)
        if not reading.wants(held):
            break
        with file.open("rb") as stream:
            pickled = is_pickle(stream.read(3))
        try:
            batch = _pickled(file, reading) if pickled else _records(file, reading)
        except DataError as error:
            if len(files) == 1 or not reading.skip_bad:
                raise
            reading.bad(file, str(error).removeprefix(f"{file}: "))
            continue
        count = reading.at_most(held + len(batch.pixels)) - held
        batches.append(Batch(batch.pixels[:count], batch.labels[:count], before + batch.places[:count], batch.held))
        before += batch.held
    if not batches:
        raise DataError(f"{where}: none of its batches can be read")
    pixels, labels, places = (np.concatenate([batch[part] for batch in batches]) for part in range(3))
    return Content(pixels, labels, _class_names(files[0].parent, int(labels.max(initial=0)) >= len(CLASSES), reading), places)


def _class_names(folder: Path, many: bool, reading: Reading) -> tuple[str, ...] | None:
    """The names that lie beside the batches; else CIFAR-10's own, unless there are `many` classes."""
    try:
        for name, key in (("batches.meta", "label_names"), ("meta", "fine_label_names")):
            file = folder / name
            if file.is_file() and file.stat().st_size < 1 << 20:
                names = _plain(load(file.read_bytes())).get(key)
                if isinstance(names, list) and names and len(set(map(_text, names))) == len(names):
                    return tuple(map(_text, names))
                raise DataError(f"has no list of distinct names under {key!r}")
    except DataError as error:
        reading.warnings.append(f"{file}: the classes' names cannot be read: {error}")
    return None if many else CLASSES


def _plain(batch: object) -> dict[str, object]:
    """A batch's dictionary with text for keys: some writers leave bytes."""
    if not isinstance(batch, dict):
        raise DataError("is a pickle, but not of CIFAR's dictionary")
    return {_text(key): value for key, value in batch.items()}


def _text(name: object) -> str:
    if not isinstance(name, str | bytes | int):
        raise DataError("holds something other than names where names should be")
    return name.decode("latin-1") if isinstance(name, bytes) else str(name)


def _pickled(file: Path, reading: Reading) -> Batch:
    if file.stat().st_size > MAX_BYTES:
        raise DataError(f"{file}: is larger than any batch of CIFAR")
    try:
        batch = _plain(load(file.read_bytes()))
        data, labels = batch.get("data"), batch.get("labels", batch.get("fine_labels"))
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != VALUES:
            raise DataError(f"has no 'data' of {VALUES} bytes per image: is it one of CIFAR's batches (data_batch_1 … 5, test_batch)?")
        if isinstance(labels, list) and all(type(label) is int and 0 <= label < 1000 for label in labels):
            labels = np.array(labels, np.int64)
        if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.shape != data.shape[:1]:
            raise DataError(f"has no whole number between 0 and 999 in 'labels' for each of its {len(data)} images")
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    reading.verify(file, CHECKSUMS, "CIFAR")
    return Batch(_upright(data), labels.astype(np.int64), np.arange(len(data)), len(data))


def _records(file: Path, reading: Reading) -> Batch:
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"{file}: is larger than any batch of CIFAR-10")
    whole, rest = divmod(size, RECORD)
    if whole == 0:
        raise DataError(f"{file}: is no pickle and holds not even one record of {RECORD} bytes: empty or cut short")
    if rest:
        reading.bad(file, f"ends inside a record: {size} bytes are {whole} records of {RECORD} and {rest} bytes more; cut short?")
    whole = reading.at_most(whole)
    records = np.fromfile(file, np.uint8, whole * RECORD).reshape(-1, RECORD)
    labels = records[:, 0].astype(np.int64)
    good = labels < len(CLASSES)
    if not good.all():
        first = int(np.argmin(good))
        reading.bad(file, f"{int((~good).sum())} labels are not 0 … 9, the first {labels[first]} of record {first}: no CIFAR-10 records?")
    return Batch(_upright(records[good, 1:]), labels[good], np.flatnonzero(good), whole)


def _upright(planes: np.ndarray) -> np.ndarray:
    """Red, green and blue planes as pixels."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
