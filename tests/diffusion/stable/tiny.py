"""Networks of Stable Diffusion so small that compiling them takes seconds: images of 8 × 8 have latents of 4 × 4."""

import jax
import numpy as np

from diffusion.layers import initialise
from diffusion.stable.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.miniature import Miniature
from diffusion.stable.text_encoder import CLIPTextConfig
from hopjax.data import Images

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
    down_block_types=("CrossAttnDownBlock2D",),
    mid_block_type=None,
    up_block_types=("CrossAttnUpBlock2D",),
    block_out_channels=(8,),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=6,
    attention_head_dim=2,
)
TEXT = CLIPTextConfig(
    vocab_size=514,
    hidden_size=6,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=8,
    eos_token_id=513,
)
CLASSES = ("up", "flat")


def stable(key):
    """A pipeline with random parameters."""
    one, other = jax.random.split(key)
    vae = initialise(lambda rngs: AutoencoderKL(AUTOENCODER, rngs=rngs), one)
    return Miniature(AUTOENCODER, UNET, TEXT).pipeline(vae, other)


def stripes(count=24, seed=0):
    """Coloured stripes of 8 × 8, upright or lying, with noise."""
    random = np.random.default_rng(seed)
    upright = np.broadcast_to(np.tile([40, 200], 4)[None, :, None], (8, 8, 3)) * random.uniform(0.5, 1, 3)
    kinds = np.stack([upright, upright.transpose(1, 0, 2)])
    labels = np.arange(count) % 2
    pixels = (kinds[labels] + random.integers(-20, 21, (count, 8, 8, 3))).clip(0, 255).astype(np.uint8)
    return Images(pixels, labels, CLASSES, "stripes")
