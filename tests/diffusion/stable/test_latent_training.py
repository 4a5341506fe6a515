"""Runs in latent space: what is learnt against a closed form, bit-for-bit repetition, and measurements against the pipeline's own."""

import dataclasses
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

from diffusion.assess import Bits, assess
from diffusion.checkpoint import Checkpoints
from diffusion.continual import Experiment
from diffusion.feed import Feed
from diffusion.layout import Layout
from diffusion.learner import UNetLearner
from diffusion.likelihood import FlowLogDensity
from diffusion.objective import Denoising
from diffusion.optimiser import Adafactor, AdamW
from diffusion.pipeline import Model
from diffusion.pixels import to_bytes
from diffusion.protocol import Densities, Learner, Plan
from diffusion.run import CHECKPOINTS, MODEL, RUN, Rhythm, RunError, Task, abstract_of, program_of, read_model, run
from diffusion.schedules import LinearSchedule
from diffusion.settings import Length, Network, Noise, Settings
from diffusion.stable.fine_tuning import fine_tuned
from diffusion.stable.latents import Latents, LatentSpace
from diffusion.stable.pipeline import StableDiffusion
from diffusion.stable.unet import UNet2DCondition
from diffusion.train import Program, train
from hopjax.cli import buffer
from hopjax.cli.options import Choice, Machine, Reading, Temperature
from hopjax.cli.options import Model as Priors
from hopjax.cli.progress import Screen
from hopjax.cli.survey import survey
from hopjax.cli.tasks import load
from tests.diffusion.stable.tiny import AUTOENCODER, CLASSES, UNET, stable, stripes
from tests.diffusion.tiny import bits

pytestmark = pytest.mark.usefixtures("as_run")
ROOT = Path(__file__).parents[3]
SETTINGS = Settings(Network(remat=True), Noise("scaled-linear"), Adafactor(1e-2, warmup=1), Length(steps=6, batch_size=8, ema=0.0, seed=3))


@pytest.fixture(scope="module")
def pipeline(as_run):
    return stable(jax.random.key(0))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def model(pipeline, cache):
    """With a prompt for each class."""
    return fine_tuned(pipeline, cache, classes=CLASSES, prompt="{label}")


