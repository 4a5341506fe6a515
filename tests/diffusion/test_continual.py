"""The protocol on a problem with a known answer: a learner that knows its data exactly, and reconstructs by their exact denoiser."""

import dataclasses
import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.continual import REQUIRED, SHEET, Experiment
from diffusion.likelihood import Draws, FlowLogDensity, Hutchinson, clean_log_density
from diffusion.pixels import to_model
from diffusion.protocol import Densities, Plan
from diffusion.reconstruct import reconstruction_errors
from diffusion.samplers import ProbabilityFlow
from diffusion.schedules import CosineSchedule
from diffusion.stages import Stages
from diffusion.variational import VariationalBound
from hopjax.cli import buffer
from hopjax.cli.options import Choice, Machine, Model, Reading, Temperature
from hopjax.cli.progress import Screen
from hopjax.cli.survey import survey
from hopjax.cli.tasks import Tasks, load
from hopjax.data import rotated
from hopjax.tiled import summarise
from tests.compiled import quickly

SCHEDULE = CosineSchedule()
# For the memories of any model here.
ROOM = 128


@dataclasses.dataclass
class Exact:
    """A model is its memories; ε is exact for them."""

    asked: int = 0
    learnt: list = dataclasses.field(default_factory=list)
    schedule = SCHEDULE

    def learn(self, name, seed, images, *, start, replay, replayed, consolidate=None):
        self.learnt.append((name, seed, replayed))
        parts = [images.pixels] + [part.pixels for part in (replay, consolidate) if part is not None]
        return np.concatenate(parts)

    def fingerprint(self, model):
        return str(hash(model.tobytes()))

    def reconstruct(self, model, images, *, timestep, draws, seed, progress):
        self.asked += 1
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(images)))
        progress(len(images))
        return np.asarray(exact_errors(*padded(model), to_model(jnp.asarray(images.pixels)), keys, timestep, draws))

    def log_densities(self, model, images, measure, how, *, seed, progress):
        self.asked += 1
        flow = FlowLogDensity(Hutchinson(how.probes), ProbabilityFlow(how.tolerance, how.tolerance))
        log_density = flow if measure == "flow" else VariationalBound(how.steps, how.draws)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(images)))
        return exact_densities(*padded(model), to_model(jnp.asarray(images.pixels)), keys, log_density, how.timestep)

    def generate(self, model, shape, count, *, seed, progress):
        self.asked += 1
        return model[np.random.default_rng(seed).integers(len(model), size=count)]


@functools.partial(quickly, static_argnames=("log_density", "timestep"))
def exact_densities(memories, count, clean, keys, log_density, timestep):
    return clean_log_density(log_density, exact_noise(memories, count), clean, SCHEDULE, keys, timestep=timestep)


@functools.partial(quickly, static_argnames=("timestep", "draws"))
def exact_errors(memories, count, clean, keys, timestep, draws):
    return reconstruction_errors(exact_noise(memories, count), clean, SCHEDULE, keys, timestep=timestep, draws=draws).values


def padded(model):
    """Memories in an array of one size for all models, so that one program does; and how many they are."""
    memories = np.zeros((ROOM, *model.shape[1:]), model.dtype)
    memories[: len(model)] = model
    return to_model(jnp.asarray(memories)), len(model)


