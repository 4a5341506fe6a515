"""Every format from small files made here, sound and broken; nothing is downloaded, nothing in a file may run."""

import gzip
import importlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hopjax import data
from hopjax.data import DataError, Images, arrays, cifar, mnist, parquet, pickles, pictures, reading

read: Any = data.read  # what may be None is asked for freely


def pixels(n: int, h: int = 32, w: int = 32, c: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array).save(buffer, kind, **options)
    return buffer.getvalue()


def planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def python2_pickle(rows: np.ndarray, labels: list[int]) -> bytes:
    """A batch byte for byte as Python 2's cPickle wrote CIFAR: strings of bytes, NumPy 1's names."""

    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text

    def number(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    shape = number(rows.shape[0]) + number(rows.shape[1]) + b"\x86"
    dtype = (
        b"cnumpy\ndtype\nq\x05("
        + string(b"u1")
        + b"K\x00K\x01tRq\x06(K\x03"
        + string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x03(cnumpy\nndarray\nq\x04K\x00\x85" + string(b"b") + b"tRq\x07(K\x01"
    array += shape + dtype + b"\x89" + string(rows.tobytes()) + b"tb"
    listed = b"]q\x02(" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}q\x01(" + string(b"labels") + listed + string(b"data") + array + b"u."


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def hub_table(
    images: Sequence[bytes | None], labels: Sequence[int | None] | None, *, names: list[str] | None = None, column: str = "img"
) -> pa.Table:
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([None if image is None else {"bytes": image, "path": None} for image in images], struct_type)
    columns = {column: rows} if labels is None else {column: rows, "label": pa.array(labels, pa.int64())}
    table = pa.table(columns)
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    return table


# ---- the result


def test_vectors_are_bytes_in_units_of_255_and_floats_as_they_are():
    images = Images(pixels(2, 2, 2, 1), None, None, "made")
    np.testing.assert_array_equal(images.vectors(), images.pixels.reshape(2, 4).astype(np.float32) / np.float32(255))
    floats = Images(np.full((2, 1, 3, 1), -7.5, np.float32), None, None, "made")
    assert floats.vectors().dtype == np.float32
    assert (floats.vectors() == -7.5).all()
    assert not np.shares_memory(floats.vectors(), floats.pixels)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [([0, -1], None, "label -1 is negative"), ([0, 2], ("a", "b"), "label 2 is outside 0 … 1"), ([5, 5], ("a",), "label 5")],
)
def test_labels_outside_the_classes_are_refused(labels, classes, message):
    with pytest.raises(DataError, match=message):
        Images(pixels(2), np.array(labels), classes, "made")


def test_nothing_is_refused():
    with pytest.raises(DataError, match="holds no image"):
        Images(pixels(0), None, None, "made")


def test_take():
    whole = Images(pixels(4), np.arange(4), None, "made", files=("a", "b", "c", "d"))
    images = whole.take([3, 1])
    np.testing.assert_array_equal(images.labels, [3, 1])
    np.testing.assert_array_equal(images.pixels, pixels(4)[[3, 1]])
    assert len(images) == 2
    for found in (images, data.rotated(images, 30), data.class_split(whole, [1, 3], [0])[0].take([1, 0])):
        assert found.places is not None
        assert found.places.tolist() == [3, 1]
        assert found.files == ("d", "b")
        assert found.name(0).startswith("image 3 of made")
        assert found.name(0).endswith(" (d)")
    assert images.take([1]).name(0) == "image 1 of made (b)"
    # Images put together of several are in no one place.
    joined = replace(images, pixels=np.concatenate([images.pixels, images.pixels]), labels=None)
    assert joined.places is None
    assert joined.files is None
    assert joined.take([2]).name(0) == "image 2 of made"


def test_neither_hopjax_nor_hopjax_data_imports_the_decoders():
    heavy = ["PIL", "pyarrow", "sklearn", "mlxtend", "pandas"]
    code = "import sys, hopjax\nassert 'hopjax.data' not in sys.modules\nimport hopjax.data\n"
    code += f"found = [m for m in {heavy} if m in sys.modules]\nassert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_missing_library_is_one_line_that_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    (tmp_path / "a.png").write_bytes(encoded(pixels(1)[0]))
    with pytest.raises(DataError, match=r"^this needs pillow: pip install 'hopjax\[data\]'") as caught:
        read(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


# ---- built-in sets


@pytest.mark.parametrize(
    ("name", "shape", "counts"),
    [
        ("digits", (1797, 8, 8, 1), (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)),
        ("mnist-5k", (5000, 28, 28, 1), (500,) * 10),
        ("photographs", (520, 32, 32, 3), (260, 260)),
    ],
)
def test_built_in_sets(name, shape, counts):
    images = read(name)
    assert images.pixels.shape == shape
    assert tuple(np.bincount(images.labels)) == counts
    assert len(images.classes) == len(counts)
    vectors = images.vectors()
    assert (vectors.min(), vectors.max()) == (0, 1)
    few = read(name, limit=len(counts))
    np.testing.assert_array_equal(few.pixels, images.pixels[: len(counts)])
    assert set(few.labels) == set(range(len(counts)))  # no class is alone in front


def test_built_in_digits_are_scikit_learns():
    sklearn = importlib.import_module("sklearn.datasets").load_digits()
    images = read("digits")
    np.testing.assert_array_equal(images.pixels[..., 0] * 16, sklearn.images)
    np.testing.assert_array_equal(images.labels, sklearn.target)


def test_photographs_are_tiles_of_the_pictures():
    file = Path(importlib.import_module("sklearn").__file__ or "").parent / "datasets" / "images" / "flower.jpg"
    whole = read(file).pixels[0]
    patch = read("photographs").pixels[2 * 21 + 1]  # the flower's 22nd: row 1, column 1 of 20 columns
    np.testing.assert_array_equal(patch, whole[32:64, 32:64])


def test_an_unknown_path_names_near_matches_and_what_is_recognised(tmp_path):
    with pytest.raises(DataError, match=r"did you mean mnist-5k.*Built in: digits.*recognised: CIFAR-10"):
        read("mnist5k")
    (tmp_path / "cifar.npz").touch()
    with pytest.raises(DataError, match=r"did you mean .*cifar\.npz"):
        read(tmp_path / "cifr.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit must be at least 1"),
        ({"size": 0}, "size must be between"),
        ({"size": (1 << 14, 1 << 14)}, "size must be between"),
        ({"split": "train"}, "is not divided into splits"),
    ],
)
def test_senseless_arguments(arguments, message):
    with pytest.raises(DataError, match=message):
        read("photographs", **arguments)


def test_strange_paths(tmp_path):
    for path in ("x" * 5000, "a\0b", "~nobody-of-that-name/x", ""):
        with pytest.raises(DataError):
            read(path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("loop", "dangling", "pipe"):
        with pytest.raises(DataError, match=r"broken link|cannot be opened|neither a file nor a folder"):
            read(tmp_path / name)
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="is empty"):
        read(tmp_path / "empty")


# ---- channels and sizes


def test_greyscale_is_pillows():
    images = pixels(1, 50, 50)
    np.testing.assert_array_equal(pictures.luma(images)[0, :, :, 0], np.asarray(Image.fromarray(images[0]).convert("L")))


def test_size_and_greyscale_agree_between_arrays_and_pictures(tmp_path):
    images = pixels(3, 20, 24)
    np.save(tmp_path / "x.npy", images)
    (tmp_path / "pictures").mkdir()
    for number, image in enumerate(images):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(encoded(image))
    for options in ({}, {"size": 8}, {"size": (10, 6)}, {"greyscale": True}, {"greyscale": False}):
        np.testing.assert_array_equal(read(tmp_path / "x.npy", **options).pixels, read(tmp_path / "pictures", **options).pixels)
    assert read(tmp_path / "x.npy", size=(10, 6), greyscale=True).pixels.shape == (3, 10, 6, 1)


def test_float_images_keep_their_range(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 6, 6), 1.5))
    images = read(tmp_path / "x.npy", size=3, greyscale=False)
    assert images.pixels.shape == (2, 3, 3, 3)
    np.testing.assert_allclose(images.pixels, 1.5, rtol=1e-6)  # weights of the filter sum to 1 to a few float32 ulps
    grey = Images(np.ones((1, 2, 2, 3), np.float32), None, None, "made")
    np.testing.assert_allclose(pictures.luma(grey.pixels), 1, rtol=1e-6)


