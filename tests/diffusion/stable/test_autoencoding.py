"""Autoencoders from scratch: the loss against NumPy, what is learnt, the scale of latents, and folders."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.optimiser import AdamW
from diffusion.stable.autoencoder import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian
from diffusion.stable.autoencoding import SMALL, Autoencoding, loss, train_autoencoder
from diffusion.weights import read_network, write_network
from tests.diffusion.stable.tiny import AUTOENCODER, stripes
from tests.diffusion.tiny import bits

pytestmark = pytest.mark.usefixtures("as_run")
HOW = Autoencoding(100, 8, optimiser=AdamW(1e-2, warmup=5, decay=0.5, weight_decay=0.0))


@pytest.fixture(scope="module")
def trained(as_run):
    told: list[tuple[int, float]] = []
    return train_autoencoder(stripes(), AUTOENCODER, HOW, watch=lambda *now: told.append(now)), told


def test_the_loss_is_that_of_its_definition():
    class Halving(AutoencoderKL):
        """Latents N(x/2, e) of which the image is decoded by adding a half."""

        def __init__(self):
            pass

        def encode(self, image):
            return DiagonalGaussian(image / 2, jnp.ones_like(image))

        def decode(self, latents):
            return latents + 0.5

    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 3, 3, 1)), jnp.float32)
    found = float(loss(Halving(), images, 0.1, jax.random.key(3)))
    mean = np.asarray(images, float) / 2
    decoded = mean + np.exp(0.5) * np.asarray(jax.random.normal(jax.random.key(3), images.shape, jnp.float32), float) + 0.5
    error = decoded - np.asarray(images, float)
    expected = np.mean(np.abs(error) + error**2) + 0.1 * np.mean((mean**2 + np.e - 1 - 1) / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_images_come_back_better_than_their_mean(trained):
    """Stripes of 8 × 8 × 3 numbers by 4 × 4 × 2: what is left of the variance after seconds of training."""
    autoencoder, told = trained
    assert [step for step, _ in told] == list(range(10, 101, 10))
    clean = jnp.asarray(stripes(24, seed=5).pixels, jnp.float32) / 127.5 - 1  # that it has not seen
    decoded = jax.jit(lambda images: autoencoder.decode(autoencoder.encode(images).mean))(clean)
    errors = np.square(np.asarray(decoded - clean)).mean()
    assert errors < 0.35 * np.var(clean)
    assert told[-1][1] < 0.5 * told[0][1]


def test_scaled_latents_have_variance_one(trained):
    autoencoder, _ = trained
    latents = jax.jit(autoencoder.encode)(jnp.asarray(stripes().pixels, jnp.float32) / 127.5 - 1)
    draws = np.asarray(jax.vmap(latents.sample)(jax.random.split(jax.random.key(0), 200)))
    assert abs(autoencoder.config.scaling_factor**2 * draws.var() - 1) < 0.02
    assert autoencoder.config.scaling_factor != AUTOENCODER.scaling_factor


def test_the_same_seed_gives_the_same_autoencoder_and_folders_give_it_back(trained, tmp_path):
    autoencoder, _ = trained
    write_network(tmp_path, autoencoder.config.to_json(), autoencoder)
    again = read_network(tmp_path, AutoencoderKLConfig.from_json, lambda config: AutoencoderKL(config, rngs=nnx.Rngs(0)))
    assert again.config == autoencoder.config
    assert bits(nnx.state(again, nnx.Param)) == bits(nnx.state(autoencoder, nnx.Param))


def test_what_cannot_be_encoded_whole_or_trained_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"^images of 7 × 8 are not decoded from latents: height and width must be multiples of 2$"):
        train_autoencoder(dataclasses.replace(stripes(), pixels=stripes().pixels[:, :7]), AUTOENCODER, HOW)
    for changes, message in (({"steps": 0}, "steps = 0 is out of range: need steps ≥ 1"), ({"kl": -1.0}, "kl = -1.0 is out of range")):
        with pytest.raises(ValueError, match=message):
            Autoencoding(**changes)
    assert SMALL.factor == 4
