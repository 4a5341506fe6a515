"""The U-Net of diffusers' UNet2DModel in Flax NNX: the same function of the same parameters, channels last.

Blocks are given the makers of their layers (`resnet`, `attention`), so that a U-Net with other attention is made of the same blocks.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Real

from diffusion.config import UNetConfig
from diffusion.layers import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimeEmbedding,
    Upsample,
    at_least_float32,
    conv,
    silu,
    timestep_features,
)

Image: TypeAlias = Float[Array, "n _ _ _"]
MakeResnet: TypeAlias = Callable[[int, int], ResnetBlock]
MakeAttention: TypeAlias = Callable[[int], nnx.Module]
Context: TypeAlias = Float[Array, "n m g"]
Keys: TypeAlias = Iterator[Key[Array, ""] | None]


def _layer(
    resnet: ResnetBlock,
    attention: nnx.Module | None,
    remat: bool,
    x: Image,
    embedding: Float[Array, "n e"],
    key: Key[Array, ""] | None,
    context: Context | None,
) -> Image:
    def apply(x: Image, embedding: Float[Array, "n e"], key: Key[Array, ""] | None, context: Context | None) -> Image:
        x = resnet(x, embedding, key)
        if attention is None:
            return x
        return attention(x) if context is None else attention(x, context)

    return (jax.checkpoint(apply) if remat else apply)(x, embedding, key, context)


class DownBlock(nnx.Module):
    """ResNet blocks, each followed by attention if there is any, and half the size in the end."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        layers: int,
        resnet: MakeResnet,
        attention: MakeAttention | None,
        downsample: Downsample | None,
        remat: bool,
    ) -> None:
        self.resnets = nnx.List([resnet(in_channels if i == 0 else out_channels, out_channels) for i in range(layers)])
        self.attentions = nnx.List([attention(out_channels) for _ in range(layers)] if attention else [])
        self.downsample = downsample
        self.remat = remat

    def __call__(self, x: Image, embedding: Float[Array, "n e"], keys: Keys, context: Context | None = None) -> tuple[Image, list[Image]]:
        """The block's output, and what the way up takes from here."""
        skips = []
        for resnet, attention in itertools.zip_longest(self.resnets, self.attentions):
            x = _layer(resnet, attention, self.remat, x, embedding, next(keys), context)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """A ResNet block, attention if there is any, and another ResNet block."""

    def __init__(self, channels: int, *, resnet: MakeResnet, attention: MakeAttention | None, remat: bool) -> None:
        self.resnets = nnx.List([resnet(channels, channels) for _ in range(2)])
        self.attentions = nnx.List([attention(channels)] if attention else [])
        self.remat = remat

    def __call__(self, x: Image, embedding: Float[Array, "n e"], keys: Keys, context: Context | None = None) -> Image:
        """The block's output."""
        x = _layer(self.resnets[0], self.attentions[0] if self.attentions else None, self.remat, x, embedding, next(keys), context)
        return _layer(self.resnets[1], None, self.remat, x, embedding, next(keys), context)


class UpBlock(nnx.Module):
    """ResNet blocks that each take one image from the way down, attention if there is any, and the size of the next in the end."""

    def __init__(
        self,
        in_channels: int,
        skip_channels: Sequence[int],
        out_channels: int,
        *,
        resnet: MakeResnet,
        attention: MakeAttention | None,
        upsample: Upsample | None,
        remat: bool,
    ) -> None:
        self.resnets = nnx.List(
            [resnet((in_channels if i == 0 else out_channels) + skip, out_channels) for i, skip in enumerate(skip_channels)]
        )
        self.attentions = nnx.List([attention(out_channels) for _ in skip_channels] if attention else [])
        self.upsample = upsample
        self.remat = remat

    def __call__(self, x: Image, skips: list[Image], embedding: Float[Array, "n e"], keys: Keys, context: Context | None = None) -> Image:
        """The block's output; takes what it needs from the end of `skips`."""
        for resnet, attention in itertools.zip_longest(self.resnets, self.attentions):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = _layer(resnet, attention, self.remat, x, embedding, next(keys), context)
        if self.upsample is None:
            return x
        _, height, width, _ = skips[-1].shape
        return self.upsample(x, (height, width))


def make_down_blocks(
    channels: Sequence[int],
    attentions: Sequence[MakeAttention | None],
    *,
    layers: int,
    resnet: MakeResnet,
    downsample: Callable[[int], Downsample],
    remat: bool,
) -> list[DownBlock]:
    """A block for each level of resolution, from the finest."""
    blocks = []
    for i, (width, attention) in enumerate(zip(channels, attentions, strict=True)):
        blocks.append(
            DownBlock(
                channels[max(i - 1, 0)],
                width,
                layers=layers,
                resnet=resnet,
                attention=attention,
                downsample=downsample(width) if i < len(channels) - 1 else None,
                remat=remat,
            )
        )
    return blocks


