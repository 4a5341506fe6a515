"""Configuration of the denoising network of Stable Diffusion: the fields of diffusers' config.json for a UNet2DConditionModel."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from diffusion.published import check_class, check_fields, check_levels, check_share, read_fields

CLASS_NAME = "UNet2DConditionModel"

# What the architecture may be made of; a published configuration that asks for something else is refused.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "downsample_padding": (1,),
    "act_fn": ("silu", "swish"),
}
_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
_POSITIVE = (
    "in_channels",
    "out_channels",
    "time_embedding_dim",
    "layers_per_block",
    "mid_block_scale_factor",
    "cross_attention_dim",
    "attention_head_dim",
    "norm_num_groups",
    "norm_eps",
)
# Options of diffusers for later networks, which newer versions write into every config.json: read where they say what version 1 does.
# Where that is false, null says the same.
_LATER: Mapping[str, Any] = types.MappingProxyType(
    {
        "only_cross_attention": False,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "use_linear_projection": False,
        "class_embed_type": None,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "num_class_embeds": None,
        "upcast_attention": False,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "projection_class_embeddings_input_dim": None,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "mid_block_only_cross_attention": False,
        "cross_attention_norm": None,
        "addition_embed_type_num_heads": 64,
    }
)


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig:
    """The fields of config.json, with diffusers' names and meanings; the defaults are those of Stable Diffusion v1.5.

    `attention_head_dim` is the *number* of attention heads at every level, whatever its name says (it is a width in a UNet2DModel).
    `sample_size`, the side of the latents it was trained on, is kept and has no effect: latents of any size do.

    Raises: ValueError naming the field, its value and what would do.
    """

    sample_size: int | tuple[int, int] | None = 64
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    time_embedding_dim: int | None = None
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: int | float = 1
    dropout: int | float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: int | float = 1e-5
    cross_attention_dim: int = 768
    attention_head_dim: int = 8

    def __post_init__(self) -> None:
        """Refuse, in one line, what the network cannot be built from."""
        check_fields(self, allowed=_ALLOWED, positive=_POSITIVE)
        check_levels(self, down=_DOWN, up=_UP, divisors=("norm_num_groups", "attention_head_dim"))
        check_share(self, "dropout")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "UNet2DConditionConfig":
        """The configuration in a parsed config.json; names that begin with an underscore are diffusers' own record-keeping.

        Raises: ValueError for another class, an unknown field (naming the nearest known one) or a value that does not do.
        """
        check_class(fields, CLASS_NAME)
        for name, version_1 in _LATER.items():
            if (value := fields.get(name, version_1)) != version_1 and (value is not None or version_1):
                raise ValueError(f"{name} = {value!r} is not supported; what is: {version_1!r}")
        # What diffusers takes a missing field for, where that is not version 1.5.
        missing = {"sample_size": None, "cross_attention_dim": 1280}
        return cls(**(missing | read_fields(cls, fields, records=_LATER.keys())))

    def to_json(self) -> dict[str, Any]:
        """The contents of config.json: every field, and the class it belongs to."""
        return {"_class_name": CLASS_NAME} | dataclasses.asdict(self)
