"""Sharded energies: the same numbers on any number of devices and over processes, and what the devices exchange."""

import json
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hopjax import mesh
from hopjax.mesh import Layout


def run(script: str, *arguments: object) -> str:
    """What a script prints in a process of its own: the number of devices is fixed when JAX starts."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


MANY_DEVICES = """
    import json, re
    import jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    from hopjax import mesh, tiled
    from hopjax.moments import QUANTITIES, needed

    rng = np.random.default_rng(0)
    memories = rng.standard_normal((101, 6))
    memories /= np.linalg.norm(memories, axis=1, keepdims=True)
    own, prior = np.arange(0, 101, 2)[:-2], rng.standard_normal(101)
    states, tile = memories[own], tiled.Tile(5, 8)
    expected = tiled.summarise(states, memories, 9.0, list(QUANTITIES), own=own, log_prior=prior)
    for shape in [(1, 1), (2, 1), (1, 4), (2, 4), (1, 8)]:
        over = jax.make_mesh(shape, ("states", "memories"), devices=jax.devices()[: shape[0] * shape[1]])
        found = mesh.summarise(over, states, memories, 9.0, list(QUANTITIES), own=own, log_prior=prior, tile=tile)
        for name, values in expected.items():
            # β = 9 and unit norms: sums of a hundred terms in another order; S has d = 6 of them, times β.
            np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-13, err_msg=f"{shape} {name}")

    # What the compiled program exchanges, against what the layout counts.
    over = jax.make_mesh((4, 2), ("states", "memories"))
    rows = np.asarray(rng.standard_normal((1024, 32)), np.float32)
    counts = {}
    for names in (("energy",), ("energy", "hessian_trace")):
        needs = needed(names, stored=False)
        x, y = mesh.distribute(over, rows, "states"), mesh.distribute(over, rows, "memories")
        offset = mesh.distribute(over, np.zeros(1024, np.float32), "memories")
        program = mesh._program(over, names, needs, tile).lower(x, y, np.float32(9), offset, None).compile()
        text = program.as_text()
        shapes = [re.findall(r"f32\\[([\\d,]+)\\]", line) for line in re.findall(r" = (.*) all-reduce\\(", text)]
        sizes = [4 * int(np.prod([int(size) for size in shape.split(",")])) for line in shapes for shape in line]
        others = re.findall(r"all-gather|all-to-all|collective-permute", text)
        counts[" ".join(names)] = [sum(sizes), len(others)]
    # Memories stay where they are when states and memories come as global arrays.
    values = mesh.summarise(over, x, y, 9.0, ["energy"])
    counts["sharding"] = [str(values["energy"].sharding.spec)]
    # Arrays that lie elsewhere, or nowhere in particular, are moved.
    wide = jax.numpy.asarray(memories[:96])
    expected = tiled.summarise(memories[:96], memories[:96], 9.0, ["excess", "nearest"], own=np.arange(96))
    for own in (np.arange(96), jax.numpy.arange(96)):
        found = mesh.summarise(over, wide, wide, 9.0, ["excess", "nearest"], own=own, log_prior=jax.numpy.zeros(96))
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-13, err_msg=name)
    print(json.dumps(counts))
