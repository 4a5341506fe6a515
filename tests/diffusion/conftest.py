"""What the tests of `diffusion` share: shape checks on its public functions too."""

import sys
from collections.abc import Iterator

import jax
import jaxtyping
import pytest

if "diffusion" in sys.modules:  # its annotations would go unchecked, silently
    raise RuntimeError("diffusion was imported before tests/diffusion/conftest.py could install the shape checks")

jaxtyping.install_import_hook("diffusion", "beartype.beartype")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The library as its users import it, without the shape checks of the tests: its own errors are reached."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def as_run() -> Iterator[None]:
    """JAX as programs have it: single precision, and the usual promotions, which optax relies on."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield
