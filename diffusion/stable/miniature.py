"""A whole Stable Diffusion of the size of an experiment of minutes: a trained autoencoder, and all else with random parameters.

The text encoder stays random, the U-Net is for a run to train. The tokenizer spells prompts in bytes: it has no merges.
"""

import dataclasses
import json
from typing import Any

import jax
from jaxtyping import Array, Key
from tokenizers import pre_tokenizers

from diffusion.layers import initialise
from diffusion.objective import Denoising
from diffusion.pipeline import scheduler_config
from diffusion.schedules import Prediction, ScaledLinearSchedule
from diffusion.stable.autoencoder import AutoencoderKL, AutoencoderKLConfig
from diffusion.stable.autoencoding import SMALL, Autoencoding
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.pipeline import StableDiffusion
from diffusion.stable.text_encoder import CLIPTextConfig, TextEncoder
from diffusion.stable.tokenizer import BEGIN, END, Tokenizer
from diffusion.stable.unet import UNet2DCondition

_UNET = UNet2DConditionConfig(
    sample_size=8,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(48, 96),
    layers_per_block=1,
    norm_num_groups=16,
    cross_attention_dim=32,
    attention_head_dim=4,
)
_TEXT = CLIPTextConfig(
    vocab_size=514,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=32,
    bos_token_id=512,
    eos_token_id=513,
)
_TRAINING = Autoencoding(steps=600)
# Stable Diffusion's noise, as diffusers has it: estimates of clean latents have no range to be clipped to.
_SCHEDULER = scheduler_config(Denoising(ScaledLinearSchedule(), Prediction("epsilon"))) | {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclasses.dataclass(frozen=True)
class Miniature:
    """Its networks, and how the autoencoder is trained. The defaults are for images of 32 × 32, whose latents are 8 × 8 × 4."""

    autoencoder: AutoencoderKLConfig = SMALL
    unet: UNet2DConditionConfig = _UNET
    text: CLIPTextConfig = _TEXT
    training: Autoencoding = _TRAINING

    def to_json(self) -> dict[str, Any]:
        """All that the pipeline depends on, besides the images."""
        made = {name: getattr(self, name).to_json() for name in ("autoencoder", "unet", "text")}
        return json.loads(json.dumps(made | {"training": dataclasses.asdict(self.training)}))

    def pipeline(self, autoencoder: AutoencoderKL, key: Key[Array, ""]) -> StableDiffusion:
        """The pipeline around an autoencoder."""
        unet, text = jax.random.split(key)
        tokenizer, files = byte_tokenizer(self.text.max_position_embeddings)
        return StableDiffusion(
            unet=initialise(lambda rngs: UNet2DCondition(self.unet, rngs=rngs), unet),
            vae=autoencoder,
            text_encoder=initialise(lambda rngs: TextEncoder(self.text, rngs=rngs), text),
            tokenizer=tokenizer,
            tokenizer_files=files,
            scheduler_config=_SCHEDULER,
        )

    def untrained(self) -> StableDiffusion:
        """The pipeline with random parameters alone, to plan with."""
        one, other = jax.random.split(jax.random.key(0))
        return self.pipeline(initialise(lambda rngs: AutoencoderKL(self.autoencoder, rngs=rngs), one), other)


def byte_tokenizer(length: int) -> tuple[Tokenizer, dict[str, bytes]]:
    """CLIP's tokenizer with a token for each byte and nothing to merge, `length` tokens a prompt; and its files."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), BEGIN, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # Without its length, transformers' tokenizer has none to fill prompts up to.
    said = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
    said |= {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": END}
    contents = {"vocab.json": json.dumps(vocabulary), "merges.txt": "#version: 0.2\n", "tokenizer_config.json": json.dumps(said)}
    files = {name: content.encode() for name, content in contents.items()}
    return Tokenizer(vocabulary, [], length=length), files


# What `python -m diffusion run --preset sd-tiny` is about.
SMALL_PIPELINE = Miniature()
