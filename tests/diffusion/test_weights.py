"""Files of weights: exact round trips, older names, shards, and one clear line for whatever is wrong with a folder or a file."""

import json
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from diffusion.layers import initialise
from diffusion.unet import UNet
from diffusion.weights import CONFIG, WEIGHTS, read_tensors, read_unet, refuse_single_file, write_tensors, write_unet

GOLDEN = Path(__file__).parent / "golden" / "colour"


@pytest.fixture
def folder(tmp_path):
    """A copy of a folder that torch wrote."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "network"))


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_what_torch_wrote_is_written_back_bit_for_bit(tmp_path):
    write_unet(tmp_path / "deep" / "copy", read_unet(GOLDEN))
    theirs, ours = load_file(GOLDEN / WEIGHTS), load_file(tmp_path / "deep" / "copy" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype
        np.testing.assert_array_equal(tensor, ours[name], err_msg=name)
    fields = json.loads((tmp_path / "deep" / "copy" / CONFIG).read_text())
    assert {k: v for k, v in json.loads((GOLDEN / CONFIG).read_text()).items() if k != "_diffusers_version"} == fields
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]  # no temporary files stay


def test_a_new_network_round_trips(tmp_path):
    config = read_unet(GOLDEN).config
    model = initialise(lambda rngs: UNet(config, rngs=rngs), jax.random.key(3))
    write_unet(tmp_path / "new", model)
    again = read_unet(tmp_path / "new")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_attention_under_its_names_of_2022_is_read(folder):
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in [*tensors]:
            for new, old in older.items():
                if f".{new}." in name:
                    tensors[name.replace(new, old)] = tensors.pop(name)

    rewrite(folder, rename)
    assert any(".proj_attn." in name for name in load_file(folder / WEIGHTS))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(read_unet(folder)), nnx.state(read_unet(GOLDEN)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_dtypes_are_read_as_float32(folder, dtype):
    rewrite(folder, lambda tensors: tensors.update({name: tensor.astype(dtype) for name, tensor in tensors.items()}))
    expected = load_file(GOLDEN / WEIGHTS)["conv_in.bias"].astype(dtype).astype(np.float32)
    bias = read_unet(folder).conv_in.bias
    assert bias is not None
    found = bias[...]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_in.bias"), r"missing: conv_in\.bias$"),
        (lambda t: t.update(extra=np.zeros(1)), r"unexpected: extra$"),
        (
            lambda t: t.update({"conv_in.weight": np.zeros((8, 3, 3, 1))}),
            r"misshapen: conv_in\.weight \(8, 3, 3, 1\) instead of \(8, 3, 3, 3\)$",
        ),
        (lambda t: t.update({"conv_in.bias": np.zeros(8, int)}), r"misshapen: conv_in\.bias is I64, not of floating point$"),
        # The same parameter under its old and its new name.
        (
            lambda t: t.update({"mid_block.attentions.0.query.bias": np.zeros(12, np.float32)}),
            r"unexpected: mid_block\.attentions\.0\.(query|to_q)\.bias$",
        ),
        (lambda t: [t.pop(n) for n in [*t] if "resnets" in n], r"missing: .* and \d+ more$"),
        (lambda t: t.update({"more": t.pop("conv_in.bias")}), r"missing: conv_in\.bias; unexpected: more$"),
    ],
)
def test_weights_that_do_not_match_are_refused_in_one_line(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        read_unet(folder)
    assert "\n" not in str(caught.value)


def test_damaged_folders_are_refused_in_one_line(folder, tmp_path):
    whole = (folder / WEIGHTS).read_bytes()
    for part in (whole[:-10], whole[:100], b""):
        (folder / WEIGHTS).write_bytes(part)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            read_unet(folder)
    (folder / WEIGHTS).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "diffusion_pytorch_model.non_ema.safetensors").touch()
    with pytest.raises(
        ValueError, match=r"model\.bin, diffusion_pytorch_model\.non_ema\.safetensors; pickles could run code and are never"
    ) as caught:
        read_unet(folder)
    assert "\n" not in str(caught.value)
    for text, message in (("{", "is not JSON"), ("[]", "one JSON object, not a list"), ('{"act_fm": 1}', "did you mean 'act_fn'")):
        (folder / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_unet(folder)
    with pytest.raises(ValueError, match="is no diffusers folder"):
        read_unet(tmp_path / "nowhere")


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(folder, tmp_path, monkeypatch):
    model = read_unet(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="exists already"):
        write_unet(folder, model)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusion.weights.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_unet(tmp_path / "new", model)
    assert [path.name for path in tmp_path.iterdir()] == ["network"]


def shard(folder, count=4):
    """The weights in `count` files and an index, as diffusers lays them out."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    placed: dict[str, str] = {}
    for i in range(count):
        name = f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[i::count])
        save_file(part, folder / name)
        placed |= dict.fromkeys(part, name)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": placed}))
    return index


