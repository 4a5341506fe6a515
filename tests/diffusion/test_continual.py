"""The protocol on a problem with a known answer: a learner that knows its data exactly, and reconstructs by their exact denoiser."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.continual import Experiment, Plan
from diffusion.pixels import to_model
from diffusion.reconstruct import reconstruction_errors
from diffusion.schedules import CosineSchedule
from diffusion.stages import Stages
from hopjax.cli import buffer
from hopjax.cli.options import Choice, Machine, Model, Reading, Temperature
from hopjax.cli.progress import Screen
from hopjax.cli.survey import survey
from hopjax.cli.tasks import load

SCHEDULE = CosineSchedule()


@dataclasses.dataclass
class Exact:
    """A model is its memories; ε is exact for them."""

    reconstructed: int = 0
    learnt: list = dataclasses.field(default_factory=list)

    def learn(self, name, seed, images, *, start, replay, replayed):
        self.learnt.append((name, seed, replayed))
        pixels = images.pixels if replay is None else np.concatenate([images.pixels, replay.pixels])
        return pixels

    def fingerprint(self, model):
        return str(hash(model.tobytes()))

    def reconstruct(self, model, images, *, timestep, draws, seed, progress):
        self.reconstructed += 1
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(images)))
        progress(len(images))
        return np.asarray(exact_errors(to_model(jnp.asarray(model)), to_model(jnp.asarray(images.pixels)), keys, timestep, draws))


@functools.partial(jax.jit, static_argnames=("timestep", "draws"))
def exact_errors(memories, clean, keys, timestep, draws):
    def epsilon(noisy, at):
        alpha, sigma = SCHEDULE.alpha_sigma_of(at, noisy)
        apart = noisy[:, None] - alpha[:, None] * memories[None]
        distances = jnp.sum(jnp.square(apart), axis=(2, 3, 4))
        weights = jax.nn.softmax(-distances / (2 * jnp.square(sigma[:, :, 0, 0])), axis=1)
        return (noisy - alpha * jnp.einsum("nm,mhwc->nhwc", weights, memories)) / sigma

    return reconstruction_errors(epsilon, clean, SCHEDULE, keys, timestep=timestep, draws=draws).values


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
    usual: dict[str, Any] = {"policies": ("none", "high", "random", "joint", "continued"), "buffer": 6, "seeds": (0, 1), "samples": 10}
    return Experiment(folder, tasks.task1, tasks.task2, learner, Plan(**usual | changes), energies, choose)


@pytest.fixture(scope="module")
def ran(tasks, energies, tmp_path_factory):
    folder, learner = tmp_path_factory.mktemp("experiment"), Exact()
    return folder, learner, experiment(folder, tasks, energies, learner).run().table


def test_each_model_is_asked_about_the_same_noise(ran, tasks):
    _, _, table = ran
    assert len(table) == 20
    assert table["seed"].tolist() == [0] * 10 + [1] * 10
    # Task 1 once more changes nothing of a learner that knew it already: the same model, the same noise.
    np.testing.assert_array_equal(table["continued@500"], table["before@500"])
    assert (table["control@500"] != table["before@500"]).all()
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
    repeated = experiment(folder, tasks, energies, again).run().table
    assert again.reconstructed == 0
    for name in table.columns:
        np.testing.assert_array_equal(repeated[name], table[name])
    stage = min((folder / "stages").glob("reconstruct-*.npz"))
    stage.write_bytes(stage.read_bytes()[:100])
    other = Exact()
    repaired = experiment(folder, tasks, energies, other).run().table
    assert other.reconstructed == 1
    for name in table.columns:
        np.testing.assert_array_equal(repaired[name], table[name])
    more = Exact()
    experiment(folder, tasks, energies, more, draws=3, seeds=(0,), policies=("none",)).run()
    assert more.reconstructed == 3  # another number of draws is another question


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
    ],
)
def test_plans_that_compare_nothing_are_refused(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Plan(**changes)


def test_a_buffer_larger_than_the_task_is_refused(tasks, energies, tmp_path):
    with pytest.raises(ValueError, match="buffer = 25 is out of range: Task 1 has 24 samples"):
        experiment(tmp_path, tasks, energies, Exact(), buffer=25)
