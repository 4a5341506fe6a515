"""`train-vae`, and `run` in latents, on the smallest networks: folders, refusals, energies of latents, dry runs, and the whole."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from scipy import special, stats

from diffusion import findings
from diffusion.__main__ import main
from diffusion.cli import experiment
from diffusion.cli import stable as command
from diffusion.cli.report import TABLE
from diffusion.continual import Experiment
from diffusion.learner import UNetLearner
from diffusion.optimiser import AdamW
from diffusion.protocol import Plan
from diffusion.settings import Length, Network, Noise, Settings
from diffusion.stable import miniature
from diffusion.stable.autoencoder import AutoencoderKL
from diffusion.stable.autoencoding import Autoencoding, fidelity
from diffusion.stable.fine_tuning import LatentModel, fine_tuned
from diffusion.stable.miniature import Miniature, byte_tokenizer
from diffusion.stable.pipeline import StableDiffusion
from diffusion.trials import TRIALS, Trial
from hopjax.cli import table
from hopjax.cli.options import Choice, Machine, Reading, Temperature, UsageError
from hopjax.cli.options import Model as Priors
from hopjax.cli.progress import Screen
from hopjax.cli.survey import survey
from hopjax.cli.tasks import load
from tests.diffusion import made_up
from tests.diffusion.stable.tiny import AUTOENCODER, TEXT, UNET, stable, stripes

pytestmark = pytest.mark.usefixtures("as_run")
SMALLEST = Miniature(AUTOENCODER, UNET, TEXT, Autoencoding(10, 8))
SETTINGS = Settings(Network(), Noise("scaled-linear"), AdamW(2e-3, 2), Length(12, 8, 0.5))
TRIAL = Trial("stripes.npz", None, "1", SETTINGS, SETTINGS, "stripes", samples=20, densities=5, weights="made")


@pytest.fixture(scope="module")
def folder(as_run, tmp_path_factory):
    """Stripes, and what `train-vae` makes of them; not to be changed."""
    folder = tmp_path_factory.mktemp("stable")
    images = stripes(80)
    np.savez(folder / "stripes.npz", images=images.pixels, labels=images.labels)
    with pytest.MonkeyPatch.context() as patch:
        leave_jax(patch)
        patch.chdir(folder)
        assert main(["train-vae", "stripes.npz", "--out", "small"]) == 0
    return folder


def leave_jax(patch):
    patch.setattr(miniature, "SMALL_PIPELINE", SMALLEST)
    patch.setattr(experiment, "TRIALS", {**TRIALS, "sd-tiny": TRIAL})
    for module in (experiment, command):
        patch.setattr(module, "configure", lambda *_: None)


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    leave_jax(monkeypatch)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)


# ---- train-vae -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_a_small_pipeline_is_a_folder_of_diffusers_with_what_it_was_made_of_beside_it(capsys):
    made = StableDiffusion.from_folder("small")
    assert made.vae.config.scaling_factor != AUTOENCODER.scaling_factor
    batch = fine_tuned(made, "latents").batch(stripes(80), pixels=False)
    mean, log_variance = np.split(np.asarray(batch.moments, float), 2, axis=-1)
    deviation = np.sqrt(mean.var() + np.exp(log_variance).mean())
    assert made.vae.config.scaling_factor * deviation == pytest.approx(1, rel=1e-3)
    assert json.loads(Path("small.json").read_text())["training"]["steps"] == 10
    with Image.open("small.png") as picture:
        assert picture.size[0] > 8 * 8
    before = (Path("small/vae/diffusion_pytorch_model.safetensors")).stat().st_mtime_ns
    capsys.readouterr()
    assert main(["train-vae", "stripes.npz", "--out", "small"]) == 0  # which does nothing
    assert "autoencoder:" not in capsys.readouterr().out
    assert (Path("small/vae/diffusion_pytorch_model.safetensors")).stat().st_mtime_ns == before


def test_prompts_are_spelt_in_bytes():
    tokenizer, _ = byte_tokenizer(8)
    ids = tokenizer(["ab", "é", ""]).ids
    assert (ids[:, 0] == 512).all()
    assert ids[2, 1:].tolist() == [513] * 7
    assert len(set(ids[0, 1:3].tolist())) == 2  # a, b at the end of a word
    assert (ids[1, 1:3] < 512).all()  # two bytes
    assert ids[1, 3] == 513


def test_fidelity_is_that_of_its_definition():
    autoencoder = stable(jax.random.key(1)).vae
    images = stripes(35)  # no whole batch
    found = fidelity(autoencoder, images)
    clean = np.asarray(images.pixels, float) / 127.5 - 1
    latents = autoencoder.encode(jnp.asarray(clean, jnp.float32))
    error = np.square(np.asarray(autoencoder.decode(latents.mean), float) - clean).mean()
    mean, log_variance = (np.asarray(each, float) for each in latents)
    # KL(N(μ, s²), N(0, 1)) through its integral's closed form, log₂.
    nats = -0.5 * log_variance + (np.exp(log_variance) + mean**2) / 2 - 0.5
    assert found.error == pytest.approx(error, rel=1e-5)
    assert found.bits == pytest.approx(nats.sum() / 35 / np.log(2), rel=1e-5)


# ---- What cannot be --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "stripes.npz", "--preset", "paper-sd"], "--preset paper-sd needs --weights: name the folder of a Stable Diffusion"),
        (["run", "--preset", "paper-sd", "--weights", "small"], "--preset paper-sd needs DATA"),
        (["run", "--preset", "quick", "--weights", "small"], "--weights small: --preset quick learns pixels, from nothing"),
        (["run", "--preset", "sd-tiny", "--weights", "smal"], "smal does not exist; did you mean small?"),
        (
            ["run", "--preset", "sd-tiny", "--weights", "small/unet"],
            "small/unet is the folder of a UNet2DConditionModel, not of a pipeline",
        ),
        (["run", "--preset", "sd-tiny", "--weights", "small", "--network", "digits"], "--preset sd-tiny has the network of its weights"),
        (["run", "--preset", "sd-tiny", "--weights", "small", "--class-prompt", "a digit"], "says the same of all classes"),
        (["run", "--preset", "sd-tiny", "--weights", "small", "--grey"], "takes 3 channels, the images have 1"),
        (["run", "--preset", "sd-tiny", "--weights", "small", "--image-size", "7"], "images of 7 × 7 are not decoded from latents"),
        (["train-vae", "stripes.npz", "--out", "small", "--steps", "9"], "small was made with other settings: training.steps: 10, now 9"),
        (["train-vae", "stripes.npz", "--out", "small/unet"], "small/unet is there, and unet.json does not say what it was made of"),
        (["train-vae", "stripes.npz", "--out", "new", "--steps", "0"], "--steps 0 is out of range: need steps ≥ 1"),
        (["train-vae", "stripes.npz", "--out", "new", "--image-size", "7"], "images of 7 × 7 are not decoded from latents"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("here", "unchecked")
def test_misuse_is_one_line_and_status_2(arguments, words, capsys):
    assert main([*arguments, *(() if "--out" in arguments else ("--out", "new"))]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not Path("new/energies.parquet").exists()


# ---- Energies of latents ---------------------------------------------------------------------------------------------------


def test_energies_of_latents_are_listed_beside_those_of_images(folder, tmp_path, monkeypatch):
    """The table's columns against the definition in NumPy, on the latents as the pipeline encodes them."""
    monkeypatch.chdir(folder)
    tasks = load("stripes.npz", Choice(task2_classes="1"), Reading())
    made = StableDiffusion.from_folder("small")
    base = fine_tuned(made, tmp_path)
    encoded = experiment._latents(base, tasks.task1, Screen())
    expected = np.asarray(made.encode(tasks.task1.pixels))
    np.testing.assert_allclose(encoded.pixels, expected, rtol=0, atol=1e-4)
    latent = dataclasses.replace(tasks, task1=encoded, task2=None)
    of_images, of_latents = (
        survey("energies", each, Temperature(perplexity=3.0), Priors(), "paper", Machine(), tmp_path / name, Screen())
        for name, each in (("images.npz", tasks), ("latents.npz", latent))
    )
    assert tasks.task2 is not None
    images, plan = [tasks.task1, tasks.task2], Plan(("none",), 4, (0,), 12)
    learner = UNetLearner(tmp_path, SETTINGS, SETTINGS, base=base)
    ready = Experiment(tmp_path, images, learner, plan, [of_images], _nothing, latents=of_latents)
    rows = ready.measured_rows()
    np.testing.assert_array_equal(rows, Experiment(tmp_path, images, learner, plan, [of_images], _nothing).measured_rows())
    columns = ready._of_samples(rows)
    memories = expected.reshape(len(expected), -1).astype(float)
    memories /= np.linalg.norm(memories, axis=1, keepdims=True)
    beta, eps = of_latents.landscape.beta, float(np.finfo(np.float32).eps)
    logits = beta * memories @ memories.T
    own, others = np.diagonal(logits), np.where(np.eye(len(logits)), -np.inf, logits)
    odds = special.logsumexp(others, axis=1) - own
    # Logits of about β are rounded, and the latents that they come of.
    np.testing.assert_allclose(columns["odds.latent"], odds[rows], rtol=0, atol=16 * beta * eps)
    np.testing.assert_allclose(columns["energy.latent"], 0.5 - special.logsumexp(logits, axis=1)[rows] / beta, rtol=0, atol=8 * eps)
    assert np.abs(columns["odds.latent"] - columns["odds"]).max() > 100 * beta * eps


