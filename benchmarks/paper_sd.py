"""The paper's setting of Stable Diffusion as a user runs it: a few steps at full size, killed and resumed, within 24 GiB."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.row import Bench, Goal, Row

LIMIT = 24 << 30
IMAGES, STEPS1, STEPS2, SAVE_EVERY = 60, 4, 2, 2
OPTIONS = (
    "--policies none,high --buffer 10 --samples 20 --timesteps 500 --draws 1 --generated 0 --densities 0 --batch-size 2 "
    f"--steps1 {STEPS1} --steps2 {STEPS2} --save-every {SAVE_EVERY}"
)


def write(folder: str) -> None:
    """A pipeline of the published shapes with random parameters; its text encoder knows the words of a tokenizer of bytes."""
    from diffusion.stable.miniature import SMALL_PIPELINE, Miniature
    from diffusion.stable.v1 import AUTOENCODER, TEXT, UNET

    few = {name: getattr(SMALL_PIPELINE.text, name) for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    Miniature(AUTOENCODER, UNET, dataclasses.replace(TEXT, **few)).untrained().save_folder(folder)


def _imitation(folder: Path) -> None:
    """A file in CIFAR-10's binary layout, noise in the place of its images."""
    folder.mkdir()
    records = np.random.default_rng(0).integers(0, 256, (IMAGES, 1 + 3 * 32 * 32), dtype=np.uint8)
    records[:, 0] = np.arange(IMAGES) % 10
    records.tofile(folder / "data_batch_1.bin")


class _Process:
    """The command, and the most anonymous memory that it was seen to hold."""

    def __init__(self, words: list[str], log: Path) -> None:
        self._log = log.open("ab")
        self._process = subprocess.Popen(words, stdout=self._log, stderr=self._log)
        self.most = 0

    def wait(self, until: Path | None = None) -> int | None:
        """Its exit status; None once there is such a file."""
        while (status := self._process.poll()) is None and not (until is not None and until.exists()):
            self._look()
            time.sleep(0.1)
        return status

    def _look(self) -> None:
        try:
            found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{self._process.pid}/status").read_text())
        except OSError:
            return
        if found is not None:
            self.most = max(self.most, 1024 * int(found[1]))

    def kill(self) -> None:
        """As a machine that goes down does."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def measure(bench: Bench) -> Iterator[Row]:
    what = f"run --preset paper-sd, {STEPS1} + 2 × {STEPS2} steps of 2 images"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if total < 0.9 * LIMIT:
        yield Row(what, None, note=f"this machine has {total / 2**30:.0f} GiB of memory: 24 are needed")
        return
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        bench.progress("writing random weights of the published shapes")
        subprocess.run([sys.executable, "-c", f"from benchmarks import paper_sd; paper_sd.write({str(root / 'weights')!r})"], check=True)
        _imitation(root / "cifar")
        words = [sys.executable, "-m", "diffusion", "run", str(root / "cifar"), "--preset", "paper-sd"]
        words += ["--weights", str(root / "weights"), "--out", str(root / "out"), *OPTIONS.split()]
        start = time.perf_counter()
        bench.progress("until the first checkpoint, then killed")
        first = _Process(words, root / "log")
        if first.wait(root / "out/seed0/task1/checkpoints" / str(SAVE_EVERY)) is not None:
            raise RuntimeError(f"it ended before its first checkpoint:\n{(root / 'log').read_text()[-2000:]}")
        first.kill()
        bench.progress("resumed")
        second = _Process(words, root / "log")
        if second.wait() != 0:
            raise RuntimeError(f"it did not end well:\n{(root / 'log').read_text()[-2000:]}")
        seconds = time.perf_counter() - start
    yield Row(
        f"{what}, killed and resumed: most memory",
        max(first.most, second.most),
        unit="B",
        goals=(Goal("ours", "≤", LIMIT),),
        note="Adafactor, no average; anonymous memory, autoencoder and text encoder included",
    )
    yield Row("its time, energies, reconstruction and page included", seconds)
