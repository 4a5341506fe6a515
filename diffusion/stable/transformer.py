"""Attention of an image's pixels to each other and to a text: diffusers' Transformer2DModel in Flax NNX, channels last."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diffusion.layers import Attention, GroupNorm, LayerNorm, conv, linear

_GROUP_EPS = 1e-6  # not the one of the ResNet blocks
_LAYER_EPS = 1e-5


class GEGLU(nnx.Module):
    """x → a GELU(b), where a and b are the halves of a dense layer's output; the exact GELU, b Φ(b).

    Source: Shazeer 2020, "GLU variants improve transformer".
    """

    def __init__(self, features: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.proj = linear(features, 2 * width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n l f"]) -> Float[Array, "n l w"]:
        """The gated features."""
        features, gate = jnp.split(self.proj(x), 2, axis=-1)
        return features * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """A gated dense layer four times as wide, and one back."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = 4 * features
        # Named by their place in a sequence, where number 1 is a dropout without parameters, of rate 0.
        gate, back = GEGLU(features, width, dtype=dtype, rngs=rngs), linear(width, features, dtype=dtype, rngs=rngs)
        self.net: nnx.List[Any] = nnx.List([gate, None, back])

    def __call__(self, x: Float[Array, "n l f"]) -> Float[Array, "n l f"]:
        """The same for each position."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Attention to the sequence itself, attention to a context, and a feed-forward layer, each normalised first and beside a shortcut."""

    def __init__(self, features: int, *, heads: int, context_features: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        head_dim = features // heads
        self.norm1 = LayerNorm(features, eps=_LAYER_EPS, dtype=dtype)
        self.attn1 = Attention(features, heads=heads, head_dim=head_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(features, eps=_LAYER_EPS, dtype=dtype)
        self.attn2 = Attention(
            features, heads=heads, head_dim=head_dim, context_features=context_features, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.norm3 = LayerNorm(features, eps=_LAYER_EPS, dtype=dtype)
        self.ff = FeedForward(features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n l f"], context: Float[Array, "n m g"]) -> Float[Array, "n l f"]:
        """The block's output."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """One transformer block over the pixels of an image, between two convolutions of 1 × 1 and beside a shortcut."""

    def __init__(self, channels: int, *, heads: int, context_features: int, groups: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.norm = GroupNorm(channels, groups, eps=_GROUP_EPS, dtype=dtype)
        self.proj_in = conv(channels, channels, 1, dtype=dtype, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [TransformerBlock(channels, heads=heads, context_features=context_features, dtype=dtype, rngs=rngs)]
        )
        self.proj_out = conv(channels, channels, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"], context: Float[Array, "n m g"]) -> Float[Array, "n h w c"]:
        """The image, having attended to itself and to `context`."""
        pixels = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            pixels = block(pixels, context)
        return self.proj_out(pixels.reshape(x.shape)) + x
