"""The published shapes of the denoising network against torch and diffusers. Needs both, and 12 GB of memory: `make parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.unet import UNet2DCondition
from diffusion.unet import parameter_count
from diffusion.weights import read_network

# Warnings of torch and diffusers about themselves.
pytestmark = [pytest.mark.parity, *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future"))]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SIZES = (4, 8)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder that diffusers wrote, and for each size the inputs and outputs of the network in it, channels last."""
    folder = tmp_path_factory.mktemp("unet")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # ones and zeros would hide a mix-up
                torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    model.save_pretrained(folder)
    generator = np.random.default_rng(0)
    cases = {}
    for size in SIZES:
        latents = generator.standard_normal((2, 4, size, size), dtype=np.float32)
        text = generator.standard_normal((2, 77, 768), dtype=np.float32)
        timestep = np.array([981, 1])
        with torch.no_grad():
            out = model(*(torch.from_numpy(x) for x in (latents, timestep, text))).sample.numpy()
        cases[size] = (latents.transpose(0, 2, 3, 1), timestep, text), out.transpose(0, 2, 3, 1)
    return folder, cases


@pytest.fixture(scope="module")
def ours(theirs):
    """The same network, read from their folder."""
    folder, _ = theirs
    model = read_network(folder, UNet2DConditionConfig.from_json, lambda config: UNet2DCondition(config, rngs=nnx.Rngs(0)))
    assert model.config == UNet2DConditionConfig()
    return nnx.split(model, nnx.Param)


@pytest.mark.parametrize("size", SIZES)
def test_the_published_shapes_compute_what_diffusers_computes(theirs, ours, size):
    arguments, expected = theirs[1][size]
    graphdef, params = ours
    assert parameter_count(nnx.merge(graphdef, params)) == 859_520_964
    found = jax.jit(lambda p, *a: nnx.merge(graphdef, p)(*a))(params, *map(jnp.asarray, arguments))
    assert np.abs(np.asarray(found) - expected).max() <= 1e-4 * expected.std()
