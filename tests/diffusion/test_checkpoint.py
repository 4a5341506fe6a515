"""Checkpoints: bit for bit, the last ones, and never wrong numbers whatever happened to the files."""

import gc
import json
import shutil
import warnings
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import checkpoint
from diffusion.checkpoint import SUMS, CheckpointError, Checkpoints
from diffusion.train import TrainState

pytestmark = [
    pytest.mark.usefixtures("as_run", "swept"),
    # Orbax leaves reads of damaged files unfinished; what they say when they are collected is no test's fault.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def swept():
    """Collects what a test has left, within that test."""
    yield
    gc.collect()


Disk = namedtuple("Disk", "total used free")


def state(number):
    """Numbers of all kinds that training has, hard ones among them."""
    random = np.random.default_rng(number)
    params = {
        "kernel": jnp.asarray(random.normal(size=(40, 50)).astype(np.float32)),
        "half": jnp.asarray(random.normal(size=7), jnp.bfloat16),
        "hard": jnp.asarray(np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38], np.float32)),
    }
    return TrainState(jnp.int32(number), params, jax.tree.map(lambda leaf: leaf + 1, params), {"count": jnp.int32(2**31 - 1)})


def abstract(of):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), of)


def bits(of):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(of)]


def restored(folder, **options):
    with Checkpoints(folder, **options) as found:
        return found.restore(abstract(state(0)))


