"""Makes the golden trajectories of schedulers with torch and diffusers: `python tests/diffusion/stable/golden/make_schedulers.py`.

Each case is a scheduler_config.json as diffusers writes it, and trajectory.npz beside it: the timesteps at which a 'network' is asked for
noise, and the states from pure noise to the end. The network is ε(x, t) = (0.3 + 0.6 t/1000) x + 0.5 (1 − t/1000) sin(entry's number).
"""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

FOLDER = Path(__file__).parent / "schedulers"

# The scheduler_config.json of Stable Diffusion 1.5.
PUBLISHED = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

CASES: dict[str, tuple[str, dict[str, object], int]] = {
    "ddim": ("DDIMScheduler", {}, 20),
    "ddim-to-one": ("DDIMScheduler", {"set_alpha_to_one": True}, 7),
    "ddim-trailing": ("DDIMScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 20),
    "pndm": ("PNDMScheduler", {}, 20),
    "pndm-to-one": ("PNDMScheduler", {"set_alpha_to_one": True, "steps_offset": 0}, 6),
    "pndm-once": ("PNDMScheduler", {}, 1),
    "pndm-twice": ("PNDMScheduler", {}, 2),
    "dpm": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}, 20),
    "dpm-linspace": ("DPMSolverMultistepScheduler", {}, 7),
    "dpm-trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, 12),
}


def network(x: torch.Tensor, timestep: int) -> torch.Tensor:
    """The noise that is found in x."""
    tilt = torch.sin(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)
    return (0.3 + 0.6 * timestep / 1000) * x + 0.5 * (1 - timestep / 1000) * tilt


def main() -> None:
    """Write all cases."""
    generator = torch.Generator().manual_seed(0)
    for name, (kind, changes, steps) in CASES.items():
        scheduler: Any = getattr(diffusers, kind).from_config(PUBLISHED | changes)
        scheduler.save_pretrained(FOLDER / name)
        scheduler.set_timesteps(steps)
        # Double precision, so that what rounds is the scheduler's tables alone.
        x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        states = [x]
        for timestep in scheduler.timesteps:
            x = scheduler.step(network(x, int(timestep)), timestep, x).prev_sample
            states.append(x)
        np.savez(FOLDER / name / "trajectory.npz", timesteps=scheduler.timesteps.numpy(), states=torch.stack(states).numpy())


if __name__ == "__main__":
    main()
