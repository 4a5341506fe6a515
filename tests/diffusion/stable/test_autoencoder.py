"""The autoencoder: the function of diffusers' (golden files), the published tensors, sizes that fit, configurations."""

import functools
import gzip
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from diffusion.layers import GroupNorm, initialise
from diffusion.stable.autoencoder import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian
from diffusion.stable.v1 import AUTOENCODER
from diffusion.unet import parameter_count
from diffusion.weights import WEIGHTS, read_tensors, write_tensors
from tests.compiled import quickly

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "autoencoder"
CONFIG = AutoencoderKLConfig.from_json(json.loads((FOLDER / "config.json").read_text()))
OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# vae/config.json of Stable Diffusion 1.5.
PUBLISHED = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def read(file=FOLDER / WEIGHTS, config=CONFIG, **options):
    return read_tensors(file, lambda: AutoencoderKL(config, rngs=nnx.Rngs(0), **options))


def array(name):
    """A golden array, channels last."""
    return np.load(FOLDER / f"{name}.npy").transpose(0, 2, 3, 1)


@functools.partial(quickly, static_argnums=0)
def both(graphdef, params, image, latents):
    model = nnx.merge(graphdef, params)
    return (*model.encode(image), model.decode(latents))


EXPECTED = tuple(array(name) for name in ("mean", "log_variance", "decoded"))


def deviations(graphdef, params):
    """How far each output is from diffusers', relative to its largest entry."""
    found = both(graphdef, params, jnp.asarray(array("image")), jnp.asarray(array("latents")))
    return [float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in zip(found, EXPECTED, strict=True)]


# Both networks round to float32 (6e-8) some thirty times in a row; bfloat16 keeps 8 bits (4e-3).
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.float64, 1e-5), (jnp.bfloat16, 1e-1)])
def test_the_autoencoder_computes_what_diffusers_computes(dtype, bound):
    """An image of 15 × 22 pixels among it: sides that are halved with a row or a column left over."""
    graphdef, params = nnx.split(read(dtype=dtype), nnx.Param)
    found = both(graphdef, params, jnp.asarray(array("image")), jnp.asarray(array("latents")))
    assert {a.dtype for a in found} == {jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)}
    assert found[0].shape == (2, 3, 5, 3)
    assert max(deviations(graphdef, params)) <= bound


def test_golden_outputs_depend_on_every_parameter():
    """A change of any by a third stands out tenfold, else agreement would say nothing about those that do not matter."""
    graphdef, params = nnx.split(read(), nnx.Param)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    values = [leaf for _, leaf in leaves]
    for i, (path, leaf) in enumerate(leaves):
        noise = np.random.default_rng(i).normal(size=leaf.shape).astype(np.float32)
        changed = jax.tree.unflatten(structure, [*values[:i], leaf + 0.3 * noise, *values[i + 1 :]])
        change = max(deviations(graphdef, changed))
        if "['to_k']['bias']" in jax.tree_util.keystr(path):  # adds the same to every logit of a query, which softmax ignores
            assert change < 1e-5
        else:
            assert change > 1e-4, jax.tree_util.keystr(path)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_two_tensors_of_the_same_shape_can_be_confused(every):
    """Each is exchanged with the next of its shape, or with all others."""
    graphdef, params = nnx.split(read(), nnx.Param)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    values, names = [leaf for _, leaf in leaves], [jax.tree_util.keystr(path) for path, _ in leaves]
    for i, leaf in enumerate(values):
        alike = [j for j, other in enumerate(values) if other.shape == leaf.shape]
        for j in alike[: alike.index(i)] if every else {alike[(alike.index(i) + 1) % len(alike)]} - {i}:
            parts = {names[k].replace("conv2", "conv_shortcut") for k in (i, j)}
            # Biases of two summands, of which only the sum matters; and of keys, which softmax ignores.
            if len(parts) == 1 or all("['to_k']['bias']" in part for part in parts):
                continue
            swapped = [*values]
            swapped[i], swapped[j] = values[j], values[i]
            assert max(deviations(graphdef, jax.tree.unflatten(structure, swapped))) > 1e-4, (names[i], names[j])


