"""What a training run is told: small dataclasses by subject, saved with the run, and the presets made of them."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from diffusion.config import PRESETS as NETWORKS
from diffusion.config import UNetConfig
from diffusion.layers import Model, initialise
from diffusion.layout import Layout
from diffusion.objective import Denoising
from diffusion.optimiser import Adafactor, AdamW
from diffusion.schedules import CosineSchedule, LinearSchedule, Prediction, ScaledLinearSchedule, Schedule
from diffusion.unet import UNet

_SCHEDULES: dict[str, type[Schedule]] = {"linear": LinearSchedule, "scaled-linear": ScaledLinearSchedule, "cosine": CosineSchedule}


# Says of which kind a setting is, where there are several.
KIND = "kind"


class SettingsError(ValueError):
    """Settings that do not do; the message says which, and what would."""


def _choice(name: str, value: str, known: Mapping[str, Any]) -> None:
    if value not in known:
        nearest = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"take one of {', '.join(known)}"
        raise SettingsError(f"{name} = {value!r} is not known: {hint}")


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise SettingsError(f"{name} = {value} is out of range: need {name} ≥ {least}")


@dataclasses.dataclass(frozen=True)
class Network:
    """The U-Net and its arithmetic.

    Attributes:
        network: a preset of diffusion.config: digits-8 (8 × 8), digits-small and digits (28 × 28), paper-45m and ddpm-cifar10-32 (32 × 32).
            Its channels of images follow the data.
        dropout: probability that an entry inside a ResNet block is dropped in training.
        dtype: of products and convolutions; parameters, norms, softmax and loss are float32.
        remat: compute blocks again in the backward pass instead of keeping their values.
    """

    network: str = "digits"
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        """Refuse names that are not known."""
        _choice("network", self.network, NETWORKS)
        _choice("dtype", self.dtype, {"float32": None, "bfloat16": None})

    def config(self, height: int, width: int, channels: int) -> UNetConfig:
        """The U-Net for images of this shape.

        Raises: ValueError if it cannot be.
        """
        size = height if height == width else (height, width)
        return dataclasses.replace(
            NETWORKS[self.network], sample_size=size, in_channels=channels, out_channels=channels, dropout=self.dropout
        )

    def make(self, config: UNetConfig, key: Key[Array, ""]) -> UNet:
        """With random parameters, which depend on the key alone."""
        return initialise(lambda rngs: UNet(config, dtype=jnp.dtype(self.dtype), remat=self.remat, rngs=rngs), key)

    def abstract(self, kind: Callable[..., Model], config: Any) -> Model:
        """A network of this kind and configuration with such arithmetic: the shapes of its parameters alone."""
        return nnx.eval_shape(lambda: kind(config, dtype=jnp.dtype(self.dtype), remat=self.remat, rngs=nnx.Rngs(0)))


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise that is added, and what the network is to say of it.

    Attributes:
        schedule: of the noise.
        timesteps: of the schedule.
        prediction: the noise ε, the velocity v = α ε − σ x₀, or the clean image x₀ ("sample").
    """

    schedule: Literal["linear", "scaled-linear", "cosine"] = "linear"
    timesteps: int = 1000
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"

    def __post_init__(self) -> None:
        """Refuse names that are not known."""
        _choice("schedule", self.schedule, _SCHEDULES)
        _choice("prediction", self.prediction, {kind.value: kind for kind in Prediction})
        _at_least(2, timesteps=self.timesteps)

    def objective(self) -> Denoising:
        """The loss that these settings mean."""
        return Denoising(_SCHEDULES[self.schedule](self.timesteps), Prediction(self.prediction))

    def unlike(self, objective: Denoising) -> tuple[str, str]:
        """What differs, as options: of an objective, and of these settings; whole schedules where they differ in what is no setting."""
        there, here = objective.schedule, self.objective().schedule
        kind = next((name for name, kind in _SCHEDULES.items() if type(there) is kind), type(there).__name__)
        known = {"schedule": kind, "timesteps": there.timesteps, "prediction": objective.prediction.value}
        differ = [name for name, value in known.items() if value != getattr(self, name)]
        if not differ:
            return str(there), str(here)
        return " ".join(f"--{name} {known[name]}" for name in differ), " ".join(f"--{name} {getattr(self, name)}" for name in differ)


