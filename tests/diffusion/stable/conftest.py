"""What the tests marked `parity` share: one measure of how far two networks are apart, and the table of what was found.

`PARITY_TABLE=docs/stable-parity.md make parity` writes the table.
"""

import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest


class Comparison(NamedTuple):
    """A network against another: the largest difference of their outputs over the deviation of what was expected."""

    network: str
    arguments: str
    difference: float
    bound: float | None


TABLE = pytest.StashKey[list[Comparison]]()
HEAD = """# Stable Diffusion v1.5 against torch

Largest difference of two outputs over the standard deviation of the expected one: networks of the published shapes, all their tensors
random, norms and biases among them; and images that whole pipelines end with, whose networks are small.
Made by `PARITY_TABLE=docs/stable-parity.md make parity`.

"""
PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = []


@pytest.fixture(scope="session")
def agree(pytestconfig: pytest.Config) -> Callable[..., float]:
    """Measures how far what was found is from what was expected, notes it, and fails beyond `bound`; without one it is only noted."""

    def agree(network: str, arguments: str, found: Any, expected: Any, bound: float | None) -> float:
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        assert found.shape == expected.shape
        difference = float(np.abs(found - expected).max() / expected.std())
        pytestconfig.stash[TABLE].append(Comparison(network, arguments, difference, bound))
        # Not `difference > bound`: a NaN is no agreement.
        assert difference <= (np.finfo(float).max if bound is None else bound), (network, arguments)
        return difference

    return agree


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found: list[Comparison] = config.stash[TABLE]
    if not found:
        return
    lines = ["| network | arguments | difference / deviation | bound |", "|---|---|---|---|"]
    for network, arguments, difference, bound in sorted(found, key=lambda row: (row.bound is None, row.network)):
        lines.append(f"| {network} | {arguments} | {difference:.1e} | {'reported' if bound is None else f'≤ {bound:.0e}'} |")
    lines += ["", f"{platform.machine()}, Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in PACKAGES)}."]
    terminalreporter.section("parity")
    terminalreporter.write_line("\n".join(lines))
    if file := os.environ.get("PARITY_TABLE"):
        Path(file).write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
