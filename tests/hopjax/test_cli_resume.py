"""Runs that are cut off go on where they stopped, and end as if they had not been."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hopjax import buffer as policies
from hopjax import temperature, tiled
from hopjax.__main__ import main
from hopjax.cli import app, figures, resume, table
from hopjax.cli.resume import Partial

SETTINGS = {"beta": 1.0}


def block(*values):
    return {"energy": np.array(values, np.float32), "nearest": np.arange(len(values))}


def test_blocks_come_back_in_order_up_to_a_gap(tmp_path):
    kept = Partial(tmp_path / "t.csv", SETTINGS)
    assert kept.load("a") == []
    for start, values in ((3, (4, 5)), (0, (1, 2, 3)), (6, (7,))):
        kept.save("a", start, block(*values))
    kept.save("b", 0, block(9))
    found = resume.joined(Partial(tmp_path / "t.csv", SETTINGS).load("a"))
    assert found["energy"].tolist() == [1, 2, 3, 4, 5]
    assert found["energy"].dtype == np.float32
    assert found["nearest"].tolist() == [0, 1, 2, 0, 1]


def test_a_setting_does_not_meet_another_s_blocks(tmp_path):
    Partial(tmp_path / "t.csv", SETTINGS).save("a", 0, block(1))
    assert Partial(tmp_path / "t.csv", {"beta": 1.0000001}).load("a") == []
    assert Partial(tmp_path / "u.csv", SETTINGS).load("a") == []
    assert len(Partial(tmp_path / "t.csv", SETTINGS).load("a")) == 1


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[: len(content) // 2], lambda content: b"x" * len(content)])
def test_a_torn_block_counts_as_missing(damage, tmp_path):
    kept = Partial(tmp_path / "t.csv", SETTINGS)
    kept.save("a", 0, block(1, 2))
    kept.save("a", 2, block(3))
    (second,) = tmp_path.glob("t.csv.partial/*/a-000000000002.npz")
    second.write_bytes(damage(second.read_bytes()))
    assert resume.joined(kept.load("a"))["energy"].tolist() == [1, 2]


def test_the_folder_disappears_with_the_last_setting(tmp_path):
    one, other = (Partial(tmp_path / "t.csv", {"beta": beta}) for beta in (1, 2))
    for kept in (one, other):
        kept.save("a", 0, block(1))
    one.discard()
    assert one.load("a") == []
    assert len(other.load("a")) == 1
    other.discard()
    assert list(tmp_path.iterdir()) == []
    other.discard()  # nothing was kept


# ---- The commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pixels(tmp_path, monkeypatch):
    """A small data set, in a folder of its own where commands run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "configure", lambda machine: None)
    monkeypatch.setattr(figures, "picture", lambda draw, *size: b"not drawn")
    # Blocks of twelve samples.
    monkeypatch.setattr(tiled, "stream", partial(tiled.stream, tile=tiled.Tile(12, 16)))
    np.savez("data.npz", x=np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), dtype=np.uint8), y=np.arange(40) % 3)


OPTIONS = {"--beta": "20", "--rotate": "20", "--out": "t.npz"}


def run(**changed):
    options = OPTIONS | {f"--{name}": value for name, value in changed.items()}
    return main(["energies", "data.npz", *(part for option in options.items() for part in option)])


@pytest.fixture
def starts(monkeypatch):
    """Where every stream began."""
    found = []
    stream = tiled.stream

    def watched(*arguments, **options):
        found.append(options["start"])
        return stream(*arguments, **options)

    monkeypatch.setattr(tiled, "stream", watched)
    return found


def interrupted_after(blocks, monkeypatch):
    """Ctrl-C when so many blocks are there."""
    stream = tiled.stream
    left = [blocks]

    def cut(*arguments, **options):
        for found in stream(*arguments, **options):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            yield found

    monkeypatch.setattr(tiled, "stream", cut)


@pytest.mark.usefixtures("pixels")
@pytest.mark.parametrize(("blocks", "words"), [(0, "energies: 0"), (2, "energies: 24"), (6, "energies under Task 2: 24")])
def test_the_same_command_goes_on_bit_for_bit(blocks, words, starts, monkeypatch, capsys):
    assert run() == 0
    files = {name: Path(name).read_bytes() for name in ("t.npz", "t.html")}
    for name in files:
        Path(name).unlink()
    capsys.readouterr()
    with monkeypatch.context() as cut:
        interrupted_after(blocks, cut)
        assert run() == 130
    assert not Path("t.npz").exists()
    assert capsys.readouterr().err == f"interrupted: {words} of 40 samples are done and kept; the same command goes on from there\n"
    assert len(list(Path("t.npz.partial").rglob("energies*.npz"))) == blocks
    starts.clear()
    assert run() == 0
    assert starts == [min(12 * blocks, 40), max(0, 12 * (blocks - 4))]
    assert {name: Path(name).read_bytes() for name in files} == files
    assert not Path("t.npz.partial").exists()


