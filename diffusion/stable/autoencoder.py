r"""The autoencoder of latent diffusion in Flax NNX: the same function of the same parameters as diffusers' AutoencoderKL, channels last.

An image of pixels in −1 … 1 is encoded as a normal distribution over latents z, one for each 8 × 8 pixels (a halving between each two
levels), and latents are decoded to an image. The diffusion process runs on `scaling_factor` · z, which has variance 1 or so.
Source: Rombach et al. 2022, Appendix G.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Shaped

from diffusion.backend import compiler_options
from diffusion.layers import AttentionBlock, Downsample, GroupNorm, ResnetBlock, Upsample, at_least_float32, conv, silu
from diffusion.pixels import to_model
from diffusion.published import check_class, check_fields, check_levels, read_fields

CLASS_NAME = "AutoencoderKL"

Image: TypeAlias = Float[Array, "n _ _ _"]
MakeResnet: TypeAlias = Callable[[int, int], ResnetBlock]

# What the architecture may be made of; a published configuration that asks for something else is refused.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
}
_DOWN = ("DownEncoderBlock2D",)
_UP = ("UpDecoderBlock2D",)
_POSITIVE = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "scaling_factor")

_EPS = 1e-6  # of every normalisation
_LOG_VARIANCE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """The fields of config.json, with diffusers' names, meanings and defaults.

    `sample_size`, the side of the images it was trained on, and `force_upcast`, that pipelines in half precision should run it in
    float32, are kept and have no effect: whoever makes the autoencoder says the dtype.

    Raises: ValueError naming the field, its value and what would do.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: int | float = 0.18215
    shift_factor: None = None
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        """Refuse, in one line, what the autoencoder cannot be built from."""
        check_fields(self, allowed=_ALLOWED, positive=_POSITIVE)
        check_levels(self, down=_DOWN, up=_UP)

    @property
    def factor(self) -> int:
        """How many pixels a latent has on each side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of an image; up to `factor` − 1 rows and columns at its end have none of their own.

        Raises: ValueError for an image of less than one latent.
        """
        if min(height, width) < self.factor:
            raise ValueError(f"an image of {height} × {width} cannot be encoded: height and width must be at least {self.factor}")
        return height // self.factor, width // self.factor

    def whole_latent_size(self, height: int, width: int) -> tuple[int, int]:
        """The same of an image that is decoded to its own size.

        Raises: ValueError besides for an image whose last rows or columns have no latents.
        """
        size, factor = self.latent_size(height, width), self.factor
        if height % factor or width % factor:
            raise ValueError(f"images of {height} × {width} are not decoded from latents: height and width must be multiples of {factor}")
        return size

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "AutoencoderKLConfig":
        """The configuration in a parsed config.json; names that begin with an underscore are diffusers' own record-keeping.

        Raises: ValueError for another class, an unknown field (naming the nearest known one) or a value that does not do.
        """
        check_class(fields, CLASS_NAME)
        return cls(**read_fields(cls, fields))

    def to_json(self) -> dict[str, Any]:
        """The contents of config.json: every field, and the class it belongs to."""
        return {"_class_name": CLASS_NAME} | dataclasses.asdict(self)


class DiagonalGaussian(NamedTuple):
    """Independent normal distributions, one for each number of the latents, of which the mean is the most likely; float32 at least."""

    mean: Float[Array, "n h w z"]
    log_variance: Float[Array, "n h w z"]

    @property
    def divergence(self) -> Float[Array, "n h w z"]:
        """½(μ² + s² − 1 − log s²): by which each differs from N(0, 1), in nats (Kingma and Welling 2013, Eq. (10))."""
        return 0.5 * (jnp.square(self.mean) + jnp.exp(self.log_variance) - 1 - self.log_variance)

    def sample(self, key: Key[Array, ""]) -> Float[Array, "n h w z"]:
        """Latents drawn from the distributions."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * jax.random.normal(key, self.mean.shape, self.mean.dtype)


def _resnets(make: MakeResnet, in_channels: int, out_channels: int, layers: int) -> list[ResnetBlock]:
    return [make(in_channels if i == 0 else out_channels, out_channels) for i in range(layers)]


class Block(nnx.Module):
    """ResNet blocks, and half or twice the size in the end."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        layers: int,
        resnet: MakeResnet,
        downsample: Downsample | None = None,
        upsample: Upsample | None = None,
    ) -> None:
        self.resnets = nnx.List(_resnets(resnet, in_channels, out_channels, layers))
        self.downsample = downsample
        self.upsample = upsample

    def __call__(self, x: Image) -> Image:
        """The block's output."""
        for layer in (*self.resnets, self.downsample, self.upsample):
            x = x if layer is None else layer(x)
        return x