def make_up_blocks(
    channels: Sequence[int],
    attentions: Sequence[MakeAttention | None],
    *,
    layers: int,
    resnet: MakeResnet,
    upsample: Callable[[int], Upsample],
    remat: bool,
) -> list[UpBlock]:
    """A block for each level of resolution, `attentions` from the coarsest; `channels` and `layers` are those of the way down."""
    # Channels of the images that the way down leaves behind; the way up takes them from the end.
    left = [channels[0]]
    for width in channels[:-1]:
        left += [width] * (layers + 1)
    left += [channels[-1]] * layers
    blocks = []
    for i, attention in zip(reversed(range(len(channels))), attentions, strict=True):
        blocks.append(
            UpBlock(
                channels[min(i + 1, len(channels) - 1)],
                [left.pop() for _ in range(layers + 1)],
                channels[i],
                resnet=resnet,
                attention=attention,
                upsample=upsample(channels[i]) if i > 0 else None,
                remat=remat,
            )
        )
    return blocks


def down_and_up(
    down_blocks: Iterable[DownBlock],
    mid_block: MidBlock | None,
    up_blocks: Iterable[UpBlock],
    x: Image,
    embedding: Float[Array, "n e"],
    keys: Keys,
    context: Context | None = None,
) -> Image:
    """The image after all blocks, each image of the way down being handed to the way up."""
    skips = [x]
    for down_block in down_blocks:
        x, more = down_block(x, embedding, keys, context)
        skips += more
    if mid_block is not None:
        x = mid_block(x, embedding, keys, context)
    for up_block in up_blocks:
        x = up_block(x, skips, embedding, keys, context)
    return x


def dropout_keys(key: Key[Array, ""] | None, *, levels: int, layers: int) -> Keys:
    """A key for each ResNet block on the way down, in the middle and on the way up; none without `key`."""
    return itertools.repeat(None) if key is None else iter(jax.random.split(key, 2 + levels * (2 * layers + 1)))


class UNet(nnx.Module):
    """Output of the shape of the image, from a noisy image and its timestep.

    Parameters are float32. `dtype` is that of the computation (bfloat16 on accelerators); normalisations and softmax are float32
    whatever it is. With `remat` the backward pass computes each ResNet block and its attention again instead of keeping their
    intermediate values.
    """

    def __init__(self, config: UNetConfig, *, dtype: DTypeLike = jnp.float32, remat: bool = False, rngs: nnx.Rngs) -> None:
        channels = config.block_out_channels
        width = config.time_embedding_dim or 4 * channels[0]
        make_resnet = functools.partial(
            ResnetBlock,
            embedding=width,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            dropout=config.dropout,
            dtype=dtype,
            rngs=rngs,
        )
        make_attention = functools.partial(
            AttentionBlock, head_dim=config.attention_head_dim, groups=config.norm_num_groups, eps=config.norm_eps, dtype=dtype, rngs=rngs
        )

        self.conv_in = conv(config.in_channels, channels[0], 3, dtype=dtype, rngs=rngs)
        self.time_embedding = TimeEmbedding(channels[0], width, dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            make_down_blocks(
                channels,
                [make_attention if kind == "AttnDownBlock2D" else None for kind in config.down_block_types],
                layers=config.layers_per_block,
                resnet=make_resnet,
                downsample=functools.partial(Downsample, padding=config.downsample_padding, dtype=dtype, rngs=rngs),
                remat=remat,
            )
        )
        # diffusers gives the middle attention no norm where the time embedding scales and shifts, unless asked for one.
        mid_groups = config.attn_norm_num_groups or (None if config.resnet_time_scale_shift == "scale_shift" else config.norm_num_groups)
        mid_attention = functools.partial(make_attention, groups=mid_groups, output_scale=config.mid_block_scale_factor)
        self.mid_block = (
            None
            if config.mid_block_type is None
            else MidBlock(
                channels[-1],
                resnet=functools.partial(make_resnet, output_scale=config.mid_block_scale_factor),
                attention=mid_attention if config.add_attention else None,
                remat=remat,
            )
        )
        self.up_blocks = nnx.List(
            make_up_blocks(
                channels,
                [make_attention if kind == "AttnUpBlock2D" else None for kind in config.up_block_types],
                layers=config.layers_per_block,
                resnet=make_resnet,
                upsample=functools.partial(Upsample, dtype=dtype, rngs=rngs),
                remat=remat,
            )
        )
        self.conv_norm_out = GroupNorm(channels[0], config.norm_num_groups, eps=config.norm_eps, dtype=dtype)
        self.conv_out = conv(channels[0], config.out_channels, 3, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype

    def __call__(
        self, image: Float[Array, "n h w c"], timestep: Real[Array, " n"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "n h w k"]:
        """The network's output, float32 at least; with a `key`, dropout is on.

        Raises: ValueError at trace time if the image's size or channels do not fit.
        """
        config = self.config
        config.check_size(image.shape[1], image.shape[2])
        if image.shape[3] != config.in_channels:
            raise ValueError(f"images have {image.shape[3]} channels, the network takes {config.in_channels}")
        keys = dropout_keys(key if config.dropout > 0 else None, levels=len(config.block_out_channels), layers=config.layers_per_block)
        x = (2 * image - 1 if config.center_input_sample else image).astype(self.dtype)
        features = timestep_features(
            timestep, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        embedding = self.time_embedding(features.astype(self.dtype))
        x = down_and_up(self.down_blocks, self.mid_block, self.up_blocks, self.conv_in(x), embedding, keys)
        return self.conv_out(silu(self.conv_norm_out(x))).astype(at_least_float32(self.dtype))


def parameter_count(model: nnx.Module) -> int:
    """The number of trained numbers; of an abstract model too (`nnx.eval_shape`)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
