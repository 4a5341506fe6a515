"""The published shapes of the denoising network against torch and diffusers. Needs both, and 12 GB of memory: `make parity`."""

import functools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.unet import UNet2DCondition
from diffusion.stable.v1 import UNET
from diffusion.unet import parameter_count
from diffusion.weights import read_network

# Warnings of torch and diffusers about themselves.
pytestmark = [pytest.mark.parity, *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "Future"))]
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

NETWORK = "UNet2DConditionModel"
# Sides of the latents → timesteps of a batch. At 64 a batch of one, which takes torch a quarter of a minute.
TIMESTEPS = {4: (981, 1), 8: (500, 261), 64: (741,)}


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
            else:  # to a variance of 1/fan_in, so that no layer dies away beside its shortcut
                parameter *= 3**0.5
    model.save_pretrained(folder)
    generator = np.random.default_rng(0)
    cases = {}
    for size, timesteps in TIMESTEPS.items():
        latents = generator.standard_normal((len(timesteps), 4, size, size), dtype=np.float32)
        text = generator.standard_normal((len(timesteps), 77, 768), dtype=np.float32)
        timestep = np.array(timesteps)
        with torch.no_grad():
            out = model(*(torch.from_numpy(x) for x in (latents, timestep, text))).sample.numpy()
        cases[size] = (latents.transpose(0, 2, 3, 1), timestep, text), out.transpose(0, 2, 3, 1)
    return folder, cases


@pytest.fixture(scope="module")
def ours(theirs):
    """The same network, read from their folder."""
    folder, _ = theirs
    model = read_network(folder, UNet2DConditionConfig.from_json, lambda config: UNet2DCondition(config, rngs=nnx.Rngs(0)))
    assert model.config == UNET
    assert parameter_count(model) == 859_520_964
    return nnx.split(model, nnx.Param)


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, params, *arguments):
    with jax.default_matmul_precision("highest"):
        return nnx.merge(graphdef, params)(*arguments)


def shown(size):
    return f"latents {len(TIMESTEPS[size])} × {size} × {size} × 4, t = {', '.join(map(str, TIMESTEPS[size]))}"


@pytest.mark.parametrize("size", TIMESTEPS)
def test_the_published_shapes_compute_what_diffusers_computes(theirs, ours, size, agree):
    arguments, expected = theirs[1][size]
    agree(NETWORK, shown(size), apply(*ours, *map(jnp.asarray, arguments)), expected, 1e-4)


def test_any_two_tensors_of_one_shape_are_told_apart(theirs, ours):
    """Of each shape that several tensors have, two drawn at random: exchanged, they would be beyond the bound of agreement."""
    arguments, expected = theirs[1][4]
    graphdef, params = ours
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    values = [leaf for _, leaf in leaves]
    alike = defaultdict(list)
    for i, value in enumerate(values):
        alike[value.shape].append(i)
    generator = np.random.default_rng(1)
    for places in alike.values():
        if len(places) == 1:
            continue
        i, j = generator.choice(places, 2, replace=False)
        swapped = [*values]
        swapped[i], swapped[j] = values[j], values[i]
        found = np.asarray(apply(graphdef, jax.tree.unflatten(structure, swapped), *map(jnp.asarray, arguments)))
        names = [jax.tree_util.keystr(leaves[k][0]) for k in (i, j)]
        assert np.abs(found - expected).max() > 1e-4 * expected.std(), names


def test_bfloat16_drifts(theirs, ours, agree):
    """Eight bits in each product of a hundred layers. Noted, and bounded where it would be noise."""
    arguments, expected = theirs[1][8]
    model = nnx.eval_shape(lambda: UNet2DCondition(UNET, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    found = apply(nnx.graphdef(model), ours[1], *map(jnp.asarray, arguments))
    assert found.dtype == jnp.float32
    assert agree(f"{NETWORK}, bfloat16", shown(8), found, expected, None) < 1
