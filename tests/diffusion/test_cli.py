"""The command line on a tiny network: train, go on, sample, export, import; one line and a status for each mistake."""

import dataclasses
import json
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

import diffusion.cli.app
import diffusion.cli.measure
import diffusion.cli.models
import diffusion.cli.train
from diffusion import settings
from diffusion.__main__ import main
from diffusion.assess import Reconstruction, assess
from diffusion.cli.app import app
from diffusion.feed import Feed
from diffusion.layout import Layout
from diffusion.optimiser import AdamW
from diffusion.pipeline import read_pipeline
from diffusion.run import Rhythm, read_model
from diffusion.settings import Length, Network, Noise, Settings
from diffusion.train import Program
from diffusion.weights import WEIGHTS
from hopjax.cli import table
from tests.diffusion.tiny import NETWORKS, OPTIONS, bits, command, last_state, pixels

pytestmark = pytest.mark.usefixtures("as_run")

STEPS = 12
Disk = namedtuple("Disk", "total used free")


def chosen():
    """What `train` below means, while the tiny network is known."""
    return Settings(Network("tiny"), Noise("cosine", prediction="v_prediction"), AdamW(2e-3, 2, 0.3), Length(STEPS, 8, 0.9))


def leave_jax(patch):
    """Commands that leave JAX as it is, and know of the tiny network."""
    patch.setattr(settings, "NETWORKS", NETWORKS)
    for module in (diffusion.cli.train, diffusion.cli.models, diffusion.cli.measure):
        patch.setattr(module, "configure", lambda *_: None)


def train(*more, out="run", data="stripes.npy", steps=STEPS):
    return main(command("train", data, *OPTIONS, "--steps", steps, "--out", out, *more))


@pytest.fixture(scope="module")
def compiled_once(as_run):
    """The same program is compiled once for all tests: how often a run compiles is tested elsewhere."""
    programs = {}
    compile = Program.compile

    def known(self, state, batch):
        what = (self.graphdef, self.objective, self.optimiser, self.steps, self.ema, batch.shape, batch.dtype)
        if what not in programs:
            programs[what] = compile(self, state, batch)
        return programs[what]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "compile", known)
        yield