# ---- CIFAR


@pytest.fixture
def cifar_folder(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number in (1, 2, 10):
        labels = [(number + place) % 10 for place in range(12)]
        (folder / f"data_batch_{number}").write_bytes(python2_pickle(planes(pixels(12, seed=number)), labels))
    (folder / "test_batch").write_bytes(python2_pickle(planes(pixels(4, seed=99)), [0, 1, 2, 3]))
    (folder / "readme.html").write_text("about")
    names = list(cifar.CLASSES[::-1])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names, "num_vis": 3072}, protocol=2))
    return folder


def test_cifar_pickles(cifar_folder):
    for path in (cifar_folder, cifar_folder.parent):
        images = read(path)
        np.testing.assert_array_equal(images.pixels, np.concatenate([pixels(12, seed=number) for number in (1, 2, 10)]))
        np.testing.assert_array_equal(images.labels[:3], [1, 2, 3])
        assert images.classes == cifar.CLASSES[::-1]
    assert any("is not the official CIFAR file" in warning for warning in images.warnings)
    np.testing.assert_array_equal(read(cifar_folder, split="test").pixels, pixels(4, seed=99))
    np.testing.assert_array_equal(read(cifar_folder / "data_batch_2").pixels, pixels(12, seed=2))
    np.testing.assert_array_equal(read(cifar_folder, limit=14).pixels, images.pixels[:14])
    with pytest.raises(DataError, match="no split 'validation', only test, train"):
        read(cifar_folder, split="validation")


def test_an_official_file_gives_no_warning(tmp_path, monkeypatch):
    file = tmp_path / "test_batch"
    file.write_bytes(python2_pickle(planes(pixels(4)), [0, 1, 2, 3]))
    assert read(file).warnings
    hashlib = importlib.import_module("hashlib")
    monkeypatch.setitem(cifar.CHECKSUMS, "test_batch", hashlib.md5(file.read_bytes()).hexdigest())
    assert not read(file).warnings


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("keys", ["text", "bytes"])
@pytest.mark.parametrize("kind", ["list", "array"])
def test_pickles_of_any_protocol_are_what_python_reads(tmp_path, protocol, keys, kind):
    labels = [3, 1, 9]
    batch: dict[Any, Any] = {
        "data": planes(pixels(3)),
        "labels": np.array(labels) if kind == "array" else labels,
        "filenames": ["a.png"] * 3,
        "x": (None, True, 2.5),
    }
    batch = {key.encode() if keys == "bytes" else key: value for key, value in batch.items()}
    (tmp_path / "batch").write_bytes(pickle.dumps(batch, protocol=protocol))
    images = read(tmp_path / "batch")
    np.testing.assert_array_equal(images.pixels, pixels(3))
    np.testing.assert_array_equal(images.labels, labels)
    assert images.classes == cifar.CLASSES
    ours: Any = pickles.load((tmp_path / "batch").read_bytes())
    for key, value in batch.items():
        np.testing.assert_array_equal(ours[key], value)


def test_fortran_and_big_endian_arrays():
    values = np.arange(12, dtype=">i4").reshape(3, 4)
    for array in (values, np.asfortranarray(values), values[:, ::2]):
        for protocol in (2, 4, 5):
            loaded: Any = pickles.load(pickle.dumps({"a": array}, protocol=protocol))
            np.testing.assert_array_equal(loaded["a"], array)


def test_cifar_100(tmp_path):
    for name, count in (("train", 6), ("test", 2)):
        batch = {"data": planes(pixels(count)), "fine_labels": [99] * count, "coarse_labels": [1] * count}
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {k}" for k in range(100)]}, protocol=2))
    images = read(tmp_path)
    assert len(images) == 6
    assert images.classes[images.labels[0]] == "class 99"
    assert len(read(tmp_path, split="test")) == 2


class Runs:
    """Unpickled by Python, it would leave a file behind."""

    def __init__(self, call: Callable, *arguments: object) -> None:
        self.call = (call, arguments)

    def __reduce__(self):
        return self.call


