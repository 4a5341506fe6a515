"""Folders of diffusers' pipelines: schedules and predictions both ways, refusals in one line, and diffusers itself reading ours."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from diffusion.layers import initialise
from diffusion.objective import Denoising
from diffusion.pipeline import INDEX, SCHEDULER, Pipeline, objective_of, read_pipeline, scheduler_config, write_pipeline
from diffusion.schedules import CosineSchedule, LinearSchedule, Prediction, ScaledLinearSchedule
from diffusion.unet import UNet
from tests.diffusion.test_unet import TINY

OBJECTIVES = [
    Denoising(LinearSchedule(500, beta_start=2e-4, beta_end=0.03)),
    Denoising(ScaledLinearSchedule(), Prediction.CLEAN),
    Denoising(CosineSchedule(300), Prediction.VELOCITY),
]


@pytest.fixture(scope="module")
def unet():
    return initialise(lambda rngs: UNet(TINY, rngs=rngs), jax.random.key(0))


@pytest.fixture
def folder(unet, tmp_path):
    write_pipeline(tmp_path / "model", Pipeline(unet, OBJECTIVES[2]))
    return tmp_path / "model"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_what_is_written_is_read(objective, unet, tmp_path):
    write_pipeline(tmp_path / "model", Pipeline(unet, objective))
    found = read_pipeline(tmp_path / "model")
    assert found.objective == objective
    assert found.unet.config == TINY
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found.unet), nnx.state(unet))
    files = sorted(path.relative_to(tmp_path / "model").as_posix() for path in (tmp_path / "model").rglob("*") if path.is_file())
    assert files == [INDEX, f"scheduler/{SCHEDULER}", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_network_s_own_folder_is_read_with_the_scheduler_beside_it_or_diffusers_default(folder, tmp_path):
    alone = Path(shutil.copytree(folder / "unet", tmp_path / "alone"))
    assert read_pipeline(alone).objective == Denoising(LinearSchedule(1000, beta_start=1e-4, beta_end=0.02), Prediction.NOISE)
    shutil.copy(folder / "scheduler" / SCHEDULER, alone)
    assert read_pipeline(alone).objective == OBJECTIVES[2]


@pytest.mark.parametrize(
    ("fields", "objective"),
    [
        ({}, Denoising(LinearSchedule(1000))),
        ({"num_train_timesteps": 20, "beta_end": 0.5}, Denoising(LinearSchedule(20, beta_end=0.5))),
        ({"beta_schedule": "scaled_linear"}, Denoising(ScaledLinearSchedule(1000, beta_start=1e-4, beta_end=0.02))),
        ({"beta_schedule": "squaredcos_cap_v2", "beta_start": 1e-4}, Denoising(CosineSchedule())),
        ({"prediction_type": "sample", "trained_betas": None, "clip_sample": False}, Denoising(LinearSchedule(), Prediction.CLEAN)),
        # google/ddpm-cifar10-32's file.
        (
            {
                "_class_name": "DDPMScheduler",
                "_diffusers_version": "0.1.1",
                "beta_end": 0.02,
                "beta_schedule": "linear",
                "beta_start": 0.0001,
                "clip_sample": True,
                "num_train_timesteps": 1000,
                "trained_betas": None,
                "variance_type": "fixed_large",
            },
            Denoising(LinearSchedule()),
        ),
    ],
)
def test_fields_have_diffusers_meaning_and_defaults(fields, objective):
    assert objective_of(fields) == objective


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_schedulers_map_both_ways(objective):
    assert objective_of(json.loads(json.dumps(scheduler_config(objective)))) == objective


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta_schedule": "sigmoid"}, r"beta_schedule = 'sigmoid' is not supported; what is: linear, scaled_linear, squaredcos_cap_v2$"),
        ({"beta_schedule": ["linear"]}, r"beta_schedule = \['linear'\] is not supported"),
        ({"trained_betas": [0.1]}, r"trained_betas is not supported"),
        ({"rescale_betas_zero_snr": True}, r"rescale_betas_zero_snr is not supported"),
        ({"prediction_type": "flow"}, r"prediction_type = 'flow' is not supported; what is: epsilon, v_prediction, sample$"),
        ({"num_train_timesteps": "many"}, r"num_train_timesteps = 'many' is not a number"),
        ({"num_train_timesteps": 10.5}, r"num_train_timesteps = 10.5 is not a whole number"),
        ({"num_train_timesteps": 1}, r"at least 2 timesteps, got 1"),
        ({"beta_end": True}, r"beta_end = True is not a number"),
        ({"beta_end": 1.5}, r"beta_end.*1.5"),
        ({"beta_start": -0.1}, r"beta_start.*-0.1"),
        ({"beta_schedule": "scaled_linear", "beta_start": -0.1}, r"beta_start.*-0.1"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        objective_of(fields)
    assert "\n" not in str(caught.value)


def test_schedules_that_diffusers_has_no_name_for_are_not_written(unet, tmp_path):
    with pytest.raises(ValueError, match="diffusers has no name for the schedule CosineSchedule"):
        write_pipeline(tmp_path / "model", Pipeline(unet, Denoising(CosineSchedule(shift=0.1))))
    assert not list(tmp_path.iterdir())


def test_damaged_and_missing_folders_are_refused_in_one_line(folder, tmp_path):
    with pytest.raises(ValueError, match=r"modle does not exist; did you mean .*model\?"):
        read_pipeline(tmp_path / "modle")
    with pytest.raises(ValueError, match=r"elsewhere/at/all does not exist$"):
        read_pipeline(tmp_path / "elsewhere" / "at" / "all")
    (folder / "scheduler" / SCHEDULER).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_pipeline(folder)
    shutil.rmtree(folder / "unet")
    with pytest.raises(ValueError, match=r"unet is no diffusers folder: cannot read config.json"):
        read_pipeline(folder)
    (tmp_path / "file").write_text("hello")
    with pytest.raises(ValueError, match="file is not a folder"):
        read_pipeline(tmp_path / "file")


def test_nothing_is_overwritten(folder, unet):
    with pytest.raises(ValueError, match="exists already and is not an empty folder"):
        write_pipeline(folder, Pipeline(unet, OBJECTIVES[0]))
    assert read_pipeline(folder).objective == OBJECTIVES[2]


READ = """
import json, sys, warnings
import numpy as np, torch
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained(sys.argv[1], local_files_only=True)
image, timestep = np.load(sys.argv[2]), np.load(sys.argv[3])
with torch.no_grad():
    np.save(sys.argv[4], pipeline.unet(torch.from_numpy(image), torch.from_numpy(timestep)).sample.numpy())
