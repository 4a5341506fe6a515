"""Configurations of the U-Net: the fields of diffusers' config.json for a UNet2DModel, and the presets of this project."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from diffusion.published import check_class, check_fields, check_levels, check_share, read_fields

CLASS_NAME = "UNet2DModel"

# What the architecture may be made of; a published configuration that asks for something else is refused.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
_DOWN = ("DownBlock2D", "AttnDownBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D")
# Where they are given.
_POSITIVE = (
    "in_channels",
    "out_channels",
    "time_embedding_dim",
    "layers_per_block",
    "mid_block_scale_factor",
    "attention_head_dim",
    "norm_num_groups",
    "attn_norm_num_groups",
    "norm_eps",
)


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields of config.json, with diffusers' names, meanings and defaults.

    `num_train_timesteps` sizes a learned time embedding, which is not supported: it is kept, and has no effect.

    Raises: ValueError naming the field, its value and what would do.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int | float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: int | float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: int | float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: int | float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        """Refuse, in one line, what the network cannot be built from."""
        check_fields(self, allowed=_ALLOWED, positive=_POSITIVE)
        check_levels(self, down=_DOWN, up=_UP)
        check_share(self, "dropout")
        if self.sample_size is not None:
            self.check_size(*((self.sample_size,) * 2 if isinstance(self.sample_size, int) else self.sample_size))

    def check_size(self, height: int, width: int) -> None:
        """Raise a ValueError unless images of this size can be halved once a level and doubled again to the same size."""
        step = 2 ** (len(self.block_out_channels) - 1)
        if height < 1 or width < 1 or height % step or width % step:
            raise ValueError(
                f"images of {height} × {width} do not fit {len(self.block_out_channels)} levels of resolution: "
                f"height and width must be multiples of {step}"
            )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "UNetConfig":
        """The configuration in a parsed config.json.

        Names that begin with an underscore are diffusers' own record-keeping (class, version, origin) and say nothing about the
        network; the class must be the right one where it is given.

        Raises: ValueError for another class, an unknown field (naming the nearest known one) or a value that does not do.
        """
        check_class(fields, CLASS_NAME)
        return cls(**read_fields(cls, fields))

    def to_json(self) -> dict[str, Any]:
        """The contents of config.json: every field, and the class it belongs to."""
        return {"_class_name": CLASS_NAME} | dataclasses.asdict(self)


def _plain(levels: int, direction: str) -> tuple[str, ...]:
    return (f"{direction}Block2D",) * levels


def _digits(sample_size: int, *channels: int) -> UNetConfig:
    return UNetConfig(
        sample_size=sample_size,
        in_channels=1,
        out_channels=1,
        block_out_channels=channels,
        down_block_types=_plain(len(channels), "Down"),
        up_block_types=_plain(len(channels), "Up"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=None,
    )


_CIFAR = UNetConfig(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)

PRESETS = types.MappingProxyType(
    {
        # google/ddpm-cifar10-32 as published: 35,746,307 parameters.
        "ddpm-cifar10-32": _CIFAR,
        # 45.37 M parameters. The paper gives only the count (45 M); these channels, this depth and this attention are ours.
        "paper-45m": dataclasses.replace(_CIFAR, layers_per_block=3, down_block_types=_plain(4, "Down"), up_block_types=_plain(4, "Up")),
        # Greyscale, for a CPU: 0.65 M, 0.64 M and 1.69 M parameters; attention at 4 × 4 and at 7 × 7, in the middle block alone.
        "digits-8": _digits(8, 32, 64),
        "digits-small": _digits(28, 16, 32, 64),
        "digits": _digits(28, 32, 64, 96),
    }
)