def exact_noise(memories, count):
    def epsilon(noisy, at):
        alpha, sigma = SCHEDULE.alpha_sigma_of(at, noisy)
        apart = noisy[:, None] - alpha[:, None] * memories[None]
        distances = jnp.sum(jnp.square(apart), axis=(2, 3, 4))
        logits = jnp.where(jnp.arange(ROOM)[None] < count, -distances / (2 * jnp.square(sigma[:, :, 0, 0])), -jnp.inf)
        weights = jax.nn.softmax(logits, axis=1)
        return (noisy - alpha * jnp.einsum("nm,mhwc->nhwc", weights, memories)) / sigma

    return epsilon


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """24 random images of 4 × 4, of which a few are alike; and 20 others."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (44, 4, 4, 1)).astype(np.uint8)
    pixels[:12] = np.clip(pixels[:1].astype(int) + random.integers(-20, 20, (12, 4, 4, 1)), 0, 255)
    file = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(file, images=pixels, labels=np.r_[np.zeros(24, int), np.ones(20, int)])
    return load(str(file), Choice(classes="0", task2_classes="1"), Reading())


@pytest.fixture(scope="module")
def energies(tasks, tmp_path_factory):
    out = tmp_path_factory.mktemp("energies") / "energies.npz"
    return survey("energies", tasks, Temperature(perplexity=3.0), Model(), "paper", Machine(), out, Screen())


def choose(found, policy, size, seed):
    return buffer.choose(found, policy, size, seed, Screen())


def experiment(folder, tasks, energies, learner, **changes):
    usual: dict[str, Any] = {
        "policies": ("none", "high", "random", "joint", "continued"),
        "buffer": 6,
        "seeds": (0, 1),
        "samples": 10,
        "later": 5,
        "generated": 0,
    }
    return Experiment(folder, [tasks.task1, tasks.task2], learner, Plan(**usual | changes), [energies], choose)


@pytest.fixture(scope="module")
def ran(tasks, energies, tmp_path_factory):
    folder, learner = tmp_path_factory.mktemp("experiment"), Exact()
    return folder, learner, experiment(folder, tasks, energies, learner).run().samples


def test_each_model_is_asked_about_the_same_noise(ran, tasks):
    _, _, table = ran
    assert len(table) == 20
    assert table["seed"].tolist() == [0] * 10 + [1] * 10
    # Task 1 once more changes nothing of a learner that knew it already: the same model, the same noise.
    np.testing.assert_array_equal(table["continued@500"], table["before@500"])
    found = (table["control@500"] < 1e-12) & (table["before@500"] < 1e-12)  # both are rounding
    assert (table["control@500"] != table["before@500"])[~found].all()
    assert found.mean() < 0.5
    # Task 1's samples are its memories, and from half of the schedule they are found again; without replay they are lost.
    assert table["before@500"].mean() < table["none@500"].mean() / 3
    assert table["joint@500"].mean() < table["high@500"].mean() < table["none@500"].mean()


def test_replayed_samples_are_kept(ran, tasks, energies):
    _, learner, table = ran
    rows = np.asarray(next(replayed for name, _, replayed in learner.learnt if name == "seed0/high"))
    odds = energies.table["log_leakage"].astype(float) - energies.table["log_self_weight"]
    assert set(rows) == set(np.argsort(odds)[:6])  # the highest energies have the lowest odds of the others
    first = table["seed"] == 0
    kept = np.isin(table["index"][first], energies.table["index"][rows])
    gained = table["none@500"][first] - table["high@500"][first]
    assert gained[kept].mean() > 3 * abs(gained[~kept].mean())
    random = [tuple(replayed) for name, _, replayed in learner.learnt if name.endswith("random")]
    assert len(set(random)) == 2  # another for each seed


def test_measured_samples_are_spread_over_the_energies(ran, tasks, energies):
    folder, learner, _ = ran
    rows = experiment(folder, tasks, energies, learner).measured_rows()
    odds = energies.table["log_leakage"].astype(float) - energies.table["log_self_weight"]
    ranks = np.sort(np.argsort(np.argsort(odds))[rows])
    assert ranks[0] == 0
    assert ranks[-1] == 23
    assert np.diff(ranks).max() <= 3
    assert len(experiment(folder, tasks, energies, learner, samples=None).measured_rows()) == 24


def test_what_is_there_is_read_and_not_computed_again(ran, tasks, energies):
    folder, _, table = ran
    again = Exact()
    repeated = experiment(folder, tasks, energies, again).run().samples
    assert again.asked == 0
    for name in table.columns:
        np.testing.assert_array_equal(repeated[name], table[name])
    stage = min((folder / "stages").glob("reconstruct-*.npz"))
    stage.write_bytes(stage.read_bytes()[:100])
    other = Exact()
    repaired = experiment(folder, tasks, energies, other).run().samples
    assert other.asked == 1
    for name in table.columns:
        np.testing.assert_array_equal(repaired[name], table[name])
    more = Exact()
    experiment(folder, tasks, energies, more, draws=3, seeds=(0,), policies=("none",)).run()
    assert more.asked == 4  # another number of draws is another question, of before, control, none, and Task 2


def test_a_model_is_learnt_with_no_other_in_memory_than_that_of_task_1(ran, tasks, energies):
    made: list[weakref.ref] = []

    class Watched(Exact):
        def learn(self, name, *arguments, start, **options):
            assert sum(each() is not None for each in made) == (start is not None), name
            model = super().learn(name, *arguments, start=start, **options)
            made.append(weakref.ref(model))
            return model

    folder, _, _ = ran
    experiment(folder, tasks, energies, Watched()).run()
    assert len(made) == 12


def test_stages_tell_inputs_apart(tmp_path):
    stages = Stages(tmp_path)
    made = []

    def make(value):
        made.append(value)
        return {"x": np.array([value])}

    assert stages.get("a", {"n": 1}, lambda: make(1))["x"] == 1
    assert stages.get("a", {"n": 2}, lambda: make(2))["x"] == 2
    assert stages.get("b", {"n": 1}, lambda: make(3))["x"] == 3
    assert stages.get("a", {"n": 1}, lambda: make(4))["x"] == 1
    assert made == [1, 2, 3]


def test_changes_of_density_are_minus_beta_times_those_of_the_energy(tasks, energies, tmp_path):
    """ΔE of the report, from densities along a flow and by the bound, against hopjax's energies of the same memories."""
    how = Densities(10, 400, policies=("none", "high"), draws=64, steps=128, probes=16, tolerance=1e-4)
    policies = ("none", "high")
    made = experiment(tmp_path, tasks, energies, Exact(), policies=policies, seeds=(0,), samples=12, densities=how)
    table = made.run().samples
    measured = np.isfinite(table["flow.none@400"])
    assert measured.sum() == 10
    alpha, sigma = (float(x[0]) for x in SCHEDULE.alpha_sigma_float64(np.array([400.0])))
    beta = (alpha / sigma) ** 2

    def vectors(pixels):
        return np.asarray(to_model(jnp.asarray(pixels))).reshape(len(pixels), -1).astype(np.float32)

    clean = vectors(tasks.task1.pixels[table["place"][measured]])

    def energy(pixels):
        """Of memories of unequal norm with the prior that makes −βE the log density, up to the number of memories and a constant."""
        memories = vectors(pixels)
        prior = (-0.5 * beta * np.sum(memories**2, axis=1)).astype(np.float32)
        return summarise(clean, memories, beta, ["energy"], log_prior=prior)["energy"], len(memories)

    rows = made.buffer("high", 0)
    before, many = energy(tasks.task1.pixels)
    for policy, replay in (("none", []), ("high", rows)):
        after, others = energy(np.concatenate([tasks.task2.pixels, tasks.task1.pixels[np.asarray(replay, int)]]))
        expected = after - before + np.log(others / many) / beta
        for measure in ("bound", "flow"):
            found = table[f"{measure}.{policy}@400"][measured]
            error = table[f"{measure}.{policy}.error@400"][measured]
            assert (error > 0).all()
            # Each is within a few of its standard errors, and they are below what is measured.
            assert np.max(np.abs(found - expected) / (error + 0.01 * expected.std())) < 5, (measure, policy)
            assert np.median(error) < 0.4 * expected.std()
    # Every second of the measured samples that is not in the subset has no number.
    assert (~np.isfinite(table["bound.high.error@400"]) == ~measured).all()