def test_what_torch_wrote_is_written_back_bit_for_bit(tmp_path):
    write_tensors(tmp_path / WEIGHTS, read())
    theirs, ours = load_file(FOLDER / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor, ours[name], err_msg=name)


def older(name):
    for new, old in OLDER.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def test_attention_under_its_names_of_2022_is_read(tmp_path):
    tensors = {older(name): tensor for name, tensor in load_file(FOLDER / WEIGHTS).items()}
    assert sum(".proj_attn." in name for name in tensors) == 4
    save_file(tensors, tmp_path / WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(read(tmp_path / WEIGHTS)), nnx.state(read()))


def published_tensors():
    """The name and shape of each tensor of the published file."""
    rows = gzip.decompress((GOLDEN / "autoencoder.tsv.gz").read_bytes()).decode().splitlines()
    return {name: tuple(map(int, shape.split("x"))) for name, shape in (row.split("\t") for row in rows)}


def hollow(file, shapes):
    """A safetensors file of float16 zeros that takes no space."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with file.open("ab") as handle:
        handle.truncate(8 + len(text) + end)


@pytest.mark.parametrize("names_of_2022", [True, False])
def test_the_published_file_is_read(names_of_2022, tmp_path):
    shapes = published_tensors()
    assert len(shapes) == 248
    assert sum(map(math.prod, shapes.values())) == 83_653_863
    if not names_of_2022:
        modern = {old: new for new, old in OLDER.items()}
        shapes = {".".join(modern.get(part, part) for part in name.split(".")): shape for name, shape in shapes.items()}
    hollow(tmp_path / WEIGHTS, shapes)
    config = AutoencoderKLConfig.from_json(PUBLISHED)
    assert config == AUTOENCODER
    assert config.scaling_factor == 0.18215
    assert parameter_count(nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))) == 83_653_863
    assert parameter_count(read(tmp_path / WEIGHTS, config)) == 83_653_863


def test_the_published_shapes_encode_and_decode():
    model = nnx.eval_shape(lambda: AutoencoderKL(AutoencoderKLConfig.from_json(PUBLISHED), rngs=nnx.Rngs(0)))
    for size, latent in (((512, 512), (64, 64)), ((67, 8), (8, 1))):
        moments = nnx.eval_shape(lambda m, s=size: m.encode(jnp.zeros((1, *s, 3), jnp.float32)), model)
        assert moments.mean.shape == moments.log_variance.shape == (1, *latent, 4)
        decoded = nnx.eval_shape(lambda m, s=latent: m.decode(jnp.zeros((1, *s, 4), jnp.float32)), model)
        assert decoded.shape == (1, 8 * latent[0], 8 * latent[1], 3)


@pytest.mark.parametrize(("size", "fits"), [((4, 4), True), ((3, 8), False), ((8, 3), False), ((0, 8), False)])
def test_images_of_less_than_a_latent_are_refused(size, fits):
    model = nnx.eval_shape(lambda: AutoencoderKL(CONFIG, rngs=nnx.Rngs(0)))

    def encode():
        return nnx.eval_shape(lambda m: m.encode(jnp.zeros((1, *size, 3), jnp.float32)), model)

    if fits:
        assert encode().mean.shape == (1, 1, 1, 3)
    else:
        with pytest.raises(ValueError, match=f"an image of {size[0]} × {size[1]} cannot be encoded: height and width must be at least 4"):
            encode()


def test_other_channels_are_refused():
    model = nnx.eval_shape(lambda: AutoencoderKL(CONFIG, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="images have 1 channels, the autoencoder takes 3"):
        nnx.eval_shape(lambda m: m.encode(jnp.zeros((1, 8, 8, 1), jnp.float32)), model)
    with pytest.raises(ValueError, match="latents have 4 channels, the autoencoder takes 3"):
        nnx.eval_shape(lambda m: m.decode(jnp.zeros((1, 2, 2, 4), jnp.float32)), model)


def test_latents_are_drawn_from_their_distribution(key):
    count = 100_000
    mean, variance = np.array([0.7, -2.0]), np.array([4.0, 0.01])
    shape = (count, 1, 1, 2)
    normal = DiagonalGaussian(jnp.broadcast_to(mean, shape), jnp.broadcast_to(np.log(variance), shape))
    drawn = np.asarray(normal.sample(key))[:, 0, 0]
    # Five standard errors of mean and variance: a false alarm in 400,000 for the four.
    assert (np.abs(drawn.mean(0) - mean) < 5 * np.sqrt(variance / count)).all()
    assert (np.abs(drawn.var(0) / variance - 1) < 5 * (2 / count) ** 0.5).all()
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 5 / count**0.5


def test_every_normalisation_has_the_published_epsilon():
    model = nnx.eval_shape(lambda: AutoencoderKL(CONFIG, rngs=nnx.Rngs(0)))
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, GroupNorm)]
    assert len(norms) == 2 * (3 + 2) + 2 * (3 * 2 + 2) + 2 + 2  # two a ResNet block, one an attention, one at each end
    assert {norm.eps for norm in norms} == {1e-6}


def test_the_tree_holds_parameters_alone_each_once_and_in_float32():
    model = initialise(lambda rngs: AutoencoderKL(CONFIG, dtype=jnp.bfloat16, rngs=rngs), jax.random.key(0))
    params = nnx.state(model, nnx.Param)
    assert not jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    holders = [id(value) for _, value in nnx.iter_graph(model) if isinstance(value, nnx.Variable)]
    assert len(holders) == len(set(holders)) == len(jax.tree.leaves(params))


def test_configurations_are_read_and_written():
    fields = json.loads((FOLDER / "config.json").read_text())
    assert json.loads(json.dumps(CONFIG.to_json())) == {k: v for k, v in fields.items() if k != "_diffusers_version"}
    assert AutoencoderKLConfig.from_json(json.loads(json.dumps(CONFIG.to_json()))) == CONFIG
    assert hash(CONFIG) == hash(AutoencoderKLConfig.from_json(fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling_facto": 0.1}, "unknown field 'scaling_facto'; did you mean 'scaling_factor'"),
        ({"zzz": 1}, "unknown field 'zzz'$"),
        ({"_class_name": "VQModel"}, "a 'VQModel', not an AutoencoderKL"),
        ({"act_fn": "gelu"}, "act_fn = 'gelu' is not supported; what is: 'silu', 'swish'"),
        ({"shift_factor": 0.1}, r"shift_factor = 0\.1 is not supported; what is: None"),
        ({"latents_mean": [0.0]}, r"latents_mean = \(0\.0,\) is not supported; what is: None"),
        ({"use_quant_conv": False}, "use_quant_conv = False is not supported"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention = False is not supported"),
        (
            {"down_block_types": ["AttnDownEncoderBlock2D"] * 4},
            "'AttnDownEncoderBlock2D', which is not supported; what is: 'DownEncoderBlock2D'",
        ),
        ({"block_out_channels": [32, 64]}, "must be equally many, one or more: got 2, 4 and 4"),
        ({"norm_num_groups": 48}, "128: not a multiple of norm_num_groups = 48"),
        ({"latent_channels": 0}, "latent_channels = 0 must be positive"),
        ({"scaling_factor": -1.0}, r"scaling_factor = -1\.0 must be positive"),
        ({"layers_per_block": "2"}, "layers_per_block = '2' must be int$"),
        ({"force_upcast": 1}, "force_upcast = 1 must be bool$"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_configurations_that_do_not_do_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        AutoencoderKLConfig.from_json(PUBLISHED | fields)
    assert "\n" not in str(caught.value)