def test_shards_are_read(folder):
    shard(folder)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(read_unet(folder)), nnx.state(read_unet(GOLDEN)))


def test_shards_that_do_not_do_are_refused_in_one_line(folder):
    index = shard(folder)
    parts = sorted(folder.glob("*-of-*"))
    fields = json.loads(index.read_text())

    def refused(message):
        with pytest.raises(ValueError, match=message) as caught:
            read_unet(folder)
        assert "\n" not in str(caught.value)

    # The same tensor in two shards.
    bias = {name: tensor for name, tensor in load_file(GOLDEN / WEIGHTS).items() if name == "conv_in.bias"}
    whole = {part: part.read_bytes() for part in parts}
    for part in parts:
        if "conv_in.bias" not in load_file(part):
            save_file(load_file(part) | bias, part)
            break
    refused(r"unexpected: conv_in\.bias$")
    for part, content in whole.items():
        part.write_bytes(content)

    long = "x" * 3000 + ".safetensors"  # than any file's name may be
    index.write_text(json.dumps(fields | {"weight_map": fields["weight_map"] | {"conv_in.bias": long}}))
    refused("1 of 5 missing: x{200}…$")
    for name in ("../x.safetensors", "/x.safetensors", "x.bin", "", "."):
        index.write_text(json.dumps(fields | {"weight_map": fields["weight_map"] | {"conv_in.bias": name}}))
        refused("which is no safetensors file beside it")
    for content in ({}, {"weight_map": {}}, {"weight_map": {"conv_in.bias": 3}}, {"weight_map": []}):
        index.write_text(json.dumps(content))
        refused("must say in weight_map")
    index.write_text(json.dumps(fields))
    for part in parts[::2]:
        part.unlink()
    refused(f"has not all shards .*: 2 of 4 missing: {parts[0].name}, {parts[2].name}$")
    shutil.copy(GOLDEN / WEIGHTS, folder)
    refused(f"has both {WEIGHTS} and {index.name}: remove the one that does not count$")


STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (None, f"{STEM}.fp16.safetensors"),
        (f"{WEIGHTS}.index.fp16.json", f"{STEM}.fp16-0000{{}}-of-00002.safetensors"),
        (f"{WEIGHTS}.fp16.index.json", f"{STEM}-0000{{}}-of-00002.fp16.safetensors"),
    ],
)
def test_weights_of_float16_are_read_if_they_are_the_only_ones(folder, index, shard):
    """In one file, or in shards as diffusers names them and as it did before."""
    half = {name: tensor.astype(np.float16) for name, tensor in load_file(folder / WEIGHTS).items()}
    parts = {shard.format(i): dict(list(half.items())[i::2]) for i in range(2)} if index else {shard: half}
    for name, part in parts.items():
        save_file(part, folder / name)
    if index:
        placed = {tensor: name for name, part in parts.items() for tensor in part}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(read_unet(folder)), nnx.state(read_unet(GOLDEN)))
    (folder / WEIGHTS).unlink()
    bias = read_unet(folder).conv_in.bias
    assert bias is not None
    np.testing.assert_array_equal(bias[...], half["conv_in.bias"].astype(np.float32))


