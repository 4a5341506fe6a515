"""Networks of Stable Diffusion so small that compiling them takes seconds: images of 8 × 8 have latents of 4 × 4."""

import json

import jax
import numpy as np

from diffusion.layers import initialise
from diffusion.stable.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.pipeline import StableDiffusion
from diffusion.stable.text_encoder import CLIPTextConfig, TextEncoder
from diffusion.stable.tokenizer import Tokenizer
from diffusion.stable.unet import UNet2DCondition
from hopjax.data import Images
from tests.diffusion.stable.vocabulary import byte_symbols

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
# Stable Diffusion's.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
CLASSES = ("up", "flat")


def tokenizer():
    """Letters are tokens; nothing is merged."""
    symbols = byte_symbols().values()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    files = {"vocab.json": json.dumps(vocabulary).encode(), "merges.txt": b"#version: 0.2\n"}
    return Tokenizer(vocabulary, [], length=8), files


def stable(key):
    """A pipeline with random parameters."""
    keys = jax.random.split(key, 3)
    made, files = tokenizer()
    return StableDiffusion(
        unet=initialise(lambda rngs: UNet2DCondition(UNET, rngs=rngs), keys[0]),
        vae=initialise(lambda rngs: AutoencoderKL(AUTOENCODER, rngs=rngs), keys[1]),
        text_encoder=initialise(lambda rngs: TextEncoder(TEXT, rngs=rngs), keys[2]),
        tokenizer=made,
        tokenizer_files=files,
        scheduler_config=SCHEDULER,
    )


def stripes(count=24, seed=0):
    """Coloured stripes of 8 × 8, upright or lying, with noise."""
    random = np.random.default_rng(seed)
    upright = np.broadcast_to(np.tile([40, 200], 4)[None, :, None], (8, 8, 3)) * random.uniform(0.5, 1, 3)
    kinds = np.stack([upright, upright.transpose(1, 0, 2)])
    labels = np.arange(count) % 2
    pixels = (kinds[labels] + random.integers(-20, 21, (count, 8, 8, 3))).clip(0, 255).astype(np.uint8)
    return Images(pixels, labels, CLASSES, "stripes")