def _nothing(found, policy, size, seed):
    return np.arange(size)


def test_findings_tell_how_well_they_predict_and_how_far_they_agree():
    samples = made_up.samples()
    latent = -samples["odds"] + 0.3 * np.random.default_rng(1).normal(size=200)[samples["place"]]
    with_latents = table.Table({**samples.columns, "odds.latent": -latent, "energy.latent": latent}, samples.settings)
    found = findings.findings(with_latents)
    assert "latents" not in findings.findings(samples)
    first = samples["seed"] == 0
    agreement = found["latents"]["energy and energy of latents"]
    assert agreement["value"] == pytest.approx(stats.spearmanr(latent[first], -samples["odds"][first]).statistic, rel=1e-9)
    predicted = found["predictors"]["energy of latents"]
    for seed, value in enumerate(predicted["seeds"]):
        rows = samples["seed"] == seed
        rise = (samples["none@500"] - samples["before@500"])[rows]
        assert value == pytest.approx(stats.spearmanr(latent[rows], rise).statistic, rel=1e-9)


@pytest.mark.usefixtures("here")
def test_each_class_has_a_prompt_if_one_is_asked_for():
    tasks = [stripes(8), dataclasses.replace(stripes(8), labels=np.full(8, 3), classes=None)]
    small = StableDiffusion.from_folder("small")
    base = experiment._fine_tuned(small, Path("latents"), tasks, "{label}!")
    assert isinstance(base, LatentModel)
    assert base.classes == ("up", "flat", "3")
    assert base.batch(tasks[1], pixels=False).prompt.tolist() == [3] * 8
    with pytest.raises(UsageError, match="has no classes; leave it out"):
        experiment._fine_tuned(small, Path("latents"), [dataclasses.replace(tasks[0], labels=None)], "{label}")


