"""Pages to read: self-contained, without scripts, pictures embedded."""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from hopjax.cli.table import printable
from hopjax.data import Images


class Sample(NamedTuple):
    """One image of a gallery: where it is embedded from, and what is said of it."""

    source: str
    caption: str


def embedded(png: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def gallery(images: Images, places: Sequence[int] | np.ndarray, captions: Sequence[str]) -> list[Sample]:
    """The images at these places; nothing where rows of numbers are no images."""
    _, height, width, channels = images.pixels.shape
    if height == 1 < width:
        return []
    from PIL import Image

    shown = images.pixels[np.asarray(places)][..., : 1 if channels < 3 else 3]
    if shown.dtype != np.uint8:
        low, high = min(0.0, float(shown.min())), max(1.0, float(shown.max()))
        shown = np.rint(255 * (shown - low) / (high - low)).astype(np.uint8)
    samples = []
    for pixels, caption in zip(shown, captions, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
        samples.append(Sample(embedded(buffer.getvalue()), caption))
    return samples


def class_name(settings: Mapping[str, Any], label: int) -> str:
    """What the data call a class, in characters that can be shown: a folder's name need not be in UTF-8."""
    classes = settings["task1"]["classes"]
    return printable(str(classes[label])) if classes else str(label)


def number(value: float) -> str:
    """A number for people."""
    mantissa, _, exponent = f"{value:.3g}".replace("-", "−").partition("e")
    return f"{mantissa}·{_power_of_ten(int(exponent.replace('−', '-')))}" if exponent else mantissa


def power(exponent: float) -> str:
    """10^exponent for people, which no float need hold."""
    whole = math.floor(exponent)
    if exponent == whole:
        return _power_of_ten(whole)
    return number(10.0**exponent) if abs(exponent) < 300 else f"{10.0 ** (exponent - whole):.3g}·{_power_of_ten(whole)}"


def _power_of_ten(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _listed(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by their full names; what says nothing is left out."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _listed(value, f"{prefix}{name}.")
        elif value not in (None, []):
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def templates(*folders: Path) -> jinja2.Environment:
    """The folders' templates: what is filled in is escaped, and must be there."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def render(template: str, settings: Mapping[str, Any], *, folder: Path | None = None, **values: Any) -> bytes:
    """The page of a template of `folder` (this one by default), which also gets the settings to list and can extend those here."""
    here = Path(__file__).parent
    environment = templates(folder or here, here)
    environment.filters |= {"number": number, "embedded": embedded}
    return (
        environment.get_template(template).render(settings=settings, listed=_listed(settings), **values).encode(errors="backslashreplace")
    )
