"""The text encoder: the function of transformers' (golden file), the published tensors, causality, configurations, memory of reading."""

import functools
import gzip
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from diffusion.stable.text_encoder import IGNORED, WEIGHTS, CLIPTextConfig, TextEncoder, TextEncoding, encode_texts, read_text_encoder
from diffusion.stable.v1 import TEXT
from diffusion.unet import parameter_count
from diffusion.weights import CONFIG, tensor_shapes, write_network

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "text_encoder"
IDS = np.load(FOLDER / "ids.npy").astype(np.int32)
EXPECTED = TextEncoding(*(np.load(FOLDER / f"{name}.npy") for name in TextEncoding._fields))
# text_encoder/config.json of Stable Diffusion v1.5.
PUBLISHED = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, params, ids):
    return nnx.merge(graphdef, params)(ids)


def deviation(graphdef, params, ids=IDS):
    found = apply(graphdef, params, ids)
    return max(float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in zip(found, EXPECTED, strict=True))


# Both networks round to float32 (6e-8) some twenty times in a row; bfloat16 keeps 8 bits (4e-3).
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 5e-6), (jnp.float64, 5e-6), (jnp.bfloat16, 1e-1)])
def test_the_network_computes_what_transformers_computes(dtype, bound):
    graphdef, params = nnx.split(read_text_encoder(FOLDER, dtype=dtype), nnx.Param)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert [field.dtype for field in apply(graphdef, params, IDS)] == [wide, wide]
    assert deviation(graphdef, params) < bound


def test_what_the_unet_attends_to_is_the_last_hidden_state():
    found = encode_texts(read_text_encoder(FOLDER), IDS)
    np.testing.assert_allclose(found, EXPECTED.last_hidden_state, atol=5e-6 * np.abs(EXPECTED.last_hidden_state).max())


def test_the_golden_output_depends_on_every_parameter():
    """A change of any by a third stands out, else agreement would say nothing about those that do not matter."""
    graphdef, params = nnx.split(read_text_encoder(FOLDER), nnx.Param)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    values = [leaf for _, leaf in leaves]
    for i, (path, leaf) in enumerate(leaves):
        noise = np.random.default_rng(i).normal(size=leaf.shape).astype(np.float32)
        change = deviation(graphdef, jax.tree.unflatten(structure, [*values[:i], leaf + 0.3 * noise, *values[i + 1 :]]))
        if "['k_proj']['bias']" in jax.tree_util.keystr(path):  # adds the same to every logit of a query, which softmax ignores
            assert change < 1e-5
        else:
            assert change > 1e-3, jax.tree_util.keystr(path)


def test_the_golden_output_depends_on_every_token_and_position():
    """Row by row of the two tables: no token and no position is without a part in it."""
    graphdef, params = nnx.split(read_text_encoder(FOLDER), nnx.Param)
    for name, count in (("token_embedding", 40), ("position_embedding", 9)):
        for row in range(count):
            changed = jax.tree.map(lambda leaf: leaf, params)
            table = changed["text_model"]["embeddings"][name]["embedding"]
            table.set_value(table[...].at[row].add(jnp.float32(0.5) * (jnp.arange(12, dtype=jnp.float32) - 4)))
            assert deviation(graphdef, changed) > 1e-3, (name, row)


def test_no_two_tensors_of_the_same_shape_can_be_confused():
    graphdef, params = nnx.split(read_text_encoder(FOLDER), nnx.Param)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    values, names = [leaf for _, leaf in leaves], [jax.tree_util.keystr(path) for path, _ in leaves]
    for i in range(len(values)):
        for j in range(i):
            if all("['k_proj']['bias']" in names[k] for k in (i, j)):  # neither matters, as above
                continue
            if values[i].shape == values[j].shape:
                swapped = [*values]
                swapped[i], swapped[j] = values[j], values[i]
                assert deviation(graphdef, jax.tree.unflatten(structure, swapped)) > 1e-3, (names[i], names[j])


def test_a_token_sees_itself_and_those_before_it():
    graphdef, params = nnx.split(read_text_encoder(FOLDER), nnx.Param)
    before = apply(graphdef, params, IDS).last_hidden_state
    for place in range(9):
        changed = IDS.copy()
        changed[:, place] = (changed[:, place] + 7) % 37
        difference = np.abs(np.asarray(apply(graphdef, params, changed).last_hidden_state - before)).max(axis=(0, 2))
        assert not difference[:place].any()
        assert (difference[place:] > 1e-3).all()  # what pads a prompt is seen too


