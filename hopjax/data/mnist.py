"""MNIST's idx files, plain or gzipped, with images and labels in two files side by side; Fashion-MNIST and others use them too."""

import gzip
import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hopjax.data.images import DataError
from hopjax.data.reading import MAX_BYTES, Content, Reading, decoding, listing, read_up_to, split_of

IMAGES, LABELS = b"\x00\x00\x08\x03", b"\x00\x00\x08\x01"  # unsigned bytes in three dimensions, and in one

# md5 of the official files.
CHECKSUMS = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


def magic(file: Path) -> bytes:
    """The first four bytes, unpacked."""
    with decoding(file, "gzip"), unpacked(file) as stream:
        return read_up_to(stream.read1, 4)[0]


def size_fits(file: Path) -> bool:
    """Whether a file that is not packed has just the size that its idx header says."""
    with file.open("rb") as stream:
        head = stream.read(16)
    dims = 3 if head.startswith(IMAGES) else 1
    if not head.startswith((IMAGES, LABELS)) or len(head) < 4 + 4 * dims:
        return False
    return file.stat().st_size == 4 + 4 * dims + math.prod(struct.unpack_from(f">{dims}I", head, 4))


def parts(folder: Path) -> dict[str, Path]:
    """The image files of a folder by split, unpacked ones first; none if it holds no idx files."""
    found: dict[str, Path] = {}
    for file in sorted(listing(folder), key=lambda path: path.suffix == ".gz"):
        if file.is_file() and ("idx" in file.name or "ubyte" in file.name) and _is(file, IMAGES):
            found.setdefault(split_of(file.name) or file.name, file)
    return found


def read_parts(folder: Path, found: dict[str, Path], reading: Reading) -> Content:
    """One split."""
    return _pair(found[reading.choose(folder, found)], reading)


def read_file(file: Path, reading: Reading) -> Content:
    """The images of one file, with the labels that lie beside it."""
    reading.no_splits(file)
    return _pair(file, reading)


@contextmanager
def unpacked(file: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """A file's bytes, without the gzip around them if there is one."""
    with file.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if packed:
            with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
                yield stream
        else:
            yield raw


def _is(file: Path, kind: bytes) -> bool:
    try:
        head = magic(file)
    except DataError:
        head = b""
    # A file cut to nothing, or a broken gzip, is what its name says: reading it tells what is wrong.
    return head == kind or (len(head) < 4 and kind == IMAGES and "images" in file.name)


def _pair(file: Path, reading: Reading) -> Content:
    if _is(file, LABELS):
        raise DataError(f"{file}: holds labels: give the file of the images, the labels beside it are found")
    images = _read(file, IMAGES, reading)
    beside = _labels_beside(file)
    if beside is None:
        reading.warnings.append(f"{file}: no file of labels beside it")
        return Content(images[..., None])
    labels = _read(beside, LABELS, reading).astype(np.int64)
    if len(images) != len(labels):
        reading.bad(beside, f"has {len(labels)} labels for {len(images)} images: one of the two files is cut short or of another set")
    count = min(len(images), len(labels))
    if count == 0:
        raise DataError(f"{file}: holds no image with a label")
    return Content(images[:count, :, :, None], labels[:count], tuple(map(str, range(int(labels[:count].max()) + 1))))


def _labels_beside(file: Path) -> Path | None:
    name = file.name.replace("images", "labels").replace("idx3", "idx1")
    plain = name.removesuffix(".gz")
    candidates = (file.with_name(beside) for beside in (name, plain, f"{plain}.gz") if beside != file.name)
    return next((path for path in candidates if path.is_file() and _is(path, LABELS)), None)


def _read(file: Path, kind: bytes, reading: Reading) -> np.ndarray:
    """The array in an idx file: of what its header claims, no more is read than is wanted."""
    dims = 3 if kind == IMAGES else 1
    with decoding(file, "idx (MNIST's format)"), unpacked(file) as stream:
        head, broken = read_up_to(stream.read1, 4 + 4 * dims)
        if len(head) < 4 + 4 * dims or not head.startswith(kind):
            raise DataError(f"{file}: is no idx file of {'images' if dims == 3 else 'labels'}, or cut short in its header")
        count, *shape = struct.unpack_from(f">{dims}I", head, 4)
        each = math.prod(shape)
        if count == 0 or each == 0:
            raise DataError(f"{file}: its header says {' × '.join(map(str, (count, *shape)))}: holds nothing")
        wanted = reading.at_most(count)
        if wanted * each > MAX_BYTES:
            raise DataError(f"{file}: its header claims {' × '.join(map(str, (count, *shape)))} bytes, more than {MAX_BYTES} are not read")
        # One byte more, to see whether there is more than the header says: that also makes gzip compare its checksum.
        data, broken = read_up_to(stream.read1, wanted * each + (wanted == count))
    if len(data) > wanted * each:
        raise DataError(f"{file}: holds more than the {count} items that its header says: corrupt, or another kind of file")
    whole = len(data) // each
    if whole < wanted:
        reading.bad(file, f"ends after {whole} of {count} items: cut short{f' ({broken})' if broken else ''}")
    reading.verify(file, CHECKSUMS, "MNIST")
    return np.frombuffer(data, np.uint8, whole * each).reshape(whole, *shape)
