"""States and batches over many devices: the same losses on any number of them, really sharded, over two processes too."""

import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from diffusion.layout import Layout, sharded_batch, state_shardings

ROOT = Path(__file__).parents[2]


def test_one_device_needs_no_words():
    mesh = Layout().mesh()
    assert dict(mesh.shape) == {"replicas": jax.device_count(), "fsdp": 1}
    batch = np.arange(24, dtype=np.uint8).reshape(4, 3, 2, 1)
    np.testing.assert_array_equal(sharded_batch(mesh, batch), batch)


@pytest.mark.parametrize(("replicas", "fsdp", "words"), [(None, 3, "1 × 3"), (2, 1, "2 × 1"), (2, 2, "2 × 2")])
def test_layouts_that_the_devices_do_not_give_are_refused(replicas, fsdp, words):
    with pytest.raises(ValueError, match=f"^replicas × fsdp = {words} must be the number of devices, 1$"):
        Layout(replicas, fsdp).mesh()


@pytest.mark.parametrize(("name", "value"), [("replicas", 0), ("fsdp", 0), ("fsdp", -2)])
def test_counts_below_one_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} = {value} is out of range: need {name} ≥ 1$"):
        Layout(**{name: value})


@pytest.mark.usefixtures("unchecked")
def test_the_largest_axis_that_divides_is_split_and_small_arrays_are_not():
    mesh = jax.sharding.AbstractMesh((2, 4), ("replicas", "fsdp"))
    shapes = {
        "kernel": (3, 3, 64, 128),
        "wide": (3, 3, 128, 64),
        "square": (64, 64),
        "odd": (4096, 6),
        "none": (81, 81),
        "small": (32, 64),
        "scalar": (),
    }
    found = state_shardings(mesh, {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()})  # type: ignore[arg-type]
    assert {name: sharding.spec for name, sharding in found.items()} == {
        "kernel": PartitionSpec(None, None, None, "fsdp"),
        "wide": PartitionSpec(None, None, "fsdp"),
        "square": PartitionSpec("fsdp"),
        "odd": PartitionSpec("fsdp"),
        "none": PartitionSpec(),
        "small": PartitionSpec(),
        "scalar": PartitionSpec(),
    }


PREPARE = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_num_cpu_devices", DEVICES)
    START
    from flax import nnx
    from diffusion import layout
    from diffusion.feed import Feed
    from diffusion.layout import Layout
    from diffusion.objective import Denoising
    from diffusion.optimiser import AdamW
    from diffusion.schedules import LinearSchedule
    from diffusion.train import Program, train

    layout.WHOLE_BELOW = 64

    class Dense(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)

        def __call__(self, image, timestep, key=None):
            x = image.reshape(image.shape[0], 16) + timestep[:, None] / 10
            return self.second(nnx.tanh(self.first(x))).reshape(image.shape)

    graphdef, params = nnx.split(Dense(nnx.Rngs(0)), nnx.Param)
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1), dtype=np.uint8)
    feed = Feed(images, 16, 0, images[:32], 0.25)

    def begin(mesh, steps=6):
        program = Program(graphdef, Denoising(LinearSchedule(10, beta_end=0.5)), AdamW(1e-2, warmup=2), steps, 0.9, mesh)
        return program, program.compile(program.abstract(params), feed.batch(0))

    def run(mesh, state=None, until=6, steps=6):
        program, step = begin(mesh)
        state = program.initial(params) if state is None else state
        stop = iter([False] * (until - int(state.step) - 1) + [True] * 9).__next__
        (pause,) = train(state, step, feed, key=jax.random.key(1), mesh=mesh, steps=steps, pauses=[10**9], stop=stop)
        return program, pause.state, [float(one.loss) for one in pause.measured]
"""


def script(devices, body, begin=""):
    return textwrap.dedent(PREPARE).replace("DEVICES", str(devices)).replace("START", begin) + textwrap.dedent(body)


def test_one_and_eight_devices_have_the_same_losses_and_a_share_of_the_state():
    body = """
    losses, shares = {}, {}
    one = jax.make_mesh((1, 1), ("replicas", "fsdp"), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for name, mesh in {"one": one, "data": Layout().mesh(), "fsdp": Layout(fsdp=8).mesh(), "both": Layout(2, 4).mesh()}.items():
        program, state, losses[name] = run(mesh)
        kernel = state.params["first"]["kernel"][...]
        assert kernel.shape == (16, 64)
        trees = (state.params, state.ema, state.opt_state)
        shares[name] = [
            [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(tree) if leaf.size > 64] for tree in trees
        ]
        assert len(kernel.addressable_shards) == mesh.size
    batch = layout.sharded_batch(Layout(2, 4).mesh(), feed.batch(0))
    pieces = [np.asarray(shard.data).shape for shard in batch.addressable_shards]
    np.testing.assert_array_equal(np.concatenate([shard.data for shard in batch.addressable_shards]), feed.batch(0))
    try:
        layout.sharded_batch(Layout().mesh(), feed.batch(0)[:12])
    except ValueError as error:
        refused = str(error)
    print(json.dumps([losses, shares, pieces, refused]))
    """
    done = subprocess.run([sys.executable, "-c", script(8, body)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    losses, shares, pieces, refused = json.loads(done.stdout)
    assert len(losses["one"]) == 6
    assert len(set(losses["one"])) == 6
    for name in ("data", "fsdp", "both"):
        # Sums of 256 numbers in another order, in float32, through six steps.
        np.testing.assert_allclose(losses[name], losses["one"], rtol=1e-5)
    for name, share in {"one": 1, "data": 1, "fsdp": 1 / 8, "both": 1 / 4}.items():
        parameters, average, optimiser = shares[name]
        assert parameters == average == [share] * 2
        assert optimiser == [share] * 4
    assert pieces == [[2, 4, 4, 1]] * 8
    assert refused == "batch_size = 12 must be a multiple of the number of devices, 8"


PROCESSES = """
    from jax.experimental import multihost_utils
    from diffusion.checkpoint import Checkpoints

    assert jax.process_count() == 2 and jax.device_count() == 4
    folder = sys.argv[3]
    mesh = Layout(2, 2).mesh()
    program, state, losses = run(mesh, until=3)
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(2, state, {"n": 2})
        checkpoints.save(3, state, {"n": 3})
    multihost_utils.sync_global_devices("written")
    if jax.process_index() == 0:  # one of the two checkpoints is damaged
        import pathlib
        (pathlib.Path(folder) / "3" / "_CHECKPOINT_METADATA").write_bytes(b"")
    multihost_utils.sync_global_devices("damaged")
    import warnings
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Checkpoints(folder, keep=2) as checkpoints:
            found = checkpoints.restore(program.abstract(params))
    assert [str(one.message).startswith("checkpoint 3 cannot be read") for one in told] == [True], told
    assert (found.step, int(found.state.step)) == (2, 3)
    kernel = found.state.params["first"]["kernel"][...]
    assert kernel.addressable_shards[0].data.size == kernel.size / 2
    _, state, more = run(mesh, found.state)
    print(json.dumps([losses + more, [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(program.gathered(state.ema))]]))
"""

ALONE = """
    program, state, losses = run(Layout().mesh())
    print(json.dumps([losses, [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(program.gathered(state.ema))]]))
"""

INITIALISE = 'jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))'


def together(code, *arguments, timeout=1800):
    """What two processes print that run this code, which gets 0 or 1 and a port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        subprocess.Popen(
            [sys.executable, *code, str(process), str(port), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for process in (0, 1)
    ]
    try:
        printed = []
        for process in both:
            out, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors[-4000:]
            printed.append(out)
        return printed
    finally:
        for process in both:
            process.kill()


@pytest.mark.slow
def test_two_processes_train_save_and_restore_as_one_does(tmp_path):
    printed = [json.loads(out.splitlines()[-1]) for out in together(["-c", script(2, PROCESSES, INITIALISE)], tmp_path / "checkpoints")]
    assert printed[0] == printed[1]
    done = subprocess.run([sys.executable, "-c", script(1, ALONE)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    losses, ema = json.loads(done.stdout)
    np.testing.assert_allclose(printed[0][0], losses, rtol=1e-5)
    for found, expected in zip(printed[0][1], ema, strict=True):
        # Adam divides by |g|: entries whose gradients are rounding errors move by the rate, whatever their sign.
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


RUN = """
    import pathlib
    from diffusion import settings
    from diffusion.run import Rhythm, Task, run as train_in
    from hopjax.data import Images
    from tests.diffusion.tiny import NETWORKS, pixels

    settings.NETWORKS = NETWORKS
    chosen = settings.Settings(
        settings.Network("tiny"), optimiser=AdamW(warmup=2), length=settings.Length(14, 8, 0.9), layout=Layout(1, 2)
    )
    task, rhythm, asked = Task(Images(pixels(), None, None, "stripes")), Rhythm(5, 10, 12), []

    def stop():  # only one of them is asked
        asked.append(0)
        return jax.process_index() == 1

    found = train_in(pathlib.Path(sys.argv[3]), task, chosen, rhythm, stop=stop)
    assert 0 < found.step < 12, found.step
    again = train_in(pathlib.Path(sys.argv[3]), task, chosen, rhythm)
    assert again.step == 14
    print(json.dumps([found.step]))
"""


@pytest.mark.slow
def test_a_run_over_two_processes_writes_each_file_once_and_stops_together(tmp_path):
    printed = together(["-c", script(1, RUN, INITIALISE)], tmp_path / "run")
    assert printed[0].splitlines()[-1] == printed[1].splitlines()[-1]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"run.json", "log.jsonl", "samples", "checkpoints", "model"}
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [5, 10, 14]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["0000012.png", "0000014.png"]