def test_pooled_is_the_first_of_the_largest_tokens():
    """Though config.json says that prompts end with token 2, which is in some of them."""
    assert json.loads((FOLDER / CONFIG).read_text())["eos_token_id"] == 2
    assert (IDS == 2).any()
    ids = np.array([[38, 2, 39, 39, 39, 39, 39, 39, 39], [38, 5, 2, 7, 8, 9, 10, 11, 39]], np.int32)
    hidden, pooled = apply(*nnx.split(read_text_encoder(FOLDER), nnx.Param), ids)
    np.testing.assert_array_equal(pooled, np.stack([hidden[0, 2], hidden[1, 8]]))


def test_a_prompt_with_a_token_that_is_in_no_vocabulary_is_nan():
    graphdef, params = nnx.split(read_text_encoder(FOLDER), nnx.Param)
    for token in (40, -1):
        hidden = apply(graphdef, params, np.array([[38, 1, token, 39], [38, 1, 2, 39]], np.int32)).last_hidden_state
        assert np.isnan(hidden[0]).all()
        assert np.isfinite(hidden[1]).all()


def test_too_many_tokens_are_refused():
    model = nnx.eval_shape(lambda: TextEncoder(CLIPTextConfig.from_json(PUBLISHED), rngs=nnx.Rngs(0)))
    for length in (0, 78):
        with pytest.raises(ValueError, match=f"{length} tokens, the text encoder takes 1 to 77"):
            nnx.eval_shape(lambda m, n=length: m(jnp.zeros((2, n), jnp.int32)), model)
    assert nnx.eval_shape(lambda m: m(jnp.zeros((2, 77), jnp.int32)), model).last_hidden_state.shape == (2, 77, 768)


def published_tensors():
    """The name and shape of each tensor of the published file."""
    rows = gzip.decompress((GOLDEN / "text_encoder.tsv.gz").read_bytes()).decode().splitlines()
    return {name: tuple(map(int, shape.split("x"))) for name, shape in (row.split("\t") for row in rows)}


def test_tensors_are_those_of_the_published_file():
    model = nnx.eval_shape(lambda: TextEncoder(CLIPTextConfig.from_json(PUBLISHED), rngs=nnx.Rngs(0)))
    published = published_tensors()
    assert published.pop(IGNORED[0]) == (1, 77)
    assert tensor_shapes(model) == published
    assert len(published) == 196
    assert parameter_count(model) == 123_060_480


def write(folder, model):
    folder.mkdir()
    write_network(folder, model.config.to_json(), model, weights=WEIGHTS)


def test_what_torch_wrote_is_written_back_bit_for_bit(tmp_path):
    write(tmp_path / "copy", read_text_encoder(FOLDER))
    theirs, ours = load_file(FOLDER / WEIGHTS), load_file(tmp_path / "copy" / WEIGHTS)
    np.testing.assert_array_equal(theirs.pop(IGNORED[0]), np.arange(9)[None])  # may be there, and is no parameter
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor, ours[name], err_msg=name)
    fields = json.loads((tmp_path / "copy" / CONFIG).read_text())
    assert {k: v for k, v in json.loads((FOLDER / CONFIG).read_text()).items() if k != "transformers_version"} == fields
    same = read_text_encoder(tmp_path / "copy")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(same), nnx.state(read_text_encoder(FOLDER)))


def test_names_as_transformers_5_writes_them_are_read(tmp_path):
    shutil.copy(FOLDER / CONFIG, tmp_path)
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in load_file(FOLDER / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(read_text_encoder(tmp_path)), nnx.state(read_text_encoder(FOLDER)))
    # The same tensor under both names.
    save_file(tensors | {"text_model.final_layer_norm.bias": tensors["final_layer_norm.bias"]}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"unexpected: (text_model\.)?final_layer_norm\.bias$"):
        read_text_encoder(tmp_path)


