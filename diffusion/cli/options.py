"""What the commands of `python -m diffusion` share."""

import contextlib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from diffusion.run import RunError
from hopjax.cli.options import Choice, Machine, Reading, UsageError, as_options, need
from hopjax.data import DataError, Images

Device = Annotated[Literal["cpu", "gpu", "tpu"] | None, Parameter(group="Devices", help="Default: the best that JAX finds.")]
Model = Annotated[str, Parameter(help="Folder of a run, finished or not, or of a diffusers pipeline or UNet2DModel.")]

Raw = Annotated[bool, Parameter(negative="", help="Of a run, the parameters themselves instead of their average.")]


# Options that are not called like the settings that they give.
_OPTIONS = {
    "densities.samples": "--densities",
    "densities.timestep": "--density-timestep",
    "densities.measures": "--measures",
    "densities.policies": "--density-policies",
}


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """What cannot be done is said in one line."""
    try:
        yield
    except (DataError, RunError, ValueError) as error:
        message = re.sub(r"^(densities\.[a-z]+) =", lambda found: _OPTIONS.get(found[1], found[0]), str(error))
        raise UsageError(as_options(message)) from error


def configure(device: Literal["cpu", "gpu", "tpu"] | None, distributed: bool = False) -> None:
    """The device asked for, compiled programs kept from run to run, and the other processes of a job."""
    from hopjax.cli.app import configure

    if distributed:
        import jax

        jax.distributed.initialize()
    configure(Machine(device=device))


def need_seed(seed: int) -> None:
    """Refuses a seed that keys have no room for."""
    need(0 <= seed < 2**32, "--seed", seed, "0 ≤ seed < 2³²", 0)


def given(**options: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def images_of(data: str, classes: str | None, reading: Reading) -> Images:
    """The images of DATA, or of some of its classes."""
    from hopjax.cli.tasks import load

    return load(data, Choice(classes=classes), reading).task1
