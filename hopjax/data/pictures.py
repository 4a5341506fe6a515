"""PNG, JPEG and WebP files: one by one, or in folders with one folder per class."""

import io
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hopjax.data.images import DataError
from hopjax.data.reading import Content, Reading, decoding, library, listing, some, split_of

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Larger pictures are refused before they are unpacked: a few kilobytes of PNG can claim gigabytes. Below pillow's own limit.
MAX_PIXELS = 1 << 26


def is_picture(head: bytes) -> bool:
    """Whether a file that begins like this is a PNG, JPEG or WebP picture."""
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def luma(pixels: np.ndarray) -> np.ndarray:
    """One channel of three by ITU-R 601, in the integer arithmetic that pillow uses for bytes."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    if pixels.dtype == np.uint8:
        weighted = 19595 * red.astype(np.uint32) + 38470 * green.astype(np.uint32) + 7471 * blue.astype(np.uint32)
        return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., None]
    return (np.float32(0.299) * red + np.float32(0.587) * green + np.float32(0.114) * blue)[..., None]


def conform(content: Content, reading: Reading, where: Path | str) -> Content:
    """Pixels with the channels and the size asked for.

    Raises: DataError where that is no image, or has channels that are no colours.
    """
    pixels = content.pixels
    if (reading.greyscale is not None or reading.size is not None) and pixels.shape[1] == 1 < pixels.shape[2]:
        raise DataError(f"{where}: holds rows of numbers, not images: size and greyscale cannot be used")
    if reading.greyscale is not None and pixels.shape[3] not in (1, 3):
        raise DataError(f"{where}: has {pixels.shape[3]} channels: greyscale needs 1 or 3")
    if reading.greyscale is True and pixels.shape[3] == 3:
        pixels = luma(pixels)
    elif reading.greyscale is False and pixels.shape[3] == 1:
        pixels = np.repeat(pixels, 3, axis=3)
    if reading.size is not None and pixels.shape[1:3] != reading.size:
        height, width = reading.size
        bilinear = library("PIL.Image").Resampling.BILINEAR
        pixels = by_plane(pixels, lambda plane: plane.resize((width, height), bilinear), reading.size)
    return content._replace(pixels=pixels)


def by_plane(pixels: np.ndarray, move: Callable[[Any], Any], shape: tuple[int, int]) -> np.ndarray:
    """Apply a pillow operation to every channel of every image; the results have this height and width."""
    pillow = library("PIL.Image")
    moved = np.empty((len(pixels), *shape, pixels.shape[3]), pixels.dtype)
    for image, target in zip(pixels, moved, strict=True):
        for channel in range(pixels.shape[3]):
            target[:, :, channel] = move(pillow.fromarray(np.ascontiguousarray(image[:, :, channel])))
    return moved


def decode(data: bytes, name: str, reading: Reading) -> tuple[np.ndarray, list[str]]:
    """One picture as (h, w, c) bytes, upright, with the size and channels that `reading` asks for; and what was odd about it.

    Transparent pixels are laid on black, 16 bits are reduced to 8.

    Raises: DataError naming the file, whatever is wrong with it.
    """
    pillow, operations = library("PIL.Image"), library("PIL.ImageOps")
    remarks = []
    with decoding(name, "a picture"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        with pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(f"{name}: claims {picture.width} × {picture.height} pixels, more than {MAX_PIXELS} are not unpacked")
            if getattr(picture, "n_frames", 1) > 1:
                raise DataError(f"{name}: is an animation of {picture.n_frames} pictures: keep one")
            if any("16" in str(tile[3]) for tile in picture.tile):
                remarks.append("16 bits reduced to 8")
            upright = operations.exif_transpose(picture)
        if upright.mode.startswith("I"):  # pillow's own conversion would clip at 255
            upright = pillow.fromarray(((np.asarray(upright).astype(np.int64) + 128) // 257).astype(np.uint8))
        if upright.has_transparency_data:
            grey, layered = upright.mode in ("L", "LA", "La"), upright.convert("RGBA")
            if layered.getchannel("A").getextrema()[0] < 255:
                remarks.append("transparent pixels laid on black")
            upright = pillow.alpha_composite(pillow.new("RGBA", layered.size, (0, 0, 0, 255)), layered).convert("L" if grey else "RGB")
        grey = reading.greyscale if reading.greyscale is not None else upright.mode in ("1", "L", "LA")
        upright = upright.convert("RGB" if upright.mode not in ("1", "L", "RGB") else upright.mode).convert("L" if grey else "RGB")
        if reading.size is not None and upright.size != reading.size[::-1]:
            upright = upright.resize(reading.size[::-1], pillow.Resampling.BILINEAR)
        pixels = np.asarray(upright)
    remarks += [str(warning.message).partition("\n")[0] for warning in caught]
    return pixels if pixels.ndim == 3 else pixels[:, :, None], remarks


def decode_all(named: Iterable[tuple[str, bytes | Path]], reading: Reading) -> tuple[np.ndarray | None, list[int]]:
    """Many pictures as one array (None if there is none), and which of them it holds: the readable ones of the commonest shape."""
    library("PIL.Image")  # if it is missing, that is no picture's fault
    pictures: dict[int, np.ndarray] = {}
    remarks: dict[str, list[str]] = {}
    names: list[str] = []
    for place, (name, source) in enumerate(named):
        names.append(name)
        try:
            with decoding(name, "a picture"):
                data = source if isinstance(source, bytes) else source.read_bytes()
            pictures[place], odd = decode(data, name, reading)
        except DataError as error:
            reading.bad(name, str(error).removeprefix(f"{name}: "))
            continue
        for remark in odd:
            remarks.setdefault(remark, []).append(name)
    reading.warnings += [f"{remark}: {some(where, 3)}" for remark, where in remarks.items()]
    if not pictures:
        return None, []
    ((common, _),) = Counter(picture.shape for picture in pictures.values()).most_common(1)
    for place, picture in list(pictures.items()):
        if picture.shape != common:
            kind, usual = ("×".join(map(str, shape)) for shape in (picture.shape, common))
            fix = "pass size=" if picture.shape[:2] != common[:2] else "pass greyscale="
            reading.bad(names[place], f"is {kind} where most are {usual} (height × width × channels): {fix}")
            del pictures[place]
    return np.stack(list(pictures.values())), list(pictures)


def read_file(file: Path, reading: Reading) -> Content:
    """One picture, a set by itself."""
    reading.no_splits(file)
    pixels, _ = decode_all([(str(file), file)], reading)
    if pixels is None:
        raise DataError(f"{file}: {reading.skipped[-1][1]}")
    return Content(pixels)


def read_folder(folder: Path, reading: Reading) -> Content:
    """A folder of pictures, or of folders of pictures, one per class, perhaps inside folders that name splits.

    Raises: DataError if it holds both pictures and folders, or no picture.
    """
    entries = listing(folder)
    folders = [entry for entry in entries if entry.is_dir()]
    splits = {name: entry for entry in folders if (name := split_of(entry.name))}
    if folders and len(splits) == len(folders):
        part = splits[reading.choose(folder, splits)]
        content = read_folder(part, replace(reading, split=None))  # remarks go to the same lists
        return content._replace(files=tuple(f"{part.name}/{name}" for name in content.files or ()))
    reading.no_splits(folder)
    if folders:
        strays = _pictures([entry for entry in entries if not entry.is_dir()], reading)
        if strays:
            raise DataError(
                f"{folder}: holds both folders and pictures ({some([s.name for s in strays], 3)}): sort the pictures into the folders"
            )
        classes = tuple(entry.name for entry in folders)
        place = itertools.count()
        by_class = [[(next(place), number, file) for file in _class_files(entry, reading)] for number, entry in enumerate(folders)]
        # The first ones of every class, so that a limit does not leave the first class alone.
        spread = [item for group in itertools.zip_longest(*by_class) for item in group if item is not None]
        wanted = sorted(spread[: reading.at_most(len(spread))])
    else:
        classes = None
        files = _pictures(entries, reading)
        wanted = [(place, 0, file) for place, file in enumerate(files[: reading.at_most(len(files))])]
    pixels, kept = decode_all([(str(file), file) for _, _, file in wanted], reading)
    if pixels is None:
        raise DataError(
            "; ".join([f"{folder}: holds no picture (PNG, JPEG, WebP) that can be read, nor another data set", *reading.warnings[:3]])
        )
    places, labels, found = zip(*(wanted[row] for row in kept), strict=True)
    names = tuple(file.relative_to(folder).as_posix() for file in found)
    return Content(pixels, np.array(labels, np.int64) if classes else None, classes, np.array(places, np.int64), names)


def _class_files(folder: Path, reading: Reading) -> list[Path]:
    entries = listing(folder)
    for entry in entries:
        if entry.is_dir():
            reading.bad(entry, "is a folder inside a class's folder: move its pictures up")
    files = _pictures([entry for entry in entries if not entry.is_dir()], reading)
    if not files:
        reading.warnings.append(f"{folder}: a class without pictures")
    return files


def _pictures(entries: Sequence[Path], reading: Reading) -> list[Path]:
    """The files that are pictures by their content, or say so by their suffix; others are mentioned and passed over."""
    pictures: list[Path] = []
    others: list[Path] = []
    for entry in entries:
        if not entry.is_file():
            reading.bad(entry, "is a broken link" if entry.is_symlink() else "is not a regular file")
            continue
        with decoding(entry, "a file"), entry.open("rb") as stream:
            picture = is_picture(stream.read(12))
        (pictures if picture or entry.suffix.lower() in SUFFIXES else others).append(entry)
    if others:
        reading.warnings.append(f"passed over what is no picture: {some(others)}")
    return pictures