def test_the_published_configuration_is_read():
    config = CLIPTextConfig.from_json(PUBLISHED)
    assert config == TEXT
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.eos_token_id) == (768, 12, 12, 2)
    assert CLIPTextConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    lost = {"_name_or_path", "dropout", "torch_dtype", "transformers_version"}
    assert {name: value for name, value in PUBLISHED.items() if name not in lost} == config.to_json()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hiden_size": 768}, "unknown field 'hiden_size'; did you mean 'hidden_size'"),
        ({"zzz": 1}, "unknown field 'zzz'$"),
        ({"model_type": "clip_vision_model"}, "a 'clip_vision_model', not a clip_text_model"),
        ({"architectures": ["CLIPTextModelWithProjection"]}, r"describes \['CLIPTextModelWithProjection'\], not \['CLIPTextModel'\]"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; what is: 'quick_gelu'"),
        ({"num_attention_heads": 7}, "hidden_size = 768 must be a multiple of num_attention_heads = 7"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 must be positive"),
        ({"vocab_size": "49408"}, "vocab_size = '49408' must be int$"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True must be int$"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps = nan must be finite"),
        ({"eos_token_id": 5}, "eos_token_id = 5 is not supported: prompts end with the last of vocab_size = 49408 tokens, 49407"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_configurations_that_do_not_do_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        CLIPTextConfig.from_json(PUBLISHED | fields)
    assert "\n" not in str(caught.value)


# The file's numbers are 0, 1, 2, …: nothing is compressed, every page is touched.
_READ = """
import json, sys, threading, time
import jax, numpy as np
from diffusion.stable.text_encoder import CLIPTextConfig, read_text_encoder, TextEncoder
from diffusion.weights import read_tensors, write_tensors

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

task = sys.argv[2]
jax.numpy.zeros(3).block_until_ready()
model = read_text_encoder(sys.argv[1]) if task == "write" else None
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
if task == "write":
    write_tensors(sys.argv[1] + "/copy.safetensors", model)
else:
    model = read_text_encoder(sys.argv[1])
    jax.block_until_ready(jax.tree.leaves(model))
done = True
watcher.join()
print(peak - before)
"""


def full_size(folder, dtype):
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(PUBLISHED))
    shapes = published_tensors()
    header, end = {}, 0
    kinds = {np.float32: "F32", np.float16: "F16", np.int64: "I64"}
    dtypes = {name: np.int64 if name in IGNORED else dtype for name in shapes}
    for name, shape in shapes.items():
        begin, end = end, end + np.dtype(dtypes[name]).itemsize * math.prod(shape)
        header[name] = {"dtype": kinds[dtypes[name]], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            stream.write((np.arange(math.prod(shape)) % 1000).astype(dtypes[name]).data)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's accounts of memory")
@pytest.mark.parametrize(("dtype", "task", "bound"), [(np.float32, "read", 1.15), (np.float16, "read", 1.15), (np.float32, "write", 0.4)])
def test_reading_takes_little_more_memory_than_the_parameters(tmp_path, dtype, task, bound):
    """The largest tensor is 0.31 of them all: reading it first and writing one at a time, nothing needs more than a copy of it besides."""
    folder = full_size(tmp_path / "text_encoder", dtype)
    output = subprocess.run([sys.executable, "-c", _READ, folder, task], check=True, capture_output=True, text=True).stdout
    ratio = int(output) / (4 * 123_060_480)
    print(f"{np.dtype(dtype).name} {task}: {ratio:.3f} of the parameters")
    assert (1 if task == "read" else 0) <= ratio <= bound


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_full_size_in_both_directions(tmp_path, agree):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = nnx.eval_shape(lambda: TextEncoder(CLIPTextConfig.from_json(PUBLISHED), rngs=nnx.Rngs(0)))
    generator = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        draw = generator.standard_normal(variable.shape, np.float32)
        if path[-1] == "kernel":
            draw *= variable.shape[0] ** -0.5
        elif path[-1] == "scale":
            draw = 1 + 0.2 * draw
        elif path[-1] == "bias":
            draw *= 0.2
        variable.set_value(jnp.asarray(draw))
    write(tmp_path / "ours", model)
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "ours").eval()
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 123_060_480
    ids = np.full((3, 77), 49407, np.int32)
    ids[:, 0] = 49406
    for row, length in zip(ids, (0, 12, 75), strict=True):
        row[1 : 1 + length] = generator.integers(0, 49406, length)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long())
    graphdef, params = nnx.split(model, nnx.Param)
    half = nnx.eval_shape(lambda: TextEncoder(CLIPTextConfig.from_json(PUBLISHED), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    for network, bound, definition in (("CLIPTextModel", 1e-4, graphdef), ("CLIPTextModel, bfloat16", None, nnx.graphdef(half))):
        with jax.default_matmul_precision("highest"):
            found = apply(definition, params, ids)
        for name in TextEncoding._fields:
            agree(network, f"{name}, tokens 3 × 77", getattr(found, name), getattr(expected, name).numpy(), bound)
    theirs.save_pretrained(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(read_text_encoder(tmp_path / "theirs"), nnx.Param), nnx.state(model, nnx.Param))
