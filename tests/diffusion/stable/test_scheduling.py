"""Samplers as scheduler_config.json says, against the trajectories of diffusers' schedulers (golden files)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.objective import Denoising
from diffusion.samplers import DDIM, PNDM, DPMSolver, noise_function
from diffusion.schedules import Prediction, ScaledLinearSchedule
from diffusion.stable.scheduling import Sampling, Scheduler, methods_for, noise

GOLDEN = Path(__file__).parent / "golden" / "schedulers"
CASES = sorted(path.name for path in GOLDEN.iterdir())
# scheduler_config.json of Stable Diffusion 1.5.
PUBLISHED = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def golden(case):
    """The scheduler, the timesteps at which diffusers evaluates the network, and the states from the first to the last."""
    found = np.load(GOLDEN / case / "trajectory.npz")
    scheduler = Scheduler.from_json(json.loads((GOLDEN / case / "scheduler_config.json").read_text()))
    return scheduler, found["timesteps"], found["states"]


def network(x, timestep):
    """That of the golden files."""
    share = timestep[:, None] / 1000
    tilt = jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    return (0.3 + 0.6 * share) * x + 0.5 * (1 - share) * tilt


@pytest.mark.parametrize("case", CASES)
def test_every_state_is_that_of_diffusers(case):
    scheduler, timesteps, states = golden(case)
    schedule = scheduler.objective.schedule
    sampling = scheduler.sampling(len(timesteps) - (scheduler.method == "PNDMScheduler" and len(timesteps) > 1))
    asked: list = []

    def noted(x, timestep):
        jax.debug.callback(lambda *question: asked.append(question), timestep[0], x, ordered=True)
        return network(x, timestep)

    epsilon = noise_function(noted, schedule, scheduler.objective.prediction)
    found = jax.jit(lambda x: sampling(epsilon, x, schedule))(jnp.asarray(states[0]))
    jax.effects_barrier()
    assert [int(timestep) for timestep, _ in asked] == timesteps.tolist()
    assert int(found.evaluations) == sampling.evaluations == len(timesteps)
    # diffusers' tables of ᾱ are float32, products of a thousand factors: 1e-6 in the states or so.
    for ours, theirs in zip([*(x for _, x in asked), found.images], states, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("case", ["ddim", "pndm", "dpm"])
def test_a_compiled_sampler_in_single_precision_ends_where_diffusers_does(case):
    scheduler, _, states = golden(case)
    run = jax.jit(lambda x: scheduler.sampling(20)(network, x, scheduler.objective.schedule).images)
    found = run(jnp.asarray(states[0], jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, states[-1], atol=1e-5 * np.abs(states[-1]).max())


def test_the_published_configuration():
    scheduler = Scheduler.from_json(PUBLISHED)
    assert scheduler == Scheduler(
        Denoising(ScaledLinearSchedule(1000, 0.00085, 0.012), Prediction.NOISE), "PNDMScheduler", "leading", 1, False
    )
    assert scheduler == golden("pndm")[0]
    assert Scheduler.from_json(PUBLISHED, "DDIMScheduler") == golden("ddim")[0]
    multistep = Scheduler.from_json(PUBLISHED, "DPMSolverMultistepScheduler")
    assert multistep.spacing == "linspace"  # as diffusers has it where nothing is said
    assert dataclasses.replace(multistep, spacing="leading") == golden("dpm")[0]


@pytest.mark.parametrize(("method", "kind"), [("DDIMScheduler", DDIM), ("PNDMScheduler", PNDM), ("DPMSolverMultistepScheduler", DPMSolver)])
def test_samplings_are_values_that_start_with_pure_noise_and_stop_where_the_configuration_says(method, kind):
    sampling = Scheduler.from_json(PUBLISHED | {"timestep_spacing": "leading"}, method).sampling(50)
    assert isinstance(sampling, Sampling)
    assert isinstance(sampling.sampler, kind)
    assert hash(sampling) == hash(dataclasses.replace(sampling))
    if kind is DPMSolver:  # 51 steps of 19, of which the last is left out
        assert (sampling.start, sampling.stop, sampling.denoise) == (951, 20, True)
    else:
        assert (sampling.start, sampling.stop, sampling.denoise) == (981, 0, False)


# As diffusers' set_timesteps has them: of T timesteps those of n steps, downwards.
SPACINGS = {
    "leading": lambda total, steps: (np.arange(steps + 1) * (total // (steps + 1))).round()[::-1][:-1],
    "linspace": lambda total, steps: np.linspace(0, total - 1, steps + 1).round()[::-1][:-1],
    "trailing": lambda total, steps: np.arange(total, 0, -total / steps).round() - 1,
}


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers_for_every_number_of_steps(spacing):
    scheduler = Scheduler.from_json(PUBLISHED | {"timestep_spacing": spacing, "steps_offset": 0}, "DPMSolverMultistepScheduler")
    more = 0
    for steps in range(1, 500 if spacing == "leading" else 1000):
        grid: Any = scheduler.sampling(steps).sampler.grid
        expected = SPACINGS[spacing](1000, steps).astype(int).tolist()
        if len(expected) > steps:  # one below 0, which the network does not know
            assert expected.pop() == -1
            more += 1
        assert list(grid.timesteps) == expected, steps
    assert more == (62 if spacing == "trailing" else 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "LMSDiscreteScheduler"}, "_class_name = 'LMSDiscreteScheduler' is not supported; what is: DDIMScheduler, PNDM"),
        ({"_class_name": None}, "_class_name = None is not supported"),
        ({"skip_prk_steps": False}, "skip_prk_steps = False is not supported for PNDMScheduler; what is: True"),
        ({"timestep_spacing": "linspace"}, "timestep_spacing = 'linspace' is not supported; what is: leading, trailing"),
        ({"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction' is not supported for PNDMScheduler; what is: 'epsilon'"),
        ({"steps_offset": -1}, "steps_offset = -1 must be a whole number, 0 or more"),
        ({"steps_offset": 1.5}, r"steps_offset = 1\.5 must be"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one = 1 must be true or false"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid' is not supported"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample = True is not supported for DDIMScheduler; what is: False"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "use_karras_sigmas = True is not supported"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, r"what is: 'dpmsolver\+\+'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min"}, "what is: 'zero'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_configurations_that_do_not_do_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        Scheduler.from_json(PUBLISHED | fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["EulerDiscreteScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler", "DDPMScheduler"])
def test_the_noise_is_known_whatever_the_method(method):
    fields = PUBLISHED | {"_class_name": method}
    assert noise(fields) == Scheduler.from_json(PUBLISHED).objective
    assert methods_for(fields) == ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"]
    assert methods_for(fields | {"clip_sample": True, "prediction_type": "v_prediction"}) == ["DPMSolverMultistepScheduler"]
    assert methods_for(fields | {"use_karras_sigmas": True, "timestep_spacing": "linspace"}) == []
    theirs = {"solver_type": "bh2", "algorithm_type": "deis", "variance_type": "fixed_small"}
    assert methods_for(fields | theirs) == methods_for(fields)
    assert methods_for(fields | {"variance_type": "learned_range"}) == ["DDIMScheduler", "PNDMScheduler"]
    # Methods that are not known may take it for another one.
    del fields["beta_end"]
    with pytest.raises(ValueError, match=f"beta_end is missing, without which the noise of '{method}' is not known"):
        noise(fields)
    assert noise(fields | {"_class_name": "DDIMScheduler"}).schedule == ScaledLinearSchedule(1000, 0.00085, 0.02)
    with pytest.raises(ValueError, match="_class_name = None must be the name of a scheduler"):
        noise(fields | {"_class_name": None})


def test_what_diffusers_does_by_default_and_is_not_supported_is_refused():
    for method, field in (("DDIMScheduler", "clip_sample"), ("PNDMScheduler", "skip_prk_steps")):
        with pytest.raises(ValueError, match=f"{field} = "):
            Scheduler.from_json({k: v for k, v in PUBLISHED.items() if k != field}, method)


@pytest.mark.parametrize(
    ("changes", "steps", "message"),
    [
        ({}, 0, "steps = 0 is out of range: need 1 ≤ steps < 1000"),
        ({}, 1000, "steps = 1000 is out of range"),
        ({}, 501, "steps_offset = 1 must be less than 1, the timesteps of each of 501 steps"),
        ({"offset": 50}, 20, "steps_offset = 50 must be less than 50, the timesteps of each of 20 steps"),
        ({"spacing": "trailing"}, 30, "needs a number of steps that divides 1000, which 30 does not"),
    ],
)
def test_steps_that_do_not_fit_the_schedule_are_refused(changes, steps, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Scheduler.from_json(PUBLISHED), **changes).sampling(steps)


def test_a_sampling_is_for_its_own_start_alone():
    sampling = Scheduler.from_json(PUBLISHED).sampling(20)
    with pytest.raises(ValueError, match="21 timesteps from 951 to 0 are listed, 21 from 500 to 0 are needed"):
        dataclasses.replace(sampling, start=500)(network, jnp.zeros((1, 2)), ScaledLinearSchedule())


@pytest.mark.parametrize("method", ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_the_last_steps_are_those_of_all_steps(method):
    scheduler = Scheduler.from_json(PUBLISHED, method)
    whole, part = scheduler.sampling(20), scheduler.sampling(20, last=7)
    assert scheduler.sampling(20, last=20) == whole
    every = whole.sampler.grid(scheduler.objective.schedule, whole.start, whole.stop, 20 + (not whole.denoise))
    some = part.sampler.grid(scheduler.objective.schedule, part.start, part.stop, 7 + (not part.denoise))
    np.testing.assert_array_equal(some, every[13:])
    assert (part.start, part.stop, part.denoise) == (some[0], whole.stop, whole.denoise)
    assert part.sampler.steps == 7
    for last in (0, 21):
        with pytest.raises(ValueError, match=f"last = {last} is out of range: need 1 ≤ last ≤ 20, the steps"):
            scheduler.sampling(20, last=last)
