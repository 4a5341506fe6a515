"""What `import hopjax` adds to `import jax`, in fresh processes."""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.row import Bench, Goal, Row

_PROGRAM = """
import json, time
start = time.perf_counter()
import jax
between = time.perf_counter()
import hopjax
print(json.dumps([time.perf_counter() - between, between - start]))
"""


def measure(bench: Bench) -> Iterator[Row]:
    runs = bench.size(11, 7)
    times = []
    for run in range(runs + 1):  # the first one writes byte code and fills the file cache
        bench.progress(f"process {run + 1} of {runs + 1}")
        done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
        times.append(json.loads(done.stdout))
    ours, peer = (statistics.median(column) for column in zip(*times[1:], strict=True))
    yield Row("import hopjax, after import jax", ours, peer, goals=(Goal("ours", "≤", 0.15),), note="peer: import jax itself")