def hostile(mark: Path) -> dict[str, bytes]:
    """Pickles that would run something, or take memory or time without end."""
    calls = {
        "system": Runs(os.system, f"touch {mark}"),
        "eval": Runs(eval, f"open({str(mark)!r}, 'w')"),
        "partial": Runs(__import__, "antigravity"),
        "ndarray": Runs(np.ndarray, (10**9,), "u1"),
        "object array": np.array([Runs(os.mkdir, str(mark))], dtype=object),
        "structured": np.zeros(3, dtype=[("a", "u1")]),
    }
    found = {f"{name}, protocol {p}": pickle.dumps({"data": value}, protocol=p) for name, value in calls.items() for p in (2, 4, 5)}
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    u1 = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNK\x00K\x00K\x00tb"
    nested = b")" + b"q\x00h\x00\x86" * 100  # a tuple whose hash and repr take 2^100 steps
    found |= {
        "os.system by INST": b"\x80\x02(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.",
        "os.system by OBJ": b"\x80\x02(cos\nsystem\nU\x01xo.",
        "os.system by NEWOBJ": b"\x80\x02cos\nsystem\n)\x81.",
        "attribute of an allowed name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93.",
        "huge memo index": b"\x80\x02}r\xff\xff\xff\x7f.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02U\x01xQ.",
        "huge array": b"\x80\x02}U\x04data" + array + b"(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86" + u1 + b"\x89U\x01xtbs.",
        "wrong shape": b"\x80\x02}U\x04data" + array + b"(K\x01K\x01K\x00\x86" + u1 + b"\x89U\x01xtbs.",
        "negative shape": b"\x80\x02}U\x04data" + array + b"(K\x01J\xff\xff\xff\xff\x85" + u1 + b"\x89U\x01xtbs.",
        "nested key": b"\x80\x02}" + nested + b"K\x01s.",
        "nested shape": b"\x80\x02}U\x04data" + array + b"(K\x01" + nested + u1 + b"\x89U\x01xtbs.",
        "nested dtype": b"\x80\x02}U\x04data" + b"cnumpy\ndtype\n(" + nested + b"tRs.",
        "attributes of a function": b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",
        "attributes of a dictionary": b"\x80\x02}}U\x01aK\x01sb.",
        "long bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.",
        "long bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fx.",
        "calls a string": b"\x80\x02U\x01x)R.",
        "codec": b"\x80\x02c_codecs\nencode\nU\x01xU\x03zip\x86R.",
        "append to a dictionary": b"\x80\x02}K\x01a.",
        "set in a list": b"\x80\x02]K\x01K\x01s.",
        "odd items": b"\x80\x02}(K\x01u.",
        "empty stack": b"\x80\x02.",
        "no mark": b"\x80\x02t.",
        "no stop": b"\x80\x02}",
        "no memo": b"\x80\x02h\x07.",
        "no instruction": b"\x80\x02\xff",
        "the mark itself": b"\x80\x02(.",
    }
    return found


def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path):
    mark = tmp_path / "ran"
    for name, content in hostile(mark).items():
        file = tmp_path / "data_batch_1"
        file.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read(file)
        assert str(file) in str(caught.value), name
        assert "\n" not in str(caught.value), name
        assert len(str(caught.value)) < 400 + len(str(file)), name
        assert not mark.exists(), name
    # The pickles are what they claim to be: Python does run the first.
    pickle.loads(hostile(mark)["eval, protocol 4"])["data"].close()
    assert mark.exists()


def test_a_hostile_meta_file_costs_the_names_only(cifar_folder, tmp_path):
    (cifar_folder / "batches.meta").write_bytes(hostile(tmp_path / "ran")["system, protocol 2"])
    images = read(cifar_folder)
    assert images.classes == cifar.CLASSES
    assert any("names cannot be read" in warning for warning in images.warnings)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "not of CIFAR's dictionary"),
        ({"labels": [1]}, "no 'data'"),
        ({"data": np.zeros((2, 7), np.uint8), "labels": [1, 2]}, "no 'data' of 3072 bytes"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]}, "no 'data' of 3072 bytes"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "'labels' for each of its 2 images"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1, "2"]}, "'labels'"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1, -2]}, "'labels'"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "'labels'"),
    ],
)
def test_pickles_that_are_no_batch(tmp_path, batch, message):
    (tmp_path / "b").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(DataError, match=message):
        read(tmp_path / "b")


def test_a_bad_batch_can_be_skipped(cifar_folder):
    bad = cifar_folder / "data_batch_2"
    bad.write_bytes(bad.read_bytes()[:1000])
    with pytest.raises(DataError, match="data_batch_2"):
        read(cifar_folder)
    images = read(cifar_folder, skip_bad=True)
    assert len(images) == 24
    assert [file for file, _ in images.skipped] == [str(bad)]