def test_densities_are_asked_again_only_where_they_change(tasks, energies, tmp_path):
    class Quick(Exact):
        def log_densities(self, model, images, measure, how, *, seed, progress):
            self.asked += 1
            return Draws(jnp.zeros((len(images), 2)), jnp.zeros(len(images), int))

    def asked(**changes):
        learner = Quick()
        how = Densities(5, 400, draws=2, steps=2, probes=2, tolerance=0.1)
        usual = {"policies": ("none",), "seeds": (0,), "samples": 6}
        experiment(tmp_path, tasks, energies, learner, densities=dataclasses.replace(how, **changes), **usual).run()
        return learner.asked

    assert asked() == 4 + 4  # reconstructions: before, control, after, of Task 2; densities: two models, two measures
    assert asked() == 0
    assert asked(steps=3) == 2
    assert asked(probes=3) == 2
    assert asked(timestep=401) == 4
    assert asked(measures=("flow",)) == 0


def test_generated_images_are_judged_against_real_ones(tmp_path):
    random = np.random.default_rng(1)
    # Two classes that no classifier takes for each other, so that what a model of one task generates is seen.
    dark, light = (random.integers(low, low + 60, (40, 4, 4, 1)).astype(np.uint8) for low in (0, 180))
    pixels = np.concatenate([dark, light])[np.argsort(np.tile(np.arange(40), 2), kind="stable")]
    file = tmp_path / "two.npz"
    np.savez(file, images=pixels, labels=np.tile([0, 1], 40))
    two = load(str(file), Choice(rotate=90.0), Reading())
    assert two.task2 is not None
    found = survey("energies", two, Temperature(perplexity=3.0), Model(), "paper", Machine(), tmp_path / "e.npz", Screen())
    plan = Plan(("none", "generative"), 6, (0,), 10, later=5, generated=100)
    only_dark = dataclasses.replace(two.task2, pixels=dark, labels=np.zeros(40, np.int64))
    measured = Experiment(tmp_path / "run", [two.task1, only_dark], Exact(), plan, [found], choose).run()
    generated = measured.generated
    assert generated is not None
    assert measured.samples.settings["required"] == REQUIRED
    of = {policy: generated["label"][generated["policy"] == policy] for policy in ("real", "before", "none", "generative")}
    assert len(of["real"]) == 40
    assert [len(labels) for labels in list(of.values())[1:]] == [100] * 3
    assert 0.3 < of["before"].mean() < 0.7  # half of them light
    assert of["none"].mean() == 0  # forgotten
    assert 0 < of["generative"].mean() < 0.2  # about three of 46 memories
    assert {name: sheet.shape for name, sheet in measured.sheets.items()} == {
        f"0.{policy}": (SHEET, 4, 4, 1) for policy in ("before", "none", "generative")
    }


