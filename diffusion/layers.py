r"""The layers that diffusers' U-Nets and autoencoders are made of, in Flax NNX.

Images are channels last. Parameters are float32; convolutions, products and activations run in the `dtype` given; statistics of
normalisations, the softmax of attention and the sinusoids run in float32 at least. No module is shared, and none holds state or random
numbers: a dropout key is an argument, and no key means no dropout. Attributes carry the names that diffusers gives to the tensors.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Real

from diffusion import backend

Model = TypeVar("Model", bound=nnx.Module)


def _bound(fan_in: int) -> float:
    """Weights and biases start as U(±fan_in^{-1/2}), as torch's do: training curves can be compared."""
    return fan_in**-0.5


def _uniform(fan_in: int) -> Callable[..., Array]:
    return lambda key, shape, dtype, *_: jax.random.uniform(key, shape, dtype, -_bound(fan_in), _bound(fan_in))


def initialise(make: Callable[[nnx.Rngs], Model], key: Key[Array, ""]) -> Model:
    """The model `make(rngs)` with the random numbers of all parameters drawn at once.

    The same law as calling `make` directly, which compiles one draw for each shape: tens of seconds for a U-Net. Embeddings are
    N(0, 0.02²), as CLIP's are published (`initializer_range`), whatever `make` says.
    """
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    variables = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    sizes = [math.prod(variable.shape) for variable in variables.values()]
    draws = np.split(np.asarray(jax.random.uniform(key, (sum(sizes),), jnp.float32, -1, 1)), np.cumsum(sizes)[:-1])
    for number, ((path, variable), draw) in enumerate(zip(variables.items(), draws, strict=True)):
        kernel = variables.get((*path[:-1], "kernel"))
        if path[-1] == "embedding":
            value = 0.02 * np.asarray(jax.random.normal(jax.random.fold_in(key, number), variable.shape, jnp.float32))
        elif kernel is None:  # a normalisation
            value = np.full(variable.shape, path[-1] == "scale", np.float32)
        else:
            value = (_bound(math.prod(kernel.shape[:-1])) * draw).reshape(variable.shape).astype(np.float32)
        variable.set_value(jnp.asarray(value))
    return model


def conv(
    in_channels: int,
    out_channels: int,
    size: int,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] | None = None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution; `padding` is for each side, or (before, after), by default what keeps the size."""
    before, after = (padding, padding) if isinstance(padding, int) else padding or (size // 2, size // 2)
    init = _uniform(in_channels * size**2)
    return nnx.Conv(
        in_channels,
        out_channels,
        (size, size),
        strides=stride,
        padding=((before, after), (before, after)),
        dtype=dtype,
        kernel_init=init,
        bias_init=init,
        conv_general_dilated=backend.convolve,
        rngs=rngs,
    )


def linear(in_features: int, out_features: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer over the last axis."""
    init = _uniform(in_features)
    return nnx.Linear(in_features, out_features, use_bias=use_bias, dtype=dtype, kernel_init=init, bias_init=init, rngs=rngs)


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of normalisations, softmax and outputs for a computation in `dtype`."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def dropout(x: Float[Array, "*shape"], rate: int | float, key: Key[Array, ""] | None) -> Float[Array, "*shape"]:
    """Zero each entry with probability `rate` and scale the others up; the identity without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x σ(x), computed again for the derivative: an array less to keep for each normalisation, which takes less time too."""
    return jax.checkpoint(nnx.silu)(x)


class GroupNorm(nnx.Module):
    """Normalise over space and the channels of a group, then scale and shift each channel."""

    def __init__(self, channels: int, groups: int, *, eps: int | float, dtype: DTypeLike) -> None:
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be divided into norm_num_groups = {groups} equal groups")
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.groups = groups
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """In float32 at least; see `diffusion.backend.normalise`."""
        x = x.astype(at_least_float32(x.dtype))
        scale, bias = (p[...].astype(x.dtype) for p in (self.scale, self.bias))
        return backend.normalise(x, scale, bias, groups=self.groups, eps=self.eps).astype(self.dtype)


class LayerNorm(nnx.Module):
    """Normalise over the last axis, then scale and shift."""

    def __init__(self, features: int, *, eps: int | float, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "n l f"]) -> Float[Array, "n l f"]:
        """In float32 at least; a mean that is large beside the deviations costs no digits."""
        x = x.astype(at_least_float32(x.dtype))
        scale, bias = (p[...].astype(x.dtype)[None, None] for p in (self.scale, self.bias))
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


def timestep_features(
    timestep: Real[Array, " n"], features: int, *, flip_sin_to_cos: bool, freq_shift: int | float, max_period: float = 10_000.0
) -> Float[Array, "n {features}"]:
    """Sinusoids of the timestep at geometric frequencies, float32: sines then cosines, or the other way round if flipped.

    Frequencies are rounded to float32 in the order in which published models were trained: at t = 1,000 a rounding of the frequency
    is 6e-5 in the sinusoid.
    """
    half = features // 2
    exponents = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp(exponents / np.float32(half - freq_shift))
    angles = timestep.astype(jnp.float32)[:, None] * frequencies[None]
    waves = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(waves, axis=1), ((0, 0), (0, features % 2)))