def test_cifar_records(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = np.concatenate([np.arange(10, dtype=np.uint8)[:, None], planes(pixels(10))], axis=1)
    (folder / "data_batch_1.bin").write_bytes(records[:6].tobytes())
    (folder / "data_batch_2.bin").write_bytes(records[6:].tobytes())
    (folder / "test_batch.bin").write_bytes(records[:1].tobytes())
    for path in (folder, tmp_path):
        images = read(path)
        np.testing.assert_array_equal(images.pixels, pixels(10))
        np.testing.assert_array_equal(images.labels, np.arange(10))
        assert images.classes == cifar.CLASSES
    (tmp_path / "any name").write_bytes(records[:3].tobytes())
    assert len(read(tmp_path / "any name")) == 3
    assert len(read(folder, limit=7)) == 7
    cut = folder / "data_batch_2.bin"
    cut.write_bytes(records[6:].tobytes()[:-5])
    with pytest.raises(DataError, match=r"data_batch_2.bin: ends inside a record.*skip_bad"):
        read(folder)
    partial = read(folder, skip_bad=True)
    assert len(partial) == 9
    assert len(partial.skipped) == 1
    cut.write_bytes(b"x")
    with pytest.raises(DataError, match="not even one record"):
        read(cut)


def test_records_with_labels_that_are_none(tmp_path):
    records = np.concatenate([np.array([[1], [200], [2]], np.uint8), planes(pixels(3))], axis=1)
    (tmp_path / "x.bin").write_bytes(records.tobytes())
    with pytest.raises(DataError, match="1 labels are not 0 … 9, the first 200 of record 1"):
        read(tmp_path / "x.bin")
    images = read(tmp_path / "x.bin", skip_bad=True)
    np.testing.assert_array_equal(images.labels, [1, 2])
    np.testing.assert_array_equal(images.places, [0, 2])


def test_places_go_on_from_batch_to_batch(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number in (1, 2):
        records = np.concatenate([np.array([[1], [200], [2]], np.uint8), planes(pixels(3))], axis=1)
        (folder / f"data_batch_{number}.bin").write_bytes(records.tobytes())
    np.testing.assert_array_equal(read(folder, skip_bad=True).places, [0, 2, 3, 5])
    np.testing.assert_array_equal(read(folder, skip_bad=True, limit=3).places, [0, 2, 3])


def test_records_that_begin_like_idx(tmp_path):
    record = bytearray(planes(pixels(1)).tobytes())
    record[:3] = b"\x00\x08\x03"
    (tmp_path / "x").write_bytes(b"\x00" + record)
    assert read(tmp_path / "x").pixels.shape == (1, 32, 32, 3)


# ---- MNIST


@pytest.fixture(params=["", ".gz"])
def mnist_folder(tmp_path, request):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", 20), ("t10k", 5)):
        for name, array in (("images-idx3", pixels(count, 28, 28, 1)[..., 0]), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            content = idx(array)
            (folder / f"{split}-{name}-ubyte{request.param}").write_bytes(gzip.compress(content) if request.param else content)
    return folder


def test_mnist(mnist_folder):
    for path in (mnist_folder, mnist_folder.parent, mnist_folder.parent.parent):
        images = read(path)
        np.testing.assert_array_equal(images.pixels, pixels(20, 28, 28, 1))
        np.testing.assert_array_equal(images.labels, np.arange(20) % 10)
    assert len(read(mnist_folder, split="test")) == 5
    assert len(read(mnist_folder, split="t10k", limit=3)) == 3
    file = next(mnist_folder.glob("t10k-images*"))
    assert len(read(file)) == 5
    with pytest.raises(DataError, match="holds labels: give the file of the images"):
        read(next(mnist_folder.glob("t10k-labels*")))
    packed = file.suffix == ".gz"
    assert any("is not the official MNIST file" in warning for warning in images.warnings) == packed
    next(mnist_folder.glob("t10k-labels*")).unlink()
    alone = read(mnist_folder, split="test")
    assert alone.labels is None
    assert any("no file of labels" in warning for warning in alone.warnings)


def test_a_file_that_is_there_packed_and_unpacked_is_read_once(mnist_folder):
    for file in list(mnist_folder.glob("train-*")):
        file.with_name(f"{file.name.removesuffix('.gz')}").write_bytes(
            idx(pixels(3, 2, 2, 1)[..., 0] if "images" in file.name else np.arange(3, dtype=np.uint8))
        )
        file.with_name(f"{file.name.removesuffix('.gz')}.gz").write_bytes(b"\x1f\x8b broken")
    assert read(mnist_folder).pixels.shape == (3, 2, 2, 1)


def test_names_with_a_dot(tmp_path):
    (tmp_path / "train-images.idx3-ubyte").write_bytes(idx(pixels(2, 4, 4, 1)[..., 0]))
    (tmp_path / "train-labels.idx1-ubyte").write_bytes(idx(np.array([4, 2], np.uint8)))
    np.testing.assert_array_equal(read(tmp_path).labels, [4, 2])


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_idx_file(tmp_path, packed):
    content = idx(pixels(10, 28, 28, 1)[..., 0])
    images, labels = tmp_path / f"train-images-idx3-ubyte{'.gz' * packed}", tmp_path / "train-labels-idx1-ubyte"
    images.write_bytes(gzip.compress(content, 0)[:-3000] if packed else content[:-3000])
    labels.write_bytes(idx(np.arange(10, dtype=np.uint8)))
    with pytest.raises(DataError, match=r"train-images.*ends after 6 of 10 items: cut short"):
        read(tmp_path)
    part = read(tmp_path, skip_bad=True)
    np.testing.assert_array_equal(part.pixels, pixels(10, 28, 28, 1)[:6])
    np.testing.assert_array_equal(part.labels, np.arange(6))
    assert len(part.skipped) == 2  # the images' file, and the labels that are left over


def test_broken_idx_files(tmp_path):
    file = tmp_path / "train-images-idx3-ubyte"
    good = idx(pixels(3, 4, 4, 1)[..., 0])
    cases = {
        "cut short in its header": good[:9],
        "holds more than the 3 items": good + b"x",
        "holds nothing": struct.pack(">HBB3I", 0, 8, 3, 0, 4, 4),
        "more than .* are not read": struct.pack(">HBB3I", 0, 8, 3, *[(1 << 32) - 1] * 3) + b"x",
    }
    for message, content in cases.items():
        for packed in (False, True):
            path = file.with_suffix(".gz") if packed else file
            path.write_bytes(gzip.compress(content) if packed else content)
            with pytest.raises(DataError, match=message):
                read(path)
    for content in (b"", b"\x1f\x8b", b"\x1f\x8b\x08 and so on"):
        file.with_suffix(".gz").unlink()
        file.write_bytes(content)
        with pytest.raises(DataError, match="train-images-idx3-ubyte: "):
            read(tmp_path)
        file.with_suffix(".gz").touch()
    wrong = bytearray(gzip.compress(good))
    wrong[-6] ^= 1  # the checksum
    file.with_suffix(".gz").write_bytes(wrong)
    with pytest.raises(DataError, match="CRC"):
        read(file.with_suffix(".gz"))


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    """A gigabyte of zeros behind a header of 3 images: only what the header says is read, in small steps."""
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    with gzip.open(file, "wb", compresslevel=1) as stream:
        stream.write(struct.pack(">HBB3I", 0, 8, 3, 3, 28, 28))
        for _ in range(64):
            stream.write(bytes(1 << 20))
    taken: list[int] = []
    unpack = gzip.GzipFile.read1

    def watched(self, size: int = -1) -> bytes:
        taken.append(size)
        return unpack(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read1", watched)
    with pytest.raises(DataError, match="holds more than the 3 items"):
        read(file)
    assert sum(taken) < 4096
    assert min(taken) > 0


# ---- .npy and .npz


def test_npy_is_mapped(tmp_path):
    np.save(tmp_path / "x.npy", pixels(5, 4, 6, 1)[..., 0])
    images = read(tmp_path / "x.npy")
    assert isinstance(images.pixels, np.memmap) or isinstance(images.pixels.base, np.memmap)
    assert images.pixels.shape == (5, 4, 6, 1)
    assert images.labels is None
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(5, 7)))
    rows = read(tmp_path / "x.npy", limit=4)
    assert rows.pixels.shape == (4, 1, 7, 1)
    assert rows.vectors().shape == (4, 7)
    with pytest.raises(DataError, match="rows of numbers, not images"):
        read(tmp_path / "x.npy", size=4)
    with pytest.raises(DataError, match="cannot be rotated"):
        data.rotated(rows, 30)


@pytest.mark.parametrize("dtype", ["u1", "i8", "u2", ">i4", "f2", "f4", ">f4", "f8", ">f8", "?"])
def test_npy_of_any_numbers(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 2, (3, 2, 2)).astype(dtype)
    for ordered in (np.ascontiguousarray(values), np.asfortranarray(values)):
        np.save(tmp_path / "x.npy", ordered)
        images = read(tmp_path / "x.npy")
        assert images.pixels.dtype == (np.uint8 if values.dtype.kind in "iu" else np.float32)
        np.testing.assert_array_equal(images.pixels[..., 0], values.astype(float))


def test_npy_that_is_no_image(tmp_path):
    file = tmp_path / "x.npy"
    cases = [
        (np.zeros((2, 3, 8, 8)), "channels first"),
        (np.zeros((2, 8, 8, 5)), "at most 4 channels"),
        (np.zeros(4), "shape \\(4,\\)"),
        (np.zeros(()), "shape \\(\\)"),
        (np.zeros((0, 3, 3)), "shape|empty"),
        (np.full((2, 2, 2), 300), "whole numbers from 300 to 300"),
        (np.array([["a"]]), "must be numbers"),
        (np.zeros((2, 2), complex), "must be numbers"),
    ]
    for array, message in cases:
        np.save(file, array)
        with pytest.raises(DataError, match=message):
            read(file)
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="Python objects"):
        read(file)
    np.save(file, pixels(4))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="corrupt or cut short"):
        read(file)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite(tmp_path, bad):
    values = np.ones((5, 3, 3))
    values[2, 0, 0] = bad
    np.savez(tmp_path / "x.npz", x=values, y=np.arange(5))
    with pytest.raises(DataError, match=r"1 images hold NaN or infinite values .* the first is image 2"):
        read(tmp_path / "x.npz")
    images = read(tmp_path / "x.npz", skip_bad=True)
    np.testing.assert_array_equal(images.labels, [0, 1, 3, 4])
    np.testing.assert_array_equal(images.places, [0, 1, 3, 4])
    assert len(images.skipped) == 1


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y"), ("data", "label"), ("arr_0", None)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, names, save):
    image, label = names
    save(tmp_path / "x.npz", **({image: pixels(4)} | ({label: np.array([[3], [2], [1], [0]])} if label else {})))
    images = read(tmp_path / "x.npz", limit=3)
    np.testing.assert_array_equal(images.pixels, pixels(4)[:3])
    assert (images.labels is None) == (label is None)
    if label:
        np.testing.assert_array_equal(images.labels, [3, 2, 1])


