"""A billion memories on 256 accelerators, on paper: bytes, seconds, bottleneck, layout; operations as the compiler counts them."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.row import Bench, Goal, Row
from hopjax import mesh
from hopjax.tiles import default_tile


class Accelerator(NamedTuple):
    """What a device of a published data sheet can do, in bytes and operations a second; float32 without tensor cores."""

    name: str
    memory: int
    operations: float
    bandwidth: float  # of its own memory
    link: float  # to its peers, one way
    host: float  # from the host's memory


H100 = Accelerator("H100 SXM", 80 << 30, 67e12, 3.35e12, 450e9, 64e9)

MEMORIES, DIM, DEVICES = 10**9, 768, 256
SHARE = 0.8  # of the device's memory for inputs; of its peak for products

_COUNTED = """
    import json
    import jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 8)
    from hopjax import mesh, tiled
    over = jax.make_mesh((2, 4), ("states", "memories"))
    rows = np.zeros((4096, 256), np.float32)
    x, y = mesh.distribute(over, rows, "states"), mesh.distribute(over, rows, "memories")
    offset = mesh.distribute(over, np.zeros(4096, np.float32), "memories")
    counts = {}
    for names in (("energy",), ("energy", "hessian_trace")):
        needs = tiled.needed(names, stored=False)
        # One tile a device: a loop's body is counted once, however often it runs.
        program = mesh._program(over, names, needs, tiled.Tile(2048, 1024)).lower(x, y, np.float32(1), offset, None).compile()
        counts[" ".join(names)] = program.cost_analysis()["flops"]
    print(json.dumps(counts))
"""


def _operations(states: int, memories: int, dim: int, products: int) -> float:
    """Of one device: a multiplication and an addition for each number of each pair, for the overlaps, and again for the mean memory."""
    return 2.0 * states * memories * dim * products


def _on_paper(count: int, quantities: tuple[str, ...], device: Accelerator) -> Iterator[Row]:
    products = 2 if "hessian_trace" in quantities else 1
    block = 1 << 20  # states at a time
    layout = mesh.layout(min(count, block), MEMORIES, DIM, DEVICES, device_memory=int(SHARE * device.memory), quantities=quantities)
    blocks = -(-count // block)
    rows, held = -(-min(count, block) // layout.states), -(-MEMORIES // layout.memories)
    compute = blocks * _operations(rows, held, DIM, products) / (SHARE * device.operations)
    # Each tile of states reads the device's memories once.
    reread = blocks * -(-rows // default_tile("gpu").states) * held * DIM * 4 / device.bandwidth
    exchange = blocks * layout.exchanged / device.link
    arrive = blocks * rows * DIM * 4 / device.host
    what = f"{count:.0e} states, {MEMORIES:.0e} memories, d = {DIM}, {' + '.join(quantities)}"
    parts = {"products": compute, "reading memories": reread, "all-reduce": exchange, "states from the host": arrive}
    worst = max(parts, key=lambda name: parts[name])
    note = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in parts.items())
    yield Row(
        what,
        parts[worst],
        note=f"{DEVICES} × {device.name}: states over {layout.states}, memories over {layout.memories} "
        f"({layout.resident / 2**30:.0f} GiB each, {layout.exchanged / 1e6:.3g} MB exchanged a block); {note}; bottleneck: {worst}",
    )


def measure(bench: Bench) -> Iterator[Row]:
    bench.progress("counting operations on 8 simulated devices")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(_COUNTED)], check=True, capture_output=True, text=True)
    for names, counted in json.loads(done.stdout).items():
        expected = _operations(2048, 1024, 256, 2 if "hessian_trace" in names else 1)
        yield Row(
            f"operations of a device, counted by the compiler over the formula's, {names}",
            counted / expected,
            unit="",
            goals=(Goal("ours", "≤", 1.1), Goal("ours", "≥", 1.0)),
            note="2 × 4 simulated devices, 4,096 × 4,096, d = 256",
        )
    for count in (10**6, 10**9):
        for quantities in (("energy",), ("energy", "hessian_trace")):
            yield from _on_paper(count, quantities, H100)