print(json.dumps([pipeline.scheduler.config.prediction_type, pipeline.scheduler.alphas_cumprod.tolist()]))
"""


@pytest.mark.parity
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_diffusers_reads_what_we_write(objective, tmp_path):
    unet = initialise(lambda rngs: UNet(dataclasses.replace(TINY, in_channels=3, out_channels=3), rngs=rngs), jax.random.key(1))
    write_pipeline(tmp_path / "model", Pipeline(unet, objective))
    image = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    timestep = np.array([3, 250])
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "timestep.npy", timestep)
    command = [sys.executable, "-c", READ, *(tmp_path / name for name in ("model", "image.npy", "timestep.npy", "out.npy"))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    prediction, products = json.loads(done.stdout.splitlines()[-1])
    assert prediction == objective.prediction.value
    # torch multiplies 1 − β in float32.
    np.testing.assert_allclose(objective.schedule.alphas_cumprod(), products, rtol=1e-4, atol=1e-7)
    graphdef, params = nnx.split(unet, nnx.Param)
    found = jax.jit(lambda p, x, t: nnx.merge(graphdef, p)(x, t))(params, image.transpose(0, 2, 3, 1), timestep)
    expected = np.load(tmp_path / "out.npy").transpose(0, 2, 3, 1)
    assert np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(expected).max()
