"""The commands of `python -m diffusion`. What takes long to import is imported when a command runs."""

from cyclopts import App

from diffusion.cli.experiment import run, trial_table
from diffusion.cli.measure import judge, likelihood, reconstruct
from diffusion.cli.models import export, import_, sample
from diffusion.cli.report import report
from diffusion.cli.stable import train_vae
from diffusion.cli.train import preset_table, presets, train

app = App(
    name="python -m diffusion",
    help="""Diffusion models of images: train, sample, measure likelihoods, exchange with diffusers.

Example: scikit-learn's digits, trained and sampled in two minutes, with nothing to download:

    python -m diffusion train --preset quick

The exit status is 0, 1 if a run could not go on or a file not be written, 2 if the command was misused, and 130 if it was interrupted:
the same command then goes on where it stopped.
""",
    help_format="plaintext",
    version_flags=[],
    suppress_keyboard_interrupt=False,  # it has something to say
    config=[presets],
)
app.command(train, help_epilogue=f"What the presets set; everything else has the default shown:\n\n{preset_table()}")
app.command(run, help_epilogue=f"The presets:\n\n{trial_table()}")
app.command(report)
app.command(train_vae)
app.command(sample)
app.command(reconstruct)
app.command(likelihood)
app.command(judge)
app.command(export)
app.command(import_, name="import")
