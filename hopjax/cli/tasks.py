"""The samples: Task 1, which is stored, Task 2 where there is one, and what identifies either."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hopjax import normalisation
from hopjax.cli.options import Choice, Reading, UsageError, as_options
from hopjax.data import DataError, Images, class_split, rotated

# With fewer there is no β at which more than one of the others weighs in, but not all.
FEWEST = 4


@dataclass(frozen=True, eq=False)
class Tasks:
    """What a command works on.

    Attributes:
        task1: the samples that are stored.
        places: where they are in DATA, of which what was left out counts too.
        task2: what is learnt next; None if nothing is.
        read: what `load` was told: plain JSON.
    """

    task1: Images
    places: np.ndarray
    task2: Images | None
    read: dict[str, Any]


def load(data: str, choice: Choice, reading: Reading) -> Tasks:
    """Reads DATA, and DATA2 if there is one, and takes the tasks out of them.

    Raises: UsageError for what cannot be read or does not fit.
    """
    try:
        return _load(data, choice, reading)
    except DataError as error:
        raise UsageError(as_options(str(error))) from None


def _load(data: str, choice: Choice, reading: Reading) -> Tasks:
    images = reading.read(data)
    task1, task2 = images, None
    if choice.task2_classes and not choice.task2:
        if images.labels is None:
            raise UsageError(f"--task2-classes {choice.task2_classes}: {data} has no labels to split by: give --task2 or --rotate")
        wanted, others = _numbers(images, choice.task2_classes)
        if choice.classes:
            others, _ = _numbers(images, choice.classes)
        if not others:
            raise UsageError(f"--task2-classes {choice.task2_classes}: are all classes of {data}: leave some for Task 1")
        task1, task2 = class_split(images, others, wanted)
    else:
        task1 = _of_classes(images, choice.classes)
        if choice.task2:
            task2 = _of_classes(reading.read(choice.task2), choice.task2_classes)
    if choice.rotate is not None:
        task2 = rotated(task1, choice.rotate)
    if task2 is not None and task2.pixels.shape[1:] != task1.pixels.shape[1:]:
        one, other = (" × ".join(map(str, images.pixels.shape[1:])) for images in (task1, task2))
        raise UsageError(
            f"--task2 {choice.task2}: its images are {other}, those of Task 1 {one}: make them alike by --image-size and --grey or --colour"
        )
    _enough(task1)
    places = np.arange(len(task1)) if task1.places is None else task1.places
    return Tasks(task1, places, task2, {"data": data, **asdict(choice), **asdict(reading)})


def directed(tasks: Tasks, normalisations: Iterable[str], *, skip: bool) -> Tasks:
    """The tasks, of which samples that one of these cannot normalise are refused, or left out and listed.

    Raises: UsageError naming the first of them, or if too few are left.
    """
    try:
        for name in normalisations:
            fitted = normalisation.fit(name, tasks.task1.vectors())
            task1, kept = _directed("Task 1", tasks.task1, fitted, skip)
            task2 = None if tasks.task2 is None else _directed("Task 2", tasks.task2, fitted, skip)[0]
            tasks = replace(tasks, task1=task1, places=tasks.places[kept], task2=task2)
    except ValueError as error:
        raise UsageError(as_options(str(error))) from None
    _enough(tasks.task1)
    return tasks


def _directed(task: str, images: Images, fitted: normalisation.Normalisation, skip: bool) -> tuple[Images, np.ndarray]:
    """The images that have a direction, and which they are."""
    kept = fitted.directed(images.vectors())
    if kept.all():
        return images, kept
    lost = [images.name(row) for row in np.flatnonzero(~kept).tolist()]
    if not skip:
        raise UsageError(f"{task}: {lost[0]} {fitted.lost}: --skip-bad leaves it out")
    left = images.take(np.flatnonzero(kept))
    return replace(left, skipped=(*left.skipped, *((name, fitted.lost) for name in lost))), kept


def _enough(images: Images) -> None:
    if len(images) < FEWEST:
        raise UsageError(
            f"{images.source}: {len(images)} samples, need at least {FEWEST}: energies tell samples from others; give more data"
        )


def _of_classes(images: Images, names: str | None) -> Images:
    """The images of the classes named; all of them where none is."""
    if names is None:
        return images
    wanted, others = _numbers(images, names)
    if images.labels is not None and not others and all(isinstance(name, int) for name in wanted):
        return images
    return class_split(images, wanted, others)[0]  # refuses what there is none of


def _numbers(images: Images, names: str) -> tuple[list[int | str], list[int | str]]:
    """The numbers of the classes named, and of all others that there are."""
    classes = images.classes or ()
    named = [name.strip() for name in names.split(",")]
    wanted: list[int | str] = [classes.index(name) if name in classes else int(name) if name.isdecimal() else name for name in named]
    if len(set(wanted)) < len(wanted):
        raise UsageError(f"classes {names} of {images.source} name one twice: name each once")
    there = [] if images.labels is None else np.unique(images.labels).tolist()
    return wanted, [number for number in there if number not in wanted]


def sample_ids(images: Images) -> np.ndarray:
    """A number for each sample that depends on its pixels alone: samples keep theirs whatever else is read with them."""
    digests = b"".join(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest() for pixels in images.pixels)
    return np.frombuffer(digests, "<i8").astype(np.int64)


def description(images: Images) -> dict[str, Any]:
    """What was read, with the hash of its content: JSON for the settings of a table."""
    content = hashlib.sha256(repr((images.pixels.shape, images.pixels.dtype.str)).encode())
    for pixels in images.pixels:
        content.update(pixels.tobytes())
    if images.labels is not None:
        content.update(images.labels.tobytes())
    return {
        "source": images.source,
        "sha256": content.hexdigest(),
        "samples": len(images),
        "shape": list(images.pixels.shape[1:]),
        "classes": None if images.classes is None else list(images.classes),
        "warnings": list(images.warnings),
        "skipped": [f"{file}: {reason}" for file, reason in images.skipped],
    }
