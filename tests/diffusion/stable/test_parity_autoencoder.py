"""The published shapes of the autoencoder against torch and diffusers, in both directions. Needs both: `make parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from diffusion.layers import initialise
from diffusion.stable.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion.unet import parameter_count
from diffusion.weights import CONFIG, WEIGHTS, write_json, write_tensors

# Warnings of torch and diffusers about themselves.
pytestmark = [pytest.mark.parity, *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future"))]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Stable Diffusion 1.x.
PUBLISHED = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=512,
)


def test_diffusers_reads_what_is_written_and_computes_the_same(tmp_path):
    model = initialise(lambda rngs: AutoencoderKL(PUBLISHED, rngs=rngs), jax.random.key(0))
    write_json(tmp_path / CONFIG, PUBLISHED.to_json())
    write_tensors(tmp_path / WEIGHTS, model)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path).eval()
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameter_count(model) == 83_653_863
    assert {name: tensor.shape for name, tensor in theirs.state_dict().items()} == {
        name: tensor.shape for name, tensor in load_file(tmp_path / WEIGHTS).items()
    }

    generator = np.random.default_rng(0)
    image = generator.uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
    latents = generator.normal(size=(1, 4, 8, 8)).astype(np.float32)
    with torch.no_grad():
        moments = theirs.encode(torch.from_numpy(image)).latent_dist
        expected = [
            tensor.numpy().transpose(0, 2, 3, 1)
            for tensor in (moments.mean, moments.logvar, theirs.decode(torch.from_numpy(latents)).sample)
        ]
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def both(params, image, latents):
        autoencoder = nnx.merge(graphdef, params)
        return (*autoencoder.encode(image), autoencoder.decode(latents))

    found = both(params, *(jnp.asarray(x.transpose(0, 2, 3, 1)) for x in (image, latents)))
    for ours, published in zip(found, expected, strict=True):
        assert np.abs(np.asarray(ours) - published).max() <= 1e-5 * np.abs(published).max()