def test_three_tasks_make_a_matrix(tasks, tmp_path):
    images = [tasks.task1, rotated(tasks.task1, 90.0), rotated(tasks.task1, 180.0)]
    surveys = []
    for number, task in enumerate(images[:2]):
        alone = Tasks(task, np.arange(len(task)), None, {})
        surveys.append(
            survey("energies", alone, Temperature(perplexity=3.0), Model(), "paper", Machine(), tmp_path / f"{number}.npz", Screen())
        )
    learner = Exact()
    plan = Plan(("none", "high", "joint", "ewc"), 6, (0,), 10, later=5, generated=0)
    measured = Experiment(tmp_path / "run", images, learner, plan, surveys, choose).run()
    table = measured.tasks
    for policy in plan.policies:
        mine = table["policy"] == policy
        cells = list(zip(table["after"][mine].tolist(), table["task"][mine].tolist(), strict=True))
        assert cells == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    error = {(p, a, t): e for p, a, t, e in zip(*(table[name] for name in ("policy", "after", "task", "error")), strict=True)}
    assert error["none", 1, 1] == error["high", 1, 1]
    assert error["none", 3, 2] > 3 * error["none", 2, 2]  # Task 2 is lost in its turn
    assert error["joint", 3, 1] < error["high", 3, 1] < error["none", 3, 1]
    assert error["ewc", 3, 2] < error["none", 3, 2]
    # Errors of Task 1's samples are those after the last task.
    np.testing.assert_allclose(measured.samples["high@500"].mean(), error["high", 3, 1], rtol=1e-12)
    replayed = {name: places for name, _, places in learner.learnt}
    assert len(replayed["seed0/high"]) == 6
    assert len(replayed["seed0/high-task3"]) == 12
    assert set(np.asarray(replayed["seed0/high-task3"][6:]) - 24) <= set(range(24))  # places in Task 2, after those of Task 1
    assert len(replayed["seed0/joint-task3"]) == 48


