"""The denoising network of Stable Diffusion: the function of diffusers' and its gradients (golden files), the published tensors, sizes."""

import functools
import gzip
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from safetensors.numpy import load_file

from diffusion.layers import Attention, GroupNorm, LayerNorm, Upsample, initialise
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.transformer import GEGLU
from diffusion.stable.unet import UNet2DCondition
from diffusion.stable.v1 import UNET
from diffusion.unet import parameter_count
from diffusion.weights import CONFIG, WEIGHTS, read_network, tensor_shapes, write_tensors
from tests.compiled import quickly

GOLDEN = Path(__file__).parent / "golden"
LARGEST = "17x9"
# unet/config.json of Stable Diffusion 1.5.
PUBLISHED = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


def read(case, **options):
    return read_network(
        GOLDEN / "unet" / case, UNet2DConditionConfig.from_json, lambda config: UNet2DCondition(config, rngs=nnx.Rngs(0), **options)
    )


def golden(case, size):
    """The network's arguments, its output and, in one case, the noise of the loss; channels last."""
    arrays = load_file(GOLDEN / "unet" / case / "cases.safetensors")
    last = {name.split(".")[1]: array for name, array in arrays.items() if name.startswith(f"{size}.")}
    images = {name: array.transpose(0, 2, 3, 1) for name, array in last.items() if array.ndim == 4}
    return (jnp.asarray(images["latents"]), jnp.asarray(last["timestep"]), jnp.asarray(last["text"])), images["out"], images.get("noise")


@functools.partial(quickly, static_argnums=0)
def apply(graphdef, params, *arguments):
    return nnx.merge(graphdef, params)(*arguments)


# The goldens are of double precision but for the sinusoids of angles up to 1,000, float32 as in published networks. Float32 rounds (6e-8)
# some hundred times in a row; bfloat16 keeps 8 bits (4e-3).
@pytest.mark.parametrize(
    ("case", "size", "dtype", "bound"),
    [
        ("published", LARGEST, jnp.float32, 1e-5),
        ("published", "4x4", jnp.float32, 1e-5),
        ("options", LARGEST, jnp.float32, 1e-5),
        ("published", LARGEST, jnp.bfloat16, 2e-1),
        *(pytest.param("published", size, jnp.float32, 1e-5, marks=pytest.mark.slow) for size in ("8x8", "5x3")),
        *(pytest.param("options", size, jnp.float32, 1e-5, marks=pytest.mark.slow) for size in ("4x4", "8x8", "5x3")),
        *(pytest.param(case, LARGEST, jnp.float64, 1e-5, marks=pytest.mark.slow) for case in ("published", "options")),
    ],
)
def test_the_network_computes_what_diffusers_computes(case, size, dtype, bound):
    arguments, expected, _ = golden(case, size)
    found = apply(*nnx.split(read(case, dtype=dtype), nnx.Param), *arguments)
    assert found.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    assert np.abs(np.asarray(found) - expected).max() <= bound * expected.std()


# The golden gradients are of double precision; float32 rounds on the way there and back.
@pytest.mark.parametrize(
    ("remat", "dtype", "bound"), [(False, jnp.float64, 1e-4), pytest.param(True, jnp.float32, 1e-3, marks=pytest.mark.slow)]
)
def test_gradients_are_those_of_torch(remat, dtype, bound, tmp_path):
    """With respect to every parameter, of the mean squared error of predicted noise."""
    arguments, _, noise = golden("published", LARGEST)
    model = read("published", remat=remat, dtype=dtype)
    graphdef, params = nnx.split(model, nnx.Param)
    gradients = quickly(jax.grad(lambda p: jnp.mean(jnp.square(nnx.merge(graphdef, p)(*arguments) - noise.astype(dtype)))))(params)
    write_tensors(tmp_path / WEIGHTS, nnx.merge(graphdef, gradients))
    found = sorted(load_file(tmp_path / WEIGHTS).items())
    expected = np.load(GOLDEN / "unet" / "published" / "gradients.npy")
    assert sum(array.size for _, array in found) == expected.size
    floor = 1e-2 * np.sqrt(np.mean(np.square(expected)))  # to which the smallest gradients, sums of larger ones, are exact
    for (name, array), there in zip(found, np.split(expected, np.cumsum([array.size for _, array in found])[:-1]), strict=True):
        rms = np.sqrt(np.mean(np.square(there)))
        assert np.abs(array.ravel() - there).max() <= bound * max(rms, floor), name


def changes(case, size):
    """The tensors of a network, and the largest change of its output over its deviation where they are replaced by others."""
    arguments, expected, _ = golden(case, size)
    graphdef, params = nnx.split(read(case), nnx.Param)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names, values = [jax.tree_util.keystr(path) for path, _ in leaves], [leaf for _, leaf in leaves]

    def change(replaced):
        altered = jax.tree.unflatten(structure, [replaced.get(i, value) for i, value in enumerate(values)])
        return np.abs(np.asarray(apply(graphdef, altered, *arguments)) - expected).max() / expected.std()

    return names, values, change


