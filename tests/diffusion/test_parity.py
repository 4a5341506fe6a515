"""The full size of google/ddpm-cifar10-32 against torch and diffusers, in both directions. Needs both: `make parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.config import PRESETS
from diffusion.layers import initialise
from diffusion.unet import UNet, parameter_count
from diffusion.weights import read_unet, write_unet

# Warnings of torch and diffusers about themselves.
pytestmark = [pytest.mark.parity, *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future"))]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("preset", PRESETS)
def test_diffusers_reads_what_is_written_and_computes_the_same(preset, tmp_path):
    config = PRESETS[preset]
    model = initialise(lambda rngs: UNet(config, rngs=rngs), jax.random.key(0))
    write_unet(tmp_path / "ours", model)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours").eval()
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameter_count(model)

    generator = np.random.default_rng(0)
    size = config.sample_size
    assert isinstance(size, int)
    image = generator.normal(size=(2, config.in_channels, size, size)).astype(np.float32)
    timestep = np.array([7, 903])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(image), torch.from_numpy(timestep)).sample.numpy().transpose(0, 2, 3, 1)
    graphdef, params = nnx.split(model, nnx.Param)
    found = jax.jit(lambda p, x, t: nnx.merge(graphdef, p)(x, t))(params, jnp.asarray(image.transpose(0, 2, 3, 1)), jnp.asarray(timestep))
    assert np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(expected).max()

    theirs.save_pretrained(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(read_unet(tmp_path / "theirs"), nnx.Param), params)
