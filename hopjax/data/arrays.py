"""NumPy's .npy and .npz files: arrays of images (n, h, w) or (n, h, w, c), or of rows (n, d)."""

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from hopjax.data.images import DataError
from hopjax.data.reading import MAX_BYTES, SPLITS, Content, Reading, decoding, read_up_to, some

IMAGES = ("images", "image", "imgs", "x", "data", "pixels")
LABELS = ("labels", "label", "y", "targets")
# Values looked at at a time, so that a mapped file need not fit into memory.
BLOCK = 1 << 24


def read_npy(file: Path, reading: Reading) -> Content:
    """Images without labels, mapped from the file where their type allows it."""
    reading.no_splits(file)
    with decoding(file, "a NumPy array"):
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    return _without_bad(Content(_images(array[: reading.limit] if array.ndim else array, file)), file, reading)


def is_npz(file: Path) -> bool:
    """Whether a zip archive holds NumPy arrays and nothing else."""
    with decoding(file, "a zip archive"), zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(file: Path, reading: Reading) -> Content:
    """Images and, if there are any, labels, under their usual names; names like x_train and y_test make splits.

    Raises: DataError if no array is named like images, or one claims more than the archive holds.
    """
    with decoding(file, "a NumPy archive"), zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        roles = {name: role for name in members if (role := _role(name))}
        if len(members) == 1:  # whatever it is called
            roles = {name: ("images", "") for name in members}
        splits = {split for kind, split in roles.values() if kind == "images"}
        if not splits:
            raise DataError(f"{file}: no array is named {', '.join(IMAGES)}, only {some(list(members))}")
        split = reading.choose(file, splits) if splits != {""} else ""
        if not split:
            reading.no_splits(file)
        names = {kind: [name for name, role in roles.items() if role == (kind, split)] for kind in ("images", "labels")}
        if max(map(len, names.values())) > 1:
            raise DataError(f"{file}: holds more than one candidate: {some(names['images'] + names['labels'])}")
        arrays = {kind: _member(archive, members[name], file) for kind, (name,) in ((k, n) for k, n in names.items() if n)}
    pixels = _images(arrays["images"], file)
    labels = _labels(arrays["labels"], len(pixels), file) if "labels" in arrays else None
    wanted = slice(reading.limit)
    return _without_bad(Content(pixels[wanted], None if labels is None else labels[wanted]), file, reading)


def _role(name: str) -> tuple[str, str] | None:
    """What an array's name says: images or labels, and of which split ("" for none)."""
    words = re.split(r"[_\-./ ]+", name.lower())
    kinds = ["images" if word in IMAGES else "labels" for word in words if word in IMAGES + LABELS]
    splits = [SPLITS[word] for word in words if word in SPLITS]
    return (kinds[0], splits[0] if splits else "") if len(kinds) == 1 and len(words) == 1 + len(splits) < 3 else None


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Path) -> np.ndarray:
    """One array of an archive; numpy.load would allocate what its header claims."""
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        header: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
        if dtype.hasobject:
            raise DataError(f"{file}: {info.filename} holds Python objects, which are never read: save plain arrays of numbers")
        claimed = math.prod(shape) * dtype.itemsize
        if claimed > MAX_BYTES:
            raise DataError(
                f"{file}: {info.filename} claims {claimed} bytes, more than {MAX_BYTES} are not unpacked: save it as .npy instead"
            )
        data, _ = read_up_to(stream.read, claimed + 1)
    if len(data) != claimed:
        more = "more" if len(data) > claimed else f"only {len(data)}"
        raise DataError(f"{file}: {info.filename} should hold {claimed} bytes by its header, but holds {more}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _images(array: np.ndarray, file: Path) -> np.ndarray:
    """An array as (n, h, w, c) of bytes or float32."""
    if array.dtype.kind not in "biuf":
        raise DataError(f"{file}: holds {array.dtype}, images must be numbers")
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise DataError(f"{file}: has shape {array.shape}: need (n, h, w), (n, h, w, c) or (n, d)")
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] > 4:
        raise DataError(f"{file}: has shape {array.shape}, channels first it seems: save array.transpose(0, 2, 3, 1)")
    if array.ndim == 4 and array.shape[3] > 4:
        raise DataError(f"{file}: has shape {array.shape}: at most 4 channels")
    pixels = array.reshape(array.shape[0], 1, -1, 1) if array.ndim == 2 else array.reshape(array.shape[:3] + (array.shape[3:] or (1,)))
    if pixels.dtype == np.uint8 or pixels.dtype == np.float32:
        return pixels
    if pixels.dtype.kind in "iu" and pixels.min() >= 0 and pixels.max() <= 255:
        return pixels.astype(np.uint8)
    if pixels.dtype.kind in "iu":
        raise DataError(f"{file}: holds whole numbers from {pixels.min()} to {pixels.max()}: save bytes (0 … 255) or floats")
    with np.errstate(over="ignore"):  # infinities are found below
        return pixels.astype(np.float32)


def _labels(array: np.ndarray, count: int, file: Path) -> np.ndarray:
    flat = array.reshape(-1) if array.ndim == 2 and array.shape[1] == 1 else array
    if flat.shape != (count,):
        raise DataError(f"{file}: has labels of shape {array.shape} for {count} images")
    if flat.dtype.kind not in "iuf" or not (np.isfinite(flat).all() and (flat == np.floor(flat)).all() and (abs(flat) < 1 << 31).all()):
        raise DataError(f"{file}: labels must be whole numbers")
    return flat.astype(np.int64)


def _without_bad(content: Content, file: Path, reading: Reading) -> Content:
    """Images with a NaN, or a number too large for float32, are refused or left out."""
    pixels = content.pixels
    if pixels.dtype == np.uint8:
        return content
    rows = max(1, BLOCK // math.prod(pixels.shape[1:]))
    blocks = (pixels[start : start + rows] for start in range(0, len(pixels), rows))
    finite = np.concatenate([np.isfinite(block).all(axis=(1, 2, 3)) for block in blocks])
    if finite.all():
        return content
    reading.bad(
        file, f"{int((~finite).sum())} images hold NaN or infinite values (or exceed float32), the first is image {int(np.argmin(finite))}"
    )
    labels = None if content.labels is None else content.labels[finite]
    return content._replace(pixels=pixels[finite], labels=labels, places=np.flatnonzero(finite))