@pytest.mark.usefixtures("pixels")
@pytest.mark.parametrize(
    "changed", [{"beta": "21"}, {"variant": "mean"}, {"rotate": "21"}, {"normalise": "centred"}, {"classes": "0,1"}, {}], ids=str
)
def test_other_settings_and_other_data_start_afresh(changed, starts, monkeypatch):
    with monkeypatch.context() as cut:
        interrupted_after(2, cut)
        assert run() == 130
    starts.clear()
    if not changed:
        with np.load("data.npz") as data:
            x, y = data["x"].copy(), data["y"]
        x[39, 3, 3, 0] ^= 1
        np.savez("data.npz", x=x, y=y)
    assert run(**changed) == 0
    assert starts == [0, 0]


@pytest.mark.usefixtures("pixels")
def test_beta_is_looked_for_once(monkeypatch):
    command = ["energies", "data.npz", "--perplexity", "5", "--out", "t.npz"]
    with monkeypatch.context() as cut:
        interrupted_after(1, cut)
        cut.setattr(temperature.Perplexity, "solve", lambda rule, memories: 12.5)
        assert main(command) == 130
    monkeypatch.setattr(temperature.Perplexity, "solve", None)
    assert main(command) == 0
    assert table.read(Path("t.npz")).settings["beta"] == 12.5


@pytest.mark.usefixtures("pixels")
def test_finished_views_are_kept(monkeypatch, capsys):
    command = ["sensitivity", "data.npz", "--perplexities", "3,8", "--out", "s.npz", "--page", "s.html"]
    assert main(command) == 0
    files = {name: Path(name).read_bytes() for name in ("s.npz", "s.html")}
    assert table.read(Path("s.npz")).settings["precision"] == "float32"
    solve, solved = temperature.Perplexity.solve, list[float]()

    def counted(rule, memories):
        if len(solved) == stop:
            raise KeyboardInterrupt
        solved.append(rule.target)
        return solve(rule, memories)

    monkeypatch.setattr(temperature.Perplexity, "solve", counted)
    capsys.readouterr()
    stop = 4
    assert main(command) == 130
    assert capsys.readouterr().err == "interrupted: views: 4 of 6 are done and kept; the same command goes on from there\n"
    solved.clear()
    stop = -1
    assert main([*command, "--precision", "float64"]) == 0
    assert len(solved) == 6
    solved.clear()
    assert main(command) == 0
    assert solved == [3.0, 8.0]
    assert {name: Path(name).read_bytes() for name in files} == files
    assert not Path("s.html.partial").exists()


@pytest.mark.usefixtures("pixels")
def test_a_choice_is_kept_while_its_gains_are_computed(monkeypatch, capsys):
    command = ["buffer", "data.npz", "--beta", "20", "--size", "5", "--policy", "coverage", "--out", "b.csv"]
    assert main(command) == 0
    whole = Path("b.csv").read_bytes()
    capsys.readouterr()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(policies.GreedyCoverage, "choose", interrupted)
        assert main(command) == 130
    words = "interrupted: while choosing: the energies are done and kept; the same command goes on from there\n"
    assert capsys.readouterr().err == words
    with monkeypatch.context() as cut:
        cut.setattr(policies, "buffer_gains", interrupted)
        assert main(command) == 130
    words = "interrupted: gains: the energies and the choice are done and kept; the same command goes on from there\n"
    assert capsys.readouterr().err == words
    monkeypatch.setattr(policies.GreedyCoverage, "choose", None)
    assert main(command) == 0
    assert Path("b.csv").read_bytes() == whole
    assert not Path("b.csv.partial").exists()


@pytest.mark.usefixtures("pixels")
def test_a_full_disk_is_one_line_and_keeps_the_blocks(monkeypatch, capsys):
    def full(path, found):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(table, "write", full)
        assert run() == 1
    assert capsys.readouterr().err == "error: t.npz: No space left on device\n"
    assert len(list(Path("t.npz.partial").rglob("energies*.npz"))) == 8
    assert run() == 0
    assert not Path("t.npz.partial").exists()


@pytest.mark.slow
def test_killed_and_interrupted_processes_go_on(tmp_path):
    np.save(tmp_path / "data.npy", np.random.default_rng(1).integers(0, 256, (6000, 8, 8, 1), dtype=np.uint8))
    # A small limit makes many blocks.
    options = ["energies", "data.npy", "--beta", "20", "--memory-limit", "1MiB", "--out"]
    subprocess.run([sys.executable, "-m", "hopjax", *options, "whole.csv"], cwd=tmp_path, check=True, capture_output=True)
    # A shell that runs the tests in the background has interrupts ignored, and children inherit that.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom hopjax.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", script, *options, "t.csv"]
    kept = 0
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while (
            len(list(tmp_path.glob("t.csv.partial/*/energies-*.npz"))) < kept + 3 and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.002)
        process.send_signal(number)
        errors = process.communicate()[1]
        assert process.returncode == status, errors
        assert not (tmp_path / "t.csv").exists()
        kept = len(list(tmp_path.glob("t.csv.partial/*/energies-*.npz")))
        assert kept >= 3
    assert errors.startswith("interrupted: energies: ")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "t.csv.partial").exists()
    assert json.loads((tmp_path / "t.csv").read_text(encoding="utf-8").partition("# beta: ")[2].partition("\n")[0]) == 20.0
