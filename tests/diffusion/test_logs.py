"""Records on the disk, whole whatever was cut off; bytes, pixels and sheets; samples of one compiled program."""

import json
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion import logs
from diffusion.pixels import checked, grid, to_bytes, to_model
from diffusion.train import Record
from hopjax.data import DataError, Images

PARTS = [0.5] * 9 + [float("nan")]


def record(step):
    return Record(step, step / 5, 1.5 / step, 0.25, PARTS, 100.0)


def test_records_are_lines_and_come_back(tmp_path):
    file = tmp_path / "log.jsonl"
    log = logs.json_lines(file, 0)
    for step in (10, 20):
        log(record(step))
    assert logs.read(file) == [{**record(step)._asdict(), "part_losses": [0.5] * 9 + [None]} for step in (10, 20)]
    assert all("NaN" not in line for line in file.read_text().splitlines())


@given(st.integers(0, 60), st.integers(0, 40))
def test_after_a_cut_the_file_holds_each_record_up_to_the_step_once(cut, step):
    """Wherever a line was cut off, and whatever was logged beyond the checkpoint that the run goes on from."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "log.jsonl"
        log = logs.json_lines(file, 0)
        for number in (10, 20, 30):
            log(record(number))
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) - cut])
        kept = [line for line in whole[: len(whole) - cut].split(b"\n")[:-1] if json.loads(line)["step"] <= step]
        log = logs.json_lines(file, step)
        assert file.read_bytes() == b"".join(line + b"\n" for line in kept)
        log(record(50))
        assert [one["step"] for one in logs.read(file)] == [json.loads(line)["step"] for line in kept] + [50]


def test_a_damaged_line_is_left_out(tmp_path):
    file = tmp_path / "log.jsonl"
    logs.json_lines(file, 0)(record(10))
    file.write_bytes(b"\0" * 20 + b"\n" + file.read_bytes() + b'{"step": \n')
    logs.json_lines(file, 20)
    assert [one["step"] for one in logs.read(file)] == [10]


def test_without_tensorboard_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert logs.tensorboard(tmp_path, 0) is None


def test_tensorboard_and_weights_and_biases_get_every_record(tmp_path, monkeypatch):
    told: list[Any] = []

    class Writer:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, *scalar):
            told.append(scalar)

        def flush(self):
            pass

    class Wandb:
        id = "abc"

        def init(self, **options):
            told.append(options["id"])
            return self

        def log(self, values, step):
            told.append((values["loss"], step))

    monkeypatch.setitem(sys.modules, "tensorboardX", type("Module", (), {"SummaryWriter": Writer}))
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    log = logs.tensorboard(tmp_path, 10)
    assert log is not None
    log(record(20))
    assert told[0] == (str(tmp_path), 10)
    assert told[1] == ("loss", 0.075, 20)
    assert len(told) == 1 + 3 + 10
    told.clear()
    for _ in range(2):
        logs.weights_and_biases("project", tmp_path, {})(record(20))
    assert told == [None, (0.075, 20), "abc", (0.075, 20)]


# ---- Pixels --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_run")
def test_bytes_go_to_the_model_and_back():
    everything = np.arange(256, dtype=np.uint8)
    seen = np.asarray(to_model(jnp.asarray(everything)))
    assert seen.dtype == np.float32
    assert (float(seen[0]), float(seen[-1])) == (-1.0, 1.0)
    np.testing.assert_allclose(seen, everything / 127.5 - 1, rtol=0, atol=2e-7)
    np.testing.assert_array_equal(to_bytes(seen), everything)
    numbers = np.linspace(0, 1, 11, dtype=np.float32)
    np.testing.assert_allclose(to_model(jnp.asarray(numbers)), 2 * numbers - 1, rtol=0, atol=1e-7)


def test_what_lies_outside_is_clipped_and_nan_is_black():
    np.testing.assert_array_equal(to_bytes(np.array([-np.inf, -2, 0.001, 2, np.inf, np.nan], np.float32)), [0, 0, 128, 255, 255, 0])


def images(pixels):
    return Images(pixels, None, None, "these")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 1, 5, 1), np.float32), "these: holds rows of numbers, not images"),
        (np.full((4, 2, 2, 1), 1.5, np.float32), r"these: pixels lie between 1.5 and 1.5: give bytes, or numbers from 0 to 1"),
        (np.full((4, 2, 2, 1), -0.5, np.float32), r"these: pixels lie between -0.5 and -0.5"),
        (np.full((4, 2, 2, 1), np.nan, np.float32), r"these: pixels lie between nan and nan"),
    ],
)
def test_images_that_cannot_be_trained_on_are_refused(pixels, message):
    with pytest.raises(DataError, match=message):
        checked(images(pixels))


def test_others_are_passed_on():
    for pixels in (np.zeros((2, 1, 1, 1), np.uint8), np.ones((2, 4, 3, 3), np.float32)):
        assert checked(images(pixels)).pixels is pixels


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_a_sheet_holds_every_image_where_it_belongs(count, columns, height, channels, scale):
    pictures = np.random.default_rng(count).integers(1, 256, (count, height, 2, channels), dtype=np.uint8)
    sheet = grid(pictures, columns, scale=scale)
    rows = -(-count // columns)
    assert sheet.shape == (scale * (rows * (height + 1) - 1), scale * (columns * 3 - 1), channels)
    small = sheet[::scale, ::scale]
    np.testing.assert_array_equal(sheet, small.repeat(scale, 0).repeat(scale, 1))
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + 1), i % columns * 3
        np.testing.assert_array_equal(small[top : top + height, left : left + 2], picture)
    assert np.count_nonzero(small) == pictures.size  # black between them
