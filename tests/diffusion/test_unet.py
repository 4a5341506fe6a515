"""The U-Net: the function of diffusers' network (golden files), parameter counts, configurations, precision, dropout, memory."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.config import PRESETS, UNetConfig
from diffusion.layers import Attention, GroupNorm, ResnetBlock, dropout, initialise
from diffusion.unet import DownBlock, UNet, parameter_count
from diffusion.weights import read_unet
from tests.compiled import quickly

GOLDEN = Path(__file__).parent / "golden"
TINY = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=2,
)


@functools.partial(quickly, static_argnums=0)
def apply(graphdef, params, image, timestep, key=None):
    return nnx.merge(graphdef, params)(image, timestep, key)


def run(model, image, timestep, key=None):
    return apply(*nnx.split(model, nnx.Param), image, timestep, key)


def make(config, **options):
    return initialise(lambda rngs: UNet(config, rngs=rngs, **options), jax.random.key(0))


def golden(case):
    image, timestep, output = (np.load(GOLDEN / case / f"{name}.npy") for name in ("in", "timesteps", "out"))
    return jnp.asarray(image.transpose(0, 2, 3, 1)), jnp.asarray(timestep), output.transpose(0, 2, 3, 1)


# Both networks round to float32 (6e-8) some fifty times in a row; bfloat16 keeps 8 bits (4e-3).
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.float64, 1e-5), (jnp.bfloat16, 1e-1)])
@pytest.mark.parametrize("case", ["colour", "grey"])
def test_the_network_computes_what_diffusers_computes(case, dtype, bound):
    image, timestep, output = golden(case)
    found = run(read_unet(GOLDEN / case, dtype=dtype), image, timestep)
    assert found.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    assert np.abs(np.asarray(found) - output).max() <= bound * np.abs(output).max()


@pytest.mark.parametrize("case", ["colour", "grey"])
def test_golden_outputs_depend_on_every_parameter(case):
    """A change of any by a third stands out tenfold, else agreement would say nothing about those that do not matter."""
    image, timestep, output = golden(case)
    graphdef, params = nnx.split(read_unet(GOLDEN / case), nnx.Param)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    values = [leaf for _, leaf in leaves]
    for i, (path, leaf) in enumerate(leaves):
        noise = np.random.default_rng(i).normal(size=leaf.shape).astype(np.float32)
        changed = jax.tree.unflatten(structure, [*values[:i], leaf + 0.3 * noise, *values[i + 1 :]])
        change = np.abs(np.asarray(apply(graphdef, changed, image, timestep)) - output).max() / np.abs(output).max()
        if "['to_k']['bias']" in jax.tree_util.keystr(path):  # adds the same to every logit of a query, which softmax ignores
            assert change < 1e-5
        else:
            assert change > 1e-4, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("preset", "count"), [("ddpm-cifar10-32", 35_746_307), ("paper-45m", 45_371_267), ("digits-small", 636_465), ("digits", 1_692_801)]
)
def test_presets_have_the_parameters_they_should(preset, count):
    assert parameter_count(nnx.eval_shape(lambda: UNet(PRESETS[preset], rngs=nnx.Rngs(0)))) == count


def test_the_tree_holds_parameters_alone_each_once_and_in_float32():
    model = make(TINY, dtype=jnp.bfloat16)
    params = nnx.state(model, nnx.Param)
    assert not jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    holders = [id(value) for _, value in nnx.iter_graph(model) if isinstance(value, nnx.Variable)]
    assert len(holders) == len(set(holders)) == len(jax.tree.leaves(params))


def test_initialising_at_once_has_the_law_of_initialising_one_by_one(key):
    def build(rngs):
        return ResnetBlock(32, 64, embedding=48, groups=4, eps=1e-6, dtype=jnp.float32, rngs=rngs)

    at_once, one_by_one = (jax.tree_util.tree_leaves_with_path(nnx.state(m)) for m in (initialise(build, key), build(nnx.Rngs(key))))
    for (path, a), (_, b) in zip(at_once, one_by_one, strict=True):
        if a.size > 1000:
            # |U(±b)| reaches within 1 % of its bound unless 1,000 draws miss it: e^{-10}. Standard deviations agree to 5 of their errors.
            np.testing.assert_allclose(jnp.abs(a).max(), jnp.abs(b).max(), rtol=0.01, err_msg=str(path))
            np.testing.assert_allclose(jnp.std(a), jnp.std(b), rtol=5 / a.size**0.5, err_msg=str(path))
        elif "norm" in str(path):
            np.testing.assert_array_equal(a, b, err_msg=str(path))


def test_embeddings_start_as_clip_s_do(key):
    class Table(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = (nnx.Embed(200, 50, rngs=rngs) for _ in range(2))

    found = [np.asarray(leaf, float) for leaf in jax.tree.leaves(nnx.state(initialise(Table, key), nnx.Param))]
    for table in found:
        # 10,000 draws of N(0, 0.02²): mean and variance to five standard errors, and the tails that a bounded law has not.
        assert abs(table.mean()) < 5 * 0.02 / 100
        assert abs(table.var() / 0.02**2 - 1) < 5 * (2 / 10_000) ** 0.5
        assert 3 * 0.02 < np.abs(table).max() < 6 * 0.02
    assert abs(np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1]) < 0.05


def test_rematerialisation_keeps_less_for_the_backward_pass():
    def kept(remat):
        graphdef, params = nnx.split(make(TINY, remat=remat), nnx.Param)
        image, timestep = jnp.zeros((16, 8, 8, 1), jnp.float32), jnp.arange(16)
        forward = jax.eval_shape(lambda p: jax.vjp(lambda q: nnx.merge(graphdef, q)(image, timestep), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(forward))

    assert kept(True) < kept(False) / 2


def test_rematerialisation_changes_no_gradient(key):
    """Nor the dropout of a block, whose key it is given again."""
    image, embedding = jax.random.normal(key, (2, 4, 4, 4), jnp.float32), jnp.ones((2, 3), jnp.float32)
    gradients = []
    for remat in (False, True):

        def build(rngs, remat=remat):
            resnet = functools.partial(ResnetBlock, embedding=3, groups=2, eps=1e-6, dropout=0.2, dtype=jnp.float32, rngs=rngs)
            return DownBlock(4, 4, layers=1, resnet=resnet, attention=None, downsample=None, remat=remat)

        block = initialise(build, jax.random.key(1))
        graphdef, params = nnx.split(block, nnx.Param)

        def loss(p, graphdef=graphdef):
            return jnp.sum(jnp.square(nnx.merge(graphdef, p)(image, embedding, iter([key]))[0]))

        gradients.append(jax.tree.leaves(quickly(jax.grad(loss))(params)))
    for a, b in zip(*gradients, strict=True):  # the same sums, perhaps in another order
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_needs_a_key_and_follows_it(key):
    image, timestep = jax.random.normal(key, (2, 8, 8, 1), jnp.float32), jnp.array([1, 2])
    model = make(dataclasses.replace(TINY, dropout=0.5))
    calm, one, same, other = (run(model, image, timestep, k) for k in (None, key, key, jax.random.fold_in(key, 1)))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    assert not np.allclose(one, calm)
    np.testing.assert_array_equal(calm, run(make(TINY), image, timestep, key))


def test_dropout_keeps_the_mean(key):
    count, rate = 100_000, 0.3
    kept = dropout(jnp.ones(count), rate, key)
    assert set(np.unique(kept)) == {0.0, 1 / (1 - rate)}
    # Five standard errors of a mean of scaled Bernoulli draws: one false alarm in two million.
    assert abs(float(jnp.mean(kept)) - 1) < 5 * (rate / (1 - rate) / count) ** 0.5


def test_normalisation_keeps_its_digits_when_the_mean_is_large():
    noise = jax.random.normal(jax.random.key(0), (1, 8, 8, 4), jnp.float32)
    norm = GroupNorm(4, 2, eps=1e-6, dtype=jnp.float32)
    # 1,000 + noise is rounded to 6e-5; E[x²] − E[x]² of float32 would be off by 0.1.
    np.testing.assert_allclose(norm(1000 + noise), norm(noise), atol=1e-3)


def test_attention_over_a_context_is_softmax_of_scaled_products(key):
    layer = Attention(6, heads=2, head_dim=4, context_features=5, use_bias=False, dtype=jnp.float64, rngs=nnx.Rngs(0))
    x, context = jax.random.normal(key, (1, 3, 6)), jax.random.normal(key, (1, 7, 5))
    heads = []
    q, k, v = (
        np.asarray(a) @ np.asarray(p.kernel[...], float)
        for a, p in ((x[0], layer.to_q), (context[0], layer.to_k), (context[0], layer.to_v))
    )
    for head in (slice(0, 4), slice(4, 8)):
        weights = np.exp(q[:, head] @ k[:, head].T / 2)
        heads.append(weights / weights.sum(1, keepdims=True) @ v[:, head])
    assert layer.to_out.bias is not None
    expected = np.concatenate(heads, 1) @ np.asarray(layer.to_out.kernel[...], float) + np.asarray(layer.to_out.bias[...], float)
    np.testing.assert_allclose(layer(x, context)[0], expected, rtol=1e-12, atol=1e-12)


def test_configurations_of_published_networks_are_read_and_written():
    fields = json.loads((GOLDEN / "grey" / "config.json").read_text())
    config = UNetConfig.from_json(fields | {"_name_or_path": "somewhere", "_commit_hash": None})
    assert config.sample_size == (12, 8)
    assert UNetConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.to_json() | fields == json.loads(json.dumps(config.to_json())) | fields  # no field is lost


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dropuot": 0.1}, "unknown field 'dropuot'; did you mean 'dropout'"),
        ({"zzz": 1}, "unknown field 'zzz'$"),
        ({"_class_name": "UNet2DConditionModel"}, "a 'UNet2DConditionModel', not a UNet2DModel"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier' is not supported; what is: 'positional'"),
        ({"down_block_types": ["SkipDownBlock2D"] * 4}, "'SkipDownBlock2D', which is not supported"),
        ({"block_out_channels": [32, 64]}, "must be equally many, one or more: got 2, 4 and 4"),
        ({"norm_num_groups": 30}, "224: not a multiple of norm_num_groups = 30"),
        ({"in_channels": 0}, "in_channels = 0 must be positive"),
        ({"layers_per_block": "2"}, "layers_per_block = '2' must be int$"),
        ({"flip_sin_to_cos": 1}, "flip_sin_to_cos = 1 must be bool$"),
        ({"layers_per_block": True}, "layers_per_block = True must be int$"),
        ({"sample_size": [8, 8, 8]}, r"sample_size = \(8, 8, 8\) must be int \| tuple"),
        ({"block_out_channels": [32, 32, 32, "64"]}, r"must be tuple\[int, \.\.\.\]"),
        ({"dropout": 1.0}, r"dropout = 1\.0 must be at least 0 and below 1"),
        ({"sample_size": 28}, "28 × 28 do not fit 4 levels of resolution: height and width must be multiples of 8"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_configurations_that_do_not_do_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_json(fields)


def test_images_that_do_not_fit_are_refused():
    model = make(PRESETS["digits-small"])
    for shape, message in (((1, 30, 28, 1), "30 × 28 do not fit 3 levels"), ((1, 28, 28, 3), "3 channels, the network takes 1")):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model, jnp.zeros(shape, jnp.float32), jnp.array([0]))
    with pytest.raises(ValueError, match="attention_head_dim = 8 does not fit into 4 channels"):
        UNet(dataclasses.replace(TINY, down_block_types=("AttnDownBlock2D", "DownBlock2D")), rngs=nnx.Rngs(0))
    block = ResnetBlock(2, 2, embedding=None, groups=1, eps=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert block(jnp.ones((1, 4, 4, 2), jnp.float32)).shape == (1, 4, 4, 2)
    with pytest.raises(ValueError, match="takes none"):
        block(jnp.ones((1, 4, 4, 2), jnp.float32), jnp.ones((1, 3), jnp.float32))


@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (1, 32, 16, 1)])
def test_digits_fit(shape):
    model = make(PRESETS["digits-small"])
    assert jax.eval_shape(model, jnp.zeros(shape, jnp.float32), jnp.zeros(shape[0], jnp.int32)).shape == shape
