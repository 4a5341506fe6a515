"""Elastic weight consolidation: the Fisher information against closed forms and a loop, where training with it ends, and its runs."""

import dataclasses
import functools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion import consolidation, settings
from diffusion.consolidation import Consolidation, Penalty, fisher
from diffusion.feed import Feed
from diffusion.layers import initialise
from diffusion.layout import Layout
from diffusion.learner import UNetLearner
from diffusion.objective import Denoising
from diffusion.optimiser import AdamW
from diffusion.pipeline import Pipeline
from diffusion.pixels import to_model
from diffusion.run import RUN, Rhythm, RunError, Task, completed, run
from diffusion.schedules import LinearSchedule
from diffusion.settings import Length, Network, Noise, Settings
from diffusion.train import Program, train
from diffusion.unet import UNet
from hopjax.data import DataError, Images
from tests.diffusion.affine import Affine, expected_loss, moments
from tests.diffusion.tiny import NETWORK, NETWORKS, bits, last_state, pixels

pytestmark = pytest.mark.usefixtures("as_run")

SCHEDULE = LinearSchedule(10, beta_start=0.02, beta_end=0.4)
ROOT = Path(__file__).parents[2]


def digits(count=60):
    return np.random.default_rng(0).integers(60, 220, (count, 3, 3, 1), dtype=np.uint8)


def affine(gain=0.0, offset=0.0):
    """graphdef and parameters."""
    model = Affine(10)
    model.gain[...], model.offset[...] = jnp.full(10, gain, jnp.float32), jnp.full(10, offset, jnp.float32)
    return nnx.split(model, nnx.Param)


def tables(params):
    return {name: np.asarray(params[name][...], float) for name in ("gain", "offset")}


# ---- The Fisher information ----------------------------------------------------------------------------------------------


def test_fisher_is_its_closed_form():
    """With all parameters 0 the errors are −ε: ∂ℓ = −2 mean ε for the offset, −2 mean ε(αx₀ + σε) for the gain, and ℓ̄ = 1.

    Of d = 9 numbers, E(Σε)² = d and E(Σε(αx₀ + σε))² = α²|x₀|² + σ²(d² + 2d); each timestep is one sample's in ten.
    """
    samples, d, (graphdef, params) = 2**16, 9, affine()
    found = tables(fisher(graphdef, params, Denoising(SCHEDULE), digits(), key=jax.random.key(0), samples=samples, batch=2**12))
    alpha, sigma = SCHEDULE.alpha_sigma_float64(np.arange(10.0))
    square = d * (moments(digits())[1] + moments(digits())[0] ** 2)
    gain = 2 / (10 * d) * (alpha**2 * square + sigma**2 * (d**2 + 2 * d))
    # (Σε)² has kurtosis 3 and falls on a timestep in one of ten: its relative variance is 3·10 − 1.
    error = (29 / samples) ** 0.5
    np.testing.assert_allclose(found["offset"], 2 / 10, rtol=5 * error)
    np.testing.assert_allclose(found["offset"].mean(), 2 / 10, rtol=5 * (2 / samples) ** 0.5)
    # (Σεx)² has a smaller kurtosis than a squared normal number, the closer to 1 the more noise there is.
    np.testing.assert_allclose(found["gain"], gain, rtol=5 * error)


def test_fisher_of_independent_errors_is_the_curvature_of_the_loss():
    """At the best parameters of noise alone, seen without the image, λ = 1 is the rise of the loss: (2/T) for each offset."""
    graphdef, params = affine(0.0, 0.3)
    images = np.full((4, 3, 3, 1), 127.5, np.float32) / 255  # 0 to the model
    found = tables(fisher(graphdef, params, Denoising(SCHEDULE), images, key=jax.random.key(1), samples=2**14, batch=2**12))
    # r = 0.3 − ε: E (Σr)² = d + 0.09 d², over ℓ̄ = 1.09.
    np.testing.assert_allclose(found["offset"].mean(), 0.2 * (1 + 0.09 * 9) / 1.09, rtol=5 * (3 / 2**14) ** 0.5)


