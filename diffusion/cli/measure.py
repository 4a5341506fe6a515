"""`reconstruct`, `likelihood` and `judge`: trained models and their images, measured."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from diffusion.cli.options import Device, Model, configure, explained, images_of, need_seed
from hopjax.cli.options import Reading, UsageError, need
from hopjax.cli.output import check_apart, check_writable, write
from hopjax.cli.progress import Screen

if TYPE_CHECKING:
    from hopjax.data import Images


def likelihood(
    model: Model,
    data: Annotated[str | None, Parameter(help="Images, as for `train` (default: those that the run held out).")] = None,
    /,
    *,
    after: Annotated[
        str | None,
        Parameter(help="A second model, trained on from the first: measure what it has forgotten of each image (default: none)."),
    ] = None,
    out: Annotated[Path, Parameter(help="Table to write: .parquet, .csv or .npz.")] = Path("results/likelihood.parquet"),
    classes: Annotated[str | None, Parameter(group="Data", help="Only these classes, A,B,… by name or number (default: all).")] = None,
    first: Annotated[int | None, Parameter(group="Data", help="Only the first so many of these images (default: all).")] = None,
    reading: Reading = Reading(),
    method: Annotated[
        Literal["flow", "bound"],
        Parameter(help="The probability flow, or the variational bound, which is cheaper and lower."),
    ] = "flow",
    timestep: Annotated[
        float | None, Parameter(help="Where clean images are placed (default: 0 for bits; for forgetting half of the schedule).")
    ] = None,
    probes: Annotated[
        int | None, Parameter(help="Of the divergence, or draws of the bound (default: 4; with --after, where noise counts for more, 64).")
    ] = None,
    draws: Annotated[int, Parameter(help="Of the noise that makes bytes continuous, for bits.")] = 2,
    tolerance: Annotated[float, Parameter(help="Of the flow's solver, relative and absolute.")] = 1e-4,
    seed: Annotated[int, Parameter(help="Of the probes and the noise.")] = 0,
    batch: Annotated[int, Parameter(help="Images at once.")] = 32,
    device: Device = None,
) -> int:
    """Measure how probable a model finds images: bits per dimension, or with --after what a second model has forgotten.

    Bits per dimension are of 8-bit images; ΔE = β⁻¹(log p₁ − log p₂) at β = α²/σ² of the timestep is intrinsic forgetting, Eq. (4) of
    arXiv:2605.27975, in squared units of pixels from −1 to 1. Each has its standard error.

    Example: what did learning the second task cost each digit of the first?

        python -m diffusion likelihood results/first mnist-5k --classes 0,1,2,3,4 --after results/second
    """
    from hopjax.cli import table
    from hopjax.cli.output import check_suffix

    check_suffix(out)
    check_apart("--out", out, filter(None, [data]))
    check_writable("--out", out)
    probes = (4 if after is None else 64) if probes is None else probes
    for option, value in (("--probes", probes), ("--draws", draws), ("--batch", batch), ("--first", 1 if first is None else first)):
        need(value >= 1, option, value, f"{option.removeprefix('--')} ≥ 1", 4)
    need(0 < tolerance < 1, "--tolerance", tolerance, "0 < tolerance < 1", 1e-4)
    need_seed(seed)
    configure(device)
    screen = Screen()
    import jax

    from diffusion import assess
    from diffusion.likelihood import FlowLogDensity, Hutchinson
    from diffusion.pixels import checked
    from diffusion.run import held_out, read_model
    from diffusion.samplers import ProbabilityFlow
    from diffusion.variational import VariationalBound
    from hopjax.cli.tasks import description, sample_ids

    with explained():
        before = read_model(model)
        with screen.working("reading images"):
            images = checked(held_out(model) if data is None else images_of(data, classes, reading))
        before.config_for(images.pixels.shape[1:], 0.0)  # refuses what the model was not made for
        images = images.take(np.arange(min(len(images), first or len(images))))
        flow = FlowLogDensity(Hutchinson(probes), ProbabilityFlow(tolerance, tolerance))
        log_density = flow if method == "flow" else VariationalBound(draws=probes)
        last = before.objective.schedule.timesteps - 1
        at = (0.0 if after is None else (last + 1) / 2) if timestep is None else timestep
        need(0 <= at < last, "--timestep", at, f"0 ≤ timestep < {last}, the schedule's last", last // 2)
        key = jax.random.key(seed)
        with screen.counting("measuring", len(images) * (1 + (after is not None)), 0, unit="images") as tell:
            if after is None:
                name, unit = "bits", "bits per dimension"
                pixels = assess.to_8_bits(images.pixels)
                found = assess.assess(before, pixels, assess.Bits(log_density, draws, at), key=key, batch=batch, progress=tell)
            else:
                name, unit = "forgetting", "ΔE"
                second = read_model(after)
                found = assess.forgetting(before, second, images.pixels, log_density, timestep=at, key=key, batch=batch, progress=tell)
    columns = _described(images) | {name: np.asarray(found.mean), f"{name}_error": np.asarray(found.standard_error)}
    columns |= {"evaluations": np.asarray(found.evaluations), "sample": sample_ids(images)}
    settings = {
        "command": "likelihood",
        "model": model,
        "after": after,
        "task1": description(images),
        "method": method,
        "timestep": at,
        "probes": probes,
        "draws": draws,
        "tolerance": tolerance,
        "seed": seed,
        "versions": table.versions(),
    }
    table.write(out, table.Table(columns, settings))
    good = np.isfinite(columns[name])
    _summarise(screen, columns, name, unit, out)
    if not good.all():
        screen.warn(f"{(~good).sum():,} images could not be measured and are NaN: try a larger --tolerance")
    return 0


def _described(images: "Images") -> dict[str, np.ndarray]:
    return {"index": np.arange(len(images))} | ({} if images.labels is None else {"label": images.labels})


def _summarise(screen: Screen, columns: dict[str, np.ndarray], name: str, unit: str, out: Path) -> None:
    """Mean over the images that could be measured, and how well each is known."""
    good = np.isfinite(columns[name])
    values = columns[name][good]
    spread = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    screen.say(f"{values.mean():.4f} ± {spread:.4f} {unit}, mean and standard error over {len(values):,} images; table: {out}")
    screen.say(
        f"of an image: standard error {np.median(columns[f'{name}_error'][good]):.2g}, "
        f"{np.median(columns['evaluations'][good]):,.0f} evaluations of the network (medians)"
    )


def reconstruct(
    model: Model,
    data: Annotated[str | None, Parameter(help="Images, as for `train` (default: those that the run held out).")] = None,
    /,
    *,
    out: Annotated[Path, Parameter(help="Table to write: .parquet, .csv or .npz; a sheet of images goes beside it.")] = Path(
        "results/reconstruction.parquet"
    ),
    classes: Annotated[str | None, Parameter(group="Data", help="Only these classes, A,B,… by name or number (default: all).")] = None,
    first: Annotated[int | None, Parameter(group="Data", help="Only the first so many of these images (default: all).")] = None,
    reading: Reading = Reading(),
    timestep: Annotated[int, Parameter(help="To which the images are noised, and from which they are recovered.")] = 500,
    draws: Annotated[int, Parameter(help="Of the noise, for each image.")] = 2,
    seed: Annotated[int, Parameter(help="Of the noise: the same for every model.")] = 0,
    batch: Annotated[int, Parameter(help="Images at once.")] = 50,
    device: Device = None,
) -> int:
    """Noise images and let a model recover them: the error of each, the paper's operational measure of forgetting (Eq. (12)).

    Asked of two models with the same seed, the same noise is used, and the difference of an image's errors is what was forgotten of it.

    Example:

        python -m diffusion reconstruct results/second mnist-5k --out results/after.parquet
    """
    from hopjax.cli import table
    from hopjax.cli.output import check_suffix

    check_suffix(out)
    check_apart("--out", out, filter(None, [data]))
    check_writable("--out", out)
    for option, value in (("--draws", draws), ("--batch", batch), ("--first", 1 if first is None else first)):
        need(value >= 1, option, value, f"{option.removeprefix('--')} ≥ 1", 2)
    need_seed(seed)
    configure(device)
    screen = Screen()
    import jax
    from flax import nnx

    from diffusion.assess import Reconstruction, assess, to_8_bits
    from diffusion.pixels import checked, to_bytes, to_model
    from diffusion.reconstruct import reconstructions
    from diffusion.run import held_out, picture, read_model
    from diffusion.samplers import noise_function
    from hopjax.cli.tasks import description, sample_ids

    with explained():
        found_model = read_model(model)
        objective = found_model.objective
        last = objective.schedule.timesteps
        need(0 < timestep < last, "--timestep", timestep, f"0 < timestep < {last}", last // 2)
        with screen.working("reading images"):
            images = checked(held_out(model) if data is None else images_of(data, classes, reading))
        found_model.config_for(images.pixels.shape[1:], 0.0)  # refuses what the model was not made for
        images = images.take(np.arange(min(len(images), first or len(images))))
        key = jax.random.key(seed)
        with screen.counting("reconstructing", len(images), 0, unit="images") as tell:
            found = assess(found_model, images.pixels, Reconstruction(timestep, draws), key=key, batch=batch, progress=tell)
        shown = images.pixels[:32]
        graphdef, params = nnx.split(found_model.unet, nnx.Param)

        @jax.jit
        def recover(params: Any, pixels: Any, keys: Any) -> Any:
            epsilon = noise_function(nnx.merge(graphdef, params), objective.schedule, objective.prediction)
            return reconstructions(epsilon, to_model(pixels), objective.schedule, keys, timestep=timestep).images

        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, np.arange(len(shown)))
        pairs = np.stack([to_8_bits(shown), to_bytes(recover(params, shown, keys))], axis=1)
    columns = _described(images) | {"error": np.asarray(found.mean), "error_error": np.asarray(found.standard_error)}
    columns |= {"evaluations": np.asarray(found.evaluations), "sample": sample_ids(images)}
    settings = {
        "command": "reconstruct",
        "model": model,
        "task1": description(images),
        "timestep": timestep,
        "draws": draws,
        "seed": seed,
        "versions": table.versions(),
    }
    table.write(out, table.Table(columns, settings))
    sheet = out.with_suffix(".png")
    picture(sheet, pairs.reshape(-1, *pairs.shape[2:]))
    _summarise(screen, columns, "error", "squared pixels (from −1 to 1)", out)
    screen.say(f"images, each before its reconstruction: {sheet}")
    return 0


def judge(
    samples: Annotated[str, Parameter(help="Generated images, which `sample --out X.npy` wrote, or any others.")],
    data: Annotated[str, Parameter(help="Real images with labels.")],
    /,
    *,
    hold_out: Annotated[int, Parameter(help="Compare with the last so many real images, from which nothing is learnt.")] = 500,
    classes: Annotated[str | None, Parameter(help="Only these classes of the real images (default: all).")] = None,
    confidence: Annotated[float, Parameter(help="Above this an image is accepted.")] = 0.9,
    out: Annotated[Path | None, Parameter(help="Write what is printed as JSON, too (default: no).")] = None,
) -> int:
    """Ask a classifier that has learnt from real images how many generated ones it recognises, and as what.

    Example:

        python -m diffusion sample results/cpu-mnist --count 1000 --out results/samples.npy
        python -m diffusion judge results/samples.npy mnist-5k
    """
    from diffusion.judge import Judge

    if out is not None:
        check_apart("--out", out, [samples, data])
        check_writable("--out", out)
    need(0 < confidence < 1, "--confidence", confidence, "0 < confidence < 1", 0.9)
    screen = Screen()
    with explained():
        real, made = images_of(data, classes, Reading()), images_of(samples, None, Reading())
        need(1 <= hold_out <= len(real) // 2, "--hold-out", hold_out, f"1 ≤ hold-out ≤ {len(real) // 2}, half of the real images", 500)
        if made.pixels.shape[1:] != real.pixels.shape[1:]:
            raise UsageError(f"{samples} holds images of {made.pixels.shape[1:]}, {data} of {real.pixels.shape[1:]}: they must be alike")
        split = len(real) - hold_out
        with screen.working("learning from real images"):
            learnt = Judge(real.take(np.arange(split)))
        held = real.take(np.arange(split, len(real)))
        verdicts, usual = learnt(made), learnt(held)
    (rate, error), (real_rate, real_error) = verdicts.accepted(confidence), usual.accepted(confidence)
    present = np.unique(learnt.labels)
    chosen = verdicts.labels[verdicts.confidence > confidence]
    histogram = {str(real.classes[i] if real.classes else i): int((chosen == i).sum()) for i in present}
    ratio = rate / real_rate if real_rate else float("nan")
    relative = ratio * ((error / rate) ** 2 + (real_error / real_rate) ** 2) ** 0.5 if rate and real_rate else float("nan")
    found = {
        "samples": len(made),
        "accepted": rate,
        "accepted_error": error,
        "real": len(held),
        "real_accepted": real_rate,
        "real_accepted_error": real_error,
        "real_accuracy": float(np.mean(usual.labels == held.labels)),
        "ratio": ratio,
        "ratio_error": relative,
        "accepted_by_class": histogram,
    }
    screen.say(f"accepted at confidence {confidence:g}: {rate:.3f} ± {error:.3f} of {len(made):,} samples")
    screen.say(f"of {len(held):,} real images held out: {real_rate:.3f} ± {real_error:.3f} (accuracy {found['real_accuracy']:.3f})")
    screen.say(f"ratio: {ratio:.3f} ± {relative:.3f}")
    screen.say("accepted samples by class: " + ", ".join(f"{name} {count}" for name, count in histogram.items()))
    if out is not None:
        found |= {name: None for name, value in (("ratio", ratio), ("ratio_error", relative)) if not math.isfinite(value)}
        write(out, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    return 0
