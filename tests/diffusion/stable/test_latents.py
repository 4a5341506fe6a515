"""Latents on the disk: what the autoencoder says, computed once, resumed where it was cut off, damaged files and company."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.layers import initialise
from diffusion.stable.autoencoder import AutoencoderKL
from diffusion.stable.latents import LatentCache
from hopjax.data import DataError, Images
from tests.diffusion.stable.tiny import AUTOENCODER

pytestmark = pytest.mark.usefixtures("as_run")
BATCH = 4


@pytest.fixture(scope="module")
def autoencoder(as_run):
    return initialise(lambda rngs: AutoencoderKL(AUTOENCODER, rngs=rngs), jax.random.key(0))


def images(count=10, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)
    return Images(pixels, None, None, "noise")


@pytest.fixture
def counted(monkeypatch):
    """The rows that were encoded."""
    seen, encoded = [], LatentCache._encoded

    def noted(self, pixels, rows):
        seen.extend(np.unique(rows).tolist())  # the last batch is filled up
        return encoded(self, pixels, rows)

    monkeypatch.setattr(LatentCache, "_encoded", noted)
    return seen


def test_moments_are_those_of_the_autoencoder(autoencoder, tmp_path):
    found = LatentCache(tmp_path, autoencoder, batch=BATCH).moments(images())
    assert found.shape == (10, 4, 3, 4)
    assert found.dtype == np.float32
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    expected = autoencoder.encode(jnp.asarray(images().pixels, jnp.float32) / 127.5 - 1)
    scale = np.std(expected.mean)
    # Sums of 100 products in another order, through a dozen layers.
    np.testing.assert_allclose(found[..., :2], expected.mean, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(found[..., 2:], expected.log_variance, rtol=0, atol=1e-5 * np.std(expected.log_variance))
    assert np.ptp(expected.log_variance) > 0.1 * scale


def test_numbers_and_bytes_are_the_same_images(autoencoder, tmp_path):
    cache = LatentCache(tmp_path, autoencoder, batch=BATCH)
    numbers = dataclasses.replace(images(), pixels=(images().pixels / 255).astype(np.float32))
    np.testing.assert_allclose(cache.moments(numbers), cache.moments(images()), rtol=1e-4, atol=1e-5)


def test_each_set_of_images_is_encoded_once_by_each_autoencoder(autoencoder, tmp_path, counted):
    cache = LatentCache(tmp_path, autoencoder, batch=BATCH)
    told: list[int] = []
    first = cache.moments(images(), progress=told.append)
    assert counted == list(range(10))
    assert sum(told) == 10
    again = LatentCache(tmp_path, autoencoder, batch=3)
    np.testing.assert_array_equal(again.moments(images()), first)
    assert len(counted) == 10
    assert not np.array_equal(cache.moments(images(seed=1)), first)
    assert len(counted) == 20
    graphdef, params = nnx.split(autoencoder, nnx.Param)
    changed = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf + 1e-3, params))
    assert not np.array_equal(LatentCache(tmp_path, changed, batch=BATCH).moments(images()), first)
    assert len(counted) == 30
    half = nnx.clone(autoencoder)
    half.dtype = jnp.bfloat16
    assert LatentCache(tmp_path, half).fingerprint != cache.fingerprint
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("torn", [0, 5])
def test_what_was_cut_off_goes_on_and_ends_bit_for_bit_the_same(autoencoder, tmp_path, counted, torn):
    whole = LatentCache(tmp_path / "whole", autoencoder, batch=BATCH).moments(images(15))
    done = 0

    def cut(more):
        nonlocal done
        done += more
        if done == 8:
            raise KeyboardInterrupt

    cache = LatentCache(tmp_path / "cut", autoencoder, batch=BATCH)
    with pytest.raises(KeyboardInterrupt):
        cache.moments(images(15), progress=cut)
    (partial,) = (tmp_path / "cut").iterdir()
    assert partial.suffix == ".partial"
    if torn:
        partial.write_bytes(partial.read_bytes()[:-torn])
    counted.clear()
    told: list[int] = []
    np.testing.assert_array_equal(cache.moments(images(15), progress=told.append), whole)
    assert counted == list(range(4 if torn else 8, 15))
    assert sum(told) == 15
    assert [path.suffix for path in (tmp_path / "cut").iterdir()] == [".npy"]


def test_damaged_files_count_as_missing(autoencoder, tmp_path, counted):
    cache = LatentCache(tmp_path, autoencoder, batch=BATCH)
    whole = np.array(cache.moments(images()))
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for damaged in (content[:-1], content[:50], b"", b"\x80\x04.", content.replace(b"<f4", b"<i4")):
        file.write_bytes(damaged)
        counted.clear()
        np.testing.assert_array_equal(cache.moments(images()), whole)
        assert len(counted) == 10
    file.rename(file.with_suffix(".partial"))
    file.with_suffix(".partial").write_bytes(b"something else" * 100)
    np.testing.assert_array_equal(cache.moments(images()), whole)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_of_two_at_once_one_computes_and_the_other_waits(autoencoder, tmp_path, counted):
    under_way, go_on = threading.Event(), threading.Event()
    found = {}

    def hold(_):
        under_way.set()
        go_on.wait(60)

    def first():
        found["first"] = LatentCache(tmp_path, autoencoder, batch=BATCH).moments(images(), progress=hold)

    def second():
        found["second"] = LatentCache(tmp_path, autoencoder, batch=BATCH).moments(images())

    one = threading.Thread(target=first)
    one.start()
    assert under_way.wait(60)
    other = threading.Thread(target=second)
    other.start()
    other.join(0.3)
    assert other.is_alive()
    go_on.set()
    one.join(60)
    other.join(60)
    np.testing.assert_array_equal(found["first"], found["second"])
    assert len(counted) == 10
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_numbers_that_are_not_finite_are_refused_with_the_image(autoencoder, tmp_path):
    graphdef, params = nnx.split(autoencoder, nnx.Param)
    broken = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf * jnp.nan, params))
    with pytest.raises(ValueError, match=r"the autoencoder makes of image 1 latents that are not finite in float32: compute it in float32"):
        LatentCache(tmp_path, broken).moments(images())


def test_images_that_do_not_fit_are_refused(autoencoder, tmp_path):
    cache = LatentCache(tmp_path, autoencoder)
    grey = dataclasses.replace(images(), pixels=images().pixels[..., :1])
    with pytest.raises(ValueError, match="noise: images have 1 channels, the autoencoder takes 3"):
        cache.moments(grey)
    with pytest.raises(ValueError, match="an image of 1 × 1 cannot be encoded"):
        cache.moments(dataclasses.replace(images(), pixels=images().pixels[:, :1, :1]))
    with pytest.raises(DataError, match="rows of numbers"):
        cache.moments(dataclasses.replace(images(), pixels=images().pixels[:, :1]))
    with pytest.raises(ValueError, match="batch = 0 is out of range: need batch ≥ 1"):
        LatentCache(tmp_path, autoencoder, batch=0)
    assert not list(tmp_path.iterdir())
