"""What the tests of `diffusion` share: shape checks on its public functions too."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jaxtyping
import pytest

if "diffusion" in sys.modules:  # its annotations would go unchecked, silently
    raise RuntimeError("diffusion was imported before tests/diffusion/conftest.py could install the shape checks")

jaxtyping.install_import_hook("diffusion", "beartype.beartype")

from diffusion import backend  # noqa: E402 (now that its annotations are checked)
from tests.compiled import OPTIONS  # noqa: E402

# Before any program is made: those of the library compile in less time, too, but for those of other processes.
backend._CPU_OPTIONS.update(OPTIONS)


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


@pytest.fixture(scope="session")
def compilations() -> Callable[[], Any]:
    """A context that gives the list of what was compiled in it, or taken from the cache of programs."""
    found: list[list[str]] = []

    def listen(event: str, duration_secs: float, **known: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            for names in found:
                names.append(str(known.get("fun_name", "")))

    jax.monitoring.register_event_duration_secs_listener(listen)  # there is no way to take it back

    @contextlib.contextmanager
    def watch() -> Iterator[list[str]]:
        found.append([])
        yield found[-1]
        found.pop()

    return watch