@pytest.fixture(scope="module")
def ended(model, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(folder, Task(stripes(), start=model), SETTINGS, Rhythm(sample_every=0))
    return folder


# ---- The space -----------------------------------------------------------------------------------------------------------


def test_latents_are_drawn_from_their_distributions_and_scaled(model):
    """Against the moments' own mean and variance, to five standard errors."""
    batch = jax.tree.map(lambda rows: jnp.asarray(rows[:3]), model.batch(stripes(), pixels=False))
    mean, log_variance = np.split(np.asarray(batch.moments), 2, axis=-1)
    scale = 0.18215
    np.testing.assert_allclose(model.space.clean(batch), scale * mean, rtol=1e-6)
    draws = np.asarray(jax.vmap(lambda key: model.space.clean(batch, key))(jax.random.split(jax.random.key(1), 4000)), float)
    deviation = scale * np.exp(0.5 * log_variance)
    assert np.abs((draws.mean(0) - scale * mean) / (deviation / 4000**0.5)).max() < 5
    assert np.abs(draws.var(0) / deviation**2 - 1).max() < 5 * (2 / 4000) ** 0.5


def test_each_image_is_seen_with_its_prompt(model, pipeline, cache):
    images = stripes()
    assert model.batch(images, pixels=False).prompt.tolist() == [1, 2] * 12
    turned = dataclasses.replace(images, classes=CLASSES[::-1])
    assert model.batch(turned, pixels=False).prompt.tolist() == [2, 1] * 12
    assert model.batch(dataclasses.replace(images, labels=None), pixels=False).prompt.tolist() == [0] * 24
    assert model.asked(5).prompt.tolist() == [1, 2, 1, 2, 1]
    plain = fine_tuned(pipeline, cache)
    assert plain.batch(images, pixels=False).prompt.tolist() == plain.asked(24).prompt.tolist() == [0] * 24
    ids = jnp.asarray(pipeline.tokenizer(["", *CLASSES]).ids)
    np.testing.assert_allclose(model.texts, pipeline.text_encoder(ids).last_hidden_state, atol=1e-5)
    np.testing.assert_array_equal(plain.texts[0], model.texts[0])
    assert np.abs(np.diff(model.texts, axis=0)).max(axis=(1, 2)).min() > 1e-3
    nothing = jnp.zeros(3)
    seen = model.space.network(lambda x, t, text, key: text, Latents(None, jnp.array([2, 0, 1])))(nothing, nothing)
    np.testing.assert_array_equal(seen, model.texts[jnp.array([2, 0, 1])])
    assert isinstance(model, Model)


class Affine(nnx.Module):
    """out = gain_t · x + (the text's first number) · slope_t, whatever else there is."""

    def __init__(self, timesteps):
        self.gain, self.slope = (nnx.Param(jnp.zeros(timesteps, jnp.float32)) for _ in range(2))

    def __call__(self, latents, timestep, text, key=None):
        gain, slope = (p[...][timestep][:, None, None, None] for p in (self.gain, self.slope))
        return gain * latents + slope * text[:, 0, 0][:, None, None, None]


def test_training_in_latents_reaches_the_closed_form_optimum():
    """Latents N(±2, 1 + e²ᵘ) with a text of ±1: they are drawn anew in each step, or their variance would be 1 alone."""
    schedule, steps, scale = LinearSchedule(10, beta_start=0.02, beta_end=0.4), 600, 0.5
    config = dataclasses.replace(AUTOENCODER, scaling_factor=scale)
    random, prompt = np.random.default_rng(0), (np.arange(60) % 2).astype(np.int32)
    mean = (random.normal(size=(60, 3, 3, 1)) + (4 * prompt - 2)[:, None, None, None]).astype(np.float32)
    log_variance = np.full(mean.shape, 2.0, np.float32)
    feed = Feed(Latents(np.concatenate([mean, log_variance], -1), prompt), 30)
    space = LatentSpace(jnp.array([-1.0, 1.0], jnp.float32)[:, None, None], {}, None, config)
    graphdef, params = nnx.split(Affine(10), nnx.Param)
    optimiser = AdamW(0.1, warmup=5, decay=0.8, weight_decay=0.0)
    program = Program(graphdef, Denoising(schedule), optimiser, steps, 0.0, Layout().mesh(), space=space)
    step = program.compile(program.abstract(params), feed.batch(0))
    (end,) = train(program.initial(params), step, feed, key=jax.random.key(7), mesh=program.mesh, steps=steps, pauses=[10**9])
    assert end.state.ema is None
    within = mean - (4 * prompt - 2)[:, None, None, None]
    known = scale**2 * (np.square(within).mean() + np.exp(2.0))  # about the class's own mean, to what chance leaves of it
    alpha, sigma = schedule.alpha_sigma_float64(np.arange(10.0))
    found = {name: np.asarray(end.state.params[name][...], float) for name in ("gain", "slope")}

    def loss(gain, slope, variance):
        return np.mean((gain * alpha) ** 2 * variance + (gain * sigma - 1) ** 2 + (gain * alpha * 2 * scale + slope) ** 2)

    gain = sigma / (alpha**2 * known + sigma**2)
    least = loss(gain, -gain * alpha * 2 * scale, known)
    assert least <= loss(found["gain"], found["slope"], known) < 1.01 * least
    # As it would be if latents were their means, or were not scaled.
    for wrong in (scale**2, np.exp(2.0) + 1):
        other = sigma / (alpha**2 * wrong + sigma**2)
        assert loss(other, -other * alpha * 2 * scale, known) > 1.05 * least


# ---- Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(model, ended, tmp_path):
    task = Task(stripes(), start=model)
    stop = iter([False, False, True] + [True] * 9).__next__
    assert run(tmp_path / "run", task, SETTINGS, Rhythm(sample_every=0), stop=stop).step == 3
    with pytest.raises(RunError, match="holds a run of a UNet2DConditionModel, whose model cannot be read before its end"):
        read_model(tmp_path / "run")
    said: list[str] = []
    assert run(tmp_path / "run", task, SETTINGS, Rhythm(sample_every=0), say=said.append).step == 6
    assert said[0] == "going on from step 3 of 6"
    states = []
    for folder in (ended, tmp_path / "run"):
        program, params = program_of(abstract_of(task, SETTINGS), SETTINGS)
        with Checkpoints(folder / CHECKPOINTS) as checkpoints:
            found = checkpoints.restore(program.abstract(params))
        assert found is not None
        states.append(bits(found.state))
    assert states[0] == states[1]
    for file in ("unet", "vae"):
        name = f"{file}/diffusion_pytorch_model.safetensors"
        assert (ended / MODEL / name).read_bytes() == (tmp_path / "run" / MODEL / name).read_bytes()


def test_a_run_ends_with_a_whole_pipeline_of_which_the_unet_alone_has_changed(model, ended):
    found = StableDiffusion.from_folder(ended / MODEL)
    for part, changed in (("vae", False), ("text_encoder", False), ("unet", True)):
        before, after = (bits(nnx.state(getattr(one, part), nnx.Param)) for one in (model.stable, found))
        assert (before != after) == changed
    assert found.unet.config == dataclasses.replace(UNET, sample_size=4)
    again = abstract_of(Task(stripes(), start=model), SETTINGS).read(ended / MODEL)
    assert again.fingerprint() == model.trained(found.unet).fingerprint() != model.fingerprint()
    assert json.loads((ended / RUN).read_text())["settings"]["optimiser"]["kind"] == "adafactor"


def test_a_run_of_another_autoencoder_or_other_prompts_is_another_run(model, pipeline, cache, ended):
    graphdef, params = nnx.split(pipeline.vae, nnx.Param)
    changed = dataclasses.replace(pipeline, vae=nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf * 1.001, params)))
    for other in (fine_tuned(pipeline, cache), fine_tuned(changed, cache)):
        with pytest.raises(RunError, match="holds a run with other settings: start"):
            run(ended, Task(stripes(), start=other), SETTINGS)