class Pair(nnx.Module):
    """Two parameters."""

    def __init__(self):
        self.a = nnx.Param(jnp.zeros(3, jnp.float32))
        self.b = nnx.Param(jnp.zeros((2, 2), jnp.bfloat16))


def raw(file, header, data=b"", length=None):
    """A file with this header, an object or text, and data."""
    file.parent.mkdir(exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def tensor(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DATA = np.arange(3, dtype=np.float32).tobytes() + np.arange(4, dtype=ml_dtypes.bfloat16).tobytes()
HEADER = {"a": tensor(0, 12, [3]), "b": tensor(12, 20, [2, 2], "BF16")}


def test_ignored_tensors_may_be_there_and_are_not_read(tmp_path):
    # Of a kind, shape and size that no parameter could have; and a header that is not a multiple of 8 bytes long.
    file = raw(tmp_path / "x", HEADER | {"c.position_ids": tensor(20, 21, [1, 1], "U8")}, DATA + b"x")
    assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 8
    with pytest.raises(ValueError, match=r"unexpected: c\.position_ids$"):
        read_tensors(file, Pair)
    for path in (file, raw(tmp_path / "y", HEADER, DATA)):
        model = read_tensors(path, Pair, ignored=["c.position_ids"])
        np.testing.assert_array_equal(model.a[...], [0, 1, 2])
        np.testing.assert_array_equal(model.b[...], np.arange(4).reshape(2, 2))
        assert (model.a.dtype, model.b.dtype) == (jnp.float32, jnp.bfloat16)
    # What is ignored is no excuse for what is not there.
    with pytest.raises(ValueError, match=r"missing: a$"):
        read_tensors(raw(file, {"b": tensor(0, 8, [2, 2], "BF16")}, DATA[:8]), Pair, ignored=["a"])


def test_what_is_written_is_safetensors_of_each_dtype(tmp_path):
    """As safetensors' own library reads it, at addresses that are multiples of 8."""
    model = read_tensors(raw(tmp_path / "x", HEADER, DATA), Pair)
    write_tensors(tmp_path / "y", model)
    found = load_file(tmp_path / "y")
    assert {name: array.dtype for name, array in found.items()} == {"a": np.float32, "b": ml_dtypes.bfloat16}
    np.testing.assert_array_equal(found["a"], [0, 1, 2])
    np.testing.assert_array_equal(found["b"], np.arange(4).reshape(2, 2))
    assert int.from_bytes((tmp_path / "y").read_bytes()[:8], "little") % 8 == 0


def test_numbers_too_large_for_the_parameters_are_refused(tmp_path):
    data = np.array([0, 1e300, 0]).tobytes() + DATA[12:]
    file = raw(tmp_path / "x", {"a": tensor(0, 24, [3], "F64"), "b": tensor(24, 32, [2, 2], "BF16")}, data)
    with pytest.raises(ValueError, match=r"x: a holds numbers too large for float32$"):
        read_tensors(file, Pair)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    for file in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="cannot read "):
            read_tensors(file, Pair)


def test_parameters_that_would_be_one_tensor_are_refused(tmp_path):
    class Clash(nnx.Module):
        def __init__(self):
            self.scale, self.embedding = (nnx.Param(jnp.zeros(1, jnp.float32)) for _ in range(2))

    with pytest.raises(ValueError, match="two parameters of Clash would be one tensor, weight"):
        write_tensors(tmp_path / "x", Clash())


TWICE = json.dumps(HEADER).encode()[:-1] + b', "a": ' + json.dumps(HEADER["a"]).encode() + b"}"
MANY = json.dumps(HEADER).encode()[:-1] + b', "c": {"dtype": "F32", "shape": [0], "data_offsets": [20, 20]}' * 20_000 + b"}"


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        (HEADER | {"b": tensor(12, 2**40, [2**38])}, None, "is not a whole safetensors file"),  # past the end
        (HEADER | {"b": tensor(8, 16, [2, 2], "BF16")}, None, "is not a whole safetensors file"),  # overlapping
        (HEADER | {"b": tensor(0, 12, [3])}, None, "is not a whole safetensors file"),  # the same bytes
        ({"a": tensor(0, 12, [3])}, None, "is not a whole safetensors file"),  # bytes of no tensor
        (HEADER | {"a": tensor(12, 0, [3])}, None, "is not a whole safetensors file"),
        (HEADER | {"a": tensor(0, 12, [-3])}, None, "is not a whole safetensors file"),
        (HEADER | {"a": tensor(0, 12, [2**40, 2**40])}, None, "is not a whole safetensors file"),
        (HEADER | {"a": tensor(0, 12, [4])}, None, "is not a whole safetensors file"),
        (HEADER, 2**30, "is not a whole safetensors file"),  # a gigabyte of header
        (HEADER, 2**63, "is not a whole safetensors file"),
        (HEADER, 10**8, "is not a whole safetensors file"),
        (b'{"a":' * 10_000, None, "is not a whole safetensors file"),
        (b'{"\xff": 1}', None, "is not a whole safetensors file"),
        (TWICE, None, "not a safetensors file: a is in it twice"),
        (HEADER | {"a": tensor(0, 12, [1] * 70 + [3])}, None, r"misshapen: a \(1, "),
        (HEADER | {"a": tensor(0, 12, [3, 4], "F8_E4M3")}, None, r"misshapen: a \(3, 4\) instead of \(3,\)$"),
        (HEADER | {"a": tensor(0, 12, [3], "I32")}, None, "misshapen: a is I32, not of floating point$"),
        (MANY, None, "not a safetensors file: c is in it twice$"),
        (HEADER | {"a": tensor(0, 12, [3], "F32\nand more")}, None, r"not a whole safetensors file: '.*F32\\nand more"),
        (HEADER | {"a": tensor(0, 12, [1] * 10_000 + [3])}, None, r"misshapen: a \(1, .*… instead of \(3,\)$"),
        ({"\n\x1b[31mred": HEADER["a"], "b": HEADER["b"]}, None, r"missing: a; unexpected: '\\n\\x1b\[31mred'$"),
        ({"x" * 10_000: HEADER["a"], "b": HEADER["b"]}, None, "missing: a; unexpected: x{200}…$"),
    ],
)
def test_hostile_headers_are_refused_in_one_line(tmp_path, header, length, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(raw(tmp_path / "x", header, DATA, length), Pair)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_checkpoints_in_one_file_are_refused_with_the_way_to_convert_them(tmp_path):
    pickled = tmp_path / "v1-5-pruned.ckpt"
    pickled.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match=r'a pickle, .* convert .*from_single_file\("v1-5-pruned.ckpt"\)\.save_pretrained\('):
        read_unet(pickled)
    # The same without pickle, where a folder's weights should be.
    file = raw(tmp_path / "v1-5.safetensors", {"model.diffusion_model.a": HEADER["a"], "first_stage_model.b": HEADER["b"]}, DATA)
    with pytest.raises(ValueError, match=r'layout of its authors, .* convert .*from_single_file\("v1-5.safetensors"\)'):
        read_tensors(file, Pair)
    with pytest.raises(ValueError, match="in one file"):
        read_unet(file)
    refuse_single_file(raw(tmp_path / "network" / "diffusion_pytorch_model.safetensors", HEADER, DATA).parent)
    for single in (pickled, file, tmp_path):
        with pytest.raises(ValueError, match=r"^.*v1-5.* holds all networks in one file .* convert"):
            refuse_single_file(single)
