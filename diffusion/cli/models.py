"""`sample`, `export` and `import`: from trained models to images and folders."""

import io
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from cyclopts import Parameter

from diffusion.cli.options import Device, Model, Raw, configure, explained, need_seed
from hopjax.cli.options import UsageError, need
from hopjax.cli.output import check_writable, write
from hopjax.cli.progress import Screen


def sample(
    model: Model,
    /,
    *,
    count: Annotated[int, Parameter(help="How many images.")] = 64,
    out: Annotated[
        Path, Parameter(help="A sheet (.png), or the images as bytes n × h × w × c (.npy), which `train` and `hopjax` read.")
    ] = Path("results/samples.png"),
    sampler: Annotated[
        Literal["ddim", "ancestral", "dpm-solver", "flow"],
        Parameter(help="DDIM; DDPM's ancestral sampling; DPM-Solver++(2M); or the probability flow to a tolerance."),
    ] = "ddim",
    sampling_steps: Annotated[
        int | None, Parameter(help="Evaluations for each image (default: 50; 1000 of ancestral; 20 of dpm-solver).")
    ] = None,
    tolerance: Annotated[float | None, Parameter(help="For flow: of its solver, relative and absolute (default: 1e-5).")] = None,
    eta: Annotated[float, Parameter(help="For ddim: 0 is deterministic, 1 as random as ancestral.")] = 0.0,
    clip: Annotated[bool, Parameter(help="Clip estimates of the clean image to the range of pixels.")] = True,
    seed: Annotated[
        int,
        Parameter(help="Of the noise: image i depends on it and i alone, unless the sampler is random; with flow within the tolerance."),
    ] = 0,
    batch: Annotated[int, Parameter(help="Images at once.")] = 64,
    raw: Raw = False,
    device: Device = None,
) -> int:
    """Draw new images from a model.

    Example: a hundred digits of the quick run, by 20 evaluations each:

        python -m diffusion sample results/quick --count 100 --sampler dpm-solver
    """
    if out.suffix not in (".png", ".npy"):
        raise UsageError(f"--out {out}: a sheet ends in .png, images in .npy, such as {out.with_suffix('.png')}")
    check_writable("--out", out)
    for option, value in (("--count", count), ("--batch", batch), ("--sampling-steps", sampling_steps or 1)):
        need(value >= 1, option, value, f"{option.removeprefix('--')} ≥ 1", 64)
    need(0 <= eta <= 1, "--eta", eta, "0 ≤ eta ≤ 1", 0)
    need(tolerance is None or 0 < tolerance < 1, "--tolerance", tolerance, "0 < tolerance < 1", 1e-5)
    need_seed(seed)
    if eta and sampler != "ddim":
        raise UsageError(f"--eta {eta} is of --sampler ddim: leave it out with {sampler}")
    if sampling_steps is not None and sampler == "flow":
        raise UsageError(f"--sampling-steps {sampling_steps} is of the other samplers: with flow give --tolerance")
    if tolerance is not None and sampler != "flow":
        raise UsageError(f"--tolerance {tolerance:g} is of --sampler flow: with {sampler} give --sampling-steps")
    configure(device)
    screen = Screen()
    import jax
    from flax import nnx

    from diffusion.generate import generate
    from diffusion.run import picture, read_model
    from diffusion.samplers import DDIM, Ancestral, DPMSolver, ProbabilityFlow

    samplers = {
        "ddim": DDIM(sampling_steps or 50, eta),
        "ancestral": Ancestral(sampling_steps),
        "dpm-solver": DPMSolver(sampling_steps or 20),
        "flow": ProbabilityFlow() if tolerance is None else ProbabilityFlow(tolerance, tolerance),
    }
    with explained():
        unet, objective = read_model(model, averaged=not raw)
        graphdef, params = nnx.split(unet, nnx.Param)
        shape = (*_size(unet.config.sample_size), unet.config.in_channels)
        with screen.counting("sampling", count, 0, unit="images") as tell:
            found = generate(
                graphdef,
                params,
                objective,
                shape,
                count,
                key=jax.random.key(seed),
                sampler=samplers[sampler],
                batch=batch,
                clip=1.0 if clip else None,
                progress=tell,
            )
    if out.suffix == ".png":
        picture(out, found.images)
    else:
        buffer = io.BytesIO()
        np.save(buffer, found.images)
        write(out, buffer.getvalue())
    screen.say(f"{count:,} images of {found.evaluations:,} evaluations each: {out}")
    return 0


def _size(sample_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if sample_size is None:
        raise ValueError("the model's config.json has no sample_size: what size its images have is not known")
    return (sample_size, sample_size) if isinstance(sample_size, int) else sample_size


def export(
    model: Model,
    folder: Annotated[Path, Parameter(help="To write; it must not exist, or be empty.")],
    /,
    *,
    raw: Raw = False,
) -> int:
    """Write a model as a diffusers pipeline: DDPMPipeline.from_pretrained(FOLDER) takes it.

    Works on a run that is not finished too; the one that is has its model/ already.

    Example:

        python -m diffusion export results/quick exported
    """
    from diffusion.pipeline import write_pipeline
    from diffusion.run import read_model
    from diffusion.unet import parameter_count

    screen = Screen()
    with explained():
        found = read_model(model, averaged=not raw)
        write_pipeline(folder, found)
    screen.say(f"{parameter_count(found.unet):,} parameters: {folder}")
    return 0


def import_(
    folder: Annotated[Path, Parameter(help="A diffusers pipeline, or the folder of a UNet2DModel; weights in safetensors.")],
    out: Annotated[Path, Parameter(help="To write; it must not exist, or be empty.")],
    /,
) -> int:
    """Check a model of diffusers and write it as this project does, older names of tensors made new; `train --start` goes on from it.

    Example:

        python -m diffusion import ddpm-cifar10-32 results/cifar10
    """
    return export(str(folder), out)