def test_what_does_not_fit_is_refused_in_one_line(model, pipeline, cache, tmp_path, unchecked):
    images = stripes()
    for changed, message in (
        (dataclasses.replace(images, pixels=images.pixels[..., :1]), "takes 3 channels, the images have 1"),
        (dataclasses.replace(images, pixels=images.pixels[:, :7]), "images of 7 × 8 are not decoded from latents"),
    ):
        with pytest.raises(RunError, match=message):
            run(tmp_path / "run", Task(changed, start=model), SETTINGS)
    with pytest.raises(RunError, match=r"was trained with --schedule scaled-linear, not --schedule linear: give the same"):
        run(tmp_path / "run", Task(images, start=model), dataclasses.replace(SETTINGS, noise=Noise()))
    with pytest.raises(ValueError, match=r"stripes: class 'slanted' has no prompt: the model was made for up, flat"):
        model.batch(dataclasses.replace(images, classes=("up", "slanted")), pixels=False)
    with pytest.raises(ValueError, match=r"prompt = 'a cat' says the same of all classes: put \{label\} where"):
        fine_tuned(pipeline, cache, prompt="a cat")
    with pytest.raises(ValueError, match="classes = a, a: each once"):
        fine_tuned(pipeline, cache, classes=("a", "a"))
    with pytest.raises(ValueError, match="bits are spent on pixels"):
        assess(model, model.batch(images, pixels=True), Bits(FlowLogDensity()), key=jax.random.key(0))
    assert not (tmp_path / "run").exists()


# ---- Measurements --------------------------------------------------------------------------------------------------------


class Toy(UNet2DCondition):
    """A network that is compiled at once."""

    def __init__(self, schedule):
        self.one = nnx.Param(jnp.ones((), jnp.float32))
        self.schedule, self.config, self.dtype = schedule, UNET, jnp.float32


class Wave(Toy):
    """Something that no part of which can be left out."""

    def __call__(self, latents, timestep, text, key=None):
        return self.one[...] * jnp.sin(latents + latents[:, ::-1] / 2 + text[:, 1, None, None, :2] + timestep[:, None, None, None] / 500)


class Known(Toy):
    """The noise in latents that are the first numbers of the prompt's first token."""

    def __call__(self, latents, timestep, text, key=None):
        alpha, sigma = self.schedule.alpha_sigma_of(timestep, latents)
        return self.one[...] * (latents - alpha * text[:, 1, None, None, :2]) / sigma


def learner(folder, model, **more):
    return UNetLearner(folder, SETTINGS, SETTINGS, base=model, batch=5, **more)


