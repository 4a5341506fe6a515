"""The published shapes of the autoencoder against torch and diffusers, in both directions. Needs both: `make parity`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from diffusion.layers import initialise
from diffusion.stable.autoencoder import AutoencoderKL
from diffusion.stable.v1 import AUTOENCODER
from diffusion.unet import parameter_count
from diffusion.weights import CONFIG, WEIGHTS, write_json, write_tensors

# Warnings of torch and diffusers about themselves.
pytestmark = [pytest.mark.parity, *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future"))]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SIDES = (32, 64, 512)  # of images


@pytest.fixture(scope="module")
def ours():
    """A network with every tensor random, norms and biases too: ones and zeros would hide a mix-up."""
    model = initialise(lambda rngs: AutoencoderKL(AUTOENCODER, rngs=rngs), jax.random.key(0))
    generator = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if len(variable.shape) == 1:
            draw = float(path[-1] == "scale") + 0.3 * generator.standard_normal(variable.shape)
            variable.set_value(jnp.asarray(draw, jnp.float32))
    return model


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """What diffusers makes of a folder that we wrote."""
    folder = tmp_path_factory.mktemp("autoencoder")
    write_json(folder / CONFIG, AUTOENCODER.to_json())
    write_tensors(folder / WEIGHTS, ours)
    model = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(ours) == 83_653_863
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in load_file(folder / WEIGHTS).items()
    }
    return model


@pytest.fixture(scope="module")
def cases(theirs):
    """For each side of an image: the image and latents, and what diffusers makes of them; channels last."""
    generator = np.random.default_rng(1)
    cases = {}
    for side in SIDES:
        image = generator.uniform(-1, 1, (1, 3, side, side)).astype(np.float32)
        latents = generator.normal(size=(1, 4, side // 8, side // 8)).astype(np.float32)
        with torch.no_grad():
            moments = theirs.encode(torch.from_numpy(image)).latent_dist
            arrays = (image, latents, *(a.numpy() for a in (moments.mean, moments.logvar, theirs.decode(torch.from_numpy(latents)).sample)))
        cases[side] = tuple(a.transpose(0, 2, 3, 1) for a in arrays)
    return cases


@functools.partial(jax.jit, static_argnums=0)
def both(graphdef, params, image, latents):
    with jax.default_matmul_precision("highest"):
        autoencoder = nnx.merge(graphdef, params)
        return (*autoencoder.encode(image), autoencoder.decode(latents))


def compare(agree, network, found, side, expected, bound):
    for what, ours, published in zip(("mean", "log-variance", "decoded"), found, expected, strict=True):
        agree(network, f"{what}, image 1 × {side} × {side} × 3", ours, published, bound)


@pytest.mark.parametrize("side", SIDES)
def test_diffusers_reads_what_is_written_and_computes_the_same(ours, cases, side, agree):
    image, latents, *expected = cases[side]
    compare(agree, "AutoencoderKL", both(*nnx.split(ours, nnx.Param), image, latents), side, expected, 1e-4)


def test_bfloat16_drifts(ours, cases, agree):
    """Noted, not bounded."""
    image, latents, *expected = cases[64]
    half = nnx.eval_shape(lambda: AutoencoderKL(AUTOENCODER, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    found = both(nnx.graphdef(half), nnx.state(ours, nnx.Param), image, latents)
    compare(agree, "AutoencoderKL, bfloat16", found, 64, expected, None)
