"""What a path holds, told by its content; the one way in."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from hopjax.data import arrays, cifar, mnist, parquet, pictures
from hopjax.data.images import DataError, Images
from hopjax.data.reading import Content, Reading, decoding, listing, read_up_to, some
from hopjax.data.samples import SAMPLES

RECOGNISED = (
    "CIFAR-10 (the folder cifar-10-batches-py or cifar-10-batches-bin, or one of its batches), CIFAR-100 in Python's format, "
    "MNIST's idx files (.gz or unpacked), the hub's parquet files, .npy and .npz, "
    "a folder of PNG, JPEG or WebP pictures or of one such folder per class"
)
ARCHIVES = (b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\x28\xb5\x2f\xfd")


def read(
    path_or_name: str | os.PathLike[str],
    *,
    split: str | None = None,
    size: int | tuple[int, int] | None = None,
    greyscale: bool | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
) -> Images:
    """Read a set of images, of whatever kind it is. No file can run code, or take more memory than its own size and format warrant.

    Args:
        path_or_name: a file or folder, or the name of a built-in set: digits, mnist-5k, photographs (a file of such a name is ./digits).
        split: train, test or another that the data have; by default the training split, or the only one.
        size: side, or (height, width), that images are stretched to (bilinear); by default they must be of one size.
        greyscale: True for one channel, False for three; by default images must be all the one or all the other.
        skip_bad: leave out what cannot be read, and list it in `skipped`, instead of refusing.
        limit: read the first so many images, of folders by class the first of every class; fewer if some of those are skipped.

    Raises: DataError naming the file and the way out, whatever is wrong with it.
    """
    shape = (size, size) if isinstance(size, int) else size
    if shape is not None and (min(shape) < 1 or shape[0] * shape[1] > pictures.MAX_PIXELS):
        raise DataError(f"size must be between 1 and {pictures.MAX_PIXELS} pixels, got {size}")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}")
    if not str(path_or_name):  # pathlib would take it for the current folder
        raise DataError(f"the path is empty; built in: {', '.join(SAMPLES)}; recognised: {RECOGNISED}")
    reading = Reading(split, shape, greyscale, skip_bad, limit)
    if isinstance(path_or_name, str) and path_or_name in SAMPLES:
        reading.no_splits(path_or_name)
        content = SAMPLES[path_or_name]()
        wanted = slice(limit)
        content = Content(content.pixels[wanted], None if content.labels is None else content.labels[wanted], content.classes)
    else:
        try:
            path = Path(path_or_name).expanduser()
            content = _reader(path, str(path_or_name))(path, reading)
        except (OSError, RuntimeError) as error:  # no permission, a name too long, a home that is unknown
            raise DataError(f"{path_or_name}: cannot be opened: {error}") from None
    content = pictures.conform(content, reading, str(path_or_name))
    pixels, labels, classes, places, files = content
    return Images(pixels, labels, classes, str(path_or_name), tuple(reading.warnings), tuple(reading.skipped), places, files)


def _reader(path: Path, name: str) -> Callable[[Path, Reading], Content]:
    if path.is_dir():
        return _read_folder
    if path.is_file():
        return _file_reader(path)
    if path.exists() or path.is_symlink():
        raise DataError(f"{path}: is {'neither a file nor a folder' if path.exists() else 'a broken link'}")
    beside = [entry.name for entry in listing(path.parent)] if path.parent.is_dir() else []
    near = difflib.get_close_matches(name, SAMPLES, n=2) + [
        str(path.with_name(match)) for match in difflib.get_close_matches(path.name, beside, n=3, cutoff=0.7)
    ]
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise DataError(f"{name}: does not exist; {guess}Built in: {', '.join(SAMPLES)}; recognised: {RECOGNISED}")


def _read_folder(folder: Path, reading: Reading) -> Content:
    for depth in range(3):  # torchvision keeps MNIST two levels below the folder that it is given, the hub keeps parquet one below
        found = [reader for inner in _inner(folder, depth) if (reader := _data_set(inner))]
        if len(found) > 1:
            raise DataError(f"{folder}: holds several data sets: give the folder of one: {some([where for where, _ in found])}")
        if found:
            return found[0][1](reading)
    return pictures.read_folder(folder, reading)


def _inner(folder: Path, depth: int) -> list[Path]:
    """The folders this far below."""
    if depth == 0:
        return [folder]
    return [inner for outer in _inner(folder, depth - 1) for inner in listing(outer) if inner.is_dir()]


def _data_set(folder: Path) -> tuple[Path, Callable[[Reading], Content]] | None:
    """The folder and its reader, if it is one of a data set in files of known names."""
    if batches := cifar.parts(folder):
        return folder, lambda reading: cifar.read_parts(folder, batches, reading)
    if files := mnist.parts(folder):
        return folder, lambda reading: mnist.read_parts(folder, files, reading)
    if shards := parquet.parts(folder):
        return folder, lambda reading: parquet.read_parts(folder, shards, reading)
    return None


def _file_reader(file: Path) -> Callable[[Path, Reading], Content]:
    with file.open("rb") as stream:
        head = stream.read(512)
    if head.startswith(b"PAR1"):
        return parquet.read_file
    if head.startswith(b"\x93NUMPY"):
        return arrays.read_npy
    if pictures.is_picture(head):
        return pictures.read_file
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        if arrays.is_npz(file):
            return arrays.read_npz
        raise _archive(file)
    if head.startswith(b"\x1f\x8b"):
        with decoding(file, "gzip"), mnist.unpacked(file) as stream:
            head, _ = read_up_to(stream.read1, 512)
        if head.startswith((mnist.IMAGES, mnist.LABELS)):
            return mnist.read_file
        raise _archive(file)
    if head[257:262] == b"ustar" or head.startswith(ARCHIVES):
        raise _archive(file)
    # A batch of CIFAR's records may begin like an idx header: sizes tell them apart.
    if head.startswith((mnist.IMAGES, mnist.LABELS)) and (mnist.size_fits(file) or not cifar.are_records(file)):
        return mnist.read_file
    if cifar.is_pickle(head) or cifar.are_records(file) or (file.suffix == ".bin" and "batch" in file.name):
        return cifar.read_file
    raise DataError(f"{file}: is {f'not recognised by its first bytes {head[:8]!r}' if head else 'empty'}; recognised: {RECOGNISED}")


def _archive(file: Path) -> DataError:
    if file.name.startswith("cifar-10-"):
        folder = "cifar-10-batches-bin" if "binary" in file.name else "cifar-10-batches-py"
        return DataError(f"{file}: is an archive: unpack it (tar -xf {file.name}) and give the folder {folder}")
    return DataError(f"{file}: is an archive or packed: unpack it and give the folder or file that was in it")
