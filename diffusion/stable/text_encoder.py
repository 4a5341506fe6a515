r"""CLIP's text encoder in Flax NNX: the same function of the same parameters as transformers' CLIPTextModel.

A transformer over the tokens of a prompt in which each token sees itself and those before it. What pads a prompt is seen as any other
token is: Stable Diffusion was trained with all 77 positions, and its U-Net attends to every one of them.
Source: Radford et al. 2021 (arXiv:2103.00020), Section 2.4.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffusion.backend import compiler_options
from diffusion.layers import LayerNorm, at_least_float32, linear
from diffusion.published import check_fields, read_fields
from diffusion.weights import read_network

WEIGHTS = "model.safetensors"
ARCHITECTURE = "CLIPTextModel"
MODEL_TYPE = "clip_text_model"

# Tensors of published files that are no parameters: 0, 1, 2, …
IGNORED = ("text_model.embeddings.position_ids",)

# Record-keeping of transformers, and a dropout that no version of it applies.
_RECORDS = ("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "dropout")
_ALLOWED = {"hidden_act": ("quick_gelu",)}
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "layer_norm_eps",
)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The fields of config.json, with transformers' names, meanings and defaults.

    Those of initialisation, training (`attention_dropout`), the projection to images (`projection_dim`) and the tokens that begin and
    pad a prompt (`bos_token_id`, `pad_token_id`) are kept and have no effect. `eos_token_id` is 2 in published files, which is wrong:
    prompts end with the last token of the vocabulary.

    Raises: ValueError naming the field, its value and what would do.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: int | float = 1e-5
    attention_dropout: int | float = 0.0
    initializer_range: int | float = 0.02
    initializer_factor: int | float = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407

    def __post_init__(self) -> None:
        """Refuse, in one line, what the network cannot be built from."""
        check_fields(self, allowed=_ALLOWED, positive=_POSITIVE)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size = {self.hidden_size} must be a multiple of num_attention_heads = {self.num_attention_heads}")
        if self.eos_token_id not in (None, 2, self.vocab_size - 1):
            raise ValueError(
                f"eos_token_id = {self.eos_token_id} is not supported: prompts end with the last of vocab_size = {self.vocab_size} tokens, "
                f"{self.vocab_size - 1} (or 2, which published files say in error)"
            )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "CLIPTextConfig":
        """The configuration in a parsed config.json.

        Names that begin with an underscore, dtypes and versions are transformers' own record-keeping and say nothing about the network;
        the architecture must be the right one where it is given.

        Raises: ValueError for another architecture, an unknown field (naming the nearest known one) or a value that does not do.
        """
        if (model_type := fields.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
            raise ValueError(f"config.json describes a {model_type!r}, not a {MODEL_TYPE}")
        if (architectures := fields.get("architectures")) not in (None, [ARCHITECTURE]):
            raise ValueError(f"config.json describes {architectures!r}, not {[ARCHITECTURE]}")
        return cls(**read_fields(cls, fields, records=_RECORDS))

    def to_json(self) -> dict[str, Any]:
        """The contents of config.json: every field, and the architecture it belongs to."""
        return {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE} | dataclasses.asdict(self)


class Embeddings(nnx.Module):
    """A vector for each token of the vocabulary, and one for each position."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.initializer_range)
        width = config.hidden_size
        self.token_embedding = nnx.Embed(config.vocab_size, width, dtype=dtype, embedding_init=init, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, width, dtype=dtype, embedding_init=init, rngs=rngs)

    def __call__(self, ids: Int[Array, "n l"]) -> Float[Array, "n l f"]:
        """The sum of the two; NaN for a token that is not in the vocabulary."""
        tokens = jnp.where(ids < 0, jnp.iinfo(ids.dtype).max, ids)  # else they count from the end
        return self.token_embedding(tokens) + self.position_embedding(jnp.arange(ids.shape[1]))[None]


