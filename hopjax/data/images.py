"""What every reader gives: pixels, labels, and all that a careful user must know about how they were read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt8


class DataError(ValueError):
    """Data that cannot be read, or cannot be used as asked; the message names the file and the way out."""


@dataclass(frozen=True, eq=False)
class Images:
    """A set of images of one shape.

    Attributes:
        pixels: n × height × width × channels: bytes, or float32 where the source holds numbers. May be mapped from the file, and then is
            read-only. Rows that are no images (an array of shape (n, d)) have height and channels 1.
        labels: one number per image, indices into `classes` if those are known; None if there are none.
        classes: the classes' names; None if unknown.
        source: what was read.
        warnings: what was found odd but not refused.
        skipped: (file, reason) of what `skip_bad` left out.
        places: where in the source each image is, of which those left out count too; None if that is all of it, in order. Forgotten where
            the number of images is replaced.
        files: the image's own file, below the source; None where images have none.

    Raises: DataError if labels and pixels do not fit each other, or there is no image.
    """

    pixels: UInt8[np.ndarray, "n h w c"] | Float32[np.ndarray, "n h w c"]
    labels: Int64[np.ndarray, " n"] | None
    classes: tuple[str, ...] | None
    source: str
    warnings: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    places: Int64[np.ndarray, " k"] | None = None
    files: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.dtype not in (np.uint8, np.float32):
            raise DataError(f"{self.source}: pixels must be (n, h, w, c) of uint8 or float32, got {self.pixels.dtype} {self.pixels.shape}")
        if self.pixels.size == 0:
            raise DataError(f"{self.source}: holds no image")
        for name in ("places", "files"):
            if (known := getattr(self, name)) is not None and len(known) != len(self.pixels):
                object.__setattr__(self, name, None)
        if self.labels is None:
            return
        if self.labels.shape != self.pixels.shape[:1]:
            raise DataError(f"{self.source}: {len(self.pixels)} images but labels of shape {self.labels.shape}")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or (self.classes is not None and high >= len(self.classes)):
            known = (
                "negative" if self.classes is None else f"outside 0 … {len(self.classes) - 1}, the classes {', '.join(self.classes[:10])}"
            )
            raise DataError(f"{self.source}: label {low if low < 0 else high} is {known}")

    def __len__(self) -> int:
        return len(self.pixels)

    def vectors(self) -> Float32[np.ndarray, "n d"]:
        """Images as rows of d = h·w·c numbers: bytes in units of 255, so in [0, 1]; float pixels as they are. Always a copy."""
        rows = self.pixels.reshape(len(self.pixels), -1)
        return np.divide(rows, np.float32(255), dtype=np.float32) if rows.dtype == np.uint8 else np.array(rows)

    def take(self, index: Integer[np.ndarray, " k"] | Sequence[int]) -> "Images":
        """The images at these places, in this order."""
        rows = np.asarray(index, dtype=np.int64)
        return replace(
            self,
            pixels=self.pixels[rows],
            labels=None if self.labels is None else self.labels[rows],
            places=np.arange(len(self))[rows] if self.places is None else self.places[rows],
            files=None if self.files is None else tuple(self.files[row] for row in rows.tolist()),
        )

    def class_name(self, label: int) -> str:
        """What the data call a class, or its number."""
        return str(label) if self.classes is None else self.classes[label]

    def name(self, row: int) -> str:
        """The image at this place, for a message."""
        place = row if self.places is None else self.places[row]
        return f"image {place} of {self.source}" + (f" ({self.files[row]})" if self.files else "")
