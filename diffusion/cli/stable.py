"""`train-vae`, and where an experiment in latents begins: a small Stable Diffusion made of the data, or one that is given."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from cyclopts import Parameter

from diffusion.cli.options import Device, configure, explained, given, images_of
from diffusion.cli.watching import interruption
from hopjax.cli.options import Reading, UsageError
from hopjax.cli.output import check_writable, write
from hopjax.cli.progress import Screen

if TYPE_CHECKING:
    from diffusion.stable.miniature import Miniature
    from diffusion.stable.pipeline import StableDiffusion
    from hopjax.data import Images

# Images that are shown beside what became of them.
SHOWN = 32


def train_vae(
    data: Annotated[str, Parameter(help="Images, as for `python -m hopjax`.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="Folder of the pipeline.")],
    classes: Annotated[str | None, Parameter(help="Only these classes, A,B,… by name or number (default: all).")] = None,
    steps: Annotated[int | None, Parameter(help="Of the optimiser (default: what `run --preset sd-tiny` takes).")] = None,
    batch_size: Annotated[int | None, Parameter(help="Images in a step (default: likewise).")] = None,
    kl: Annotated[float | None, Parameter(help="Weight of the distance of latents from N(0, 1) (default: likewise).")] = None,
    seed: Annotated[int, Parameter(help="Of everything random.")] = 0,
    reading: Reading = Reading(),
    device: Device = None,
) -> int:
    """Train a small autoencoder, and put a Stable Diffusion around it whose U-Net has learnt nothing yet: `run --weights` takes it.

    The folder is one of diffusers. Beside it are what it was made of (.json), and images with their reconstructions (.png). The same
    command again does nothing. One that was interrupted begins anew: it takes minutes.

    Example:

        python -m diffusion train-vae photographs --out results/small
    """
    check_writable("--out", out.with_suffix(".json"))
    configure(device)
    screen = Screen()
    from diffusion.stable import miniature

    with explained():
        small = miniature.SMALL_PIPELINE
        training = dataclasses.replace(small.training, seed=seed, **given(steps=steps, batch_size=batch_size, kl=kl))
        with screen.working(f"reading {data}"):
            images = images_of(data, classes, reading)
        with interruption() as stop:
            made(out, images, dataclasses.replace(small, training=training), screen, stop)
    for line in (f"pipeline: {out}", f"reconstructions: {_beside(out, '.png')}"):
        screen.say(line)
    return 0


def made(folder: Path, images: "Images", small: "Miniature", screen: Screen, stop: Callable[[], bool]) -> "StableDiffusion":
    """The pipeline in a folder, which is made if it is not there.

    Raises: UsageError for one that was made of something else; KeyboardInterrupt when it was asked to stop.
    """
    import jax

    from diffusion.settings import difference
    from diffusion.stable.autoencoding import fidelity, train_autoencoder
    from diffusion.stable.pipeline import StableDiffusion
    from hopjax.cli.tasks import description

    known = small.to_json() | {"data": description(images)["sha256"]}
    record = _beside(folder, ".json")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            changed = difference(found, known)
        except (OSError, ValueError, AttributeError):
            raise UsageError(f"{folder} is there, and {record.name} does not say what it was made of: name another folder") from None
        if changed:
            raise UsageError(f"{folder} was made with other settings: {'; '.join(changed)}. Give the same, or name another folder")
        return StableDiffusion.from_folder(folder)
    steps, at = small.training.steps, 0
    with screen.counting("autoencoder", steps, 0, unit="images", each=small.training.batch_size) as tell:

        def watch(done: int, loss: float) -> None:
            nonlocal at
            tell(done - at, f"loss {loss:.4f}")
            at = done
            if stop():
                raise KeyboardInterrupt(f"{folder} is not made: stopped at step {done:,} of {steps:,}")

        autoencoder = train_autoencoder(images, small.autoencoder, small.training, watch=watch)
    kept = fidelity(autoencoder, images)
    screen.say(
        f"autoencoder: pixels come back to {127.5 * kept.error**0.5:.1f} of 255 (root mean square), latents hold at most {kept.bits:,.0f} "
        f"bits an image; scaling factor {autoencoder.config.scaling_factor:.4g}"
    )
    pipeline = small.pipeline(autoencoder, jax.random.fold_in(jax.random.key(small.training.seed), 1))
    write(record, (json.dumps(known, indent=1) + "\n").encode())
    _show(_beside(folder, ".png"), images, pipeline)
    pipeline.save_folder(folder)
    return pipeline


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


def _show(file: Path, images: "Images", pipeline: "StableDiffusion") -> None:
    """Columns of an image and its reconstruction, in turn."""
    from diffusion.assess import to_8_bits
    from diffusion.pixels import to_bytes
    from diffusion.run import picture

    shown = images.pixels[np.unique(np.linspace(0, len(images) - 1, SHOWN).round().astype(int))]
    decoded = to_bytes(pipeline.decode(pipeline.encode(shown, batch=len(shown)), batch=len(shown)))
    picture(file, np.stack([to_8_bits(shown), decoded], axis=1).reshape(-1, *decoded.shape[1:]))
