"""What a run leaves to read: JSON lines always, TensorBoard if tensorboardX is installed, Weights & Biases on request."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion.train import Record
from hopjax.cli.output import write

Log = Callable[[Record], None]


def numbers(record: Record) -> dict[str, Any]:
    """A record as JSON: what is not a number is null."""
    fields = record._asdict()
    fields["part_losses"] = [None if math.isnan(loss) else loss for loss in record.part_losses]
    return fields


def json_lines(file: Path, step: int) -> Log:
    """Appends to a file of one record a line; what a run that was cut off left beyond `step`, or of a line, is taken out first."""
    if file.exists():
        write(file, b"".join(line for line in file.read_bytes().splitlines(keepends=True) if _step(line) <= step))

    def log(record: Record) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(numbers(record)) + "\n")

    return log


def _step(line: bytes) -> float:
    """Of a record; ∞ if it is not whole."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def tensorboard(folder: Path, step: int) -> Log | None:
    """None where tensorboardX is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    writer = SummaryWriter(str(folder), purge_step=step)

    def log(record: Record) -> None:
        for name in ("loss", "gradient_norm", "rate"):
            writer.add_scalar(name, getattr(record, name), record.step)
        for i, loss in enumerate(record.part_losses):
            writer.add_scalar(f"loss by noise/{i}", loss, record.step)
        writer.flush()

    return log


def weights_and_biases(project: str, folder: Path, settings: dict[str, Any]) -> Log:
    """To a project; the run's identity is kept in the folder, so that a resumed run goes on there."""
    import wandb

    identity = folder / "wandb-id"
    run = wandb.init(
        project=project, id=identity.read_text() if identity.exists() else None, resume="allow", config=settings, dir=str(folder)
    )
    write(identity, run.id.encode())
    return lambda record: run.log(numbers(record), step=record.step)