class TimeEmbedding(nnx.Module):
    """Two dense layers with SiLU between them."""

    def __init__(self, features: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.linear_1 = linear(features, width, dtype=dtype, rngs=rngs)
        self.linear_2 = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "n f"]) -> Float[Array, "n e"]:
        """The embedding that every ResNet block takes."""
        return self.linear_2(silu(self.linear_1(features)))


class ResnetBlock(nnx.Module):
    """GroupNorm, SiLU, convolution, twice, beside a shortcut; the time embedding enters between the two.

    Without `embedding` (an autoencoder's) there is no time. With `scale_shift` the embedding scales and shifts the second norm's
    output instead of being added before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding: int | None,
        groups: int,
        eps: int | float,
        scale_shift: bool = False,
        dropout: int | float = 0.0,
        output_scale: int | float = 1.0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = GroupNorm(in_channels, groups, eps=eps, dtype=dtype)
        self.conv1 = conv(in_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.time_emb_proj = None if embedding is None else linear(embedding, out_channels * (1 + scale_shift), dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, groups, eps=eps, dtype=dtype)
        self.conv2 = conv(out_channels, out_channels, 3, dtype=dtype, rngs=rngs)
        self.conv_shortcut = None if in_channels == out_channels else conv(in_channels, out_channels, 1, dtype=dtype, rngs=rngs)
        self.scale_shift = scale_shift
        self.dropout = dropout
        self.output_scale = output_scale

    def __call__(
        self, x: Float[Array, "n h w c"], embedding: Float[Array, "n e"] | None = None, key: Key[Array, ""] | None = None
    ) -> Float[Array, "n h w k"]:
        """The block's output; `key` turns dropout on."""
        if (self.time_emb_proj is None) != (embedding is None):
            raise ValueError("a block made for a time embedding needs one, and one made without takes none")
        h = self.conv1(silu(self.norm1(x)))
        if self.time_emb_proj is None or embedding is None:
            h = self.norm2(h)
        else:
            time = self.time_emb_proj(silu(embedding))[:, None, None]
            if self.scale_shift:
                scale, shift = jnp.split(time, 2, axis=-1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + time)
        h = self.conv2(dropout(silu(h), self.dropout, key))
        return ((x if self.conv_shortcut is None else self.conv_shortcut(x)) + h) / self.output_scale


class Attention(nnx.Module):
    """Multi-head attention of a sequence over itself, or over a context."""

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        head_dim: int,
        context_features: int | None = None,
        use_bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        inner = heads * head_dim
        context_features = context_features or features
        self.to_q = linear(features, inner, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.to_k = linear(context_features, inner, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.to_v = linear(context_features, inner, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.to_out = linear(inner, features, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Float[Array, "n l f"], context: Float[Array, "n m g"] | None = None) -> Float[Array, "n l f"]:
        """softmax(q·k/√d) v, projected."""
        context = x if context is None else context
        query, key, value = (p.reshape(*p.shape[:2], self.heads, -1) for p in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(backend.attend(query, key, value).reshape(*x.shape[:2], -1))


class AttentionBlock(nnx.Module):
    """Self-attention over the pixels of an image, normalised first (unless `groups` is None), beside a shortcut."""

    def __init__(
        self,
        channels: int,
        *,
        head_dim: int | None,
        groups: int | None,
        eps: int | float,
        output_scale: int | float = 1.0,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        head_dim = channels if head_dim is None else head_dim
        if not 1 <= head_dim <= channels:
            raise ValueError(f"attention_head_dim = {head_dim} does not fit into {channels} channels")
        self.group_norm = None if groups is None else GroupNorm(channels, groups, eps=eps, dtype=dtype)
        self.attention = Attention(channels, heads=channels // head_dim, head_dim=head_dim, use_bias=True, dtype=dtype, rngs=rngs)
        self.output_scale = output_scale

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """The block's output."""
        normal = x if self.group_norm is None else self.group_norm(x)
        return (self.attention(normal.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape) + x) / self.output_scale


class Downsample(nnx.Module):
    """A convolution of stride 2; with `padding` 0 a row and a column of zeros are added at the end alone."""

    def __init__(self, channels: int, *, padding: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.conv = conv(channels, channels, 3, stride=2, padding=padding or (0, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n _ _ c"]:
        """Half the size; half of an odd size is rounded up, or down with `padding` 0."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Every pixel four times, then a convolution."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.conv = conv(channels, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"], size: tuple[int, int] | None = None) -> Float[Array, "n _ _ c"]:
        """Twice the size, or `size`: that of an image whose half, rounded up, is `x`. The last row or column is then left out.

        That is the nearest-neighbour interpolation of torch, which rounds down: pixel i shows ⌊i n / size⌋, which is ⌊i / 2⌋ for
        size = 2 n and 2 n − 1. `jax.image.resize` compares the middles of pixels, and differs.

        Raises: ValueError at trace time for any other size.
        """
        doubled = (2 * x.shape[1], 2 * x.shape[2])
        size = size or doubled
        if any(whole - part not in (0, 1) for whole, part in zip(doubled, size, strict=True)):
            raise ValueError(f"{x.shape[1]} × {x.shape[2]} pixels cannot be doubled to {size[0]} × {size[1]}: twice as many, or one less")
        assert self.conv.bias is not None
        kernel, bias = (p[...].astype(x.dtype) for p in (self.conv.kernel, self.conv.bias))
        return backend.convolve_doubled(x, kernel, size) + bias[None, None, None]