class MidBlock(nnx.Module):
    """A ResNet block, attention of one head over all pixels, and another ResNet block."""

    def __init__(self, channels: int, *, resnet: MakeResnet, groups: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.resnets = nnx.List(_resnets(resnet, channels, channels, 2))
        self.attentions = nnx.List([AttentionBlock(channels, head_dim=None, groups=groups, eps=_EPS, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Image) -> Image:
        """The block's output."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nnx.Module):
    """Twice as many numbers as latents, from an image."""

    def __init__(self, config: AutoencoderKLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        channels = config.block_out_channels
        groups = config.norm_num_groups
        resnet = functools.partial(ResnetBlock, embedding=None, groups=groups, eps=_EPS, dtype=dtype, rngs=rngs)
        self.conv_in = conv(config.in_channels, channels[0], 3, dtype=dtype, rngs=rngs)
        self.down_blocks: nnx.List[Block] = nnx.List([])
        for i, width in enumerate(channels):
            last = i == len(channels) - 1
            downsample = None if last else Downsample(width, padding=0, dtype=dtype, rngs=rngs)
            self.down_blocks.append(
                Block(channels[max(i - 1, 0)], width, layers=config.layers_per_block, resnet=resnet, downsample=downsample)
            )
        self.mid_block = MidBlock(channels[-1], resnet=resnet, groups=groups, dtype=dtype, rngs=rngs)
        self.conv_norm_out = GroupNorm(channels[-1], groups, eps=_EPS, dtype=dtype)
        self.conv_out = conv(channels[-1], 2 * config.latent_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Image) -> Image:
        """The encoder's output."""
        x = self.conv_in(x)
        for down_block in self.down_blocks:
            x = down_block(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """An image, from latents; one ResNet block more at each level than the encoder has."""

    def __init__(self, config: AutoencoderKLConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        channels = config.block_out_channels[::-1]
        groups = config.norm_num_groups
        resnet = functools.partial(ResnetBlock, embedding=None, groups=groups, eps=_EPS, dtype=dtype, rngs=rngs)
        self.conv_in = conv(config.latent_channels, channels[0], 3, dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(channels[0], resnet=resnet, groups=groups, dtype=dtype, rngs=rngs)
        self.up_blocks: nnx.List[Block] = nnx.List([])
        for i, width in enumerate(channels):
            last = i == len(channels) - 1
            upsample = None if last else Upsample(width, dtype=dtype, rngs=rngs)
            self.up_blocks.append(
                Block(channels[max(i - 1, 0)], width, layers=config.layers_per_block + 1, resnet=resnet, upsample=upsample)
            )
        self.conv_norm_out = GroupNorm(channels[-1], groups, eps=_EPS, dtype=dtype)
        self.conv_out = conv(channels[-1], config.out_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Image) -> Image:
        """The decoder's output."""
        x = self.mid_block(self.conv_in(x))
        for up_block in self.up_blocks:
            x = up_block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Images to distributions of latents, and latents to images.

    Parameters are float32. `dtype` is that of the computation; normalisations, softmax and outputs are float32 whatever it is. The
    published decoders overflow in float16.
    """

    def __init__(self, config: AutoencoderKLConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        latent = config.latent_channels
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = conv(2 * latent, 2 * latent, 1, dtype=dtype, rngs=rngs)
        self.post_quant_conv = conv(latent, latent, 1, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype

    def encode(self, image: Float[Array, "n h w c"]) -> DiagonalGaussian:
        """The distribution of the latents of each image; multiply them by `scaling_factor` for the diffusion process.

        Raises: ValueError at trace time if the image is too small, or has other channels.
        """
        self.config.latent_size(image.shape[1], image.shape[2])
        check_channels("images", image, self.config.in_channels)
        moments = self.quant_conv(self.encoder(image.astype(self.dtype))).astype(at_least_float32(self.dtype))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return DiagonalGaussian(mean, jnp.clip(log_variance, *_LOG_VARIANCE))

    def decode(self, latents: Float[Array, "n h w z"]) -> Float[Array, "n _ _ c"]:
        """The image of each latent, `factor` times as high and wide; divide by `scaling_factor` what the diffusion process ends with.

        Raises: ValueError at trace time if the latents have other channels.
        """
        check_channels("latents", latents, self.config.latent_channels)
        return self.decoder(self.post_quant_conv(latents.astype(self.dtype))).astype(at_least_float32(self.dtype))


@functools.lru_cache
def image_encoder(graphdef: Any) -> Callable[..., DiagonalGaussian]:
    """Of parameters and images as files hold them, the latents; one program for all autoencoders that differ in parameters alone."""

    def encode_image(params: Any, pixels: Shaped[Array, "n h w c"]) -> DiagonalGaussian:
        return nnx.merge(graphdef, params).encode(to_model(pixels))

    return jax.jit(encode_image, compiler_options=compiler_options())


def check_channels(what: str, x: Shaped[Array, "n h w c"] | Shaped[np.ndarray, "n h w c"], channels: int) -> None:
    """Raises ValueError unless an autoencoder that takes so many channels takes these images or latents."""
    if x.shape[-1] != channels:
        raise ValueError(f"{what} have {x.shape[-1]} channels, the autoencoder takes {channels}")