@pytest.mark.parametrize("case", ["published", "options"])
def test_golden_outputs_depend_on_every_parameter(case):
    names, values, change = changes(case, LARGEST)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        noise = np.random.default_rng(i).normal(size=value.shape).astype(np.float32)
        assert change({i: value + 0.3 * noise}) > 1e-4, name


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["published", "options"])
def test_golden_outputs_tell_tensors_of_one_shape_apart(case, every):
    """Each is exchanged with the next of its shape and with the one half round, or with all others."""
    names, values, change = changes(case, LARGEST)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, value in enumerate(values):
        shapes.setdefault(value.shape, []).append(i)
    for same in shapes.values():
        for place, i in enumerate(same):
            for j in same[:place] if every else {same[place - 1], same[place - len(same) // 2]} - {i}:
                if not added_at_once(names[i], names[j]):
                    assert change({i: values[j], j: values[i]}) > 1e-4, (names[i], names[j])


def added_at_once(one, other):
    """Whether these are two biases of one ResNet block that are added to the same image: only their sum matters."""
    parts = {name.removesuffix("['bias'].value").rsplit("['", 1)[0] for name in (one, other)}
    layers = {name.removesuffix("['bias'].value").rsplit("['", 1)[1] for name in (one, other)}
    return len(parts) == 1 and layers in ({"conv1']", "time_emb_proj']"}, {"conv2']", "conv_shortcut']"})


@functools.cache
def published():
    return nnx.eval_shape(lambda: UNet2DCondition(UNet2DConditionConfig.from_json(PUBLISHED), rngs=nnx.Rngs(0)))


def test_the_published_network_has_the_published_tensors():
    with gzip.open(GOLDEN / "unet.tsv.gz", "rt") as lines:
        expected = {name: tuple(map(int, shape.split("x"))) for name, shape in (line.split() for line in lines)}
    assert tensor_shapes(published()) == expected
    assert len(expected) == 686
    assert sum(map(math.prod, expected.values())) == parameter_count(published()) == 859_520_964


def test_the_field_called_width_of_a_head_is_the_number_of_heads():
    widths = {
        (layer.heads, layer.to_q.kernel.shape[1] // layer.heads) for _, layer in nnx.iter_graph(published()) if isinstance(layer, Attention)
    }
    assert widths == {(8, 40), (8, 80), (8, 160)}


def test_normalisations_have_the_epsilons_that_the_network_was_trained_with():
    epsilons = {(type(layer), "attentions" in path, layer.eps) for path, layer in nnx.iter_graph(published()) if hasattr(layer, "eps")}
    assert epsilons == {(GroupNorm, False, 1e-5), (GroupNorm, True, 1e-6), (LayerNorm, True, 1e-5)}


def test_a_layer_is_normalised_about_its_mean_with_epsilon_added_to_the_variance(key):
    norm = LayerNorm(6, eps=1e-5, dtype=jnp.float64)
    x = np.asarray(jax.random.normal(key, (2, 3, 6)))
    for scale, shift in ((3e-3, 0.0), (1.0, 1e6)):  # a variance as small as epsilon, and a mean of which the square has no digit left
        there = scale * x + shift
        centred = there - there.mean(-1, keepdims=True)
        expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(norm(jnp.asarray(there)), expected, rtol=1e-9, atol=1e-9)


def test_the_second_half_is_the_gate_and_goes_through_the_exact_gelu(key):
    layer = GEGLU(3, 4, dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = 3 * jax.random.normal(key, (1, 50, 3))
    assert layer.proj.bias is not None
    a, b = np.split(np.asarray(x) @ np.asarray(layer.proj.kernel[...], float) + np.asarray(layer.proj.bias[...], float), 2, axis=-1)
    # The approximation by tanh is off by up to 5e-4.
    np.testing.assert_allclose(layer(x), a * b * 0.5 * (1 + scipy.special.erf(b / math.sqrt(2))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 2), (1, 1), (3, 4), (4, 3), (5, 9), (40, 40)])
def test_an_image_is_enlarged_as_torch_does(size, key):
    """To the size of the next: pixel i shows ⌊i n / size⌋, before a convolution that sees zeros outside."""
    small = tuple(-(-length // 2) for length in size)
    layer = Upsample(2, dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = np.asarray(jax.random.normal(key, (1, *small, 2)))
    rows, columns = ([i * there // here for i in range(here)] for here, there in zip(size, small, strict=True))
    enlarged = np.pad(x[:, rows][:, :, columns], ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(layer.conv.kernel[...], float)
    assert layer.conv.bias is not None
    expected = np.asarray(layer.conv.bias[...], float) + sum(
        enlarged[:, i : i + size[0], j : j + size[1]] @ kernel[i, j] for i in range(3) for j in range(3)
    )
    np.testing.assert_allclose(layer(jnp.asarray(x), size), expected, rtol=1e-12, atol=1e-12)


def test_an_image_is_enlarged_to_no_other_size():
    layer = Upsample(2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for size in ((1, 3), (2, 4), (4, 5)):
        with pytest.raises(ValueError, match=rf"2 × 2 pixels cannot be doubled to {size[0]} × {size[1]}: twice as many, or one less"):
            layer(jnp.zeros((1, 2, 2, 2), jnp.float32), size)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 9), (64, 64)])
def test_latents_of_any_size_do(size):
    latents, text = jnp.zeros((1, *size, 4), jnp.float32), jnp.zeros((1, 77, 768), jnp.float32)
    graphdef, params = nnx.split(published(), nnx.Param)
    assert jax.eval_shape(apply, graphdef, params, latents, jnp.array([3]), text).shape == latents.shape


def test_latents_and_texts_that_do_not_fit_are_refused():
    latents, text, timestep = jnp.zeros((1, 4, 4, 4), jnp.float32), jnp.zeros((1, 77, 768), jnp.float32), jnp.array([3])
    with pytest.raises(ValueError, match="latents have 3 channels, the network takes 4"):
        jax.eval_shape(published(), latents[..., :3], timestep, text)
    with pytest.raises(ValueError, match="the text has 512 features a token, the network takes 768"):
        jax.eval_shape(published(), latents, timestep, text[..., :512])


def test_dropout_needs_a_key_and_follows_it(key):
    """A rate of 0.1 in the golden case "options", whose outputs are those without a key."""
    arguments, expected, _ = golden("options", LARGEST)
    split = nnx.split(read("options"), nnx.Param)
    one, same, other = (np.asarray(apply(*split, *arguments, k)) for k in (key, key, jax.random.fold_in(key, 1)))
    np.testing.assert_array_equal(one, same)
    assert min(np.abs(one - other).max(), np.abs(one - expected).max()) > 1e-2 * expected.std()


def test_every_parameter_starts_as_torch_starts_it(key):
    """U(±fan_in^{-1/2}), norms at one and zero; in one draw."""
    model = initialise(lambda rngs: UNet2DCondition(read("published").config, rngs=rngs), key)
    assert model.mid_block is not None
    block: Any = model.mid_block.attentions[0].transformer_blocks[0]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(block.norm1.scale[...], 1)
    np.testing.assert_array_equal(block.norm1.bias[...], 0)
    # 512 draws: each misses the outer tenth with probability 0.9.
    assert 0.9 * 8**-0.5 < np.abs(block.ff.net[0].proj.kernel[...]).max() <= 8**-0.5


@pytest.mark.parametrize("case", ["published", "options"])
def test_configurations_are_read_and_written(case):
    for fields in (PUBLISHED, json.loads((GOLDEN / "unet" / case / CONFIG).read_text())):
        config = UNet2DConditionConfig.from_json(fields | {"_name_or_path": "somewhere"})
        written = json.loads(json.dumps(config.to_json()))
        assert UNet2DConditionConfig.from_json(written) == config
        assert written.items() <= (written | fields).items()  # nothing is altered
    assert UNet2DConditionConfig.from_json(PUBLISHED) == UNET


@pytest.mark.parametrize("said", [None, False])
def test_options_that_are_off_may_be_null(said):
    names = ("upcast_attention", "dual_cross_attention", "only_cross_attention", "use_linear_projection", "resnet_skip_time_act")
    off = dict.fromkeys((*names, "class_embeddings_concat", "mid_block_only_cross_attention"), said)
    assert UNet2DConditionConfig.from_json(PUBLISHED | off) == UNet2DConditionConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "a 'UNet2DModel', not a UNet2DConditionModel"),
        ({"cross_atention_dim": 768}, "unknown field 'cross_atention_dim'; did you mean 'cross_attention_dim'"),
        ({"use_linear_projection": True}, "use_linear_projection = True is not supported; what is: False"),
        ({"upcast_attention": True}, "upcast_attention = True is not supported; what is: False"),
        ({"mid_block_only_cross_attention": True}, "mid_block_only_cross_attention = True is not supported; what is: False"),
        ({"conv_in_kernel": None}, "conv_in_kernel = None is not supported; what is: 3"),
        ({"num_class_embeds": 1000}, "num_class_embeds = 1000 is not supported; what is: None"),
        ({"attention_head_dim": [5, 10, 20, 20]}, r"attention_head_dim = \(5, 10, 20, 20\) must be int$"),
        ({"attention_head_dim": 7}, "320: not a multiple of attention_head_dim = 7"),
        ({"norm_num_groups": 30}, "320: not a multiple of norm_num_groups = 30"),
        ({"downsample_padding": 0}, "downsample_padding = 0 is not supported; what is: 1"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "'AttnDownBlock2D', which is not supported; what is: 'DownBlock2D', 'Cross"),
        ({"block_out_channels": [320, 640]}, "must be equally many, one or more: got 2, 4 and 4"),
        ({"cross_attention_dim": 0}, "cross_attention_dim = 0 must be positive"),
        ({"dropout": 1.0}, r"dropout = 1\.0 must be at least 0 and below 1"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu' is not supported; what is: 'silu', 'swish'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_configurations_that_do_not_do_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UNet2DConditionConfig.from_json(PUBLISHED | fields)