@pytest.fixture(scope="module")
def trained(compiled_once, tmp_path_factory):
    """A folder with a finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "stripes.npy", pixels())
    with pytest.MonkeyPatch.context() as patch:
        leave_jax(patch)
        patch.chdir(folder)
        assert train("--sample-every", "5", "--log-every", "6", "--save-every", "5") == 0
    return folder


@pytest.fixture(autouse=True)
def here(trained, tmp_path, monkeypatch):
    """A folder with the run, and data of several kinds."""
    leave_jax(monkeypatch)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "run", "run")
    np.save("stripes.npy", pixels())
    np.save("other.npy", pixels(seed=1))
    np.save("colour.npy", pixels().repeat(3, axis=3))
    np.save("large.npy", pixels().repeat(2, axis=1).repeat(2, axis=2))
    np.save("odd.npy", pixels()[:, :3])
    np.save("rows.npy", np.zeros((20, 5), np.float32))
    np.save("bright.npy", pixels().astype(np.float32))
    np.save("infinite.npy", np.where(np.arange(40)[:, None, None, None] == 7, np.nan, pixels() / 255).astype(np.float32))


def lines(file="run/log.jsonl"):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


# ---- train ---------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_settings_losses_sheets_and_model():
    assert {path.name for path in Path("run").iterdir()} == {"run.json", "log.jsonl", "loss.png", "samples", "checkpoints", "model"}
    known = json.loads(Path("run/run.json").read_text())
    assert Settings.from_json(known["settings"]) == chosen()
    assert known["network"]["block_out_channels"] == [8, 8]
    assert known["data"]["samples"] == 40
    records = lines()
    assert [record["step"] for record in records] == [6, 12]
    assert [record["epoch"] for record in records] == [6 / 5, 12 / 5]
    for record in records:
        assert 0 < record["loss"] < 10
        assert len(record["part_losses"]) == 10
        assert record["rate"] > 0
    assert sorted(path.name for path in Path("run/samples").iterdir()) == ["0000005.png", "0000010.png", "0000012.png"]
    for file in Path("run/samples").iterdir():
        sheet = np.asarray(Image.open(file))
        # Eight by eight pictures of 4 × 4, a pixel apart, all sixteen times.
        assert sheet.shape == (16 * (8 * 5 - 1),) * 2
        assert np.ptp(sheet) > 100
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["10", "12"]


def test_the_model_is_the_average_in_the_last_checkpoint():
    step, state = last_state("run", chosen())
    assert (step, int(state.step)) == (STEPS, STEPS)
    assert bits(nnx.state(read_model("run").unet, nnx.Param)) == bits(state.ema)
    assert bits(nnx.state(read_model("run", averaged=False).unet, nnx.Param)) == bits(state.params)
    assert bits(state.params) != bits(state.ema)


def test_the_same_command_on_a_finished_run_does_nothing(capsys):
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()}
    assert train("--sample-every", "5", "--log-every", "6", "--save-every", "5") == 0
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()} == before
    assert "model: run/model" in capsys.readouterr().out


def interrupted_at(number):
    """`Feed.batch`, with Ctrl-C while this batch is read."""
    batch = Feed.batch

    def read(feed, wanted):
        if wanted == number:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(feed, wanted)

    return read


def test_an_interrupted_run_goes_on_bit_for_bit_whatever_the_rhythm(monkeypatch, capsys):
    expected = last_state("run", chosen())[1]
    sheet = Path("run/samples/0000012.png").read_bytes()
    shutil.rmtree("run")
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as cut:
        cut.setattr(Feed, "batch", interrupted_at(6))
        assert train("--log-every", "2") == 130
    assert capsys.readouterr().err.endswith("interrupted: saved step 7 of 12 in run; the same command goes on from there\n")
    assert [record["step"] for record in lines()] == [2, 4, 6]
    assert not Path("run/model").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert train("--log-every", "3", "--save-every", "2", "--keep", "1", "--sample-every", "12") == 0
    assert "going on from step 7 of 12" in capsys.readouterr().err
    assert [record["step"] for record in lines()] == [2, 4, 6, 9, 12]
    assert bits(last_state("run", chosen())[1]) == bits(expected)
    assert Path("run/samples/0000012.png").read_bytes() == sheet
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["12"]


def test_a_damaged_checkpoint_is_told_and_the_run_ends_the_same(capsys):
    expected = last_state("run", chosen())[1]
    shutil.rmtree("run/model")
    (array,) = Path("run/checkpoints/12/state/ocdbt.process_0/d").iterdir()
    array.write_bytes(array.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"checkpoint 12 cannot be read \(.* is not as it was written\); going on from 10"):
        assert train() == 0
    assert "going on from step 10 of 12" in capsys.readouterr().err
    assert bits(last_state("run", chosen())[1]) == bits(expected)
    assert [record["step"] for record in lines()] == [6, 12]


@pytest.mark.parametrize(
    ("more", "data", "names"),
    [
        (["--learning-rate", "1e-3"], "stripes.npy", ("settings.optimiser.learning_rate: 0.002, now 0.001",)),
        (["--steps", "13", "--seed", "1"], "stripes.npy", ("settings.length.steps: 12, now 13; settings.length.seed: 0, now 1",)),
        ([], "other.npy", ("data.sha256", "stripes.npy", "other.npy")),
        (["--replay", "other.npy"], "stripes.npy", ("replay: null, now",)),
    ],
    ids=str,
)
def test_a_run_with_other_settings_is_refused_with_the_difference(more, data, names, capsys):
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert train(*more, data=data) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for name in ("error: run holds a run with other settings: ", *names, "Give the same, or name another folder"):
        assert name in line
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("number", "saved"), [(0, None), (3, 3)])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(number, saved, capsys, monkeypatch):
    compile = Program.compile

    def failing(self, state, batch):
        step = compile(self, state, batch)

        def measured(state, batch, key):
            at = int(state.step)
            state, found = step(state, batch, key)
            return state, found._replace(loss=np.float32(np.nan)) if at == number else found

        return measured

    monkeypatch.setattr(Program, "compile", failing)
    assert train("--save-every", "1", out="bad") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    good = "there is no checkpoint yet" if saved is None else f"the last good checkpoint is of step {saved}"
    assert line.startswith("error: loss nan, gradient norm ")
    assert f" at step {number + 1} (epoch 1, batch {number + 1} of 5): stopped; {good} in bad/checkpoints. A lower learning_rate" in line
    assert max((int(path.name) for path in Path("bad/checkpoints").iterdir()), default=None) == saved
    assert not Path("bad/model").exists()


def test_a_full_disk_ends_the_run_and_loses_nothing(capsys, monkeypatch):
    shutil.rmtree("run/checkpoints/12")
    monkeypatch.setattr("diffusion.checkpoint.shutil.disk_usage", lambda _: Disk(9, 9, 0))
    assert train() == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "the disk has 0 MB left: make room and run the same command again; it goes on from step 10" in line
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["10"]


def test_a_second_task_starts_from_a_model_with_replay():
    options = ["--start", "run", "--replay", "stripes.npy", "--replay-ratio", "0.25", "--out", "second"]
    assert train(*options, data="other.npy") == 0
    known = json.loads(Path("second/run.json").read_text())
    assert known["replay"]["source"] == "stripes.npy"
    assert len(known["start"]) == 64
    record = json.loads(next(Path("second/checkpoints/12").glob("_CHECKPOINT_METADATA")).read_text())
    assert json.dumps(list(range(40)))[1:-1] in json.dumps(record)


def test_a_dry_run_writes_nothing_and_says_what_it_would_take(capsys):
    assert train("--dry-run", out="nowhere") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in out] == [
        *("images", "steps", "parameters", "memory of a device", "compilation", "a step", "training")
    ]
    assert out[1] == "steps: 12 of 8 images: 2.4 epochs of 5"
    count = sum(tensor.size for tensor in load_file(f"run/model/unet/{WEIGHTS}").values())
    assert out[2] == f"parameters: {count:,}"
    size = f"{4 * count / 2**20:,.1f} MiB"
    assert out[3].startswith(f"memory of a device: parameters {size}, average {size}, optimiser {8 * count / 2**20:,.1f} MiB")
    assert not Path("nowhere").exists()


# ---- sample, export, import ----------------------------------------------------------------------------------------------


def test_samples_as_a_sheet_and_as_bytes(capsys):
    assert main(["sample", "run", "--count", "7", "--batch", "4", "--sampling-steps", "5", "--out", "few.npy"]) == 0
    assert capsys.readouterr().out == "7 images of 5 evaluations each: few.npy\n"
    few = np.load("few.npy")
    assert (few.shape, few.dtype) == ((7, 4, 4, 1), np.uint8)
    assert all(np.ptp(image) > 0 for image in few)
    assert main(["sample", "run", "--count", "9", "--batch", "4", "--sampling-steps", "5", "--out", "more.npy"]) == 0
    # The same images come first; the same compiled program gives the same bytes.
    np.testing.assert_array_equal(np.load("more.npy")[:7], few)
    assert main(["sample", "run", "--count", "4", "--batch", "4", "--sampling-steps", "5", "--out", "sheet.png"]) == 0
    sheet = np.asarray(Image.open("sheet.png"))
    assert sheet.shape == (16 * 9, 16 * 9)
    np.testing.assert_array_equal(sheet[: 16 * 4 : 16, : 16 * 4 : 16], few[0, ..., 0])
    np.testing.assert_array_equal(sheet[16 * 5 :: 16, 16 * 5 :: 16], few[3, ..., 0])


def test_the_flow_takes_as_many_evaluations_as_its_tolerance_needs(capsys):
    for tolerance in ("0.1", "1e-4"):
        assert main(["sample", "run", "--count", "2", "--sampler", "flow", "--tolerance", tolerance, "--out", "few.npy"]) == 0
    loose, tight = (int(line.split()[3].replace(",", "")) for line in capsys.readouterr().out.splitlines())
    assert loose < tight


def test_a_ratio_of_nothing_is_null(tmp_path):
    np.savez("real.npz", images=pixels(), labels=np.arange(40) % 2)
    assert main(["judge", "stripes.npy", "real.npz", "--hold-out", "20", "--confidence", "0.9999999", "--out", "found.json"]) == 0
    found = json.loads(Path("found.json").read_text())
    assert found["accepted"] == found["real_accepted"] == 0
    assert found["ratio"] is None
    assert found["ratio_error"] is None


def test_reconstructions_as_a_table_and_a_sheet(capsys):
    assert main(["reconstruct", "run", "stripes.npy", "--first", "7", "--batch", "4", "--timestep", "100", "--out", "errors.npz"]) == 0
    out = capsys.readouterr().out.splitlines()
    found = table.read(Path("errors.npz"))
    assert len(found) == 7
    model = read_pipeline("run/model")
    expected = assess(model, pixels()[:7], Reconstruction(100), key=jax.random.key(0), batch=4)
    np.testing.assert_array_equal(found["error"], np.asarray(expected.mean))
    assert found["evaluations"].tolist() == [10] * 7  # a tenth of fifty steps, for each of two draws
    assert out[0].startswith(f"{found['error'].mean():.4f} ± ")
    sheet = np.asarray(Image.open("errors.png"))
    enlarged = 16
    np.testing.assert_array_equal(sheet[: 4 * enlarged : enlarged, : 4 * enlarged : enlarged], pixels()[0, ..., 0])
    # Beside it its reconstruction, of which the error of the first draw is that of the bytes, but for their rounding.
    bytes_ = sheet[: 4 * enlarged : enlarged, 5 * enlarged : 9 * enlarged : enlarged].astype(float)
    error = np.mean(((bytes_ - pixels()[0, ..., 0]) / 127.5) ** 2)
    first = float(expected.values[0, 0])
    assert abs(error - first) <= 2 * first**0.5 * 0.5 / 127.5 + (0.5 / 127.5) ** 2 + 1e-6


def test_export_and_import_keep_every_bit(capsys):
    assert main(["export", "run", "there"]) == 0
    assert main(["export", "run", "raw", "--raw"]) == 0
    assert main(["import", "there", "back"]) == 0
    trees = {name: load_file(f"{name}/unet/{WEIGHTS}") for name in ("run/model", "there", "raw", "back")}
    for name in ("there", "back"):
        assert {key: value.tobytes() for key, value in trees[name].items()} == {
            key: value.tobytes() for key, value in trees["run/model"].items()
        }
    assert any(not np.array_equal(value, trees["raw"][key]) for key, value in trees["there"].items())
    assert read_pipeline("back").objective == chosen().noise.objective()
    count = sum(value.size for value in trees["back"].values())
    assert capsys.readouterr().out.splitlines() == [f"{count:,} parameters: {name}" for name in ("there", "raw", "back")]


def rewritten(change):
    file = Path("run/model/unet") / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_in.bias"), "missing: conv_in.bias"),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), "unexpected: extra"),
        (lambda t: t.update({"conv_in.bias": np.zeros(9, np.float32)}), "misshapen: conv_in.bias (9,) instead of (8,)"),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
@pytest.mark.parametrize(
    "arguments",
    [["import", "run/model", "new"], ["sample", "run/model"], ["train", "stripes.npy", *OPTIONS, "--start", "run/model", "--out", "new"]],
    ids=lambda arguments: arguments[0],
)
def test_weights_that_do_not_fit_are_one_line(arguments, change, message, capsys):
    rewritten(change)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not Path("new").exists()


TRAIN = ["train", "stripes.npy", *OPTIONS, "--steps", "3", "--out", "new"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nonsense"], ("nonsense", "--help")),
        ([*TRAIN, "--stesp", "3"], ("--stesp", "--steps")),
        ([*TRAIN, "--steps", "many"], ("--steps", "many", "int")),
        ([*TRAIN, "--steps", "0"], ("--steps 0 is out of range: need steps ≥ 1",)),
        ([*TRAIN, "--batch-size", "41"], ("--batch-size 41 is out of range: need 1 ≤ batch_size ≤ 40, the images of an epoch",)),
        ([*TRAIN, "--ema", "1"], ("--ema 1.0 is out of range: need 0 ≤ ema < 1",)),
        ([*TRAIN, "--seed", "-1"], ("--seed -1 is out of range",)),
        ([*TRAIN, "--learning-rate", "0"], ("--learning-rate 0.0 is out of range: need 0 < learning_rate < ∞",)),
        ([*TRAIN, "--learning-rate", "nan"], ("--learning-rate nan is out of range",)),
        ([*TRAIN, "--dropout", "1"], ("--dropout 1.0 must be at least 0 and below 1",)),
        ([*TRAIN, "--network", "digit"], ("--network 'digit' is not known: did you mean 'digits'?",)),
        ([*TRAIN, "--schedule", "quartic"], ("--schedule", "quartic", "cosine")),
        ([*TRAIN, "--preset", "slow"], ("--preset", "slow", "quick")),
        ([*TRAIN, "--timesteps", "1"], ("--timesteps 1 is out of range: need timesteps ≥ 2",)),
        ([*TRAIN, "--log-every", "0"], ("--log-every 0 is out of range: need log_every ≥ 1",)),
        ([*TRAIN, "--keep", "0"], ("--keep 0 is out of range",)),
        ([*TRAIN, "--fsdp", "3"], ("replicas × fsdp = 1 × 3 must be the number of devices, 1",)),
        ([*TRAIN, "--replay-ratio", "0.5"], ("--replay-ratio 0.5 needs a replay buffer",)),
        ([*TRAIN, "--replay", "other.npy", "--replay-ratio", "1"], ("--replay-ratio 1.0 is out of range: need 0 < replay_ratio < 1",)),
        ([*TRAIN, "--replay", "other.npy", "--replay-ratio", "-0.5"], ("--replay-ratio -0.5 is out of range",)),
        ([*TRAIN, "--replay", "colour.npy"], ("replayed images are uint8 (4, 4, 3), new ones uint8 (4, 4, 1)",)),
        ([*TRAIN, "--buffer", "b.npz"], ("--buffer", "--replay")),
        ([*TRAIN, "--hold-out", "40"], ("--hold-out 40 is out of range: need 0 ≤ hold-out < 40",)),
        ([*TRAIN, "--start", "rnu"], ("rnu does not exist; did you mean run?",)),
        (
            [*TRAIN, "--start", "run", "--prediction", "epsilon"],
            ("the model to start from was trained with --prediction v_prediction, not --prediction epsilon: give the same",),
        ),
        (["train", "colour.npy", *TRAIN[2:], "--start", "run"], ("takes 1 channels, the images have 3",)),
        (["train", "large.npy", *TRAIN[2:], "--start", "run"], ("draws images of 4, these are 8 × 8",)),
        (["train", "odd.npy", *TRAIN[2:]], ("images of 3 × 4 do not fit 2 levels of resolution: height and width must be multiples of 2",)),
        (["train", "rows.npy", *TRAIN[2:]], ("rows.npy: holds rows of numbers, not images",)),
        (["train", "bright.npy", *TRAIN[2:]], ("bright.npy: pixels lie between", "give bytes, or numbers from 0 to 1")),
        (["train", "infinite.npy", *TRAIN[2:]], ("infinite.npy",)),
        (["train", "stirpes.npy", *TRAIN[2:]], ("stirpes.npy: does not exist", "did you mean stripes.npy?")),
        (["train", "--preset", "paper-cifar10"], ("--preset paper-cifar10 needs DATA",)),
        ([*TRAIN, "--out", "stripes.npy"], ("stripes.npy", "cannot be written")),
        ([*TRAIN, "--out", "."], (". is not empty and holds no run: name another folder",)),
        (["sample", "stripes.npy"], ("stripes.npy is not a folder",)),
        (["sample", "nowhere"], ("nowhere does not exist",)),
        (["sample", "empty"], ("empty/unet is no diffusers folder: cannot read config.json",)),
        (["sample", "run", "--count", "0"], ("--count 0 is out of range: need count ≥ 1",)),
        (["sample", "run", "--eta", "2"], ("--eta 2.0 is out of range: need 0 ≤ eta ≤ 1",)),
        (["sample", "run", "--eta", "0.5", "--sampler", "flow"], ("--eta 0.5 is of --sampler ddim",)),
        (["sample", "run", "--sampling-steps", "10", "--sampler", "flow"], ("--sampling-steps 10 is of the other samplers: with flow",)),
        (["sample", "run", "--tolerance", "0.1"], ("--tolerance 0.1 is of --sampler flow: with ddim give --sampling-steps",)),
        (["sample", "run", "--tolerance", "0", "--sampler", "flow"], ("--tolerance 0.0 is out of range: need 0 < tolerance < 1",)),
        (["likelihood", "run", ".", "--out", "x.parquet"], ("--out x.parquet is in the folder ., which is read: name a file outside it",)),
        (["reconstruct", "run", ".", "--out", "x.parquet"], ("--out x.parquet is in the folder ., which is read: name a file outside it",)),
        (["judge", "x.npy", "stripes.npy", "--out", "stripes.npy"], ("--out stripes.npy is what is read: name another file",)),
        (["sample", "run", "--seed", "-1"], ("--seed -1 is out of range: need 0 ≤ seed < 2³²",)),
        (["sample", "run", "--out", "sheet.jpg"], ("sheet.jpg", "sheet.png")),
        (["reconstruct", "run", "stripes.npy", "--timestep", "1000"], ("--timestep 1000 is out of range: need 0 < timestep < 1000",)),
        (["reconstruct", "run", "stripes.npy", "--draws", "0"], ("--draws 0 is out of range: need draws ≥ 1",)),
        (["reconstruct", "run", "large.npy"], ("the model draws images of 4, these are 8 × 8: give some of its size",)),
        (["reconstruct", "run", "colour.npy"], ("the model takes 1 channels, the images have 3",)),
        (["likelihood", "run", "large.npy"], ("the model draws images of 4, these are 8 × 8: give some of its size",)),
        (["likelihood", "run", "stripes.npy", "--seed", str(2**32)], ("--seed 4294967296 is out of range",)),
        (["reconstruct", "run"], ("the run in run held no images out: name the images",)),
        (["export", "run", "run"], ("run exists already and is not an empty folder",)),
        (["import", "run/samples", "new"], ("run/samples/unet is no diffusers folder",)),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("unchecked")
def test_misuse_is_one_line_and_status_2(arguments, names, capsys):
    Path("empty").mkdir()
    assert main(command(*arguments)) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in errors.splitlines() if line != "compiling"]
    assert line.startswith("error: ")
    for name in names:
        assert name in line
    assert not Path("new/checkpoints").exists()


def test_a_run_that_has_not_saved_has_no_model(capsys):
    shutil.rmtree("run/model")
    shutil.rmtree("run/checkpoints")
    assert main(["sample", "run"]) == 2
    assert "run has no checkpoint yet: run its `train` command for longer" in capsys.readouterr().err
    Path("run/run.json").write_text("{")
    assert main(["sample", "run"]) == 2
    assert "run/run.json was not written by this version" in capsys.readouterr().err


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        app(["train", "--help"], exit_on_error=False)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for group in (Network(), Noise(), AdamW(), Length(), Layout(), Rhythm()):
        for field in dataclasses.fields(group):
            option = f"--{field.name.replace('_', '-')}"
            assert option in text
            value = getattr(group, field.name)
            if value is not None and not isinstance(value, bool):
                assert f"[default: {value}]" in text[text.index(option) :][:900], option
    for name, preset in settings.PRESETS.items():
        assert f"{name}: {preset.about}" in text
