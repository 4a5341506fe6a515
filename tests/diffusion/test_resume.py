"""Runs in processes of their own that are killed or interrupted at any moment and end as if they had not been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from diffusion import settings
from diffusion.optimiser import AdamW
from diffusion.settings import Length, Network, Noise, Settings
from tests.diffusion.tiny import NETWORKS, OPTIONS, bits, command, last_state, pixels

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_run")]

STEPS = 60
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with the data, a cache of programs, and a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "stripes.npy", pixels())
    errors = finished(start(folder, "whole"))
    assert (folder / "whole" / "model").is_dir(), errors[-3000:]
    return folder


def start(folder, out, *more):
    """`python -m diffusion train` in a process of its own."""
    words = command("train", folder / "stripes.npy", *OPTIONS, "--steps", STEPS, "--save-every", 1, "--log-every", 5, *more)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.diffusion.tiny", *words, "--out", str(folder / out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    )


def finished(process):
    """What it said on its standard error, when it has ended."""
    with process:
        try:
            return process.communicate(timeout=1800)[1]
        finally:
            process.kill()


def end_of(folder, monkeypatch):
    monkeypatch.setattr(settings, "NETWORKS", NETWORKS)
    chosen = Settings(Network("tiny"), Noise("cosine", prediction="v_prediction"), AdamW(2e-3, 2, 0.3), Length(STEPS, 8, 0.9))
    step, state = last_state(folder, chosen)
    return step, bits(state)


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def progress(folder):
    """How many steps are saved."""
    return max((int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()), default=0)


def test_killed_at_any_moment_a_run_ends_bit_for_bit_as_if_it_had_not_been(here, monkeypatch):
    """Every step is saved, which takes far longer than the step: nearly every kill cuts off a write."""
    pause = random.Random(0)
    run, kills, torn = here / "killed", 0, 0
    while kills < 6:
        process = start(here, "killed")
        began, saved = time.monotonic(), progress(run)
        # The first kills come whenever they come, on the way up; the others once a step more is saved.
        if kills < 2:
            time.sleep(pause.uniform(0.5, 12))
        else:
            while process.poll() is None and progress(run) <= saved and time.monotonic() - began < 900:
                time.sleep(0.02)
            time.sleep(pause.uniform(0, 2))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        torn += any("tmp" in path.name for path in (run / "checkpoints").glob("*")) if (run / "checkpoints").exists() else 0
    assert kills >= 4
    errors = finished(start(here, "killed"))
    assert (run / "model").is_dir(), errors[-3000:]
    print(f"{kills} kills, {torn} of them in a write")
    assert torn >= 1
    assert end_of(run, monkeypatch) == end_of(here / "whole", monkeypatch)
    records = logged(run)
    assert [record["step"] for record in records] == list(range(5, STEPS + 1, 5))
    files = [path.relative_to(here / "whole") for path in (here / "whole" / "model").rglob("*.safetensors")]
    assert all((here / "whole" / file).read_bytes() == (run / file).read_bytes() for file in files)
    assert not [path for path in (run / "checkpoints").iterdir() if not path.name.isdecimal()]
    # Where no kill fell between two records, they are those of the whole run; the others are of fewer steps.
    same = sum(one["loss"] == other["loss"] for one, other in zip(records, logged(here / "whole"), strict=True))
    assert same >= len(records) - kills


def test_interrupted_a_run_saves_says_how_to_go_on_and_does(here, monkeypatch):
    run = here / "interrupted"
    process = start(here, "interrupted", "--save-every", 1000)
    began = time.monotonic()
    while not (run / "log.jsonl").exists() and time.monotonic() - began < 900:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    errors = finished(process)
    assert process.returncode == 130, errors[-3000:]
    step = progress(run)
    assert 0 < step < STEPS
    assert errors.splitlines()[-1] == f"interrupted: saved step {step:,} of {STEPS} in {run}; the same command goes on from there"
    errors = finished(start(here, "interrupted"))
    assert f"going on from step {step:,} of {STEPS}" in errors
    assert end_of(run, monkeypatch) == end_of(here / "whole", monkeypatch)
    assert [record["step"] for record in logged(run)] == list(range(5, STEPS + 1, 5))


COUNT = """
import collections, json, sys
import jax
found = collections.Counter()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **known: found.update([known.get("fun_name")]) if event == "/jax/core/compile/backend_compile_duration" else None
)
from diffusion import settings
from tests.diffusion.tiny import NETWORKS
settings.NETWORKS = NETWORKS
from diffusion.__main__ import main
assert main() == 0
print(json.dumps(found))
"""


def test_a_whole_run_compiles_a_fixed_number_of_programs(here):
    """Whatever its length: the step once, the sampler once, and what is small."""
    counts = []
    for steps in (12, 36):
        words = command("train", here / "stripes.npy", *OPTIONS, "--steps", steps, "--save-every", 5, "--log-every", 3)
        words += ["--sample-every", "6", "--out", str(here / f"counted{steps}")]
        words = command(*words)
        done = subprocess.run([sys.executable, "-c", COUNT, *words], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    print(counts)
    assert counts[0] == counts[1]
    assert counts[0]["jit(_step)"] == counts[0]["jit(_batch)"] == 1