@pytest.fixture(scope="module")
def written(as_run, tmp_path_factory):
    """Two checkpoints; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder, keep=2) as checkpoints:
        for number in (10, 20):
            checkpoints.save(number, state(number), {"epoch": number, "replayed": [1, 2, number]})
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def found_in(checkpoints):
    found = checkpoints.restore(abstract(state(0)))
    assert found is not None
    return found


def test_a_checkpoint_comes_back_bit_for_bit(written):
    found = restored(written)
    assert (found.step, found.record) == (20, {"epoch": 20, "replayed": [1, 2, 20]})
    assert isinstance(found.state, TrainState)
    assert bits(found.state) == bits(state(20))


def test_the_last_ones_are_kept_and_none_is_written_twice(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(abstract(state(0))) is None
        for number in (1, 2, 3):
            checkpoints.save(number, state(number), {})
            checkpoints.save(number, state(99), {})
        assert checkpoints.steps == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    assert bits(restored(tmp_path).state) == bits(state(3))


FILES = ("_CHECKPOINT_METADATA", SUMS, "state/_METADATA", "state/manifest.ocdbt", "state/d/*", "state/ocdbt.process_0/d/*")
DAMAGE = {
    "half": lambda file, content: file.write_bytes(content[: len(content) // 2]),
    "empty": lambda file, content: file.write_bytes(b""),
    "zeros": lambda file, content: file.write_bytes(bytes(len(content))),
    "a byte": lambda file, content: file.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]),
    "gone": lambda file, content: file.unlink(),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, folder, caplog):
    """Each file in turn, and those that Orbax will have in its next version."""
    files = sorted(path.relative_to(folder / "20") for path in (folder / "20").rglob("*") if path.is_file())
    assert all(any(file.match(known) for file in files) for known in FILES)
    for file in files:
        whole = folder.with_name("whole")
        shutil.copytree(folder, whole)
        DAMAGE[damage](whole / "20" / file, (whole / "20" / file).read_bytes())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = restored(whole, keep=2)
        if (damage, file.name) == ("gone", SUMS):
            assert (found.step, told) == (20, [])
        else:
            (line,) = [str(warning.message) for warning in told]
            assert line.startswith("checkpoint 20 cannot be read (")
            assert file.as_posix() in line or file.name == SUMS  # a name in it, perhaps
            assert line.endswith("); going on from 10")
            assert sorted(path.name for path in whole.iterdir()) == ["10", "20.broken"]
        assert bits(found.state) == bits(state(found.step))
        assert found.record["epoch"] == found.step
        shutil.rmtree(whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Orbax leaves coroutines behind
@pytest.mark.parametrize("damage", ["half", "empty", "gone"])
def test_without_checksums_what_is_cut_short_is_still_noticed(damage, folder):
    """Of a run that was killed after Orbax wrote, before the sums were noted."""
    (folder / "20" / SUMS).unlink()
    fallen = 0
    for file in sorted(path.relative_to(folder / "20") for path in (folder / "20").rglob("*") if path.is_file()):
        whole = folder.with_name("whole")
        shutil.copytree(folder, whole)
        DAMAGE[damage](whole / "20" / file, (whole / "20" / file).read_bytes())
        found = restored(whole, keep=2)
        assert bits(found.state) == bits(state(found.step))
        fallen += found.step == 10
        shutil.rmtree(whole)
    assert fallen >= 4


def test_a_reader_beside_the_run_touches_nothing(folder):
    """Not what the run is writing, nor what is damaged."""
    writing = folder / "30.orbax-checkpoint-tmp"
    writing.mkdir()
    (writing / "part").write_bytes(b"x")
    (folder / "20" / "state" / "manifest.ocdbt").write_bytes(b"")
    before = sorted(folder.rglob("*"))
    with pytest.warns(UserWarning, match=r"checkpoint 20 cannot be read \(state/manifest.ocdbt .*\); going on from 10"):
        found = restored(folder)
    assert bits(found.state) == bits(state(10))
    assert sorted(folder.rglob("*")) == before
    assert restored(folder.with_name("nowhere")) is None


def test_what_a_killed_run_was_writing_is_cleaned_up(folder):
    writing = folder / "30.orbax-checkpoint-tmp"
    writing.mkdir()
    (writing / "part").write_bytes(b"x")
    assert restored(folder, keep=2).step == 20
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]


def test_if_none_can_be_read_that_is_an_error(folder):
    for number in (10, 20):
        (folder / str(number) / "state" / "manifest.ocdbt").unlink()
    line = r"checkpoints/10 cannot be read \(state/manifest.ocdbt is missing\), and there is no earlier checkpoint$"
    with pytest.warns(UserWarning, match="going on from 10"), pytest.raises(CheckpointError, match=line):
        restored(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20"]


def test_a_full_disk_is_one_line_and_loses_nothing(folder, monkeypatch):
    needed = checkpoint.size(state(30))
    assert needed == sum(leaf.nbytes for leaf in jax.tree.leaves(state(30)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 10**9 - needed + 1, needed - 1))
    with Checkpoints(folder, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match=r"a checkpoint needs 0 MB, the disk has 0 MB left: make room .* from step 20$"):
            checkpoints.save(30, state(30), {})
        assert bits(found_in(checkpoints).state) == bits(state(20))
        monkeypatch.undo()
        checkpoints.save(30, state(30), {})
        assert checkpoints.steps == [20, 30]
        assert bits(found_in(checkpoints).state) == bits(state(30))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(28, "No space left on device"), CheckpointError, "could not be written: .*No space left"),
        (ValueError("x: No space left on device [y]"), CheckpointError, "could not be written: x: No space left"),
        (OSError(5, "Input/output error"), CheckpointError, "could not be written: .*Input/output error"),
        (ValueError("a mistake of ours"), ValueError, "^a mistake of ours$"),
    ],
    ids=str,
)
def test_a_disk_that_fails_while_writing_is_one_line_and_loses_nothing(error, kind, words, folder, monkeypatch):
    with Checkpoints(folder, keep=2) as checkpoints:
        with monkeypatch.context() as full:

            def fail(*_, **__):
                raise error

            full.setattr(checkpoints._checkpointer, "save_checkpointables", fail)
            with pytest.raises(kind, match=words):
                checkpoints.save(30, state(30), {})
        assert bits(found_in(checkpoints).state) == bits(state(20))


def test_the_sums_are_of_every_file(written):
    noted = json.loads((written / "20" / SUMS).read_text())
    files = {path.relative_to(written / "20").as_posix() for path in (written / "20").rglob("*") if path.is_file()}
    assert set(noted) == files - {SUMS}
