"""Pipelines so small that compiling them takes seconds: the golden one, a folder of diffusers, and a smaller one still."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from diffusion.stable.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.pipeline import StableDiffusion
from diffusion.stable.text_encoder import CLIPTextConfig, TextEncoder
from diffusion.stable.tokenizer import read_tokenizer
from diffusion.stable.unet import UNet2DCondition
from diffusion.weights import read_json

GOLDEN = Path(__file__).parent / "golden"
MODEL = GOLDEN / "pipeline" / "model"

# As in golden/make_pipeline.py, which needs torch.
PROMPTS = ["a cat", "The CATS at night, and much more than sixteen tokens of it"]
NEGATIVE_PROMPTS = ["", "rain"]
STEPS, GUIDANCE, STRENGTH = 20, 7.5, 0.6
SIZE = (24, 16)  # latents of 3 × 2
LENGTH = 16
TEXTS = {"ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "dpm": "DPMSolverMultistepScheduler"}
IMAGES = {"ddim-image": "DDIMScheduler", "dpm-image": "DPMSolverMultistepScheduler"}


def write(folder):
    """The golden folder, whole: its U-Net is another golden's."""
    shutil.copytree(MODEL, folder)
    shutil.copytree(GOLDEN / "unet" / "published", folder / "unet", ignore=shutil.ignore_patterns("cases*", "gradients*"))
    return folder


def pictures():
    """The images that golden cases begin with."""
    return np.random.default_rng(0).integers(0, 256, (len(PROMPTS), *SIZE, 3), np.uint8)


def cases():
    """The latents and pixels that diffusers ends with, for each case."""
    arrays = load_file(GOLDEN / "pipeline" / "cases.safetensors")
    return {name: (arrays[f"{name}.latents"], arrays[f"{name}.pixels"]) for name in (*TEXTS, *IMAGES)}


def randomised(make, seed):
    """The module that `make(rngs)` describes, every parameter of it random."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    generator = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        scale = np.prod(variable.shape[:-1]) ** -0.5 if path[-1] == "kernel" else 1.0 if path[-1] == "embedding" else 0.3
        draw = scale * generator.standard_normal(variable.shape, np.float32) + (path[-1] == "scale")
        variable.set_value(jnp.asarray(draw, jnp.float32))
    return model


def smallest(*, dtype=jnp.float32, seed=0):
    """Pixels of 2 × 2 to a latent, of which there are 2 × 2 by default."""
    text = CLIPTextConfig(
        vocab_size=521, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=LENGTH,
        eos_token_id=520,
    )  # fmt: skip
    vae = AutoencoderKLConfig(
        block_out_channels=(2, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3, norm_num_groups=1,
    )  # fmt: skip
    unet = UNet2DConditionConfig(
        sample_size=2, in_channels=3, out_channels=3, down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("UpBlock2D",), block_out_channels=(4,), layers_per_block=1, norm_num_groups=1, cross_attention_dim=4,
        attention_head_dim=1,
    )  # fmt: skip
    return StableDiffusion(
        unet=randomised(lambda rngs: UNet2DCondition(unet, dtype=dtype, rngs=rngs), seed),
        vae=randomised(lambda rngs: AutoencoderKL(vae, dtype=dtype, rngs=rngs), seed + 1),
        text_encoder=randomised(lambda rngs: TextEncoder(text, dtype=dtype, rngs=rngs), seed + 2),
        tokenizer=read_tokenizer(MODEL / "tokenizer", length=LENGTH),
        tokenizer_files={path.name: path.read_bytes() for path in (MODEL / "tokenizer").iterdir()},
        scheduler_config=read_json(MODEL / "scheduler" / "scheduler_config.json"),
    )


def network(pipeline, prompts):
    """ε of noisy latents and timesteps with these prompts and no guidance, for plain loops in numpy."""
    text = jax.jit(lambda ids: pipeline.text_encoder(ids).last_hidden_state)(pipeline.tokenizer(prompts).ids)
    unet = jax.jit(lambda x, t: pipeline.unet(x, t, text))
    return lambda x, t: np.asarray(unet(jnp.asarray(x, jnp.float32), jnp.full(len(x), t, jnp.float32)), float)