@dataclasses.dataclass(frozen=True)
class Length:
    """How long, on what, and from which seed.

    Attributes:
        steps: of the optimiser.
        batch_size: images in a step.
        ema: decay of the average of the parameters that samples are drawn from; 0 for none: it takes as much memory as they do.
        seed: of everything random: initial parameters, order of the data, timesteps, noise.
        replay_ratio: fraction of replayed images in a batch; by default each is seen as often as each new one.
    """

    steps: int = 20_000
    batch_size: int = 64
    ema: float = 0.9995
    seed: int = 0
    replay_ratio: float | None = None

    def __post_init__(self) -> None:
        """Refuse what gives no run."""
        _at_least(1, steps=self.steps, batch_size=self.batch_size)
        _at_least(0, seed=self.seed)
        if not 0 <= self.ema < 1:
            raise SettingsError(f"ema = {self.ema} is out of range: need 0 ≤ ema < 1")
        if self.replay_ratio is not None and not 0 < self.replay_ratio < 1:
            raise SettingsError(f"replay_ratio = {self.replay_ratio} is out of range: need 0 < replay_ratio < 1")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that the parameters at the end of a run depend on, besides the data."""

    network: Network = Network()
    noise: Noise = Noise()
    optimiser: AdamW | Adafactor = AdamW()
    length: Length = Length()
    layout: Layout = Layout()

    def key(self, purpose: Literal["parameters", "training", "samples"]) -> Key[Array, ""]:
        """A key for each purpose, from the seed."""
        return jax.random.fold_in(jax.random.key(self.length.seed), ("parameters", "training", "samples").index(purpose))

    def to_json(self) -> dict[str, Any]:
        """By subject; what is of another kind than the usual one says so ("kind")."""
        found = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            kinds = _kinds(field.type)
            kind = next(name for name, kind in kinds.items() if type(getattr(self, field.name)) is kind)
            if kind != next(iter(kinds)):
                found[field.name] = {KIND: kind, **found[field.name]}
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Settings":
        """What `to_json` gave, of this version or an earlier one: what is not there has its default.

        Raises: SettingsError for a name that is not known (with the nearest that is), or a value that does not do.
        """
        return _from_json(_kinds(cls), found, "settings")


def _kinds(annotation: Any) -> dict[str, type]:
    """The dataclasses that a setting may be one of, by name, the usual one first; none for a number or a name."""
    alternatives = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return {kind.__name__.lower(): kind for kind in alternatives if dataclasses.is_dataclass(kind) and isinstance(kind, type)}


def _from_json(kinds: Mapping[str, Any], found: Any, where: str) -> Any:
    if not isinstance(found, Mapping):
        raise SettingsError(f"{where} must be an object of named values, got {found!r}")
    named = str(found.get(KIND, next(iter(kinds))))
    _choice(f"{where}.{KIND}", named, kinds)
    kind, found = kinds[named], {name: value for name, value in found.items() if name != KIND}
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in found:
        if name not in fields:
            _choice(where, name, fields)
    values = {}
    for name, value in found.items():
        if within := _kinds(fields[name]):
            values[name] = _from_json(within, value, f"{where}.{name}")
        else:
            values[name] = _typed(f"{where}.{name}", value, fields[name])
    return kind(**values)


def _typed(name: str, value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        kinds: tuple[Any, ...] = (str,)
    else:
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, bool) != (bool in kinds) or not isinstance(value, (*kinds, *((int,) if float in kinds else ()))):
        raise SettingsError(f"{name} = {json.dumps(value)} must be {' or '.join(getattr(one, '__name__', str(one)) for one in kinds)}")
    return value


def difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two sets of settings, one line each: "length.steps: 100, now 200"."""
    lines = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += difference(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {json.dumps(old, ensure_ascii=False)}, now {json.dumps(new, ensure_ascii=False)}")
    return lines


class Preset(typing.NamedTuple):
    """Settings and the data that they are for (None: there is no default)."""

    data: str | None
    settings: Settings
    about: str


PRESETS: Mapping[str, Preset] = types.MappingProxyType(
    {
        "quick": Preset(
            "digits",
            Settings(
                Network("digits-8"),
                Noise("cosine", prediction="v_prediction"),
                AdamW(2e-3, warmup=50, decay=0.3),
                Length(600, 64, ema=0.99),
            ),
            "scikit-learn's 8 × 8 digits, two minutes on two cores",
        ),
        "cpu-mnist": Preset(
            "mnist-5k",
            Settings(
                Network("digits-small"),
                Noise("cosine", prediction="v_prediction"),
                AdamW(2e-3, warmup=200, decay=0.3),
                Length(5_000, 64, ema=0.998),
            ),
            "5,000 digits of MNIST, 28 × 28, an hour on two cores",
        ),
        # Of the paper: the count of parameters, T, the schedule, the optimiser, batch and EMA. The channels and 100 epochs are ours.
        "paper-cifar10": Preset(
            None,
            Settings(Network("paper-45m", dtype="bfloat16"), length=Length(19_500, 128, ema=0.9999)),
            "split CIFAR-10 at the paper's size, for an accelerator",
        ),
    }
)