def test_further_temperatures_and_perturbations_are_listed(ran, tasks, energies, tmp_path):
    table = (
        experiment(tmp_path, tasks, energies, Exact(), seeds=(0,), policies=("none",), betas=(2.0, energies.landscape.beta)).run().samples
    )
    beta = energies.landscape.beta
    np.testing.assert_allclose(table[f"energy@{beta:g}"], table["energy"], rtol=1e-6)
    memories = energies.landscape.memories
    own = memories[table["place"]]
    expected = summarise(own, memories, beta, ["hessian_trace"], own=table["place"])["hessian_trace"]
    # Its limit is the trace of the Hessian; 32 perturbations of radius 1 % estimate it.
    assert np.corrcoef(table["perturbation"], expected)[0, 1] > 0.9
    low = summarise(own, memories, 2.0, ["energy"], own=table["place"])["energy"]
    np.testing.assert_allclose(table["energy@2"], low, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ("none", "hihg")}, "policies = 'hihg' is not known: take some of none, high"),
        ({"policies": ("high",)}, "each once, and 'none' among them"),
        ({"policies": ("none", "high", "high")}, "each once"),
        ({"seeds": ()}, "seeds = .* must be one or more"),
        ({"timesteps": (500, 500)}, "timesteps = .* different numbers"),
        ({"draws": 0}, "draws = 0 is out of range: need draws ≥ 1"),
        ({"samples": 0}, "samples = 0 is out of range"),
        ({"later": 0}, "later = 0 is out of range"),
        ({"betas": (0.0,)}, "betas = 0.0 is out of range: need 0 < β < ∞"),
        ({"densities": Densities(policies=("high",)), "policies": ("none",)}, "densities.policies = 'high' is not among the policies none"),
    ],
)
def test_plans_that_compare_nothing_are_refused(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Plan(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": (500, 1000)}, "timesteps = 1000 is out of range: need 0 < timestep < 1000; take 500"),
        ({"densities": Densities(timestep=999)}, "densities.timestep = 999 is out of range: need 0 ≤ timestep < 999; take 300"),
    ],
)
def test_timesteps_that_the_schedule_has_not_are_refused_before_anything_is_learnt(tasks, energies, tmp_path, changes, message):
    Plan(**changes).check(1001)
    with pytest.raises(ValueError, match=message):
        experiment(tmp_path, tasks, energies, Exact(), **changes)


def test_no_schedule_has_a_timestep_without_noise():
    with pytest.raises(ValueError, match="timesteps = 0 is out of range: need 0 < timestep < 1000; take 500"):
        Plan(timesteps=(0,)).check(1000)


def test_a_buffer_larger_than_the_task_is_refused(tasks, energies, tmp_path):
    with pytest.raises(ValueError, match="buffer = 25 is out of range: Task 1 has 24 samples"):
        experiment(tmp_path, tasks, energies, Exact(), buffer=25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 4}, "densities.samples = 4 is out of range: need samples ≥ 5"),
        ({"draws": 1}, "densities.draws = 1 is out of range"),
        ({"tolerance": 1.0}, "densities.tolerance = 1.0 is out of range"),
        ({"measures": ("exact",)}, "densities.measures = 'exact' is not known: take bound or flow"),
    ],
)
def test_densities_that_cannot_be_measured_are_refused(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Densities(**changes)


def test_one_task_is_refused(tasks, energies, tmp_path):
    with pytest.raises(ValueError, match="1 tasks with 0 surveys: need two tasks or more"):
        Experiment(tmp_path, [tasks.task1], Exact(), Plan(), [], choose)