def test_npz_with_splits(tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=pixels(4), y_train=np.arange(4.0), x_test=pixels(2), y_test=np.arange(2))
    np.testing.assert_array_equal(read(tmp_path / "mnist.npz").labels, np.arange(4))
    assert len(read(tmp_path / "mnist.npz", split="test")) == 2


def test_npz_that_is_none(tmp_path):
    file = tmp_path / "x.npz"
    cases = [
        ({"a": pixels(1), "b": pixels(1)}, "no array is named images"),
        ({"x": pixels(1), "images": pixels(1)}, "more than one candidate: x, images"),
        ({"x": pixels(2), "y": np.arange(3)}, "labels of shape \\(3,\\) for 2 images"),
        ({"x": pixels(2), "y": np.array([0.5, 1])}, "labels must be whole numbers"),
        ({"x": pixels(2), "y": np.array([np.nan, 1])}, "labels must be whole numbers"),
        ({"x": pixels(2), "y": np.array([-1, 1])}, "label -1 is negative"),
        ({"x": np.array([{}], dtype=object)}, "Python objects"),
    ]
    for content, message in cases:
        np.savez(file, allow_pickle=True, **content)
        with pytest.raises(DataError, match=message):
            read(file)
    np.savez(file, x=pixels(2))
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="corrupt or cut short"):
        read(file)


