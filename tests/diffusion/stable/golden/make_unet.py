"""Makes the golden files of the denoising network with torch and diffusers: `python tests/diffusion/stable/golden/make_unet.py`.

Each case is a diffusers folder of a tiny network with random weights in float16, and beside it inputs and outputs for latents of several
sizes, computed in float64. "published" is laid out as version 1.5 but for one
layer a block, and comes with the gradient of the loss |output − noise|², averaged,
with respect to every parameter; "options" has every option that is supported set otherwise.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "unet"
# Those of odd lengths are halved to 9 × 5, 5 × 3, 3 × 2 and 3 × 2, 2 × 1, 1 × 1; only the first has attention among pixels at every level.
SIZES = ((17, 9), (4, 4), (8, 8), (5, 3))
TIMESTEPS = (torch.tensor([21, 500]), torch.tensor([1, 999]), torch.tensor([981, 0]), torch.tensor([3, 700]))
TOKENS = 5

CASES: dict[str, dict[str, object]] = {
    "published": {
        "block_out_channels": (4, 4, 8, 8),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 6,
        "norm_num_groups": 2,
        "sample_size": 8,
    },
    "options": {
        "in_channels": 3,
        "out_channels": 2,
        "block_out_channels": (4, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 5,
        "norm_num_groups": 2,
        "norm_eps": 1e-3,
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "time_embedding_dim": 10,
        "mid_block_scale_factor": 1.4,
        "dropout": 0.1,
        "sample_size": (5, 3),
    },
}


def main() -> None:
    """Write all cases."""
    for seed, (name, options) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model: Any = UNet2DConditionModel(**options).eval()
        # At their initial values a mix-up of norms and biases would go unseen. Larger ones in attention would saturate it.
        for tensor, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float("norm" in tensor and tensor.endswith("weight")), std=0.3)
            else:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        model.half().save_pretrained(HERE / name)
        model.double()
        arrays: dict[str, torch.Tensor] = {}
        for size, timestep in zip(SIZES, TIMESTEPS, strict=True):
            at = f"{size[0]}x{size[1]}"
            latents = torch.randn(2, model.config.in_channels, *size).double()
            text = torch.randn(2, TOKENS, model.config.cross_attention_dim).double()
            out = model(latents, timestep, text).sample
            arrays |= {f"{at}.latents": latents, f"{at}.timestep": timestep, f"{at}.text": text, f"{at}.out": out}
            if name == "published" and at == "17x9":
                noise = torch.randn(out.shape).double()
                torch.nn.functional.mse_loss(out, noise).backward()
                arrays |= {"17x9.noise": noise}
        save_file({key: _single(array) for key, array in arrays.items()}, HERE / name / "cases.safetensors")
        if name == "published":
            # One after another in the order of their names; a file of tensors would be half names.
            gradients = [_single(parameter.grad).ravel() for _, parameter in sorted(model.named_parameters())]
            np.save(HERE / name / "gradients.npy", np.concatenate(gradients))


def _single(array: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    whole = array.detach().numpy()
    return np.ascontiguousarray(whole.astype(np.int32 if array.dtype == torch.int64 else np.float32))


if __name__ == "__main__":
    main()