@pytest.fixture(scope="module")
def network(as_run):
    return nnx.split(initialise(lambda rngs: UNet(NETWORK, rngs=rngs), jax.random.key(0)), nnx.Param)


def test_fisher_of_a_network_is_a_loop_over_samples(network):
    graphdef, params = network
    objective, images, key, samples = Denoising(SCHEDULE), pixels(5), jax.random.key(3), 12

    @jax.jit
    @jax.value_and_grad
    def loss(params, image, key):
        return objective(nnx.merge(graphdef, params), image, key).losses.mean()

    losses, squares = [], []
    for i in range(samples):
        value, gradient = loss(params, to_model(jnp.asarray(images[[i * 5 // samples]])), jax.random.fold_in(key, i))
        losses.append(float(value))
        squares.append([np.asarray(leaf, float) ** 2 for leaf in jax.tree.leaves(gradient)])
    expected = [16 / (2 * np.mean(losses)) * np.mean(leaf, axis=0) for leaf in zip(*squares, strict=True)]
    found = fisher(graphdef, params, objective, images, key=key, samples=samples, batch=4)
    for one, other in zip(leaves_like(found, params), expected, strict=True):
        # Gradients of float32, each of many products: relative to the largest of their tensor.
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * other.max())


def leaves_like(tree, other):
    """The leaves, if they have the places and types of the other's."""
    jax.tree.map(lambda one, two: np.testing.assert_equal((one.shape, one.dtype), (two.shape, two.dtype)), tree, other)
    return jax.tree.leaves(tree)


def test_fisher_does_not_depend_on_the_size_of_batches():
    graphdef, params = affine(0.5, 0.1)
    one, other = (
        tables(fisher(graphdef, params, Denoising(SCHEDULE), digits(), key=jax.random.key(2), samples=48, batch=batch)) for batch in (3, 16)
    )
    for name in one:
        # Sums of 48 numbers of float32 in two orders.
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5)


def test_fisher_is_compiled_once_and_repeats_bit_for_bit(network, compilations):
    graphdef, params = network

    def found(seed):
        return bits(fisher(graphdef, params, Denoising(SCHEDULE), pixels(), key=jax.random.key(seed), samples=8, batch=4))

    first = found(0)
    with compilations() as again:
        assert found(0) == first
        assert found(1) != first
    assert again == []


@pytest.mark.parametrize(("samples", "batch"), [(0, 4), (6, 4), (4, 0)])
def test_fisher_refuses_parts_of_batches(samples, batch):
    graphdef, params = affine()
    with pytest.raises(ValueError, match=f"samples = {samples} must be a multiple of batch = {batch}"):
        fisher(graphdef, params, Denoising(SCHEDULE), digits(), key=jax.random.key(0), samples=samples, batch=batch)


# ---- The penalty ---------------------------------------------------------------------------------------------------------


def penalty_of(strength, fisher_gain=2.0, fisher_offset=0.5, gain=0.4, offset=-0.2):
    return jax.device_get(Penalty(np.float32(strength), affine(gain, offset)[1], affine(fisher_gain, fisher_offset)[1]))


def test_the_penalty_and_its_gradient():
    penalty, (_, params) = penalty_of(3.0), affine(0.9, 0.1)
    value, gradient = jax.value_and_grad(penalty.value)(params)
    np.testing.assert_allclose(value, 0.5 * 3 * 10 * (2 * 0.5**2 + 0.5 * 0.3**2), rtol=1e-6)
    np.testing.assert_allclose(gradient["gain"][...], np.full(10, 3 * 2 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(gradient["offset"][...], np.full(10, 3 * 0.5 * 0.3), rtol=1e-6)


OPTIMISER = AdamW(0.1, warmup=5, decay=0.8, weight_decay=0.0)


@functools.cache
def trained(strength, steps=600):
    """The end of a run from the anchor, without a penalty for None; and what it measured."""
    penalty = None if strength is None else penalty_of(strength)
    graphdef, params = affine(0.4, -0.2)
    program = Program(graphdef, Denoising(SCHEDULE), OPTIMISER, steps, 0.9, Layout().mesh(), penalty)
    feed = Feed(digits(), 30)
    step = program.compile(program.abstract(params), feed.batch(0))
    (end,) = train(program.initial(params), step, feed, key=jax.random.key(7), mesh=program.mesh, steps=steps, pauses=[10**9])
    return end


def penalised(gain, offset, strength):
    """Expected loss and penalty, and the least that they can be: a quadratic form of gain and offset at each timestep."""
    mean, variance = moments(digits())
    alpha, sigma = SCHEDULE.alpha_sigma_float64(np.arange(10.0))

    def total(gain, offset):
        held = 2.0 * (gain - 0.4) ** 2 + 0.5 * (offset + 0.2) ** 2
        return expected_loss(gain, offset, SCHEDULE, digits()).mean() + 0.5 * strength * held.sum()

    second = alpha**2 * (variance + mean**2) + sigma**2
    matrix = np.array([[second + 10 * strength, alpha * mean], [alpha * mean, np.ones(10) + 2.5 * strength]]).transpose(2, 0, 1)
    vector = np.stack([sigma + 10 * strength * 0.4, -2.5 * strength * 0.2 * np.ones(10)], axis=1)
    # Half of T times the derivative: T λ F / 2 = 10 λ and 2.5 λ.
    least = np.linalg.solve(matrix, vector[..., None])[..., 0].T
    return total(gain, offset), total(*least)


@pytest.mark.parametrize("strength", [0.1, pytest.param(0.01, marks=pytest.mark.slow)])
def test_training_reaches_the_closed_form_optimum_of_loss_and_penalty(strength):
    found = tables(trained(strength).state.params)
    value, least = penalised(found["gain"], found["offset"], strength)
    free = tables(trained(None).state.params)
    assert least <= value < 1.01 * least
    assert penalised(free["gain"], free["offset"], strength)[0] > 1.03 * least  # it is another place


def test_without_strength_a_run_is_the_run_without_it_bit_for_bit():
    plain, held = trained(None, 50), trained(0.0, 50)
    assert bits(plain.state) == bits(held.state)
    assert [bits(one) for one in plain.measured] == [bits(one) for one in held.measured]


def test_a_huge_strength_moves_nothing_and_no_loss_is_hidden_in_it():
    """Swinging about the anchor by steps of the optimiser, whose rate falls to 0.1/481."""
    held, plain = trained(1e9), trained(None)
    ends = [tables(end.state.params) for end in (held, plain)]
    apart = [max(np.abs(end["gain"] - 0.4).max(), np.abs(end["offset"] + 0.2).max()) for end in ends]
    print(apart)
    assert apart[1] > 0.1
    assert apart[0] < 10 * 0.1 / 481
    # What is reported is the loss of images: at the anchor, whatever the penalty.
    expected = expected_loss(np.full(10, 0.4), np.full(10, -0.2), SCHEDULE, digits()).mean()
    np.testing.assert_allclose(np.mean([one.loss for one in held.measured[-100:]]), expected, rtol=0.05)


def test_the_gradient_that_is_measured_has_the_penalty_and_the_loss_has_not():
    penalty = penalty_of(1e4)
    graphdef, params = affine(0.9, 0.1)
    batch, found = Feed(digits(), 30).batch(0), []
    for held in (None, penalty):
        program = Program(graphdef, Denoising(SCHEDULE), OPTIMISER, 10, 0.9, Layout().mesh(), held)
        step = program.compile(program.abstract(params), batch)
        found.append(step(program.initial(params), jax.device_put(batch), jax.random.key(0))[1])
    plain, measured = found
    assert measured.loss == plain.loss
    norm = 1e4 * (10 * ((2 * 0.5) ** 2 + (0.5 * 0.3) ** 2)) ** 0.5
    assert abs(measured.gradient_norm - norm) <= 1.001 * plain.gradient_norm


def test_an_anchor_of_another_network_is_refused():
    graphdef, params = affine()
    longer = nnx.split(Affine(12), nnx.Param)[1]
    for changes, message in (
        ({"anchor": longer}, r"^the anchor is of another network: parameter \['gain'\].* has shape \(12,\) there, \(10,\) here; consol"),
        ({"fisher": {"gain": params["gain"]}}, r"^the Fisher information is of another network: parameter .* has shape None there"),
    ):
        program = Program(graphdef, Denoising(SCHEDULE), OPTIMISER, 9, 0.9, Layout().mesh(), penalty_of(1.0)._replace(**changes))
        with pytest.raises(ValueError, match=message):
            program.compile(program.abstract(params), digits()[:30])


SHARDED = """
    import json
    import jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 8)
    from flax import nnx
    from diffusion import layout
    from diffusion.consolidation import Penalty, fisher
    from diffusion.feed import Feed
    from diffusion.layout import Layout
    from diffusion.objective import Denoising
    from diffusion.optimiser import AdamW
    from diffusion.schedules import LinearSchedule
    from diffusion.train import Program, train

    layout.WHOLE_BELOW = 64

    class Dense(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)

        def __call__(self, image, timestep, key=None):
            return self.second(nnx.tanh(self.first(image.reshape(image.shape[0], 16)))).reshape(image.shape)

    graphdef, params = nnx.split(Dense(nnx.Rngs(0)), nnx.Param)
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1), dtype=np.uint8)
    objective, feed, found = Denoising(LinearSchedule(10, beta_end=0.5)), Feed(images, 16), []
    penalty = Penalty(np.float32(100), params, fisher(graphdef, params, objective, images, key=jax.random.key(0), samples=64))
    one = jax.make_mesh((1, 1), ("replicas", "fsdp"), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for mesh, held in ((one, None), (one, jax.device_get(penalty)), (Layout(2, 4).mesh(), jax.device_get(penalty))):
        program = Program(graphdef, objective, AdamW(1e-2, warmup=2), 6, 0.9, mesh, held)
        step = program.compile(program.abstract(params), feed.batch(0))
        (pause,) = train(program.initial(params), step, feed, key=jax.random.key(1), mesh=mesh, steps=6, pauses=[10**9])
        found.append([float(one.loss) for one in pause.measured])
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_one_and_eight_devices_have_the_same_losses():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(SHARDED)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, one, eight = json.loads(done.stdout)
    # Sums of 256 numbers in another order, in float32, through six steps.
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert np.abs(np.subtract(plain, one)).max() > 1e-4


# ---- What is asked for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(ValueError, match=rf"^strength = {strength} is out of range: need 0 ≤ strength < ∞$"):
        Consolidation(Images(pixels(), None, None, "stripes"), strength)


def test_samples_and_images_that_are_none_are_refused():
    images = Images(pixels(), None, None, "stripes")
    with pytest.raises(ValueError, match=r"^samples = 12 is out of range: need a multiple of 8, at least 8$"):
        Consolidation(images, samples=12)
    with pytest.raises(DataError, match="rows of numbers"):
        Consolidation(dataclasses.replace(images, pixels=images.pixels.reshape(40, 1, 16, 1)))


# ---- Runs ----------------------------------------------------------------------------------------------------------------

OBJECTIVE = Noise("cosine", prediction="v_prediction").objective()
RHYTHM = Rhythm(4, 100, 0)
STRIPES, TURNED = (Images(values, None, None, "stripes") for values in (pixels(), pixels(seed=1).transpose(0, 2, 1, 3)))


@pytest.fixture(scope="module", autouse=True)
def known():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "NETWORKS", NETWORKS)
        yield


@pytest.fixture(scope="module")
def start(as_run):
    """A model that was never trained: it is gone on from all the same."""
    return Pipeline(initialise(lambda rngs: UNet(NETWORK, rngs=rngs), jax.random.key(5)), OBJECTIVE)


def later():
    return Settings(Network("tiny"), Noise("cosine", prediction="v_prediction"), AdamW(2e-3, 2, 0.3), Length(40, 8, 0.9, seed=3))


def task(start, strength=100.0):
    return Task(TURNED, start=start, consolidation=None if strength is None else Consolidation(STRIPES, strength, samples=16))


@pytest.fixture(scope="module")
def ended(start, tmp_path_factory):
    """Folders of runs without it, and with some strengths."""
    folders = {strength: tmp_path_factory.mktemp("runs") / "run" for strength in (None, 100.0)}
    for strength, folder in folders.items():
        run(folder, task(start, strength), later(), RHYTHM)
    return folders


@pytest.mark.slow
def test_a_run_is_held_where_the_penalty_is(ended, start):
    graphdef, anchor = nnx.split(start.unet, nnx.Param)
    penalty = Penalty(1, anchor, fisher(graphdef, anchor, OBJECTIVE, STRIPES.pixels, key=jax.random.key(0), samples=512))
    free, held = (float(penalty.value(last_state(ended[strength], later())[1].params)) for strength in (None, 100.0))
    print(free, held)
    assert 0 < held < free / 10


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(ended, start, tmp_path):
    stop = iter([False] * 4 + [True] * 9).__next__
    assert run(tmp_path / "run", task(start), later(), RHYTHM, stop=stop).step == 5
    said: list[str] = []
    assert run(tmp_path / "run", task(start), later(), RHYTHM, say=said.append).step == 40
    assert said == ["going on from step 5 of 40", "estimating the Fisher information", "compiling"]
    assert bits(last_state(tmp_path / "run", later())[1]) == bits(last_state(ended[100.0], later())[1])


def test_a_run_says_what_it_keeps_and_one_that_keeps_nothing_says_nothing(ended, start):
    assert "consolidation" not in json.loads((ended[None] / RUN).read_text())
    told = json.loads((ended[100.0] / RUN).read_text())["consolidation"]
    assert (told["strength"], told["samples"], told["data"]["samples"]) == (100.0, 16, 40)
    for folder, given, message in (
        (ended[None], task(start), "consolidation: null, now "),
        (ended[100.0], task(start, None), "consolidation: .*, now null"),
        (ended[100.0], task(start, 99.0), r"consolidation\.strength: 100\.0, now 99\.0"),
    ):
        with pytest.raises(RunError, match=f"holds a run with other settings: {message}"):
            completed(folder, given, later())
    assert all(completed(folder, task(start, strength), later()) is not None for strength, folder in ended.items())


def test_what_cannot_be_kept_is_refused_before_anything_is_written(start, tmp_path):
    small = Consolidation(dataclasses.replace(STRIPES, pixels=STRIPES.pixels[:, :2, :2]))
    for given, message in (
        (task(start)._replace(start=None), "nothing to consolidate .* give one to start from"),
        (task(start)._replace(consolidation=small), r"images to consolidate have shape \(2, 2, 1\), those to learn \(4, 4, 1\)"),
    ):
        with pytest.raises(RunError, match=message):
            run(tmp_path / "run", given, later(), RHYTHM)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_learner_consolidates_and_does_not_estimate_again_what_is_done(start, tmp_path, monkeypatch):
    learner = UNetLearner(tmp_path, later(), later(), strength=7.0)

    def learn(name, **more):
        return learner.fingerprint(learner.learn(name, 4, TURNED, start=start, replay=None, replayed=None, **more))

    found = learn("held", consolidate=STRIPES)
    assert json.loads((tmp_path / "held" / RUN).read_text())["consolidation"]["strength"] == 7.0
    assert learn("free") != found
    monkeypatch.delattr(consolidation, "fisher")
    assert learn("held", consolidate=STRIPES) == found
