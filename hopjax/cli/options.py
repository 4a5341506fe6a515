"""What the commands can be told, in the groups that they share. Every value is checked as it is read, before any work."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from hopjax.data import Images

TIMESTEPS = 1000
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class UsageError(Exception):
    """What was asked for cannot be done: one line that says what, why, and what to do instead."""


def _number(kind: type[int] | type[float], name: str, example: str) -> Parameter:
    """A number of this kind, and nothing that could be rounded to one."""

    def convert(_: object, tokens: Sequence[Any]) -> int | float:
        option, text = tokens[0].keyword, tokens[0].value
        try:
            return kind(text)
        except ValueError:
            raise UsageError(f"{option} {text} is not a {name}: give one, such as {option} {example}") from None

    return Parameter(converter=convert, metavar="N" if kind is int else "X")


def _bytes(_: object, tokens: Sequence[Any]) -> int:
    option, text = tokens[0].keyword, tokens[0].value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text, re.IGNORECASE)
    if not found or found[2].upper() not in UNITS:
        raise UsageError(f"{option} {text} is no amount of memory: give a number and its unit, such as {option} 512MiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _side(_: object, tokens: Sequence[Any]) -> int | tuple[int, int]:
    option, text = tokens[0].keyword, tokens[0].value
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})?", text):
        raise UsageError(f"{option} {text} is no size in pixels: give a side or HEIGHTxWIDTH, such as {option} 32")
    height, _, width = text.partition("x")
    return (int(height), int(width)) if width else int(height)


Whole = Annotated[int, _number(int, "whole number", "20")]
Real = Annotated[float, _number(float, "number", "0.5")]


def need(condition: bool, option: str, value: object, bound: str, instead: object) -> None:
    """Refuses a value outside its bound."""
    if not condition:
        raise UsageError(f"{option} {value} is out of range: need {bound}; take {option} {instead}")


def as_options(message: str) -> str:
    """What a library says of its arguments, in terms of the options."""
    message = re.sub(r"^([a-z_]+) = ", lambda found: f"--{found[1].replace('_', '-')} ", message)
    message = re.sub(r"\bskip_bad=True\b", "--skip-bad", message)
    message = re.sub(r"\bgreyscale=", "--grey or --colour", message)
    message = re.sub(r"\bsize=(?=$|[^\w])", "--image-size", message)
    return re.sub(
        r"\b(beta|limit|memory_limit|perplexity|self_weight|split|timestep)=", lambda found: f"--{found[1].replace('_', '-')} ", message
    )


@Parameter(name="*", group="Reading")
@dataclass(frozen=True)
class Reading:
    """How DATA (and DATA2) are read."""

    split: Annotated[str | None, Parameter(help="train, test or another (default: train, or the only one).")] = None
    size: Annotated[
        int | tuple[int, int] | None,
        Parameter(
            name="--image-size",
            converter=_side,
            n_tokens=1,
            negative="",
            metavar="SIDE",
            help="Stretch images to SIDE or HEIGHTxWIDTH (default: leave them).",
        ),
    ] = None
    grey: Annotated[bool | None, Parameter(negative="--colour", help="One channel, or three (default: as they are).")] = None
    limit: Annotated[Whole | None, Parameter(help="Read the first so many images (default: all).")] = None
    skip_bad: Annotated[bool, Parameter(negative="", help="Leave out what cannot be read instead of stopping.")] = False

    def read(self, path: str) -> "Images":
        """Raises DataError, whatever is wrong with the data."""
        from hopjax import data

        return data.read(path, split=self.split, size=self.size, greyscale=self.grey, skip_bad=self.skip_bad, limit=self.limit)


@dataclass(frozen=True)
class Amount:
    """So many samples, or so many of a hundred, as an option said."""

    option: str
    text: str
    number: float
    percent: bool

    @classmethod
    def read(cls, option: str, text: str) -> "Amount":
        """What an option says. Raises UsageError if that is no amount."""
        if not (found := re.fullmatch(r"(\d{1,15})|(\d{1,15}(?:\.\d+)?)\s*%", text)):
            raise UsageError(
                f"{option} {text} is neither a number of samples nor a percentage: give one, such as {option} 500 or {option} 10%"
            )
        amount = cls(option, text, float(found[1] or found[2]), percent=found[1] is None)
        name = option.removeprefix("--")
        bound = f"0% < {name} ≤ 100%" if amount.percent else f"1 ≤ {name} ≤ number of samples"
        need(0 < amount.number <= (100 if amount.percent else math.inf), option, text, bound, "10%")
        return amount

    def of(self, total: int) -> int:
        """How many of `total` that is, at least one."""
        if not self.percent and self.number > total:
            name = self.option.removeprefix("--")
            raise UsageError(
                f"{self.option} {self.text} is out of range: need 1 ≤ {name} ≤ {total}, the number of samples; take {self.option} 10%"
            )
        return max(1, round(self.number / 100 * total)) if self.percent else int(self.number)


def _amount(_: object, tokens: Sequence[Any]) -> Amount:
    return Amount.read(tokens[0].keyword, tokens[0].value)


BufferSize = Annotated[Amount, Parameter(converter=_amount, accepts_keys=False, n_tokens=1, metavar="N|P%")]


@Parameter(name="*", group="Tasks")
@dataclass(frozen=True)
class Choice:
    """Which images of DATA are Task 1, whose samples are stored, and what Task 2 is."""

    classes: Annotated[str | None, Parameter(help="Task 1: these classes of DATA, A,B,… by name or number (default: all images).")] = None
    task2: Annotated[str | None, Parameter(help="Task 2: another data set (default: none).")] = None
    task2_classes: Annotated[
        str | None, Parameter(help="Task 2: these classes of DATA2, or of DATA, whose others then are Task 1 (default: none).")
    ] = None
    rotate: Annotated[Real | None, Parameter(help="Task 2: Task 1 turned by so many degrees (default: none).")] = None

    def __post_init__(self) -> None:
        if self.rotate is not None and (self.task2 or self.task2_classes):
            raise UsageError(
                f"--rotate {self.rotate:g} and {'--task2' if self.task2 else '--task2-classes'} both say what Task 2 is: give one of them"
            )
        if self.rotate is not None:
            need(math.isfinite(self.rotate), "--rotate", self.rotate, "a finite angle", 30)
        for option, names in (("--classes", self.classes), ("--task2-classes", self.task2_classes)):
            if names is not None and not all(name.strip() for name in names.split(",")):
                raise UsageError(f"{option} {names!r} has an empty name: give classes as A,B,…")


@Parameter(name="*", group="Temperature (one of)")
@dataclass(frozen=True)
class Temperature:
    """The rule that gives β."""

    beta: Annotated[Real | None, Parameter(help="β itself, for the normalised images.")] = None
    timestep: Annotated[
        Real | None, Parameter(help=f"Signal-to-noise ratio of a diffusion step, 0 … {TIMESTEPS - 1} of a linear schedule.")
    ] = None
    perplexity: Annotated[
        Real | None,
        Parameter(help="Let the other samples that weigh in number P on average (default: 30, or a third of fewer than 90 samples)."),
    ] = None
    self_weight: Annotated[Real | None, Parameter(help="Let a sample's own softmax weight be W on average, 0 < W < 1.")] = None
    model_scale: Annotated[
        Real, Parameter(help="For the timestep: range of the model's pixels over that of DATA's, 2 for [−1, 1] over [0, 1].")
    ] = 2.0

    def __post_init__(self) -> None:
        given = [
            f"--{name.replace('_', '-')}" for name in ("beta", "timestep", "perplexity", "self_weight") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} both give β: keep one of them")
        for option, value, instead in (("--beta", self.beta, 30), ("--model-scale", self.model_scale, 2)):
            need(value is None or 0 < value < math.inf, option, value, f"0 < {option.removeprefix('--')} < ∞", instead)
        t, p, w = self.timestep, self.perplexity, self.self_weight
        need(t is None or 0 <= t <= TIMESTEPS - 1, "--timestep", t, f"0 ≤ timestep ≤ {TIMESTEPS - 1}", 500)
        need(p is None or 1 < p < math.inf, "--perplexity", p, "1 < perplexity < number of samples − 1", 30)
        need(w is None or 0 < w < 1, "--self-weight", w, "0 < self-weight < 1", 0.5)


@Parameter(name="*", group="Memories")
@dataclass(frozen=True)
class Model:
    """What is stored, and the rotation that it is to survive."""

    normalise: Annotated[
        Literal["unit", "none", "centred"],
        Parameter(help="Divide images by their norm, leave them, or subtract their mean first."),
    ] = "unit"
    epsilon: Annotated[Real, Parameter(help="Size ε of the rotation whose predicted rise ½ε²σ²[S − (d−1) x·∇E] is listed.")] = 0.05
    sigma: Annotated[
        Real | None, Parameter(help="Scale σ of the rotation's entries (default: 1/√(d−1), which moves a sample by ε of its norm).")
    ] = None

    def __post_init__(self) -> None:
        need(0 < self.epsilon < math.inf, "--epsilon", self.epsilon, "0 < epsilon < ∞", 0.05)
        need(self.sigma is None or 0 < self.sigma < math.inf, "--sigma", self.sigma, "0 < sigma < ∞", 1)


@Parameter(name="*", group="Machine")
@dataclass(frozen=True)
class Machine:
    """What computes, and with how many digits."""

    device: Annotated[Literal["cpu", "gpu", "tpu"] | None, Parameter(help="Where to compute (default: the best that JAX finds).")] = None
    precision: Annotated[Literal["float32", "float64"], Parameter(help="Digits of all arithmetic.")] = "float32"
    memory_limit: Annotated[
        int,
        Parameter(
            converter=_bytes, metavar="BYTES", help="Working memory besides the images: 512MiB, 4GB, …", show_default=lambda _: "512MiB"
        ),
    ] = 512 << 20

    def __post_init__(self) -> None:
        need(self.memory_limit >= 1 << 20, "--memory-limit", f"{self.memory_limit} bytes", "at least 1MiB", "512MiB")
