# ruff: noqa: E402 (see below)
"""The command line with a network so small that compiling it takes seconds: `--network tiny`, for 4 × 4 images."""

import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from diffusion import backend
from tests import compiled

# As tests/diffusion/conftest.py does for its process: what two processes compute is compared bit for bit.
backend._CPU_OPTIONS.update(compiled.OPTIONS)

from diffusion import config, settings
from diffusion.checkpoint import Checkpoints
from diffusion.config import UNetConfig
from diffusion.optimiser import AdamW
from diffusion.run import CHECKPOINTS, Task, abstract_of, program_of
from diffusion.settings import Length, Network, Noise, Settings
from diffusion.trials import TRIALS, Trial
from hopjax.data import Images

NETWORK = UNetConfig(
    sample_size=4,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    add_attention=False,
    layers_per_block=1,
    norm_num_groups=4,
)
NETWORKS = {**config.PRESETS, "tiny": NETWORK}
OPTIONS = ("--network", "tiny", "--batch-size", "8", "--ema", "0.9", "--warmup", "2", "--sample-every", "0")


def command(*tokens):
    """The words of a command line; an option that comes again counts as it came last."""
    words: list[str] = []
    options: dict[str, list[str]] = {}
    for token in map(str, tokens):
        if token.startswith("--"):
            options[token] = []
            words.append(token)
        elif words and words[-1].startswith("--") and not options[words[-1]]:
            options[words[-1]] = [token]
        else:
            words.append(token)
    return [word for word in words if not word.startswith("--")] + [word for pair in options.items() for word in (pair[0], *pair[1])]


def pixels(count=40, seed=0):
    """Stripes, upright or lying, with noise."""
    random = np.random.default_rng(seed)
    stripes = np.stack([np.broadcast_to([40, 200, 40, 200], (4, 4)), np.broadcast_to([[40], [200], [40], [200]], (4, 4))])
    return (stripes[np.arange(count) % 2] + random.integers(-20, 21, (count, 4, 4)))[..., None].astype(np.uint8)


def last_state(folder, given: Settings):
    """The step and the whole state in a run's last checkpoint."""
    images = Images(pixels(), None, None, "stripes")
    program, params = program_of(abstract_of(Task(images), given), given)
    with Checkpoints(Path(folder) / CHECKPOINTS) as checkpoints:
        found = checkpoints.restore(program.abstract(params))
    assert found is not None
    return found.step, found.state


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state)]


def trials():
    """The presets of `run`, of which the quick one is of the tiny network: 40 stripes, turned by 90°."""
    first, later = (
        Settings(Network("tiny"), Noise("cosine", prediction="v_prediction"), AdamW(2e-3, 2, 0.3), Length(steps, 8, 0.9))
        for steps in (20, 6)
    )
    return {**TRIALS, "quick": Trial("stripes.npz", 90.0, None, first, later, "stripes")}


if __name__ == "__main__":
    from diffusion.cli import experiment

    settings.NETWORKS = NETWORKS  # type: ignore[assignment, attr-defined]
    experiment.TRIALS = trials()  # type: ignore[attr-defined]
    from diffusion.__main__ import main

    sys.exit(main())