def npy_header(shape: str, dtype: str = "|u1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(1000000, 1000000, 3)", "claims .* bytes, more than"),
        ("(50000, 32, 32, 3)", "should hold 153600000 bytes by its header, but holds only 1048576"),
        ("(2, 2, 2)", "should hold 8 bytes by its header, but holds more"),
        ("(-2, 2, 2)", "should hold"),
        ("(-1, -1)", "corrupt|should hold"),
        ("__import__('os')", "corrupt"),
    ],
)
def test_npz_headers_that_lie(tmp_path, shape, message):
    """The member is a small zip bomb: a megabyte in a kilobyte."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy_header(shape) + bytes(1 << 20))
    with pytest.raises(DataError, match=message):
        read(tmp_path / "x.npz")


# ---- parquet


def test_parquet(tmp_path):
    names = ["cat", "dog"]
    table = hub_table([encoded(image) for image in pixels(5)], [0, 1, 1, 0, 1], names=names)
    pq.write_table(table, tmp_path / "x.parquet")
    images = read(tmp_path / "x.parquet")
    np.testing.assert_array_equal(images.pixels, pixels(5))
    np.testing.assert_array_equal(images.labels, [0, 1, 1, 0, 1])
    assert images.classes == ("cat", "dog")
    assert len(read(tmp_path / "x.parquet", limit=2)) == 2


@pytest.mark.parametrize(
    "layout", ["{split}-{shard:05}-of-00011.parquet", "data/{split}-{shard:05}-of-00011.parquet", "plain_text/{split}/{shard:04}.parquet"]
)
def test_parquet_shards(tmp_path, layout):
    for split, shards in (("train", (0, 2, 10)), ("test", (0,))):
        for shard in shards:
            file = tmp_path / layout.format(split=split, shard=shard)
            file.parent.mkdir(parents=True, exist_ok=True)
            images = pixels(2, 28, 28, 1, seed=shard)
            pq.write_table(hub_table([encoded(image) for image in images], [shard % 10] * 2, column="image"), file)
    images = read(tmp_path)
    np.testing.assert_array_equal(images.pixels, np.concatenate([pixels(2, 28, 28, 1, seed=shard) for shard in (0, 2, 10)]))
    assert images.classes is None
    assert len(read(tmp_path, split="test")) == 2
    assert len(read(tmp_path, limit=3)) == 3


def test_parquet_of_plain_bytes_without_labels(tmp_path):
    pq.write_table(pa.table({"image": [encoded(image) for image in pixels(2)]}), tmp_path / "some.parquet")
    for path in (tmp_path, tmp_path / "some.parquet"):
        assert read(path).labels is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"a": [1], "b": [2]}), "no column 'img' or 'image' or 'images', only a, b"),
        (pa.table({"img": [1]}), "is int64, need encoded pictures"),
        (pa.table({"img": [{"path": "x"}]}), "need encoded pictures"),
        (pa.table({"img": [b"x"], "label": ["cat"]}), "column 'label' is string, need whole numbers"),
        (pa.table({"img": [b"x"]}), "row 0: cannot be read as a picture"),
        (hub_table([None], [1]), "row 0: has no picture's bytes"),
        (hub_table([encoded(pixels(1)[0])], [2], names=["a", "b"]), "label 2 is outside 0 … 1"),
        (hub_table([], []), "no picture that can be read"),
    ],
)
def test_parquet_that_is_no_image_set(tmp_path, table, message):
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "x.parquet")


def test_bad_rows_and_shards_can_be_skipped(tmp_path):
    good = encoded(pixels(1)[0])
    pq.write_table(hub_table([good, None, b"no picture", good, good], [0, 1, 1, None, 1]), tmp_path / "train-0.parquet")
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError):
        read(tmp_path)
    with pytest.raises(DataError, match="1 rows have no label"):
        read(tmp_path, skip_bad=True)
    pq.write_table(hub_table([good, None, b"no picture", good, good], [0, 1, 1, 0, 1]), tmp_path / "train-0.parquet")
    images = read(tmp_path, skip_bad=True)
    np.testing.assert_array_equal(images.labels, [0, 0, 1])
    np.testing.assert_array_equal(images.places, [0, 3, 4])
    (tmp_path / "train-0.parquet").rename(tmp_path / "train-\udce9.parquet")
    assert len(read(tmp_path / "train-\udce9.parquet", skip_bad=True)) == 3
    assert len(images.skipped) == 3


def test_cut_parquet(tmp_path):
    buffer = io.BytesIO()
    pq.write_table(hub_table([encoded(image) for image in pixels(3)], [0, 1, 2]), buffer)
    for length in (4, 12, 100, len(buffer.getvalue()) - 1):
        (tmp_path / "x.parquet").write_bytes(buffer.getvalue()[:length])
        with pytest.raises(DataError, match="cannot be read as parquet, corrupt or cut short"):
            read(tmp_path / "x.parquet")


# ---- pictures


@pytest.fixture
def picture_folder(tmp_path):
    folder = tmp_path / "pictures"
    for kind in ("cat2", "cat10", "ant"):
        (folder / kind).mkdir(parents=True)
    for number, kind in ((2, "cat2"), (10, "cat2"), (1, "cat10"), (1, "ant")):
        value = np.full((6, 5, 3), 10 * number, np.uint8)
        (folder / kind / f"img{number}.png").write_bytes(encoded(value))
    return folder


def test_folders_by_class_in_natural_order(picture_folder):
    (picture_folder / "cat2" / ".hidden.png").write_bytes(b"nothing")
    (picture_folder / ".cache").mkdir()
    (picture_folder / "README.txt").write_text("about")
    (picture_folder / "ant" / "Thumbs.db").write_bytes(b"x")
    images = read(picture_folder)
    assert images.classes == ("ant", "cat2", "cat10")
    np.testing.assert_array_equal(images.labels, [0, 1, 1, 2])
    np.testing.assert_array_equal(images.pixels[:, 0, 0, 0], [10, 20, 100, 10])
    assert any("Thumbs.db" in warning for warning in images.warnings)
    assert images.files == ("ant/img1.png", "cat2/img2.png", "cat2/img10.png", "cat10/img1.png")
    some = read(picture_folder, limit=3)
    np.testing.assert_array_equal(some.labels, [0, 1, 2])
    np.testing.assert_array_equal(some.places, [0, 1, 3])  # of all, whatever the limit
    (picture_folder / "ant" / "img1.png").write_bytes(b"")
    kept = read(picture_folder, skip_bad=True)
    np.testing.assert_array_equal(kept.places, [1, 2, 3])
    assert kept.files == images.files[1:]


def test_a_flat_folder_and_one_file(picture_folder):
    images = read(picture_folder / "cat2")
    assert images.labels is None
    assert images.classes is None
    np.testing.assert_array_equal(images.pixels[:, 0, 0, 0], [20, 100])
    assert len(read(picture_folder / "cat2" / "img2.png")) == 1


def test_folders_of_splits(picture_folder, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    picture_folder.rename(root / "train")
    (root / "val").mkdir()
    (root / "val" / "x.png").write_bytes(encoded(pixels(1)[0]))
    assert len(read(root)) == 4
    assert read(root).files[0] == "train/ant/img1.png"
    assert len(read(root, split="validation")) == 1
    with pytest.raises(DataError, match="no split 'test', only train, validation"):
        read(root, split="test")


def test_formats_are_told_by_content(tmp_path):
    image = np.full((8, 8, 3), 77, np.uint8)
    for number, kind in enumerate(("PNG", "JPEG", "WEBP")):
        (tmp_path / f"{number}.dat").write_bytes(encoded(image, kind))
    np.testing.assert_array_equal(read(tmp_path).pixels, 77)


def test_modes(tmp_path):
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    file = tmp_path / "x.png"

    def saved(picture: Image.Image, **options):
        picture.save(file)
        return read(file, **options)

    np.testing.assert_array_equal(saved(Image.fromarray(grey)).pixels[0, :, :, 0], grey)
    sixteen = saved(Image.fromarray(grey.astype(np.uint16) * 257))
    np.testing.assert_array_equal(sixteen.pixels[0, :, :, 0], grey)
    assert "16 bits reduced to 8" in sixteen.warnings[0]
    np.testing.assert_array_equal(saved(Image.fromarray(grey > 100)).pixels[0, :, :, 0], 255 * (grey > 100))
    palette = saved(Image.fromarray(np.stack([grey] * 3, axis=2)).quantize(4))
    np.testing.assert_array_equal(palette.pixels[0, :, :, 1], grey)
    opaque = saved(Image.merge("RGBA", [Image.fromarray(grey)] * 3 + [Image.fromarray(np.full_like(grey, 255))]))
    assert opaque.pixels.shape == (1, 2, 2, 3)
    assert not opaque.warnings
    clear = saved(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(np.array([[255, 0], [255, 255]], np.uint8))]))
    np.testing.assert_array_equal(clear.pixels[0, :, :, 0], [[0, 0], [200, 255]])
    assert "transparent" in clear.warnings[0]
    np.testing.assert_array_equal(saved(Image.fromarray(grey), greyscale=False).pixels[0, :, :, 2], grey)
    Image.fromarray(np.full((8, 8, 4), 0, np.uint8), "CMYK").save(tmp_path / "x.jpg")
    np.testing.assert_array_equal(read(tmp_path / "x.jpg").pixels, 255)


def test_exif_orientation(tmp_path):
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:, :16] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to be upright: white at the top
    Image.fromarray(picture).save(tmp_path / "x.jpg", exif=exif, quality=95)
    upright = read(tmp_path / "x.jpg").pixels[0]
    assert upright.shape == (32, 16, 3)
    assert upright[:12].min() > 200
    assert upright[-12:].max() < 50


def test_mixed_shapes(picture_folder):
    odd = picture_folder / "ant" / "img1.png"
    odd.write_bytes(encoded(pixels(1, 6, 6)[0]))
    with pytest.raises(DataError, match=r"img1.png: is 6×6×3 where most are 6×5×3 .*pass size="):
        read(picture_folder)
    assert len(read(picture_folder, size=4)) == 4
    images = read(picture_folder, skip_bad=True)
    assert len(images) == 3
    assert [file for file, _ in images.skipped] == [str(odd)]
    odd.write_bytes(encoded(pixels(1, 6, 5, 1)[0]))
    with pytest.raises(DataError, match=r"is 6×5×1 where most are 6×5×3 .*pass greyscale="):
        read(picture_folder)
    assert read(picture_folder, greyscale=True).pixels.shape == (4, 6, 5, 1)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that claims width × height pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_bad_pictures_are_refused_or_listed(picture_folder):
    whole = encoded(pixels(1, 64, 64)[0])
    frames = [Image.fromarray(image) for image in pixels(3, 8, 8)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    bad = {
        "bomb-a.png": png_bomb(9000, 9000),
        "bomb-b.png": png_bomb(50000, 50000),
        "bomb-c.png": png_bomb(12000, 12000),
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": encoded(pixels(1, 64, 64)[0], "JPEG")[:600],
        "cut.webp": encoded(pixels(1, 64, 64)[0], "WEBP")[:100],
        "empty.png": b"",
        "text.jpeg": b"this is no picture",
        "broken.png": whole[:40] + bytes(40) + whole[80:],
        "gif.png": encoded(pixels(1)[0], "GIF"),
        "moving.png": buffer.getvalue(),
    }
    (picture_folder / "ant" / "gone.png").symlink_to("nowhere.png")
    (picture_folder / "ant" / "deeper").mkdir()
    os.mkfifo(picture_folder / "ant" / "pipe.png")
    for name, content in bad.items():
        file = picture_folder / "cat2" / name
        file.write_bytes(content)
        with pytest.raises(DataError, match=name):
            read(file)
    with pytest.raises(DataError, match="skip_bad=True leaves it out"):
        read(picture_folder)
    images = read(picture_folder, skip_bad=True)
    assert len(images) == 4
    assert {Path(file).name for file, _ in images.skipped} == {*bad, "gone.png", "deeper", "pipe.png"}
    assert all("\n" not in reason and reason for _, reason in images.skipped)
    bombs = [reason for file, reason in images.skipped if "bomb" in file]
    assert len(bombs) == 3
    assert all("claims" in reason or "decompression bomb" in reason for reason in bombs)  # refused for their size, not when they run out


def test_linked_pictures_are_read(picture_folder):
    (picture_folder / "ant" / "link.png").symlink_to(picture_folder / "cat2" / "img2.png")
    (picture_folder / "eel").symlink_to(picture_folder / "cat2", target_is_directory=True)
    np.testing.assert_array_equal(read(picture_folder).labels, [0, 0, 1, 1, 2, 3, 3])


def test_folders_that_hold_no_pictures(tmp_path, picture_folder):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "cifar-10-python.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no picture .* passed over .*cifar-10-python.tar.gz"):
        read(tmp_path / "none")
    (picture_folder / "stray.png").write_bytes(encoded(pixels(1)[0]))
    with pytest.raises(DataError, match=r"holds both folders and pictures \(stray.png\)"):
        read(picture_folder)
    with pytest.raises(DataError, match="not divided into splits"):
        read(picture_folder / "ant", split="test")


def test_archives_are_refused_with_a_hint(tmp_path):
    tarfile = importlib.import_module("tarfile")
    for name, mode in (("cifar-10-python.tar.gz", "w:gz"), ("pictures.tar", "w"), ("x.tar.xz", "w:xz"), ("x.tar.bz2", "w:bz2")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.addfile(tarfile.TarInfo("data_batch_1"), io.BytesIO())
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", b"x")
    with pytest.raises(DataError, match=r"unpack it \(tar -xf cifar-10-python.tar.gz\) and give the folder cifar-10-batches-py"):
        read(tmp_path / "cifar-10-python.tar.gz")
    for name in ("pictures.tar", "x.tar.xz", "x.tar.bz2", "x.zip"):
        with pytest.raises(DataError, match="is an archive or packed: unpack it"):
            read(tmp_path / name)


def test_several_data_sets_in_a_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pq.write_table(hub_table([encoded(pixels(1)[0])], [1]), tmp_path / name / "train.parquet")
    with pytest.raises(DataError, match="holds several data sets"):
        read(tmp_path)


# ---- tasks


def test_class_split_is_the_papers_by_default():
    images: Any = Images(pixels(20), np.arange(20) % 10, cifar.CLASSES, "made")
    task1: Any
    task2: Any
    task1, task2 = data.class_split(images)
    assert sorted({images.classes[label] for label in task1.labels}) == ["bird", "cat", "deer", "dog", "horse"]
    assert sorted({images.classes[label] for label in task2.labels}) == ["airplane", "automobile", "frog", "ship", "truck"]
    assert len(task1) == len(task2) == 10
    np.testing.assert_array_equal(task1.pixels, images.pixels[np.isin(images.labels, [2, 3, 4, 5, 7])])
    by_number, _ = data.class_split(images, [2, 3, 4, 5, 7], [0])
    np.testing.assert_array_equal(by_number.pixels, task1.pixels)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ((["bird"], ["brid"]), "no class 'brid': did you mean bird"),
        ((["bird"], ["zzz"]), "no class 'zzz': only airplane"),
        ((["bird"], [2]), "named twice"),
        ((["bird"], ["cat", "cat"]), "named twice"),
        ((["bird"], []), "no image of a task without classes"),
        ((["bird"], ["truck"]), "no image of truck"),
        (([10], [0]), "only 0 … 9"),
        (([-1], [0]), "numbers start at 0"),
    ],
)
def test_class_splits_that_are_none(tasks, message):
    images = Images(pixels(3), np.array([0, 2, 3]), cifar.CLASSES, "made")
    with pytest.raises(DataError, match=message):
        data.class_split(images, *tasks)


def test_class_split_needs_labels_and_names():
    with pytest.raises(DataError, match="no labels to split by"):
        data.class_split(Images(pixels(3), None, None, "made"))
    with pytest.raises(DataError, match="give numbers instead of 'bird'"):
        data.class_split(Images(pixels(3), np.arange(3), None, "made"))


def test_rotated():
    images = Images(pixels(3, 9, 9, 1), np.arange(3), None, "made")
    np.testing.assert_array_equal(data.rotated(images, 0).pixels, images.pixels)
    np.testing.assert_array_equal(data.rotated(images, 90).pixels, np.rot90(images.pixels, axes=(1, 2)))
    turned = data.rotated(images, 45).pixels
    assert (turned[:, 0, 0] == 0).all()
    floats = Images(images.pixels.astype(np.float32), None, None, "made")
    # Bytes are the floats rounded by pillow: half a unit, and one more for its fixed-point weights.
    assert np.abs(data.rotated(floats, 30).pixels - data.rotated(images, 30).pixels).max() <= 1.5
    assert data.rotated(images, 30).source == "made, rotated by 30°"
    with pytest.raises(DataError, match="must be finite"):
        data.rotated(images, float("nan"))


def test_rotated_turns_colours_alike():
    images = Images(pixels(2, 9, 12), None, None, "made")
    by_pillow = np.asarray(Image.fromarray(images.pixels[1]).rotate(30, Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(data.rotated(images, 30).pixels[1], by_pillow)


# ---- whatever is in a file, the answer is images or a DataError


def specimens() -> dict[str, bytes]:
    made = {"python2": python2_pickle(planes(pixels(2)), [1, 2])}
    made |= {f"pickle {p}": pickle.dumps({"data": planes(pixels(2)), "labels": [1, 2]}, protocol=p) for p in (2, 4, 5)}
    made["records"] = np.concatenate([np.ones((2, 1), np.uint8), planes(pixels(2))], axis=1).tobytes()
    made["idx"] = idx(pixels(3, 4, 4, 1)[..., 0])
    made["idx.gz"] = gzip.compress(made["idx"])
    for name, save in (("npz", np.savez), ("packed npz", np.savez_compressed)):
        buffer = io.BytesIO()
        save(buffer, x=pixels(2, 4, 4).astype(np.float32), y=np.arange(2))
        made[name] = buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, pixels(2, 4, 4))
    made["npy"] = buffer.getvalue()
    buffer = io.BytesIO()
    pq.write_table(hub_table([encoded(image) for image in pixels(3, 4, 4)], [0, 1, 1], names=["a", "b"]), buffer)
    made["parquet"] = buffer.getvalue()
    for kind in ("PNG", "JPEG", "WEBP"):
        made[kind] = encoded(pixels(1, 8, 8)[0], kind)
    buffer = io.BytesIO()
    Image.fromarray(pixels(1, 8, 8)[0]).quantize(16).save(buffer, "PNG", transparency=3)
    made["palette"] = buffer.getvalue()
    return made


SPECIMENS = specimens()


@st.composite
def damaged(draw) -> bytes:
    content = bytearray(SPECIMENS[draw(st.sampled_from(sorted(SPECIMENS)))])
    # Most damage near the beginning, where headers are; parquet and zip keep theirs at the end.
    place = st.one_of(
        st.integers(0, min(64, len(content) - 1)),
        st.integers(0, len(content) - 1),
        st.integers(max(0, len(content) - 300), len(content) - 1),
    )
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        at = min(draw(place), len(content) - 1)
        match draw(st.sampled_from(["set", "cut", "insert", "remove", "word"])):
            case "set":
                content[at] = draw(st.integers(0, 255))
            case "cut":
                del content[at:]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "remove":
                del content[at : at + draw(st.integers(1, 8))]
            case "word":
                content[at : at + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"]))
    return bytes(content)


def readable_or_refused(content: bytes, file: Path, skip_bad: bool) -> None:
    file.write_bytes(content)
    try:
        images = read(file, skip_bad=skip_bad)
    except DataError as error:
        message = str(error)
    else:
        message = str(file)
        assert len(images) > 0
        assert np.isfinite(images.vectors()).all()
    assert str(file) in message
    assert "\n" not in message


@given(content=damaged(), skip_bad=st.booleans())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files(tmp_path, content, skip_bad):
    readable_or_refused(content, tmp_path / "file", skip_bad)


@pytest.mark.slow
@given(content=damaged(), skip_bad=st.booleans())
@settings(max_examples=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_damaged_files_at_length(tmp_path, content, skip_bad):
    readable_or_refused(content, tmp_path / "file", skip_bad)


@given(
    content=st.binary(max_size=64),
    magic=st.sampled_from(
        [
            b"",
            b"PAR1",
            b"\x93NUMPY\x01\x00",
            b"PK\x03\x04",
            b"\x1f\x8b\x08",
            b"\x80\x02",
            b"\x80\x04",
            b"\0\0\x08\x03",
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff",
            b"RIFF\x40\0\0\0WEBP",
        ]
    ),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_behind_a_magic_number(tmp_path, content, magic):
    readable_or_refused(magic + content, tmp_path / "file", skip_bad=False)


@pytest.mark.parametrize("module", [arrays, cifar, mnist, parquet, pictures, reading, pickles])
def test_no_module_unpickles(module):
    """numpy.load(allow_pickle=True) and pickle's own machine are nowhere."""
    source = Path(module.__file__).read_text()
    assert "allow_pickle=True" not in source
    assert "import pickle\n" not in source
    assert "Unpickler" not in source


def test_every_specimen_is_sound(tmp_path):
    """Else the damage would be done to files that are refused anyway."""
    for name, content in SPECIMENS.items():
        (tmp_path / "file").write_bytes(content)
        assert len(read(tmp_path / "file")) in (1, 2, 3), name