class CausalAttention(nnx.Module):
    """Multi-head attention of each token over itself and those before it."""

    def __init__(self, features: int, *, heads: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.q_proj = linear(features, features, dtype=dtype, rngs=rngs)
        self.k_proj = linear(features, features, dtype=dtype, rngs=rngs)
        self.v_proj = linear(features, features, dtype=dtype, rngs=rngs)
        self.out_proj = linear(features, features, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Float[Array, "n l f"]) -> Float[Array, "n l f"]:
        """softmax(q·k/√d) v over what is not later, projected."""
        query, key, value = (p(x).reshape(*x.shape[:2], self.heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        wide = at_least_float32(query.dtype)
        logits = jnp.einsum("nlhd,nmhd->nhlm", query, key, preferred_element_type=wide) / math.sqrt(query.shape[-1])
        later = jnp.triu(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool), k=1)
        weights = jax.nn.softmax(jnp.where(later, -jnp.inf, logits), axis=-1).astype(value.dtype)
        return self.out_proj(jnp.einsum("nhlm,nmhd->nlhd", weights, value).reshape(x.shape))


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x σ(1.702 x), the stand-in for GELU that OpenAI's CLIP was trained with."""
    return x * nnx.sigmoid(1.702 * x)


class MLP(nnx.Module):
    """Two dense layers with `quick_gelu` between them."""

    def __init__(self, features: int, inner: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.fc1 = linear(features, inner, dtype=dtype, rngs=rngs)
        self.fc2 = linear(inner, features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n l f"]) -> Float[Array, "n l f"]:
        """Each token by itself."""
        return self.fc2(quick_gelu(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Attention, then two dense layers, each normalised first and beside a shortcut."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        self.layer_norm1 = LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)
        self.self_attn = CausalAttention(width, heads=config.num_attention_heads, dtype=dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)
        self.mlp = MLP(width, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n l f"]) -> Float[Array, "n l f"]:
        """The layer's output."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The layers, one after the other."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([EncoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Float[Array, "n l f"]) -> Float[Array, "n l f"]:
        """The last layer's output."""
        for layer in self.layers:
            x = layer(x)
        return x


class TextTransformer(nnx.Module):
    """Embeddings, layers, and a last normalisation."""

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=at_least_float32(dtype))

    def __call__(self, ids: Int[Array, "n l"]) -> Float[Array, "n l f"]:
        """A vector for each token, float32 at least."""
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class TextEncoding(NamedTuple):
    """What the U-Net attends to, a vector for each token; and the vector of the token that ends the prompt."""

    last_hidden_state: Float[Array, "n l f"]
    pooler_output: Float[Array, "n f"]


class TextEncoder(nnx.Module):
    """Vectors for the tokens of a prompt.

    Parameters are float32. `dtype` is that of the computation; normalisations and softmax are float32 at least whatever it is, and so
    is the output.
    """

    def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.text_model = TextTransformer(config, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(self, ids: Int[Array, "n l"]) -> TextEncoding:
        """The encoding of tokens as `diffusion.stable.tokenizer` gives them; NaN for a prompt with one that is in no vocabulary.

        The prompt is taken to end at the first of its largest tokens.

        Raises: ValueError at trace time for no tokens, or more than there are positions.
        """
        if not 1 <= ids.shape[1] <= self.config.max_position_embeddings:
            raise ValueError(f"{ids.shape[1]} tokens, the text encoder takes 1 to {self.config.max_position_embeddings}")
        hidden = self.text_model(ids)
        end = jnp.argmax(ids, axis=1)
        return TextEncoding(hidden, jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0])


def encode_texts(encoder: TextEncoder, ids: Int[np.ndarray, "n l"]) -> Float[Array, "n l f"]:
    """What the U-Net attends to for tokens; one program for all encoders that differ in their parameters alone."""
    graphdef, params = nnx.split(encoder, nnx.Param)
    return _program(graphdef)(params, jnp.asarray(ids))


@functools.lru_cache
def _program(graphdef: Any) -> Callable[..., Any]:
    def encode_text(params: Any, ids: Int[Array, "n l"]) -> Float[Array, "n l f"]:
        return nnx.merge(graphdef, params)(ids).last_hidden_state

    return jax.jit(encode_text, compiler_options=compiler_options())


def read_text_encoder(folder: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> TextEncoder:
    """The text encoder in a folder of transformers, old or new; `dtype` as for `TextEncoder`.

    Raises: ValueError in one line if a file is missing, damaged, or not of this architecture.
    """
    return read_network(
        folder,
        CLIPTextConfig.from_json,
        lambda config: TextEncoder(config, dtype=dtype, rngs=nnx.Rngs(0)),
        weights=WEIGHTS,
        ignored=IGNORED,
    )