def test_reconstruction_errors_are_those_of_the_pipeline_s_own_reconstructions(model, tmp_path):
    """Whose steps are taken in Python, image by image with its prompt, decoded to pixels from −1 to 1."""
    images = stripes(7)
    told: list[int] = []
    model = model.trained(Wave(model.objective.schedule))

    found = learner(tmp_path, model).reconstruct(model, images, timestep=500, draws=2, seed=4, progress=told.append)
    assert found.shape == (7, 2)
    assert sum(told) == 7
    assert images.labels is not None
    prompts = [CLASSES[label] for label in images.labels]
    expected = model.stable.reconstruct(images.pixels, 500, key=jax.random.key(4), prompts=prompts, batch=7).pixels
    errors = np.square(expected - (images.pixels / 127.5 - 1)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found[:, 0], errors, rtol=1e-3)
    assert np.abs(found[:, 0] - found[:, 1]).min() > 0
    plain = fine_tuned(model.stable, tmp_path)
    other = learner(tmp_path, plain).reconstruct(plain, images, timestep=500, draws=1, seed=4, progress=told.append)
    assert np.abs(other[:, 0] / errors - 1).max() > 2e-3  # prompts matter


def test_generated_images_are_decoded_from_the_latents_that_their_prompts_ask_for(model, tmp_path):
    """However far these are from what pixels lie between."""
    known = dataclasses.replace(model.trained(Known(model.objective.schedule)), texts=3 * model.texts)
    told: list[int] = []
    found = learner(tmp_path, known).generate(known, (8, 8, 3), 7, seed=1, progress=told.append)
    assert (found.shape, sum(told)) == ((7, 8, 8, 3), 7)
    latents = jnp.broadcast_to(known.texts[1:, 1, None, None, :2], (2, 4, 4, 2))
    expected = to_bytes(model.stable.decode(latents))
    assert np.abs(expected[0].astype(int) - expected[1]).max() > 2
    # Bytes may be rounded the other way.
    assert np.abs(found.astype(int) - expected[np.arange(7) % 2]).max() <= 1


def test_densities_of_latents_fall_by_what_the_network_says(model, tmp_path):
    """Of the known latents m: the farther from m, the less likely, by |α(z − m)|²/2σ² in nats.

    That is the bound's; the flow begins with N(0, 1) at the last timestep T, where α_T m is left of m, and ends as far from α m.
    """
    images = stripes(4)
    known = model.trained(Known(model.objective.schedule))
    how = Densities(5, 500, draws=8, steps=64, probes=8, tolerance=1e-3)
    batch = known.batch(images, pixels=True)
    latents, mean = 0.18215 * np.asarray(batch.moments)[..., :2], np.asarray(known.texts)[batch.prompt][:, 1, None, None, :2]
    alpha, sigma = model.objective.schedule.alpha_sigma_float64(np.array([500.0, 999.0]))
    ends = {"bound": (alpha[0], sigma[0]), "flow": (alpha[0] - sigma[0] * alpha[1] / sigma[1], sigma[0] / sigma[1])}
    for measure, (part, deviation) in ends.items():
        expected = -np.square((alpha[0] * latents - part * mean) / deviation).sum(axis=(1, 2, 3)) / 2
        found = learner(tmp_path, known).log_densities(known, images, measure, how, seed=2, progress=lambda _: None)
        # One part in 80 of the bound's is the signal that is left at T.
        np.testing.assert_allclose(found.mean - found.mean[0], expected - expected[0], rtol=0, atol=0.02 * np.ptp(expected))
        assert np.ptp(expected) > 1


# ---- Many devices, and the whole protocol --------------------------------------------------------------------------------

