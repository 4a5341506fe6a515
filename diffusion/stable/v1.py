"""The configurations of Stable Diffusion v1, as its config.json files have them."""

from diffusion.stable.autoencoder import AutoencoderKLConfig
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.text_encoder import CLIPTextConfig

UNET = UNet2DConditionConfig()
AUTOENCODER = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=512,
)
TEXT = CLIPTextConfig(
    hidden_size=768,
    intermediate_size=3072,
    projection_dim=768,
    num_attention_heads=12,
    bos_token_id=0,
    eos_token_id=2,
)
