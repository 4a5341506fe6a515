"""The training loop: what it learns against closed forms, bit-for-bit repetition, what it says of itself, and how it stops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.config import PRESETS
from diffusion.feed import Feed
from diffusion.layers import initialise
from diffusion.layout import Layout
from diffusion.objective import Denoising
from diffusion.optimiser import AdamW
from diffusion.schedules import CosineSchedule, LinearSchedule, Prediction
from diffusion.train import PARTS, Diverged, Measured, Pause, Program, record, train
from diffusion.unet import UNet
from hopjax.correspondence import posterior_mean
from tests.diffusion.affine import Affine, best, expected_loss
from tests.diffusion.tiny import NETWORK

pytestmark = pytest.mark.usefixtures("as_run")

SCHEDULE = LinearSchedule(10, beta_start=0.02, beta_end=0.4)


def digits(count=60):
    """Bytes with a mean and a variance of their own."""
    return np.random.default_rng(0).integers(60, 220, (count, 3, 3, 1), dtype=np.uint8)


@functools.cache
def made(learning_rate=0.1, batch=30, dtype=np.uint8):
    """A program of 600 steps for the affine network, its compiled step and its first parameters."""
    graphdef, params = nnx.split(Affine(10), nnx.Param)
    optimiser = AdamW(learning_rate, warmup=5, decay=0.8, weight_decay=0.0)
    program = Program(graphdef, Denoising(SCHEDULE), optimiser, 600, 0.9, Layout().mesh())
    return program, program.compile(program.abstract(params), np.zeros((batch, 3, 3, 1), dtype)), params


def begin():
    program, _, params = made()
    return program.initial(params)


def pauses(feed, steps, state=None, *, every=(10**9,), stop=lambda: False, learning_rate=0.1):
    program, step, params = made(learning_rate, feed.batch_size, feed.images.dtype.type)
    state = program.initial(params) if state is None else state
    return train(state, step, feed, key=jax.random.key(7), mesh=program.mesh, steps=steps, pauses=every, stop=stop)


def loss_of(tables, images):
    """Expected, of an affine network, over all timesteps."""
    gain, offset = tables
    return float(expected_loss(gain, offset, SCHEDULE, images).mean())


# ---- What is learnt ------------------------------------------------------------------------------------------------------


def test_training_reaches_the_closed_form_optimum():
    feed = Feed(digits(), 30)
    (end,) = pauses(feed, 600)
    least, begun = (loss_of(tables, feed.images) for tables in (best(SCHEDULE, feed.images), (np.zeros(10), np.zeros(10))))
    assert least < 0.5 < begun  # there is something to learn
    for params in (end.state.params, end.state.ema):
        found = loss_of((np.asarray(params["gain"][...]), np.asarray(params["offset"][...])), feed.images)
        assert least <= found < 1.01 * least


def test_what_is_measured_is_the_loss_of_the_parameters():
    """With a learning rate of almost nothing the losses of many steps average to the closed form, in each part of the schedule too."""
    feed = Feed(digits(), 30)
    (end,) = pauses(feed, 300, learning_rate=1e-12)
    found = record([end], feed)
    # All parameters 0: the loss of an image is the mean of nine squared normal numbers: variance 2/9.
    assert abs(found.loss - 1) < 5 * (2 / 9 / (300 * 30)) ** 0.5
    counts = np.sum([one.part_counts for one in end.measured], axis=0)
    assert counts.sum() == 300 * 30
    np.testing.assert_array_less(np.abs(np.array(found.part_losses) - 1), 5 * (2 / 9 / counts) ** 0.5)


@pytest.mark.slow
def test_a_network_comes_close_to_the_exact_denoiser_of_two_images():
    """Whose loss is the least that any network can have: ε̂ = (x − α E[x₀|x])/σ with the softmax mean of the images."""
    pair = np.array([[[0, 1, 1, 0]] * 4, [[0, 0, 1, 1]] * 4], np.float32)[..., None]
    memories = jnp.asarray(2 * pair - 1).reshape(2, 16)
    graphdef, params = nnx.split(initialise(lambda rngs: UNet(NETWORK, rngs=rngs), jax.random.key(0)), nnx.Param)
    objective, batch = Denoising(SCHEDULE), 60
    program = Program(graphdef, objective, AdamW(3e-3, 50, 0.7), 1500, 0.99, Layout().mesh())
    feed = Feed(pair.repeat(batch, axis=0), batch)
    step = program.compile(program.abstract(params), feed.batch(0))
    (end,) = train(program.initial(params), step, feed, key=jax.random.key(1), mesh=program.mesh, steps=1500, pauses=[10**9])

    clean = jnp.tile(memories, (2000, 1)).reshape(4000, 4, 4, 1)
    noise, timestep = jax.random.normal(jax.random.key(2), clean.shape), jnp.repeat(jnp.arange(10), 400)

    def exact(noisy, t):
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        mean = jax.vmap(posterior_mean, in_axes=(0, None, 0, 0))(noisy.reshape(len(noisy), 16), memories, alpha, sigma**2)
        return ((noisy.reshape(len(noisy), 16) - alpha[:, None] * mean) / sigma[:, None]).reshape(noisy.shape)

    def loss(network):
        return float(jax.jit(lambda: objective.losses_at(network, clean, noise, timestep))().mean())

    least, found = loss(exact), loss(nnx.merge(graphdef, jax.tree.map(jnp.asarray, jax.device_get(end.state.ema))))
    print(f"least {least:.5f}, found {found:.5f}")
    # Common noise: the network cannot be better but by chance. From 1 at the start it comes within two fifths of what nobody can know.
    assert 0.99 * least < found < 1.4 * least


# ---- A step --------------------------------------------------------------------------------------------------------------


def test_part_losses_add_up():
    feed = Feed(digits(), 30)
    for pause in pauses(feed, 8, every=(1,)):
        (one,) = pause.measured
        assert one.part_counts.tolist() == [3] * PARTS  # of ten timesteps, thirty equal parts of the schedule
        np.testing.assert_allclose(one.part_losses.sum(), 30 * one.loss, rtol=1e-5)


def test_losses_fall_into_the_parts_of_their_timesteps():
    """On data without noise to learn, E ε² = 1 at all timesteps, but where the gain is off it grows by gain²(α²V + σ²)."""
    program, step, params = made(1e-12)
    feed = Feed(digits(), 30)
    state = program.initial(params)
    gain = jnp.zeros(10, jnp.float32).at[3].set(5.0)
    state = state._replace(params=jax.tree.map(lambda leaf, new: new, state.params, nnx.state(changed(gain), nnx.Param)))
    _, one = step(state, jax.device_put(feed.batch(0)), jax.random.key(0))
    losses = np.asarray(one.part_losses) / np.asarray(one.part_counts)
    assert np.argmax(losses) == 3
    assert np.sort(losses)[-1] > 5 * np.sort(losses)[-2]


def changed(gain):
    model = Affine(10)
    model.gain[...] = gain
    return model


def test_the_state_after_a_step():
    feed = Feed(digits(), 30)
    states = [jax.device_get(pause.state) for pause in pauses(feed, 5, every=(1,))]
    assert [int(state.step) for state in states] == [1, 2, 3, 4, 5]
    assert {leaf.dtype for state in states for leaf in jax.tree.leaves((state.params, state.ema))} == {np.dtype(np.float32)}
    # Σ dⁿ⁻ⁱ pᵢ / Σ dⁿ⁻ⁱ over the parameters after each step.
    weights = 0.9 ** np.arange(5)[::-1]
    for name in ("gain", "offset"):
        values = np.array([state.params[name][...] for state in states], float)
        np.testing.assert_allclose(states[-1].ema[name][...], weights @ values / weights.sum(), rtol=1e-5)
        np.testing.assert_array_equal(states[0].ema[name][...], states[0].params[name][...])
        # Adam's first step is the rate, of the warm-up, whatever the gradient.
        np.testing.assert_allclose(np.abs(values[0]), 0.1 / 6, rtol=1e-3)


def test_a_step_takes_the_memory_of_the_state_over_and_of_nothing_else():
    program, step, params = made()
    first = program.initial(params)
    batch = jax.device_put(Feed(digits(), 30).batch(0))
    second, _ = step(first, batch, jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((second, params, batch)))
    assert not {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)} & {
        leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(second)
    }


def test_without_an_average_there_is_none_in_memory_and_training_is_the_same():
    program, _, params = made()
    bare = dataclasses.replace(program, ema=0.0)
    step, feed = bare.compile(bare.abstract(params), digits()[:30]), Feed(digits(), 30)
    (end,) = train(bare.initial(params), step, feed, key=jax.random.key(7), mesh=bare.mesh, steps=4, pauses=[10**9])
    *_, with_one = pauses(feed, 600, stop=iter([False] * 3 + [True]).__next__)
    assert end.state.ema is None
    assert bare.averaged(end.state) is end.state.params
    assert program.averaged(with_one.state) is with_one.state.ema
    same(end.state.params, with_one.state.params)


def test_every_step_has_noise_of_its_own():
    program, step, params = made()
    batch = Feed(digits(), 30).batch(0)
    losses = []
    for number in (0, 0, 1):
        state = program.initial(params)._replace(step=jnp.int32(number))
        losses.append(float(step(state, jax.device_put(batch), jax.random.key(0))[1].loss))
    assert losses[0] == losses[1] != losses[2]


def test_bfloat16_computes_with_parameters_and_losses_of_float32():
    """Convolutions and products of the whole step are in bfloat16, the state and what is measured in float32."""
    model = nnx.eval_shape(lambda: UNet(PRESETS["digits-8"], dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    program = Program(graphdef, Denoising(CosineSchedule(), Prediction.VELOCITY), AdamW(), 10, 0.9, Layout().mesh())
    state, batch = program.abstract(params), jax.ShapeDtypeStruct((4, 8, 8, 1), np.uint8)
    text, (after, measured) = jax.make_jaxpr(program._step, return_shape=True)(state, batch, jax.eval_shape(lambda: jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves((after.params, after.ema))} == {np.dtype(np.float32)}
    assert (measured.loss.dtype, measured.part_losses.dtype) == (np.float32, np.float32)
    convolutions = [line for line in str(text).splitlines() if "conv_general_dilated[" in line]
    assert convolutions
    assert all(":bf16[" in line for line in convolutions)


# ---- The loop ------------------------------------------------------------------------------------------------------------


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_a_run_in_pieces_is_the_run_in_one_piece():
    feed = Feed(digits(), 30, 3, digits(20), 0.25)
    (whole,) = pauses(feed, 9)
    state = None
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return asked % 4 == 0

    stops: list[int] = []
    while not stops or stops[-1] < 9:
        *_, end = pauses(feed, 9, state, stop=stop)
        state = jax.tree.map(jnp.asarray, jax.device_get(end.state))
        stops.append(end.step)
    assert stops == [4, 8, 9]
    same(state, whole.state)


def test_pauses_are_where_they_should_be_and_change_nothing():
    feed = Feed(digits(), 30)
    (whole,) = pauses(feed, 13)
    found = []
    for pause in pauses(feed, 13, every=(4, 6)):
        found.append((pause.step, len(pause.measured)))
        last = pause
    assert found == [(4, 4), (6, 2), (8, 2), (12, 4), (13, 1)]
    same(last.state, whole.state)
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(last.measured))


def test_a_finished_run_does_nothing():
    assert not list(pauses(Feed(digits(), 30), 5, begin()._replace(step=jnp.int32(5))))


def test_records_are_means_of_what_was_measured():
    feed = Feed(digits(), 30)
    counts, sums = np.zeros(PARTS), np.zeros(PARTS)
    counts[:2], sums[:2] = (4, 1), (2.0, 3.0)
    one, two = (Measured(*map(jnp.asarray, values)) for values in ((1.0, 4.0, sums, counts), (2.0, 6.0, 2 * sums, counts)))
    found = record([Pause(6, begin(), [one], 0.5), Pause(7, begin(), [two], 1.5)], feed)
    assert (found.step, found.epoch, found.loss, found.gradient_norm, found.rate) == (7, 3.5, 1.5, 5.0, 30.0)
    np.testing.assert_array_equal(found.part_losses, [0.75, 4.5, *[np.nan] * 8])


@pytest.mark.parametrize(("value", "number"), [(np.inf, 1), (np.nan, 4)])
@pytest.mark.parametrize("every", [1, 4, 100])
def test_what_is_not_finite_is_told_with_its_step_and_batch(value, number, every):
    images = digits().astype(np.float32) / 255
    feed = Feed(images, 20)
    # An image that comes in this batch; of another epoch, once the first has gone well.
    bad = feed.places(number)[0]
    calm = images.copy()
    images[bad] = value
    epoch, batch = divmod(number, 3)
    state, step = None, 0
    if epoch:
        *_, end = pauses(Feed(calm, 20), 30, stop=iter([False] * 2 + [True]).__next__)
        state, step = end.state, end.step
    seen = []
    message = rf"^loss (inf|nan), gradient norm (inf|nan) at step {number + 1} \(epoch {epoch + 1}, batch {batch + 1} of 3\)$"

    def look():
        for found in pauses(feed, 30, state, every=(every,)):
            seen.append(found.step)
            assert all(np.isfinite(one.loss) for one in found.measured)
            assert np.all(np.isfinite(jax.device_get(found.state.params["gain"][...])))

    with pytest.raises(Diverged, match=message):
        look()
    # None is given whose loss is not finite, though the step after it was under way.
    assert seen == [i for i in range(step + 1, number + 1) if i % every == 0]


def test_a_whole_run_compiles_its_step_alone(compilations):
    """Neither pauses, nor the batches of another epoch, nor going on compile anything."""
    feed = Feed(digits(), 30, 0, digits(20))
    list(pauses(feed, 11, every=(3,)))
    state = begin()
    with compilations() as found:
        list(pauses(feed, 11, state, every=(3, 4)))
    assert found == []
