"""Makes the golden files of the pipeline with torch, diffusers and transformers: `python -m tests.diffusion.stable.golden.make_pipeline`.

pipeline/model is a folder of diffusers with tiny networks of random weights in float16; its U-Net is that of unet/published, which tests
copy into it. pipeline/cases.safetensors holds what diffusers makes with it in float64, channels last: for each case the latents at the end,
and their pixels from −1 to 1. The noise that each begins with is `jax.random.normal` with `fold_in(key(0), i)` for image i.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.diffusion.stable.golden.make_schedulers import PUBLISHED
from tests.diffusion.stable.vocabulary import byte_symbols

HERE = Path(__file__).parent
FOLDER = HERE / "pipeline" / "model"

PROMPTS = ["a cat", "The CATS at night, and much more than sixteen tokens of it"]
NEGATIVE_PROMPTS = ["", "rain"]
SHAPE = (3, 2, 4)
STEPS, GUIDANCE, STRENGTH = 20, 7.5, 0.6
LENGTH = 16
MERGES = ("a t</w>", "c at</w>", "c a", "t s</w>", "ca ts</w>", "t h", "th e</w>")
TEXTS = {"ddim": "DDIMScheduler", "pndm": "PNDMScheduler", "dpm": "DPMSolverMultistepScheduler"}
IMAGES = {"ddim-image": "DDIMScheduler", "dpm-image": "DPMSolverMultistepScheduler"}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a vocabulary of all bytes and a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = byte_symbols().values()
    merged = ["".join(pair.split(" ")) for pair in MERGES]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *merged, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    settings = json.loads((HERE / "tokenizer" / "tokenizer_config.json").read_text()) | {"model_max_length": LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def randomise(model: Any) -> Any:
    """At their initial values a mix-up of norms and biases would go unseen."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=1 if "embedding" in name else 1.5 * parameter[0].numel() ** -0.5)
    return model.half().eval()


def write() -> None:
    """Write pipeline/model."""
    torch.manual_seed(0)
    words = tokenizer(FOLDER / "tokenizer")
    text: Any = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=6,
        intermediate_size=10,
        projection_dim=6,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=LENGTH,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        architectures=["CLIPTextModel"],
    )
    vae: Any = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        sample_size=64,
    )
    randomise(CLIPTextModel(text)).save_pretrained(FOLDER / "text_encoder")
    randomise(vae).save_pretrained(FOLDER / "vae")
    diffusers.PNDMScheduler.from_config(PUBLISHED).save_pretrained(FOLDER / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (FOLDER / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def read() -> Any:
    """The pipeline in pipeline/model, in float64."""
    networks: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_pretrained(HERE / "unet" / "published"),
        "vae": AutoencoderKL.from_pretrained(FOLDER / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(FOLDER / "text_encoder"),
    }
    return StableDiffusionPipeline(
        **{name: network.double().eval() for name, network in networks.items()},
        tokenizer=CLIPTokenizer.from_pretrained(FOLDER / "tokenizer"),
        scheduler=diffusers.PNDMScheduler.from_pretrained(FOLDER / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def noise() -> torch.Tensor:
    """What all cases begin with."""
    key = jax.random.key(0)
    draws = [jax.random.normal(jax.random.fold_in(key, i), SHAPE, "float32") for i in range(len(PROMPTS))]
    return torch.from_numpy(np.stack(draws).transpose(0, 3, 1, 2)).double()


def pictures() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images to begin with, as bytes."""
    return np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 8 * SHAPE[0], 8 * SHAPE[1], 3), np.uint8)


def main() -> None:
    """Write all."""
    write()
    texts = read()
    settings = texts.scheduler.config
    asked: dict[str, Any] = {"prompt": PROMPTS, "negative_prompt": NEGATIVE_PROMPTS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def keep(name: str, latents: torch.Tensor) -> None:
        pixels = texts.vae.decode(latents / texts.vae.config.scaling_factor).sample.clamp(-1, 1)
        for what, array in (("latents", latents), ("pixels", pixels)):
            arrays[f"{name}.{what}"] = np.ascontiguousarray(array.numpy().transpose(0, 2, 3, 1).astype(np.float32))

    with torch.no_grad():
        for name, scheduler in TEXTS.items():
            texts.scheduler = getattr(diffusers, scheduler).from_config(settings)
            keep(name, texts(**asked, num_inference_steps=STEPS, latents=noise()).images)
        # The most likely latents and the noise are given: diffusers would draw both.
        pixels = torch.from_numpy(pictures().transpose(0, 3, 1, 2)).double() / 127.5 - 1
        clean = texts.vae.config.scaling_factor * texts.vae.encode(pixels).latent_dist.mode()
        module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
        module.randn_tensor = lambda *_, **__: noise()
        for name, scheduler in IMAGES.items():
            texts.scheduler = getattr(diffusers, scheduler).from_config(settings)
            images = StableDiffusionImg2ImgPipeline(**texts.components, requires_safety_checker=False)
            keep(name, images(**asked, image=clean, strength=STRENGTH, num_inference_steps=STEPS).images)
    save_file(arrays, HERE / "pipeline" / "cases.safetensors")


if __name__ == "__main__":
    main()