"""


def test_one_two_four_and_eight_devices_agree_and_exchange_what_the_layout_counts():
    counts = json.loads(run(MANY_DEVICES))
    for names in ("energy", "energy hessian_trace"):
        reduced, others = counts[names]
        # 4 × 2 devices: each holds a quarter of the states and reduces their moments over two.
        per_state = 2 if names == "energy" else 2 + 32 + 1
        assert reduced == 4 * 256 * per_state
        assert others == 0
        tight = mesh.layout(1024, 1024, 32, 8, device_memory=4 * 32 * (256 + 512), quantities=names.split())
        assert tight == Layout(4, 2, 4 * 32 * (256 + 512), reduced * 2 // 2)
    assert "states" in counts["sharding"][0]


TWO_PROCESSES = """
    import sys
    import jax, numpy as np
    process, port = int(sys.argv[1]), sys.argv[2]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    from jax.sharding import NamedSharding, PartitionSpec as P
    from hopjax import mesh, tiled

    rows = np.random.default_rng(0).standard_normal((48, 5))
    over = jax.make_mesh((1, 4), ("states", "memories"))

    def place(array, axis):
        return jax.make_array_from_callback(array.shape, NamedSharding(over, P(axis)), lambda index: array[index])

    found = mesh.summarise(
        over, place(rows, "states"), place(rows, "memories"), 2.0, ["energy", "hessian_trace", "nearest"],
        own=place(np.arange(48, dtype=np.int32), "states"), log_prior=place(np.zeros(48), "memories"),
    )
    expected = tiled.summarise(rows, rows, 2.0, ["energy", "hessian_trace", "nearest"], own=np.arange(48))
    assert jax.process_count() == 2 and len(jax.devices()) == 4
    for name, values in found.items():
        for shard in values.addressable_shards:
            np.testing.assert_allclose(np.asarray(shard.data), expected[name][shard.index], rtol=0, atol=1e-11)
    print("agrees")
"""


def test_two_processes_agree():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES)]
    both = [
        subprocess.Popen([*command, str(process), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for process in (0, 1)
    ]
    try:
        for process in both:
            out, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
            assert out.strip().endswith("agrees")
    finally:
        for process in both:
            process.kill()


# ---- Layout --------------------------------------------------------------------------------------------------------------


def test_states_are_sharded_until_the_memories_do_not_fit():
    assert mesh.layout(10**6, 10**6, 100, 8, device_memory=1 << 30)[:2] == (8, 1)
    assert mesh.layout(10**6, 10**6, 100, 8, device_memory=350_000_000)[:2] == (4, 2)
    tight = mesh.layout(10**4, 10**6, 100, 8, device_memory=60_000_000)
    assert tight[:2] == (1, 8)
    # One shard of the memories, and all states; (top, Σw) of each state, 2·7/8 times.
    assert tight.resident == 4 * 100 * (10**4 + 125_000)
    assert tight.exchanged == 2 * 7 * 10**4 * 8 // 8


def test_a_billion_memories_on_256_accelerators():
    chosen = mesh.layout(10**6, 10**9, 768, 256, device_memory=64 << 30)
    assert chosen[:2] == (4, 64)
    assert chosen.resident == 4 * 768 * (250_000 + 15_625_000)


def test_what_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"device_memory=1000000 is too small: 8 devices need \d+ bytes each"):
        mesh.layout(10**6, 10**6, 100, 8, device_memory=10**6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"own": np.array([0, 1, 3, 2])}, "state 2 is not its own memory 3"),
        ({"own": np.arange(4) + 1}, "own holds 1 … 4: need indices of memories, 0 … 3"),
        ({"own": np.arange(4) - 1}, "own holds -1 … 2"),
        ({"own": np.arange(3)}, r"own has shape \(3,\): need \(4,\)"),
        ({"log_prior": np.zeros(3)}, r"log_prior has shape \(3,\): need \(4,\)"),
    ],
)
def test_what_does_not_fit_is_named_as_on_one_device(options, message):
    over, rows = jax.make_mesh((1, 1), ("states", "memories")), np.eye(4, dtype=np.float32)
    for given in (rows, jnp.asarray(rows)):
        with pytest.raises(ValueError, match=message):
            mesh.summarise(over, given, given, 1.0, ["energy"], **options)


@pytest.mark.usefixtures("unchecked")
def test_a_mesh_needs_its_two_axes():
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r'mesh has axes \(.batch.,\): need "states" and "memories"'):
        mesh.summarise(jax.make_mesh((1,), ("batch",)), rows, rows, 1.0, ["energy"])
