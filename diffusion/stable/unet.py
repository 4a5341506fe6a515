"""The denoising network of Stable Diffusion v1 in Flax NNX: the same function of the same parameters as diffusers'
UNet2DConditionModel, channels last.

Its blocks are those of `diffusion.unet`, with a transformer that attends to a text in the place of attention among pixels.
Source: Rombach et al. 2022; config.json of the published checkpoints, v1.1 to v1.5.
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Real

from diffusion.layers import Downsample, GroupNorm, ResnetBlock, TimeEmbedding, Upsample, at_least_float32, conv, silu, timestep_features
from diffusion.stable.config import UNet2DConditionConfig
from diffusion.stable.transformer import Transformer
from diffusion.unet import MidBlock, down_and_up, dropout_keys, make_down_blocks, make_up_blocks


class UNet2DCondition(nnx.Module):
    """Output of the shape of the latents, from noisy latents, their timestep and a text.

    Parameters are float32. `dtype` is that of the computation; normalisations and softmax are float32 whatever it is. With `remat` the
    backward pass computes each ResNet block and its transformer again instead of keeping their intermediate values.

    Accuracy: as published in float32; on an accelerator that needs `jax.default_matmul_precision("highest")`.
    """

    def __init__(self, config: UNet2DConditionConfig, *, dtype: DTypeLike = jnp.float32, remat: bool = False, rngs: nnx.Rngs) -> None:
        channels = config.block_out_channels
        width = config.time_embedding_dim or 4 * channels[0]
        resnet = functools.partial(
            ResnetBlock,
            embedding=width,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            dropout=config.dropout,
            dtype=dtype,
            rngs=rngs,
        )
        transformer = functools.partial(
            Transformer,
            heads=config.attention_head_dim,
            context_features=config.cross_attention_dim,
            groups=config.norm_num_groups,
            dtype=dtype,
            rngs=rngs,
        )

        self.conv_in = conv(config.in_channels, channels[0], 3, dtype=dtype, rngs=rngs)
        self.time_embedding = TimeEmbedding(channels[0], width, dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            make_down_blocks(
                channels,
                [transformer if kind == "CrossAttnDownBlock2D" else None for kind in config.down_block_types],
                layers=config.layers_per_block,
                resnet=resnet,
                downsample=functools.partial(Downsample, padding=config.downsample_padding, dtype=dtype, rngs=rngs),
                remat=remat,
            )
        )
        self.mid_block = (
            None
            if config.mid_block_type is None
            else MidBlock(
                channels[-1],
                resnet=functools.partial(resnet, output_scale=config.mid_block_scale_factor),
                attention=transformer,
                remat=remat,
            )
        )
        self.up_blocks = nnx.List(
            make_up_blocks(
                channels,
                [transformer if kind == "CrossAttnUpBlock2D" else None for kind in config.up_block_types],
                layers=config.layers_per_block,
                resnet=resnet,
                upsample=functools.partial(Upsample, dtype=dtype, rngs=rngs),
                remat=remat,
            )
        )
        self.conv_norm_out = GroupNorm(channels[0], config.norm_num_groups, eps=config.norm_eps, dtype=dtype)
        self.conv_out = conv(channels[0], config.out_channels, 3, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        latents: Float[Array, "n h w c"],
        timestep: Real[Array, " n"],
        text: Float[Array, "n m f"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "n h w k"]:
        """The network's output, float32 at least, for latents of any size; with a `key`, dropout is on.

        Raises: ValueError at trace time if the channels of the latents or the features of the text do not fit.
        """
        config = self.config
        if latents.shape[3] != config.in_channels:
            raise ValueError(f"latents have {latents.shape[3]} channels, the network takes {config.in_channels}")
        if text.shape[2] != config.cross_attention_dim:
            raise ValueError(f"the text has {text.shape[2]} features a token, the network takes {config.cross_attention_dim}")
        keys = dropout_keys(key if config.dropout > 0 else None, levels=len(config.block_out_channels), layers=config.layers_per_block)

        x = (2 * latents - 1 if config.center_input_sample else latents).astype(self.dtype)
        features = timestep_features(
            timestep, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        embedding = self.time_embedding(features.astype(self.dtype))
        x = down_and_up(self.down_blocks, self.mid_block, self.up_blocks, self.conv_in(x), embedding, keys, text.astype(self.dtype))
        return self.conv_out(silu(self.conv_norm_out(x))).astype(at_least_float32(self.dtype))