# ---- Dry runs, and the whole -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_a_dry_run_of_given_weights_reads_no_weights_of_the_network(capsys):
    shutil.copytree("small", "hollow")
    Path("hollow/unet/diffusion_pytorch_model.safetensors").unlink()
    assert main(["run", "stripes.npz", "--preset", "sd-tiny", "--weights", "hollow", "--dry-run", "--out", "nowhere"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not Path("nowhere").exists()
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(StableDiffusion.from_folder("small").unet, nnx.Param)))
    assert lines[0] == f"parameters: {count:,}"
    assert "frozen" in lines[1]
    assert lines[2] == f"learning: {12 * 6} steps of 8 images"
    assert "about" not in "".join(lines)


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_whole_experiment_makes_its_pipeline_once_and_goes_on(capsys, monkeypatch):
    words = [
        "run",
        "--preset",
        "sd-tiny",
        "--policies",
        "none,high",
        "--generated",
        "8",
        "--measures",
        "bound",
        "--beta",
        "30",
        "--class-prompt",
        "{label}!",
        "--optimiser",
        "adafactor",
        "--out",
        "run",
    ]
    assert main([*words, "--dry-run"]) == 0
    assert "in all: about" in capsys.readouterr().out
    assert main(words) == 0
    samples = table.read(Path("run") / TABLE)
    for name in ("energy.latent", "odds.latent", "none@500", "high@500"):
        assert np.isfinite(samples[name]).all()
    found = json.loads(Path("run/findings.json").read_text())
    assert "energy of latents" in found["predictors"]
    assert "energy of latents" in Path("run/report.html").read_text()
    made = StableDiffusion.from_folder("run/pipeline")
    assert np.isfinite(made.decode(made.encode(stripes(4).pixels))).all()
    assert table.read(Path("run") / experiment.LATENT_ENERGIES).settings["task1"]["source"].startswith("latents of ")
    for name in ("learner.run", "learner.assess", "learner.generate", "stable.autoencoding.train_autoencoder"):
        monkeypatch.setattr(f"diffusion.{name}", None)
    assert main(words) == 0
    again = table.read(Path("run") / TABLE)
    for name in samples.columns:
        np.testing.assert_array_equal(again[name], samples[name])
    assert isinstance(StableDiffusion.from_folder("run/seed0/none/model").vae, AutoencoderKL)
