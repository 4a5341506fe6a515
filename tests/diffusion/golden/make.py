"""Makes the golden files of the parity tests with torch and diffusers: `python tests/diffusion/golden/make.py`.

Each case is a diffusers folder of a tiny network with random weights, and in.npy, timesteps.npy, out.npy beside it. Between them the
cases use every option of the architecture that is supported.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

HERE = Path(__file__).parent

CASES: dict[str, tuple[dict[str, object], tuple[int, int]]] = {
    # As google/ddpm-cifar10-32 has it: asymmetric padding, sines first, one head over all channels.
    "colour": (
        {
            "sample_size": 8,
            "block_out_channels": (8, 12),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
            "time_embedding_dim": 16,
        },
        (8, 8),
    ),
    # Everything else: scale and shift by the time, heads of 4 channels, rescaled middle block, rectangular greyscale images.
    "grey": (
        {
            "sample_size": (12, 8),
            "in_channels": 1,
            "out_channels": 2,
            "center_input_sample": True,
            "block_out_channels": (4, 8, 8),
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "norm_num_groups": 2,
            "attention_head_dim": 4,
            "attn_norm_num_groups": None,
            "resnet_time_scale_shift": "scale_shift",
            "mid_block_scale_factor": 1.4,
            "time_embedding_dim": 12,
        },
        (12, 8),
    ),
}


def main() -> None:
    """Write all cases."""
    for seed, (name, (options, size)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model: Any = UNet2DModel(**options)
        # At their initial values a mix-up of norms and biases would go unseen, and attention be nearly uniform.
        for tensor, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in tensor and tensor.endswith("weight")), std=0.3)
            else:
                gain = 1.5
                if "to_q" in tensor or "to_k" in tensor:  # neither uniform nor saturated, the middle of "grey" having no norm before it
                    gain = 0.3 if name == "grey" and "mid_block" in tensor else 3
                torch.nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
        folder = HERE / name
        model.save_pretrained(folder)
        image = torch.randn(2, model.config.in_channels, *size)
        timesteps = torch.tensor([3, 871])
        with torch.no_grad():
            out = model(image, timesteps).sample
        np.save(folder / "in.npy", image.numpy())
        np.save(folder / "timesteps.npy", timesteps.numpy())
        np.save(folder / "out.npy", out.numpy())


if __name__ == "__main__":
    main()
