"""Image data sets as the Hugging Face hub keeps them: parquet files with encoded pictures, in shards and splits."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hopjax.data.images import DataError
from hopjax.data.pictures import decode_all
from hopjax.data.reading import Content, Reading, decoding, library, listing, some, split_of

IMAGES = ("img", "image", "images")
LABELS = ("label", "labels", "fine_label")
# Rows decoded at a time.
BATCH = 256
MAX_LABEL = 1 << 31


def parts(folder: Path) -> dict[str, list[Path]]:
    """The shards of a folder by split, named by the files or by the folders in it ("all" for none); empty if there are none."""
    found: dict[str, list[Path]] = {}
    entries = listing(folder)
    for file in entries:
        if file.is_file() and file.suffix == ".parquet":
            found.setdefault(split_of(file.stem) or "all", []).append(file)
    for inner in entries if not found else []:
        if inner.is_dir() and (split := split_of(inner.name)) and (shards := [f for f in listing(inner) if f.suffix == ".parquet"]):
            found.setdefault(split, []).extend(shards)
    return found


def read_parts(folder: Path, found: dict[str, list[Path]], reading: Reading) -> Content:
    """The shards of one split, one after the other."""
    return _shards(found[reading.choose(folder, found)], folder, reading)


def read_file(file: Path, reading: Reading) -> Content:
    """One file."""
    reading.no_splits(file)
    return _shards([file], file, reading)


def _shards(files: Sequence[Path], where: Path, reading: Reading) -> Content:
    library("pyarrow")  # if it is missing, that is no file's fault
    labels: list[int | None] = []
    places: list[int] = []
    classes: tuple[str, ...] | None = None

    def pictures() -> Iterator[tuple[str, bytes]]:
        nonlocal classes
        before = itertools.count()
        for file in files:
            try:
                names = _class_names(file)
                classes = classes or names
                for number, (data, label) in enumerate(_rows(file)):
                    if not reading.wants(len(labels)):
                        return
                    row, place = f"{file} row {number}", next(before)
                    if data is None:
                        reading.bad(row, "has no picture's bytes")
                    elif label is None and names is not None:
                        reading.bad(row, "has no label")
                    elif label is not None and not 0 <= label < (len(names) if names else MAX_LABEL):
                        reading.bad(row, f"label {label} is outside 0 … {(len(names) if names else MAX_LABEL) - 1}")
                    else:
                        labels.append(label)
                        places.append(place)
                        yield row, data
            except DataError as error:
                if len(files) == 1 or not reading.skip_bad:
                    raise
                reading.bad(file, str(error).removeprefix(f"{file}: "))

    pixels, kept = decode_all(pictures(), reading)
    if pixels is None:
        raise DataError(f"{where}: holds no picture that can be read")
    known = [label for label in (labels[place] for place in kept) if label is not None]
    if known and len(known) < len(kept):
        raise DataError(f"{where}: {len(kept) - len(known)} rows have no label")
    return Content(pixels, np.array(known, np.int64) if known else None, classes, np.array(places, np.int64)[kept])


def _rows(file: Path) -> Iterator[tuple[bytes | None, int | None]]:
    """Encoded picture and label of every row, a few hundred in memory at a time."""
    arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
    with decoding(file, "parquet"), file.open("rb") as stream, parquet.ParquetFile(stream) as table:  # its name need not be in UTF-8
        schema = table.schema_arrow
        image, label = _column(schema.names, IMAGES), _column(schema.names, LABELS)
        if image is None:
            raise DataError(f"{file}: has no column {' or '.join(map(repr, IMAGES))}, only {some(schema.names)}")
        kind = schema.field(image).type
        nested = arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        content = kind.field("bytes").type if nested else kind
        if not (arrow.types.is_binary(content) or arrow.types.is_large_binary(content)):
            raise DataError(f"{file}: column {image!r} is {str(kind)[:80]}, need encoded pictures: binary, or a struct with 'bytes'")
        if label and not arrow.types.is_integer(schema.field(label).type):
            raise DataError(f"{file}: column {label!r} is {str(schema.field(label).type)[:80]}, need whole numbers")
        columns = [f"{image}.bytes" if nested else image, *([label] if label else [])]
        for batch in table.iter_batches(batch_size=BATCH, columns=columns):
            pictures = batch.column(image).field("bytes") if nested else batch.column(image)
            numbers = batch.column(label).to_pylist() if label else [None] * len(batch)
            yield from zip(pictures.to_pylist(), numbers, strict=True)


def _column(names: Sequence[str], usual: Sequence[str]) -> str | None:
    return next((name for name in usual if name in names), None)


def _class_names(file: Path) -> tuple[str, ...] | None:
    """The label's names, which the hub's own writers leave in the file."""
    with decoding(file, "parquet"), file.open("rb") as stream:
        schema = library("pyarrow.parquet").read_schema(stream)
    try:
        info: Any = json.loads((schema.metadata or {})[b"huggingface"])
        names = info["info"]["features"][_column(schema.names, LABELS)]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):  # files of other writers: the names are a convenience
        return None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
        return tuple(names)
    return None
