"""Networks of Stable Diffusion so small that compiling them takes seconds: images of 8 × 8 have latents of 4 × 4."""

from diffusion.stable.autoencoder import AutoencoderKLConfig
from diffusion.stable.config import UNet2DConditionConfig

AUTOENCODER = AutoencoderKLConfig(
    block_out_channels=(4, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    latent_channels=2,
    norm_num_groups=2,
    sample_size=8,
)
UNET = UNet2DConditionConfig(
    sample_size=4,
    in_channels=2,
    out_channels=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=6,
    attention_head_dim=2,
)
