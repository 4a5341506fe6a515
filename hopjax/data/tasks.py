"""Two tasks out of one data set: by class, or by rotation."""

import difflib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hopjax.data.images import DataError, Images
from hopjax.data.pictures import by_plane
from hopjax.data.reading import library, some

# Split CIFAR-10 of arXiv:2605.27975, Appendix G.
LIVING = ("bird", "cat", "deer", "dog", "horse")
NON_LIVING = ("airplane", "automobile", "frog", "ship", "truck")


def class_split(images: Images, task1: Sequence[str | int] = LIVING, task2: Sequence[str | int] = NON_LIVING) -> tuple[Images, Images]:
    """The images of the classes of Task 1, and those of Task 2, each in the order of the data set; labels stay what they were.

    Args:
        task1, task2: classes by name or number; by default the paper's split of CIFAR-10.

    Raises: DataError if there are no labels, a class is unknown, in both tasks or twice in one, or a task has no image.
    """
    if images.labels is None:
        raise DataError(f"{images.source}: has no labels to split by")
    numbers = [[_number(images, name) for name in task] for task in (task1, task2)]
    if len(set(numbers[0] + numbers[1])) < len(numbers[0] + numbers[1]):
        raise DataError(f"a class is named twice: {some(task1, 10)}; {some(task2, 10)}")
    tasks = []
    for names, wanted in zip((task1, task2), numbers, strict=True):
        places = np.flatnonzero(np.isin(images.labels, wanted))
        if len(places) == 0:
            raise DataError(f"{images.source}: has no image of {some(names, 10) or 'a task without classes'}")
        tasks.append(replace(images.take(places), source=f"{images.source}, classes {', '.join(map(str, names))}"))
    return tasks[0], tasks[1]


def _number(images: Images, name: str | int) -> int:
    classes = images.classes
    if isinstance(name, str):
        if classes is None:
            raise DataError(f"{images.source}: does not tell the names of its classes: give numbers instead of {name!r}")
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5)
            raise DataError(
                f"{images.source}: has no class {name!r}: {f'did you mean {some(near)}?' if near else f'only {some(classes, 10)}'}"
            )
        return classes.index(name)
    if name < 0 or (classes is not None and name >= len(classes)):
        raise DataError(
            f"{images.source}: has no class {name}: {'numbers start at 0' if name < 0 else f'only 0 … {len(classes or ()) - 1}'}"
        )
    return int(name)


def rotated(images: Images, degrees: float | int) -> Images:
    """The images turned counter-clockwise about their centres: bilinear, black where nothing was, the same size.

    Task 2 of the paper's domain-incremental experiment is MNIST turned by 30° (arXiv:2605.27975, Appendix F).

    Raises: DataError if there is no image to turn (rows of numbers), or the angle is not finite.
    """
    _, height, width, _ = images.pixels.shape
    if height == 1 < width:
        raise DataError(f"{images.source}: holds rows of numbers, not images: they cannot be rotated")
    if not np.isfinite(degrees):
        raise DataError(f"the angle must be finite, got {degrees}")
    bilinear = library("PIL.Image").Resampling.BILINEAR
    pixels = by_plane(images.pixels, lambda plane: plane.rotate(degrees, bilinear, fillcolor=0), (height, width))
    return replace(images, pixels=pixels, source=f"{images.source}, rotated by {degrees:g}°")
