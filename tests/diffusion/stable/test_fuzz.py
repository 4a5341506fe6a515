"""Damaged and hostile files: whatever is in them, the answer is one line of a ValueError, soon, and in little more memory than the file.

A handful of known cases; at length, with hypothesis, where asked for (`slow`).
"""

import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from diffusion.config import UNetConfig
from diffusion.stable.autoencoder import AutoencoderKLConfig
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.scheduling import Scheduler
from diffusion.stable.text_encoder import CLIPTextConfig
from diffusion.stable.tokenizer import BEGIN, END, read_tokenizer
from diffusion.stable.unet import UNet2DCondition
from diffusion.weights import CONFIG, read_json, read_network, read_tensors
from tests.diffusion.stable.vocabulary import byte_symbols

pytestmark = pytest.mark.usefixtures("unchecked")
GOLDEN = Path(__file__).parent / "golden"
# Seconds that nothing here may take, on a machine that does other things too.
SOON = settings(deadline=timedelta(seconds=10), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def answered(call, *arguments, **options):
    """Whether the call gives something; else it must have raised one printable line of a ValueError."""
    try:
        call(*arguments, **options)
    except ValueError as error:
        refusal = error
    else:
        return True
    assert type(refusal) is ValueError
    assert len(str(refusal).splitlines()) == 1
    str(refusal).encode()  # no half of a surrogate pair
    return False


class Pair(nnx.Module):
    """Two parameters."""

    def __init__(self):
        self.a = nnx.Param(jnp.zeros((5, 3), jnp.float32))
        self.b = nnx.Param(jnp.zeros(40, jnp.float32))


TENSORS: dict[str, np.ndarray] = {"a": np.arange(15, dtype=np.float32).reshape(5, 3), "b": np.linspace(0, 1, 40, dtype=np.float16)}
WHOLE = save(TENSORS)


def taken(file: Path) -> int:
    """Bytes that Python and NumPy had at most in reading the file, beyond those before."""
    tracemalloc.start()
    try:
        answered(read_tensors, file, Pair)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: Any, end: Any, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([2**63, 2**64, 10**400, -1, 0]) | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=4),
    max_leaves=12,
)
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F4", "F6_E2M3", "I64", "U8", "BOOL", "C64", "f32", "F32\n", "\u2028"]
SMALL = st.integers(0, 240) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, -1])
NAMES = st.sampled_from(["a", "b", "weight", "model.diffusion_model.a", "__metadata__"]) | st.text(st.characters(), max_size=6)
ENTRIES = st.builds(entry, SMALL, SMALL, st.lists(SMALL, max_size=4), st.sampled_from(DTYPES)) | JSON


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A file with a header of entries that contradict each other, some twice, and a length that may be another."""
    entries = draw(st.lists(st.tuples(NAMES, ENTRIES), max_size=5))
    fitting = [("a", entry(0, 60, [5, 3])), ("b", entry(60, 140, [40], "F16"))]
    listed = draw(st.permutations([*entries, *draw(st.sampled_from([[], fitting[:1], fitting]))]))
    text = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in listed) + "}"
    length = draw(st.none() | st.integers(0, 300) | st.sampled_from([2**20, 10**8, 2**31, 2**63, 2**64 - 1]))
    return header(text.encode(), bytes(draw(st.sampled_from([0, 60, 140, 141]))), length)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes = WHOLE) -> bytes:
    """A file with some bytes changed, left out or put in, and its end cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content) - 1))
        content[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
        content = content or bytearray(b"\0")
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


@pytest.mark.slow
@settings(SOON, max_examples=2000)
@given(content=damaged() | headers() | st.binary(max_size=64))
def test_any_bytes_are_tensors_or_refused(tmp_path, content):
    file = tmp_path / "x"
    file.write_bytes(WHOLE)
    assert answered(read_tensors, file, Pair)  # what JAX makes once
    file.write_bytes(content)
    # Making the two parameters takes a hundred kilobytes or so.
    assert taken(file) < 64 * len(content) + 2**20


@pytest.mark.slow
@settings(SOON, max_examples=1000)
@given(placed=st.dictionaries(st.sampled_from(["a", "b", "c"]), JSON | st.sampled_from(["x", "x.safetensors", "y.safetensors"])) | JSON)
def test_any_index_is_read_or_refused(tmp_path, placed):
    (tmp_path / "x.safetensors").write_bytes(WHOLE)
    index = tmp_path / "x.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    answered(read_tensors, index, Pair)


@pytest.mark.slow
@settings(SOON, max_examples=1000)
@given(content=damaged(json.dumps({"a": [1, 2.5, "é"], "b": {"c": None}}).encode()) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_text_is_a_json_object_or_refused(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    answered(read_json, file)


FIELDS: dict[Any, dict[str, Any]] = {
    UNetConfig.from_json: json.loads((GOLDEN.parents[1] / "golden" / "colour" / CONFIG).read_text()),
    UNet2DConditionConfig.from_json: json.loads((GOLDEN / "unet" / "options" / CONFIG).read_text()),
    AutoencoderKLConfig.from_json: json.loads((GOLDEN / "autoencoder" / CONFIG).read_text()),
    CLIPTextConfig.from_json: json.loads((GOLDEN / "text_encoder" / CONFIG).read_text()),
    Scheduler.from_json: json.loads((GOLDEN / "schedulers" / "pndm" / "scheduler_config.json").read_text()),
}
READERS = [pytest.param(reader, id=reader.__self__.__name__) for reader in FIELDS]
# What could pass for a value.
VALUES = JSON | st.integers(-1, 64) | st.lists(st.integers(0, 64), max_size=4) | st.just(float("inf"))


def changed(reader: Any) -> st.SearchStrategy[dict[str, Any]]:
    """The fields of a configuration with some others, some taken from another field."""
    fields = FIELDS[reader]
    names = st.sampled_from([*fields]) | st.text(st.characters(), max_size=12)
    return st.dictionaries(names, VALUES | st.sampled_from([*fields.values()]), max_size=3).map(lambda some: fields | some)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_any_configuration_is_read_or_refused(reader):
    @settings(SOON, max_examples=1000)
    @given(changed(reader) | st.dictionaries(st.text(st.characters()), JSON, max_size=4))
    def read(fields):
        answered(reader, fields)

    assert answered(reader, FIELDS[reader])
    read()


def read_denoiser(folder: Path) -> UNet2DCondition:
    return read_network(folder, UNet2DConditionConfig.from_json, lambda config: UNet2DCondition(config, rngs=nnx.Rngs(0)))


@pytest.mark.slow
@settings(SOON, max_examples=100, deadline=None)  # what a network is made of may be a minute's work
@given(fields=changed(UNet2DConditionConfig.from_json))
def test_any_folder_is_a_network_or_refused(tmp_path_factory, fields):
    folder = Path(shutil.copytree(GOLDEN / "unet" / "options", tmp_path_factory.mktemp("unet") / "x"))
    (folder / CONFIG).write_text(json.dumps(fields))
    answered(read_denoiser, folder)


SYMBOLS = [*byte_symbols().values()]
VOCABULARY = {
    token: number for number, token in enumerate([*SYMBOLS, *(f"{symbol}</w>" for symbol in SYMBOLS), "th", "the</w>", BEGIN, END])
}
MERGES = "#version: 0.2\nt h\nth e</w>\n"


@pytest.mark.slow
@settings(SOON, max_examples=500)
@given(
    vocabulary=st.just({}) | st.dictionaries(st.sampled_from(["th", "a", END, "x"]) | st.text(st.characters()), VALUES, max_size=3),
    merges=damaged(MERGES.encode()) | st.text().map(str.encode) | st.just(MERGES.encode()),
    whole=st.booleans(),
)
def test_any_vocabulary_and_merges_are_a_tokenizer_or_refused(tmp_path_factory, vocabulary, merges, whole):
    folder = tmp_path_factory.mktemp("tokenizer")
    if whole:
        lines = merges.decode(errors="replace").split("\n")
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": VOCABULARY | vocabulary, "merges": lines}}))
    else:
        (folder / "vocab.json").write_text(json.dumps(VOCABULARY | vocabulary))
        (folder / "merges.txt").write_bytes(merges)
    answered(read_tokenizer, folder)


def test_the_tokenizer_that_is_damaged_is_whole(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(VOCABULARY))
    (tmp_path / "merges.txt").write_text(MERGES)
    assert read_tokenizer(tmp_path)(["the"]).ids[0, 1] == VOCABULARY["the</w>"]


# Found by the tests above, or by thought.
@pytest.mark.parametrize(
    ("reader", "fields"),
    [
        (UNet2DConditionConfig.from_json, {"_class_name": "two\nlines"}),
        (UNet2DConditionConfig.from_json, {"_class_name": "\ud800"}),
        (UNet2DConditionConfig.from_json, {"layers_per_block": 10**9}),
        (UNet2DConditionConfig.from_json, {"norm_eps": float("inf")}),
        (AutoencoderKLConfig.from_json, {"block_out_channels": [2**40]}),
        (AutoencoderKLConfig.from_json, {"block_out_channels": [4] * 10_000}),
        (AutoencoderKLConfig.from_json, {"_class_name": "two\nlines"}),
        (CLIPTextConfig.from_json, {"model_type": "two\nlines"}),
        (CLIPTextConfig.from_json, {"num_hidden_layers": 10**6}),
        (CLIPTextConfig.from_json, {"vocab_size": 10**400}),
        (Scheduler.from_json, {"num_train_timesteps": float("inf")}),
        (Scheduler.from_json, {"num_train_timesteps": float("nan")}),
        (Scheduler.from_json, {"num_train_timesteps": 10**12}),
        (Scheduler.from_json, {"_class_name": ["PNDMScheduler"]}),
        (UNetConfig.from_json, {"layers_per_block": 10**9}),
    ],
)
def test_configurations_of_no_network_are_refused(reader, fields):
    assert not answered(reader, FIELDS[reader] | fields)


@pytest.mark.parametrize("size", [10, 2**20])
def test_reading_tensors_takes_no_more_memory_than_a_small_multiple_of_the_file(tmp_path, size):
    """A length that promises more, and a header that is long."""
    file = tmp_path / "x"
    answered(read_tensors, file, Pair)  # what is made once
    for length in (None, 10**8, 2**63):
        file.write_bytes(header(b'{"' + b"x" * size + b'":' + json.dumps(entry(0, 0, [0])).encode() + b"}", length=length))
        assert taken(file) < 16 * size + 2**20


# With a limit on the addresses of the process: what is not NumPy's or Python's counts too.
_LIMITED = """
import resource, sys
import jax.numpy as jnp
from flax import nnx
from diffusion.weights import read_tensors, read_unet

class Pair(nnx.Module):
    def __init__(self):
        self.a = nnx.Param(jnp.zeros((5, 3), jnp.float32))
        self.b = nnx.Param(jnp.zeros(40, jnp.float32))

read_tensors(sys.argv[1] + "/whole", Pair)
with open("/proc/self/statm") as pages:
    now = int(pages.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**26, now + 2**26))
for name in sys.argv[2:]:
    try:
        (read_unet if name == "network" else lambda file: read_tensors(file, Pair))(f"{sys.argv[1]}/{name}")
    except ValueError as error:
        print(str(error))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of addresses")
def test_promises_of_gigabytes_are_not_believed(tmp_path):
    cases = {
        "header": header(b"{", length=2**30),
        "longest": header(b"{", length=10**8),
        "past": header(json.dumps({"a": entry(0, 2**34, [2**32])}).encode(), bytes(60)),
        "wide": header(json.dumps({"a": entry(0, 60, [2**32, 2**30])}).encode(), bytes(60)),
    }
    for name, content in cases.items() | {("whole", WHOLE)}:
        (tmp_path / name).write_bytes(content)
    folder = Path(shutil.copytree(GOLDEN.parents[1] / "golden" / "colour", tmp_path / "network"))
    fields = FIELDS[UNetConfig.from_json]
    (folder / CONFIG).write_text(json.dumps(fields | {"block_out_channels": [2**20 for _ in fields["block_out_channels"]]}))
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, tmp_path, *cases, "network"], check=True, capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases) + 1
    assert all("is not a whole safetensors file" in line for line in lines[:-1])
    assert "does not hold this network: " in lines[-1]
    assert " instead of (1048576,)" in lines[-1]
