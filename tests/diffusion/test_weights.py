"""Files of weights: exact round trips, older names, and one clear line for whatever is wrong with a folder."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from diffusion.layers import initialise
from diffusion.unet import UNet
from diffusion.weights import CONFIG, WEIGHTS, read_unet, write_unet

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
    with pytest.raises(ValueError, match="is a pickle, which could run code and is not read"):
        read_unet(folder)
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

    monkeypatch.setattr("diffusion.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_unet(tmp_path / "new", model)
    assert [path.name for path in tmp_path.iterdir()] == ["network"]