SHARDED = """
    import json, sys
    import jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 8)
    from flax import nnx
    from diffusion import layout
    from diffusion.feed import Feed
    from diffusion.layout import Layout
    from diffusion.objective import Denoising
    from diffusion.optimiser import Adafactor, AdamW
    from diffusion.plan import memory_of
    from diffusion.schedules import ScaledLinearSchedule
    from diffusion.stable.fine_tuning import fine_tuned
    from diffusion.train import Program, train
    from tests.diffusion.stable.tiny import CLASSES, stable, stripes

    layout.WHOLE_BELOW = 64
    model = fine_tuned(stable(jax.random.key(0)), sys.argv[1], classes=CLASSES, prompt="{label}")
    graphdef, params = nnx.split(model.unet, nnx.Param)
    feed = Feed(model.batch(stripes(32), pixels=False), 16)
    one = jax.make_mesh((1, 1), ("replicas", "fsdp"), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    found = []
    adam = AdamW(1e-2, warmup=2)
    for mesh, optimiser in ((one, adam), (Layout(2, 4).mesh(), adam), (Layout(1, 8).mesh(), Adafactor(1e-2))):
        program = Program(graphdef, model.objective, optimiser, 4, 0.0, mesh, space=model.space)
        step = program.compile(program.abstract(params), feed.batch(0))
        (pause,) = train(program.initial(params), step, feed, key=jax.random.key(1), mesh=mesh, steps=4, pauses=[10**9])
        leaves = jax.tree.leaves(pause.state.params)
        shares = sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)
        parts, _ = memory_of(program, params, feed.batch(0))
        found.append([[float(one.loss) for one in pause.measured], shares, parts])
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_one_and_eight_devices_have_the_same_losses_and_a_share_of_the_parameters(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, both, eight = json.loads(done.stdout.splitlines()[-1])
    # Sums in another order, in float32, through four steps; Adam divides by |g| where that is rounding alone.
    np.testing.assert_allclose(both[0], one[0], rtol=1e-4)
    np.testing.assert_allclose(eight[0][0], one[0][0], rtol=1e-5)  # before the first step the optimiser does not matter
    assert one[1] == 1
    # In networks as small as this much is too small to be split.
    assert 1 / 4 <= both[1] < 0.35
    assert 1 / 8 <= eight[1] < 0.25
    for (_, share, parts), moments in ((one, 2), (both, 2)):
        assert parts["parameters"] == pytest.approx(share * one[2]["parameters"])
        assert parts["optimiser"] == pytest.approx(moments * parts["parameters"], abs=10)
    assert both[2]["frozen"] < 0.5 * one[2]["frozen"]


@pytest.mark.slow
def test_the_whole_protocol_runs_in_latents_and_goes_on(pipeline, tmp_path):
    """Two tasks, turned by 90°, under replay, generative replay and elastic weight consolidation; a second call computes nothing."""
    images = stripes(40)
    np.savez(tmp_path / "stripes.npz", images=images.pixels, labels=images.labels)
    tasks = load(str(tmp_path / "stripes.npz"), Choice(rotate=90.0), Reading())
    energies = survey("energies", tasks, Temperature(perplexity=3.0), Priors(), "paper", Machine(), tmp_path / "e.npz", Screen())
    settings = dataclasses.replace(SETTINGS, optimiser=AdamW(2e-3, 2), length=Length(12, 8, 0.5))
    base = fine_tuned(pipeline, tmp_path / "latents", classes=("0", "1"), prompt="{label}")
    densities = Densities(5, 400, draws=2, steps=4, probes=2, tolerance=0.1)
    plan = Plan(("none", "high", "generative", "ewc"), 6, (0,), 10, later=5, generated=8, densities=densities)
    before = nnx.state(pipeline.unet, nnx.Param)
    held = bits(before)

    def choose(found, policy, size, seed):
        return buffer.choose(found, policy, size, seed, Screen())

    def experiment():
        made = UNetLearner(tmp_path, settings, settings, Rhythm(sample_every=0), base=base, batch=8)
        assert isinstance(made, Learner)
        assert tasks.task2 is not None
        return Experiment(tmp_path, [tasks.task1, tasks.task2], made, plan, [energies], choose).run()

    found = experiment()
    assert bits(nnx.state(pipeline.unet, nnx.Param)) == held  # what was started from is as it was
    table = found.samples
    for policy in ("before", *plan.policies):
        assert np.isfinite(table[f"{policy}@500"]).all()
        # Of pixels from −1 to 1.
        assert 0 < table[f"{policy}@500"].mean() < 4
        assert found.sheets[f"0.{policy}"].shape == (8, 8, 8, 3)
    assert len({float(table[f"{policy}@500"].mean()) for policy in ("before", *plan.policies)}) == 5
    assert np.isfinite(table["bound.none@400"]).sum() == np.isfinite(table["flow.none@400"]).sum() == 5
    with pytest.MonkeyPatch.context() as patch:
        for name in ("learner.run", "learner.assess", "learner.generate"):
            patch.setattr(f"diffusion.{name}", None)
        again = experiment()
    for name in table.columns:
        np.testing.assert_array_equal(again.samples[name], table[name])
