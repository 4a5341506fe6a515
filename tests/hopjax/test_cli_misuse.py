"""Every mistake gets one line that names the value, its bound and the way out, and exit status 2, before any work."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest

from hopjax import temperature
from hopjax.__main__ import main
from hopjax.cli import app, buffer, figures, heights, output
from hopjax.cli.options import Amount, Choice, Machine, Model, Reading, Temperature, UsageError, as_options
from hopjax.correspondence import linear_alphas_cumprod
from hopjax.normalisation import NORMALISATIONS


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a few data sets, and commands that leave JAX as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "configure", lambda machine: None)
    monkeypatch.setattr(figures, "picture", lambda draw, *size: b"not drawn")
    random = np.random.default_rng(0)
    np.save("plain.npy", random.integers(1, 256, (20, 3, 3, 1), dtype=np.uint8))
    np.save("rows.npy", random.random((20, 5), dtype=np.float32))
    np.save("three.npy", random.integers(1, 256, (3, 3, 3, 1), dtype=np.uint8))
    np.save("colour.npy", random.integers(1, 256, (20, 3, 3, 3), dtype=np.uint8))
    black = random.integers(1, 256, (20, 3, 3, 1), dtype=np.uint8)
    black[7] = 0
    np.save("black.npy", black)
    np.save("few.npy", black[4:8])
    corner = random.integers(1, 256, (20, 9, 9, 1), dtype=np.uint8)
    corner[3] = 0
    corner[3, 0, 0] = 255  # is turned out of the picture
    np.save("corner.npy", corner)
    np.save("same.npy", np.full((20, 3, 3, 1), 9, np.uint8))
    np.save("single.npy", random.random((20, 1), dtype=np.float32) + 1)
    np.save("big.npy", random.random((20, 5), dtype=np.float32) * np.float32(1e20))
    np.savez("own.npz", random.integers(1, 256, (20, 3, 3, 1), dtype=np.uint8))
    os.symlink("own.npz", "link")
    os.mkdir("sub")


def test_what_is_tested_below_is_refused_for_its_own_reason(capsys):
    """The commands that the mistakes are made in are right without them."""
    assert main(["energies", "plain.npy"]) == 0
    assert main(["buffer", "plain.npy", "--size", "3", "--policy", "highest"]) == 0
    assert main(["compare", "results/energies.parquet", "results/energies.parquet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nonsense"], ("nonsense", "energies, buffer, sensitivity, compare", "--help")),
        (["energies"], ("DATA", "--help")),
        (["energies", "plain.npy", "--nonsense"], ("--nonsense", "--help")),
        (["energies", "plian.npy"], ("plian.npy: does not exist", "did you mean plain.npy?", "mnist-5k")),
        (["energies", "plain.npy", "--split", "test"], ("plain.npy", "leave --split 'test' out")),
        (["energies", "rows.npy", "--image-size", "4"], ("rows of numbers", "size")),
        (["energies", "plain.npy", "--image-size", "0"], ("size", "between 1 and", "0")),
        (["energies", "plain.npy", "--image-size", "axb"], ("--image-size axb", "HEIGHTxWIDTH", "--image-size 32")),
        (["energies", "plain.npy", "--limit", "0"], ("limit", "at least 1", "0")),
        (["energies", "plain.npy", "--limit", "ten"], ("--limit ten", "whole number", "--limit 20")),
        (["energies", "three.npy"], ("three.npy: 3 samples", "at least 4")),
        (["energies", "black.npy"], ("Task 1: image 7 of black.npy is black", "--skip-bad leaves it out")),
        (["energies", "plain.npy", "--task2", "black.npy"], ("Task 2: image 7 of black.npy is black", "--skip-bad leaves it out")),
        (["energies", "corner.npy", "--rotate", "45"], ("Task 2: image 3 of corner.npy, rotated by 45° is black", "--skip-bad")),
        (["energies", "same.npy", "--normalise", "centred"], ("Task 1: image 0 of same.npy equals the mean image", "--skip-bad")),
        (["energies", "same.npy", "--normalise", "centred", "--skip-bad"], ("same.npy: holds no image",)),
        (["energies", "few.npy", "--skip-bad"], ("few.npy: 3 samples, need at least 4",)),
        (["sensitivity", "black.npy"], ("Task 1: image 7 of black.npy is black", "--skip-bad")),
        (["energies", "big.npy", "--normalise", "none"], ("--normalise none leaves norms up to", "e+20", "float32", "--normalise unit")),
        (["energies", "same.npy"], ("the default rule for β, perplexity 6.6", "no β gives it", "take another, such as --beta 30")),
        (["energies", "single.npy"], ("the default rule for β, perplexity 6.6", "no β gives it", "such as --beta 30")),
        (["energies", "digits", "--classes", "1,1"], ("error: classes 1,1 of digits name one twice: name each once\n",)),
        (["energies", "digits", "--task2-classes", "1,01"], ("classes 1,01 of digits name one twice",)),
        (["energies", "plain.npy", "--classes", "0,1"], ("plain.npy", "no labels")),
        (["energies", "plain.npy", "--task2-classes", "1"], ("plain.npy has no labels to split by", "give --task2 or --rotate")),
        (["energies", "digits", "--classes", "0,twelve"], ("digits", "no class 'twelve'", "only 0, 1")),
        (["energies", "digits", "--classes", "0,12"], ("digits", "no class 12", "0 … 9")),
        (["energies", "digits", "--classes", "0,,1"], ("--classes '0,,1'", "empty", "A,B")),
        (["energies", "digits", "--classes", "0,1", "--task2-classes", "1,2"], ("twice", "0, 1; 1, 2")),
        (["energies", "digits", "--task2-classes", "0,1,2,3,4,5,6,7,8,9"], ("--task2-classes", "all classes", "leave some for Task 1")),
        (["energies", "plain.npy", "--task2", "colour.npy"], ("--task2 colour.npy", "3 × 3 × 3", "3 × 3 × 1", "--grey or --colour")),
        (["energies", "plain.npy", "--task2", "nosuch"], ("nosuch: does not exist",)),
        (["energies", "plain.npy", "--task2", "plain.npy", "--rotate", "30"], ("--rotate 30 and --task2", "give one")),
        (["energies", "digits", "--task2-classes", "1", "--rotate", "30"], ("--rotate 30 and --task2-classes", "give one")),
        (["energies", "plain.npy", "--rotate", "inf"], ("--rotate inf", "finite angle", "--rotate 30")),
        (["energies", "rows.npy", "--rotate", "30"], ("rows of numbers", "cannot be rotated")),
        (["energies", "plain.npy", "--beta", "-8"], ("--beta -8.0", "0 < beta < ∞", "take --beta 30")),
        (["energies", "plain.npy", "--beta", "nan"], ("--beta nan", "0 < beta < ∞")),
        (["energies", "plain.npy", "--beta", "warm"], ("--beta warm is not a number", "--beta 0.5")),
        (["energies", "plain.npy", "--beta", "3", "--perplexity", "4"], ("--beta and --perplexity", "keep one")),
        (["energies", "plain.npy", "--timestep", "1000"], ("--timestep 1000.0", "0 ≤ timestep ≤ 999", "take --timestep 500")),
        (["energies", "plain.npy", "--perplexity", "1"], ("--perplexity 1.0", "1 < perplexity", "take --perplexity 30")),
        (["energies", "plain.npy", "--perplexity", "19"], ("--perplexity 19", "perplexity < 19", "other samples")),
        (["energies", "plain.npy", "--self-weight", "1"], ("--self-weight 1.0", "0 < self-weight < 1", "take --self-weight 0.5")),
        (["energies", "plain.npy", "--self-weight", "0.01"], ("--self-weight 0.01", "0.05", "20 samples")),
        (["energies", "plain.npy", "--model-scale", "0"], ("--model-scale 0.0", "0 < model-scale < ∞", "take --model-scale 2")),
        (["energies", "plain.npy", "--normalise", "most"], ("most", "--normalise", "centred")),
        (["energies", "plain.npy", "--variant", "most"], ("most", "--variant", "density")),
        (["energies", "plain.npy", "--epsilon", "0"], ("--epsilon 0.0", "0 < epsilon", "take --epsilon 0.05")),
        (["energies", "plain.npy", "--sigma", "-1"], ("--sigma -1.0", "0 < sigma", "take --sigma 1")),
        (["energies", "plain.npy", "--device", "abacus"], ("abacus", "--device", "cpu")),
        (["energies", "plain.npy", "--precision", "half"], ("half", "--precision", "float64")),
        (["energies", "plain.npy", "--memory-limit", "lots"], ("--memory-limit lots", "--memory-limit 512MiB")),
        (["energies", "plain.npy", "--memory-limit", "1KiB"], ("--memory-limit 1024 bytes", "at least 1MiB")),
        (["energies", "plain.npy", "--out", "t.txt"], ("t.txt", ".parquet, .csv, .npz", "t.parquet")),
        (["energies", "plain.npy", "--out", "/dev/null/t.csv"], ("--out /dev/null/t.csv", "cannot be written")),
        (["energies", "plain.npy", "--page", "/dev/null/t.html"], ("--page /dev/null/t.html", "cannot be written")),
        (["energies", "plain.npy", "--page", "."], ("--page .", "it is a folder")),
        (["energies", "plain.npy", "--out", "t.csv", "--page", "t.csv"], ("--page t.csv", "take --page t.html")),
        (["energies", "own.npz", "--out", "own.npz"], ("--out own.npz", "is what is read", "another file")),
        (["energies", "own.npz", "--out", "sub/../own.npz"], ("--out sub/../own.npz", "is what is read")),
        (["energies", "digits", "--task2", "own.npz", "--page", "link"], ("--page link", "is what is read")),
        (["energies", "own.npz", "--page", "own.npz"], ("--page own.npz", "is what is read")),
        (["energies", "sub", "--out", "sub/new/t.csv"], ("--out sub/new/t.csv", "in the folder sub", "outside")),
        (["energies", "."], ("--out results/energies.parquet", "in the folder .", "outside")),
        (["buffer", "own.npz", "--size", "3", "--policy", "lowest", "--out", "own.npz"], ("--out own.npz", "is what is read")),
        (["sensitivity", "own.npz", "--page", "own.npz"], ("--page own.npz", "is what is read")),
        (["compare", "own.npz", "b.csv", "--out", "own.npz"], ("--out own.npz", "is what is read")),
        (["compare", "a.csv", "own.npz", "--out", "own.npz"], ("--out own.npz", "is what is read")),
        (["energies", "plain.npy", "--size", "4"], ("--size", "--help")),
        (["buffer", "plain.npy", "--policy", "highest"], ("--size", "--help")),
        (["buffer", "plain.npy", "--size", "3"], ("--policy", "--help")),
        (["buffer", "plain.npy", "--size", "3", "--policy", "best"], ("best", "--policy", "coverage")),
        (["buffer", "plain.npy", "--size", "0", "--policy", "highest"], ("--size 0 ", "1 ≤ size ≤ number of samples", "take --size 10%")),
        (["buffer", "plain.npy", "--size", "21", "--policy", "highest"], ("--size 21 ", "1 ≤ size ≤ 20", "take --size 10%")),
        (["buffer", "plain.npy", "--size", "0%", "--policy", "highest"], ("--size 0% ", "0% < size ≤ 100%")),
        (["buffer", "plain.npy", "--size", "200%", "--policy", "highest"], ("--size 200% ", "0% < size ≤ 100%", "take --size 10%")),
        (["buffer", "plain.npy", "--size", "-5", "--policy", "highest"], ("--size -5 ", "--size 500 or --size 10%")),
        (["buffer", "plain.npy", "--size", "1.5", "--policy", "highest"], ("--size 1.5 ", "--size 500 or --size 10%")),
        (["buffer", "plain.npy", "--size", "a tenth", "--policy", "highest"], ("--size a tenth ", "--size 500 or --size 10%")),
        (["buffer", "plain.npy", "--size", "3", "--policy", "class-balanced"], ("class-balanced needs labels", "--policy stratified")),
        (["buffer", "plain.npy", "--size", "3", "--policy", "random", "--seed", "-1"], ("--seed -1", "0 ≤ seed", "take --seed 0")),
        (["buffer", "plain.npy", "--size", "3", "--policy", "random", "--seed", "x"], ("--seed x", "whole number")),
        (["buffer", "plain.npy", "--size", "3", "--policy", "random", "--image-size", "x"], ("--image-size x", "HEIGHTxWIDTH")),
        (["sensitivity", "plain.npy", "--perplexities", "5,x"], ("--perplexities 5,x", "--perplexities 5,30,100")),
        (["sensitivity", "plain.npy", "--perplexities", "1,5"], ("--perplexities 1,5", "1 < perplexity")),
        (["sensitivity", "plain.npy", "--perplexities", "99"], ("--perplexity 99", "the number of other samples")),
        (["compare", "a.parquet"], ("B", "--help")),
        (["compare", "a.parquet", "b.parquet"], ("a.parquet: does not exist", "energies DATA --out a.parquet")),
        (["compare", "plain.npy", "b.parquet"], ("plain.npy", ".parquet, .csv, .npz")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_is_one_line_and_status_2(capsys, arguments, names, tmp_path):
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file())
    assert main(arguments) == 2
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()) == before
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    for name in names:
        assert name in errors, errors
    assert not list(tmp_path.rglob("*.partial/**/*.npz"))  # nothing was computed
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize(
    ("text", "total", "expected"),
    [("1", 20, 1), ("20", 20, 20), ("10%", 20, 2), ("100%", 20, 20), ("0.1%", 20, 1), ("33.3 %", 10, 3), ("12.5%", 5000, 625)],
)
def test_sizes_of_buffers(text, total, expected, monkeypatch):
    given = []

    def stop(amount, count):
        given.append(amount)
        raise UsageError("enough")

    with monkeypatch.context() as stopped:
        stopped.setattr(Amount, "of", stop)
        assert main(["buffer", "plain.npy", "--size", text, "--policy", "lowest"]) == 2
    assert given[0].of(total) == expected


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("x (skip_bad=True leaves it out)", "x (--skip-bad leaves it out)"),
        ("is 3×3: pass size=", "is 3×3: pass --image-size"),
        ("is 3×3×1: pass greyscale=", "is 3×3×1: pass --grey or --colour"),
        ("memory_limit=16 is too small: tiles need 18 bytes", "--memory-limit 16 is too small: tiles need 18 bytes"),
        ("self_weight=0.999: no β gives it", "--self-weight 0.999: no β gives it"),
        ("shape (10, size) of split 'test'", "shape (10, size) of split 'test'"),
    ],
)
def test_the_library_s_arguments_are_named_as_options(message, said):
    assert as_options(message) == said


def test_choices_are_those_of_the_library():
    hints = get_type_hints(Model, include_extras=True)
    assert set(get_args(get_args(hints["normalise"])[0])) == set(NORMALISATIONS)
    parameters = get_type_hints(app.buffer, include_extras=True)
    assert set(get_args(get_args(parameters["policy"])[0])) == set(buffer.WORDS)
    assert set(get_args(get_args(get_type_hints(app.energies, include_extras=True)["variant"])[0])) == set(heights.NAMES)
    assert len(linear_alphas_cumprod()) == 1000
    with pytest.raises(UsageError):
        Temperature(timestep=999.5)
    assert temperature.Timestep(999.0, 1.0).solve(np.ones((2, 2), np.float32)) > 0


def test_every_option_says_its_default(capsys):
    one_of = {"beta", "timestep", "self_weight"}
    for command in ("energies", "buffer", "compare"):
        assert main([command, "--help"]) == 0
        printed = capsys.readouterr().out
        assert f"python -m hopjax {command}" in printed.partition("Example")[2]
        rows = [line.strip("│ ") for line in printed.splitlines() if line.startswith("│")]
        texts = " ".join(rows).replace("--colour", "").replace("--image-size", "--size").split(" --")
        options = {name.replace("-", "_"): text for name, _, text in (text.partition(" ") for text in texts[1:])}
        if command != "compare":
            fields = {field.name for group in (Reading, Choice, Temperature, Model, Machine) for field in dataclasses.fields(group)}
            assert fields <= set(options)
        for name in set(options) - one_of:
            assert "default: " in options[name] or "required" in options[name], options[name]


def test_help_starts_without_what_takes_long():
    script = (
        "import sys\nfrom hopjax.__main__ import main\nassert main(['energies', '--help']) == 0\n"
        "found = {name.partition('.')[0] for name in sys.modules} & {'matplotlib', 'scipy', 'pyarrow', 'PIL', 'jinja2', 'sklearn'}\n"
        "assert not found, found\n"
        "from hopjax.cli import app\nfrom hopjax.cli.options import Machine, UsageError\n"
        "try:\n    app.configure(Machine(device='tpu'))\nexcept UsageError as error:\n    print('ERROR', error)\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert "--device tpu is not to be had" in done.stdout
    assert "take --device cpu, or leave it out" in done.stdout


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    for name in [name for name in sys.modules if name.startswith("hopjax.cli")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["energies", "digits"]) == 2
    assert capsys.readouterr().err == "error: the command line needs cyclopts: pip install 'hopjax[cli]'\n"


def test_the_version_is_said(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == importlib.metadata.version("hopjax") + "\n"


def test_readers_that_have_seen_enough_are_no_error(monkeypatch):
    def closed(*arguments, **options):
        raise BrokenPipeError

    monkeypatch.setattr(app, "app", SimpleNamespace(parse_args=closed))
    monkeypatch.setattr(os, "dup2", lambda one, other: None)
    assert main(["--help"]) == 0


def test_writability_is_found_out_without_leaving_anything(tmp_path):
    output.check_writable("--out", tmp_path / "new" / "t.csv")
    assert list((tmp_path / "new").iterdir()) == []
