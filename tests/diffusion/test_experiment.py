"""The command `run` on a tiny network: what it leaves, what it does not do twice, what it refuses; and `report`, without a model."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffusion import continual, settings, trials
from diffusion.__main__ import main
from diffusion.cli import experiment, report
from diffusion.cli.report import EXPERIMENT, GENERATED, TABLE, TASKS
from diffusion.continual import Stage
from diffusion.learner import Unfinished
from diffusion.run import run
from diffusion.weights import WEIGHTS
from hopjax.cli import table
from hopjax.cli.options import Choice, Reading
from hopjax.cli.progress import Screen
from hopjax.cli.table import Table
from hopjax.cli.tasks import description, directed, load
from tests.diffusion import tiny
from tests.diffusion.tiny import NETWORKS, pixels

pytestmark = pytest.mark.usefixtures("as_run")

ROOT = Path(__file__).parents[2]
OPTIONS = ("--policies", "none,high,low", "--samples", "20", "--generated", "20", "--densities", "5", "--measures", "bound")
TABLES = (TABLE, TASKS, GENERATED)


def save_stripes(folder):
    np.savez(folder / "stripes.npz", images=pixels(), labels=np.arange(40) % 2)


def leave_jax(patch):
    patch.setattr(settings, "NETWORKS", NETWORKS)
    patch.setattr(experiment, "TRIALS", tiny.trials())
    patch.setattr(experiment, "configure", lambda *_: None)


@pytest.fixture(scope="module")
def ran(as_run, tmp_path_factory):
    """A folder with a finished experiment; not to be changed. In `held` are the bytes of all arrays at the beginning of each run."""
    folder = tmp_path_factory.mktemp("experiment")
    save_stripes(folder)
    held = []

    def counted(*arguments, **options):
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return run(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        leave_jax(patch)
        patch.chdir(folder)
        patch.setattr("diffusion.learner.run", counted)
        gc.disable()  # or what is kept would depend on when it runs
        try:
            assert main(["run", *OPTIONS, "--out", "run"]) == 0
        finally:
            gc.enable()
    np.save(folder / "held.npy", held)
    return folder


@pytest.fixture
def here(ran, tmp_path, monkeypatch):
    leave_jax(monkeypatch)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ran, tmp_path, dirs_exist_ok=True)


def contents(folder):
    """Of the tables: columns, bit for bit."""
    tables = {name: table.read(Path(folder) / name) for name in TABLES}
    return {(name, column): list(map(repr, found[column].tolist())) for name, found in tables.items() for column in found.columns}


@pytest.mark.usefixtures("here")
def test_an_experiment_leaves_tables_and_a_page(capsys):
    samples, tasks, generated = (table.read(Path("run") / name) for name in TABLES)
    assert len(samples) == 20
    assert np.isfinite(samples["bound.none@300"]).sum() == 5
    assert len(tasks) == 3 * 3  # policies, and Task 1 after one and after two, Task 2
    assert {policy: int((generated["policy"] == policy).sum()) for policy in np.unique(generated["policy"])} == {
        "real": 20,
        **dict.fromkeys(("before", "none", "high", "low"), 20),
    }
    with np.load("run/generated.npz") as sheets:
        assert set(sheets) == {"0.before", "0.none", "0.high", "0.low"}
    for name in ("learning", "plan", "task1", "task2", "versions"):
        assert name in samples.settings
    page = Path("run/report.html").read_bytes()
    assert main(["report", "run"]) == 0
    assert Path("run/report.html").read_bytes() == page
    assert "page: run/report.html" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_no_model_is_kept_that_nobody_asks_for_any_more():
    model = load_file(f"run/seed0/task1/model/unet/{WEIGHTS}")
    first, none, high, low = np.load("held.npy")
    assert none - first >= sum(array.nbytes for array in model.values())
    assert none == high == low


@pytest.mark.usefixtures("here")
def test_a_report_needs_neither_models_nor_data():
    for path in Path("run").iterdir():
        if path.name not in TABLES:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    Path("stripes.npz").unlink()
    assert main(["report", "run", "--no-images"]) == 0
    assert json.loads(Path("run/findings.json").read_text())["samples"] == 20
    assert b"<img" in Path("run/report.html").read_bytes() or b"<svg" in Path("run/report.html").read_bytes()


@pytest.mark.usefixtures("here")
def test_what_is_there_is_not_computed_again(monkeypatch):
    def never(*_, **__):
        raise AssertionError("computed again")

    before = contents("run")
    for name in ("learner.run", "learner.assess", "learner.generate"):
        monkeypatch.setattr(f"diffusion.{name}", never)
    monkeypatch.setattr(continual, "Judge", never)
    assert main(["run", *OPTIONS, "--out", "run"]) == 0
    assert contents("run") == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policies", "none,hihg"], "--policies 'hihg' is not known: take some of none, high"),
        (["--buffer", "41"], "--buffer 41 is out of range: need 1 ≤ buffer ≤ 40, the number of samples; take --buffer 10%"),
        (["--buffer", "0%"], "--buffer 0% is out of range: need 0% < buffer ≤ 100%"),
        (["--samples", "10"], "--samples 10 is out of range: need samples ≥ 20, two for each bin of the report; take --samples 500"),
        (["--limit", "12"], "stripes.npz: Task 1 has 12 samples, need at least 20, two for each bin of the report"),
        (["alike.npz", "--beta", "5"], "energies do not tell the samples apart: "),
        (["--timesteps", "500,1000"], "--timesteps 1000 is out of range: need 0 < timestep < 1000; take 500"),
        (["--timesteps", "0", "--dry-run"], "--timesteps 0 is out of range: need 0 < timestep < 1000; take 500"),
        (
            ["--timesteps", "500,"],
            "--timesteps 500, is no list of whole numbers: give some, such as --timesteps 500 or --timesteps 500,100",
        ),
        (["--density-timestep", "999"], "--density-timestep 999 is out of range: need 0 ≤ timestep < 999; take 300"),
        (["--seeds", "0,x"], "--seeds 0,x is no list of whole numbers: give some, such as --seeds 0,1,2"),
        (["--betas", "1,x"], "--betas 1,x is no list of numbers: give some, such as --betas 10,30"),
        (["--betas", "0"], "--betas 0.0 is out of range: need 0 < β < ∞"),
        (["--strength", "-1"], "--strength -1.0 is out of range: need 0 ≤ strength < ∞"),
        (["--tasks", "1"], "--tasks 1 is out of range: need tasks ≥ 2"),
        (["--tasks", "3", "--task2-classes", "1"], "--tasks 3: only rotations make more than two tasks: give --rotate"),
        (["--task2-classes", "0,1"], "are all classes of stripes.npz: leave some for Task 1"),
        (["--task2-classes", "7"], "stripes.npz: has no image of 7"),
        (["--densities", "3"], "--densities 3 is out of range: need samples ≥ 5"),
        (["--density-policies", "joint"], "--density-policies 'joint' is not among the policies none, high"),
        (["--measures", "exact"], "--measures 'exact' is not known: take bound or flow"),
        (["nowhere.npz"], "nowhere.npz: does not exist"),
        (["--steps2", "0"], "--steps2 0 is out of range: need steps2 ≥ 1; take --steps2 6"),
        (["--network", "tny"], "--network 'tny' is not known: did you mean 'tiny'?"),
        (["--class-prompt", "a {label}"], "--preset quick learns pixels, from nothing; take --preset sd-tiny or paper-sd"),
        (
            [*OPTIONS, "--beta", "20", "--out", "run"],
            "run holds an experiment with other settings: temperature.beta: null, now 20.0. Give the",
        ),
        ([*OPTIONS, "--buffer", "5", "--out", "run"], "run holds an experiment with other settings: buffer: 4, now 5. Give the same, or"),
        ([*OPTIONS, "--normalise", "none", "--out", "run"], 'with other settings: memories.normalise: "unit", now "none". Give'),
        (
            [*OPTIONS, "--rotate", "45", "--out", "run"],
            'tasks.task2.source: "stripes.npz, rotated by 90°", now "stripes.npz, rotated by 45°";',
        ),
        ([*OPTIONS, "--steps2", "7", "--out", "run"], "run/seed0/none holds a run with other settings: settings.length.steps: 6, now 7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("here", "unchecked")
def test_misuse_is_one_line_and_status_2(arguments, words, capsys):
    np.savez("alike.npz", images=pixels()[np.arange(40) % 2], labels=np.arange(40) % 2)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert main(["run", *(arguments if "--out" in arguments else [*arguments, "--out", "new"])]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert {path: path.read_bytes() for path in before} == before
    assert not Path("new/seed0").exists()


@pytest.mark.usefixtures("here", "unchecked")
def test_an_image_without_a_direction_is_named_before_anything_is_learnt(capsys):
    images = pixels().copy()
    images[7] = 0
    np.savez("black.npz", images=images, labels=np.arange(40) % 2)
    assert main(["run", "black.npz", "--out", "new"]) == 2
    assert "error: Task 1: image 7 of black.npz is black" in capsys.readouterr().err
    assert not any(Path("new").iterdir())


@pytest.mark.usefixtures("here", "unchecked")
def test_a_folder_that_holds_no_experiment_is_refused(capsys):
    Path("empty").mkdir()
    for folder, words in (
        ("nowhere", "nowhere does not exist: `python -m diffusion run --out nowhere` makes one"),
        ("empty", "empty holds no experiment: `python -m diffusion run --out empty` makes one"),
        ("run/seed0/none", "run/seed0/none holds a run of `train`: name the folder of an experiment"),
    ):
        assert main(["report", folder]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {words}")
    found = table.read(Path("run") / TABLE)
    table.write(Path("run") / TABLE, Table({"x": np.zeros(3)}, {}))
    assert main(["report", "run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: run/samples.parquet was not written by this version of `run`: run the experiment again, in another folder"
    assert len(found) == 20
    (Path("run") / TABLE).unlink()
    assert main(["report", "run"]) == 2
    assert "run holds an experiment that is not finished: the `run` command that" in capsys.readouterr().err
    (Path("run") / EXPERIMENT).write_text("[]")
    assert main(["run", *OPTIONS, "--out", "run"]) == 2
    assert "run/experiment.json was not written by this version: name another folder" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_images_of_other_data_are_not_shown(capsys):
    whole = Path("run/report.html").read_bytes()
    np.savez("stripes.npz", images=pixels(seed=1), labels=np.arange(40) % 2)
    assert main(["report", "run"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: no images of Task 1 are shown: stripes.npz holds others than those of the experiment"
    without = Path("run/report.html").read_bytes()
    assert len(without) < len(whole)
    Path("stripes.npz").unlink()
    assert main(["report", "run"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no images of Task 1 are shown: stripes.npz: does not exist")
    assert Path("run/report.html").read_bytes() == without


@pytest.mark.usefixtures("here", "unchecked")
def test_images_that_were_left_out_are_left_out_again(capsys):
    black = pixels()
    black[3] = 0
    np.savez("black.npz", images=black, labels=np.arange(40) % 2)
    read = load("black.npz", Choice(rotate=90.0), Reading(skip_bad=True))
    kept = directed(read, ["unit"], skip=True).task1
    found = Table({}, {"read": json.loads(json.dumps(read.read)), "normalise": "unit", "task1": description(kept)})
    again = report._task1(found, Screen())
    assert again is not None
    np.testing.assert_array_equal(again.pixels, np.delete(black, 3, axis=0))
    assert capsys.readouterr().err == ""


def test_the_paper_s_presets_are_its_protocol():
    cifar, mnist, latent = (trials.TRIALS[name] for name in ("paper-cifar10", "paper-mnist", "paper-sd"))
    for trial in (cifar, mnist):
        assert set(trial.timesteps) == {100, 250, 500, 750}
        assert trial.timesteps[0] == 500
    assert [trial.buffer for trial in (cifar, mnist, latent)] == [5_000, None, 5_000]
    assert all(trial.samples is None for trial in (cifar, mnist, latent))
    for trial, images, epochs in ((cifar, 25_000, 100), (mnist, 60_000, 100), (latent, 25_000, 5)):
        for length in (trial.first.length, trial.later.length):
            assert length.steps == epochs * (images // length.batch_size)


@pytest.mark.usefixtures("here")
def test_options_that_are_left_out_are_the_preset_s(capsys, monkeypatch):
    trial = tiny.trials()["quick"]._replace(buffer=41, samples=None, timesteps=(250, 100))
    monkeypatch.setattr(experiment, "TRIALS", {"quick": trial})
    assert main(["run", "--dry-run", "--out", "nowhere"]) == 2
    assert "--buffer 41 is out of range: need 1 ≤ buffer ≤ 40" in capsys.readouterr().err
    assert (
        main(["run", "--buffer", "4", "--generated", "0", "--densities", "0", "--policies", "none", "--dry-run", "--out", "nowhere"]) == 0
    )
    # 13 and 5 steps × 2 draws of all 40 samples three times, and from the first timestep of Task 2's 40.
    assert f"reconstruction: {(26 + 10) * 3 * 40 + 26 * 40:,} evaluations" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_a_dry_run_counts_what_it_would_take(capsys):
    assert main(["run", *OPTIONS, "--tasks", "3", "--rotate", "90", "--seeds", "0,1", "--dry-run", "--out", "nowhere"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not Path("nowhere").exists()
    assert f"learning: {2 * (20 + 3 * 2 * 6):,} steps of 8 images" in lines[2]
    # 25 steps × 2 draws: Task 1's 20 samples twice before and once after each policy; Task 2's 40 after two tasks and three, Task 3's.
    assert f"reconstruction: {2 * 50 * (5 * 20 + 3 * (2 * 40 + 40)):,} evaluations" in lines[3]
    assert f"generation: {2 * 4 * 20 * 50:,} evaluations" in lines[4]


def test_measuring_stops_after_the_batch_at_which_it_was_asked_to(capsys):
    asked = False
    tell = experiment.stages(Screen(), lambda: asked)(Stage(3, "reconstructing high from 500"))
    tell(10)
    tell(10)
    assert capsys.readouterr().err.splitlines() == ["seed 3: reconstructing high from 500"]  # once
    asked = True
    with pytest.raises(Unfinished, match="stopped while reconstructing high from 500, what came before is kept"):
        tell(10)


# ---- killed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments_an_experiment_ends_as_if_it_had_not_been(ran, tmp_path):
    """SIGKILL during learning, reconstruction and writing, until an attempt comes to its end: the tables are those of `ran`."""
    save_stripes(tmp_path)
    pause = random.Random(0)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    words = [sys.executable, "-m", "tests.diffusion.tiny", "run", *OPTIONS, "--save-every", "2", "--out", "killed"]
    kills, seconds = 0, 12.0
    while True:
        process = subprocess.Popen(
            words,
            cwd=tmp_path,
            env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            end = time.monotonic() + pause.uniform(2, seconds)
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
                seconds *= 1.15  # so that it ends
                process.wait()
                continue
            assert process.stderr is not None
            assert process.returncode == 0, process.stderr.read()[-3000:]
            break
    assert kills >= 3
    assert contents(tmp_path / "killed") == contents(ran / "run")
