"""Makes the golden files of the autoencoder with torch and diffusers: `python tests/diffusion/stable/golden/make_autoencoder.py`.

A diffusers folder of a tiny autoencoder with random weights, and beside it what it computes: moments of an image with odd sides, and the
image of latents.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

FOLDER = Path(__file__).parent / "autoencoder"


def main() -> None:
    """Write the folder."""
    torch.manual_seed(0)
    model: Any = AutoencoderKL(
        block_out_channels=(8, 12, 12),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=16,
    )
    # At their initial values a mix-up of norms and biases would go unseen, and attention be nearly uniform.
    for tensor, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in tensor and tensor.endswith("weight")), std=0.3)
        else:
            gain = 3 if "to_q" in tensor or "to_k" in tensor else 1.5
            torch.nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
    with torch.no_grad():
        # Variances of 1e-5 or so at the first norm, where its epsilon matters.
        model.encoder.conv_in.weight *= 0.003
        model.encoder.conv_in.bias *= 0.003
        # Logarithms of variances of one channel about the upper bound and of one about the lower: half of them are clipped.
        model.quant_conv.bias[3] += 20
        model.quant_conv.bias[4] -= 30
        model.save_pretrained(FOLDER)
        image = torch.randn(2, 3, 15, 22)
        latents = torch.randn(2, 3, 5, 3)
        moments = model.encode(image).latent_dist
        arrays = {
            "image": image,
            "mean": moments.mean,
            "log_variance": moments.logvar,
            "latents": latents,
            "decoded": model.decode(latents).sample,
        }
    for name, array in arrays.items():
        np.save(FOLDER / f"{name}.npy", array.numpy())


if __name__ == "__main__":
    main()
