r"""What is chosen by the device that programs are compiled for: the one place where a CPU gets another program than a GPU or a TPU.

On accelerators nothing is: the plain formulations and the compiler's defaults. On CPUs four operations are written so that XLA's
code for them is fast; they are the same functions, to rounding. `jax.jvp`, `jax.vjp`, `jax.vmap` and higher orders work as with the plain
formulations: the one derivative that is given, of `normalise`, is a `jax.custom_jvp`, whose rule JAX transposes.

- `normalise`: sums over space, then over groups; the derivative reads the image three times instead of eight.
- `convolve`: an image of fewer pixels than the kernel has taps is a product with the taps that see it. XLA would convolve the kernel
  with the image, and turn a copy of it round first: 10 to 50 times slower for the 1,280 channels of Stable Diffusion.
- `convolve_doubled`: an image with every pixel four times, convolved with 3 × 3, is four convolutions of the small image with 2 × 2.
- `attend`: logits of one head and a few hundred queries at a time, which stay in the cache; the derivative computes them again.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from numpy.typing import NDArray

# On CPUs jaxlib 0.10 and later send products and convolutions through a library (YNNPACK) that takes up to twice the time of the code
# used before; its reductions are three times as fast as XLA's own.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Adding up the taps of a kernel takes as long as the four small convolutions save in this many pixels of the small images.
_PIXELS = 256
# Rows and columns, of which one is looked at to learn roughly where the mean of an image is.
_EVERY = 4
# Queries at a time: 4 MB of logits over the 4,096 pixels of a latent image.
_QUERIES = 256


@functools.cache
def compiler_options() -> dict[str, str] | None:
    """The `compiler_options` of `jax.jit` for networks on the default backend; None for the defaults.

    None on everything but a CPU, and where this jaxlib does not know the options (it is asked once, by compiling an empty program).
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: None, compiler_options=_CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:  # "No such compile option"
        return None
    return dict(_CPU_OPTIONS)


def normalise(
    x: Float[Array, "n h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"], *, groups: int, eps: int | float
) -> Float[Array, "n h w c"]:
    """Mean 0 and variance 1 over space and the channels of each group, then `scale` and `bias` of each channel.

    Accuracy: a mean that is large beside the deviations costs no digits (it is E[x²] − E[x]² that would lose them).
    """
    return (_normalise_by_channel if jax.default_backend() == "cpu" else _normalise)(x, scale, bias, groups, eps)


def convolve(
    image: Float[Array, "n h w c"],
    kernel: Float[Array, "r s c k"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **plain: Any,
) -> Float[Array, "n _ _ k"]:
    """The image convolved with the kernel, zeros around it; what `nnx.Conv` takes in the place of `jax.lax.conv_general_dilated`.

    Args:
        plain: that function's other arguments. There are no dilations and no groups.
    """
    by_taps = jax.default_backend() == "cpu" and image.shape[1] * image.shape[2] < kernel.shape[0] * kernel.shape[1]
    if by_taps:
        return _convolve_by_taps(image, kernel, strides, padding)
    return lax.conv_general_dilated(image, kernel, strides, padding, **plain)


def convolve_doubled(image: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c k"], size: tuple[int, int]) -> Float[Array, "n _ _ k"]:
    """The image with every pixel four times, cut to `size` (at most twice the image's), convolved with `kernel`, zeros around it."""
    n, h, w, _ = image.shape
    by_phases = jax.default_backend() == "cpu" and size == (2 * h, 2 * w) and n * h * w > _PIXELS
    return _convolve_phases(image, kernel) if by_phases else _convolve_repeated(image, kernel, size)


def attend(
    query: Float[Array, "n l heads d"], key: Float[Array, "n m heads d"], value: Float[Array, "n m heads e"]
) -> Float[Array, "n l heads e"]:
    """softmax(q·k/√d) v for each head; the softmax in float32 at least."""
    by_rows = jax.default_backend() == "cpu" and query.shape[1] > _QUERIES
    return (_attend_by_rows if by_rows else _attend)(query, key, value)


def _normalise(x: Array, scale: Array, bias: Array, groups: int, eps: int | float) -> Array:
    n, h, w, c = x.shape
    grouped = x.reshape(n, h, w, groups, c // groups)
    centred = grouped - jnp.mean(grouped, axis=(1, 2, 4), keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=(1, 2, 4), keepdims=True)
    normal = (centred * lax.rsqrt(variance + eps)).reshape(n, h, w, c)
    return normal * scale[None, None, None] + bias[None, None, None]


def _over_groups(x: Array, groups: int) -> Array:
    """Means over the channels of each group, at each of its channels.

    As products, because the compiler would merge sums with those over space that they follow, and read the image again for each.
    """
    size = x.shape[1] // groups
    member = np.kron(np.eye(groups), np.ones((size, 1)))
    means = jnp.matmul(x, jnp.asarray(member / size, x.dtype), precision=lax.Precision.HIGHEST)
    return jnp.matmul(means, jnp.asarray(member.T, x.dtype), precision=lax.Precision.HIGHEST)


def _for_each(x: Array, vector: Array) -> Array:
    """A row for each image: a product, for the same reason, of which the transpose is a sum over images."""
    return jnp.matmul(jnp.ones((x.shape[0], 1), x.dtype), vector[None], precision=lax.Precision.HIGHEST)


def _statistics(x: Array, groups: int, eps: int | float) -> tuple[Array, Array]:
    """Mean and inverse standard deviation of its group at each image and channel, from one reading of the image, and of some of it before.

    Moments are taken about the mean of every fourth row's every fourth pixel. Whatever the image, that lies within 4 deviations of a
    channel's mean (the variance is at least the share of these pixels times the square of their distance), so that the subtraction of
    squares costs little more than a digit; about a single pixel it would cost as many as that pixel stands out.
    """
    about = jnp.mean(x[:, ::_EVERY, ::_EVERY], axis=(1, 2))
    apart = x - about[:, None, None]
    first, second = jnp.mean(apart, axis=(1, 2)), jnp.mean(jnp.square(apart), axis=(1, 2))
    mean = _over_groups(first + about, groups)
    variance = _over_groups(second - jnp.square(first) + jnp.square(first + about - mean), groups)
    return mean, lax.rsqrt(variance + eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _normalise_by_channel(x: Array, scale: Array, bias: Array, groups: int, eps: int | float) -> Array:
    mean, inverse = _statistics(x, groups, eps)
    return (x - mean[:, None, None]) * (inverse * scale[None])[:, None, None] + bias[None, None, None]


@_normalise_by_channel.defjvp
def _(groups: int, eps: int | float, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """Transposed, this needs the sums over space of the cotangent and of its product with the normalised image, and no others."""
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    mean, inverse = _statistics(x, groups, eps)
    normal = (x - mean[:, None, None]) * inverse[:, None, None]
    slope = inverse * scale[None]
    shift = _for_each(x, dbias) - slope * _over_groups(jnp.mean(dx, axis=(1, 2)), groups)
    stretch = _for_each(x, dscale) - slope * _over_groups(jnp.mean(dx * normal, axis=(1, 2)), groups)
    tangent = dx * slope[:, None, None] + shift[:, None, None] + normal * stretch[:, None, None]
    return normal * scale[None, None, None] + bias[None, None, None], tangent


def _seen(size: int, taps: int, stride: int, padding: tuple[int, int]) -> tuple[NDArray[np.bool_], slice]:
    """Along an axis: whether an output's tap is on a pixel, for the taps that are on one for some output; and which those are."""
    places = stride * np.arange((size + sum(padding) - taps) // stride + 1)[:, None] + np.arange(taps) - padding[0]
    seen = places[..., None] == np.arange(size)
    used = seen.any(axis=(0, 2))
    some = slice(int(used.argmax()), taps - int(used[::-1].argmax()))
    return seen[:, some], some


def _convolve_by_taps(image: Array, kernel: Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> Array:
    n, h, w, c = image.shape
    (down, rows), (across, columns) = map(_seen, (h, w), kernel.shape[:2], strides, padding)
    # Patches are a product too: one operation to compile, and one for its derivative.
    pixels = np.einsum("irh,jsw->ijrshw", down, across).reshape(-1, h * w)
    patches = jnp.matmul(jnp.asarray(pixels, image.dtype), image.reshape(n, h * w, c))
    taps = kernel[rows, columns].reshape(-1, kernel.shape[3])
    return jnp.matmul(patches.reshape(-1, taps.shape[0]), taps).reshape(n, len(down), len(across), kernel.shape[3])


def _convolve_repeated(image: Array, kernel: Array, size: tuple[int, int]) -> Array:
    doubled = jnp.repeat(jnp.repeat(image, 2, axis=1), 2, axis=2)[:, : size[0], : size[1]]
    return convolve(doubled, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=_LAYOUT)


def _folded(kernel: Array, axis: int) -> tuple[Array, Array]:
    """What an even and an odd pixel of the doubled image see of the small one: two of the three taps fall on the same pixel."""
    before, here, after = jnp.split(kernel, 3, axis=axis)
    return jnp.concatenate([before, here + after], axis), jnp.concatenate([before + here, after], axis)


def _convolve_phases(image: Array, kernel: Array) -> Array:
    n, h, w, _ = image.shape
    rows = []
    for i, part in enumerate(_folded(kernel, 0)):
        pixels = [
            lax.conv_general_dilated(image, small, (1, 1), ((1 - i, i), (1 - j, j)), dimension_numbers=_LAYOUT)
            for j, small in enumerate(_folded(part, 1))
        ]
        rows.append(jnp.stack(pixels, axis=3))
    return jnp.stack(rows, axis=2).reshape(n, 2 * h, 2 * w, -1)


def _attend_with_head(query: Array, key: Array, value: Array) -> Array:
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    logits = jnp.matmul(query, key.T, preferred_element_type=wide) / math.sqrt(query.shape[-1])
    return jnp.matmul(jax.nn.softmax(logits, axis=-1).astype(value.dtype), value)


# Of all heads at once, and of all images.
_attend = jax.vmap(jax.vmap(_attend_with_head, in_axes=1, out_axes=1))


def _attend_by_rows(query: Array, key: Array, value: Array) -> Array:
    n, length, heads, features = query.shape
    rows = -(-length // _QUERIES)

    def head(arrays: tuple[Array, Array, Array]) -> Array:
        query, key, value = arrays
        # Kept, the weights of all rows would have to come back from memory.
        attend = jax.checkpoint(lambda some: _attend_with_head(some, key, value))
        return lax.map(attend, query.reshape(rows, _QUERIES, features))

    query = jnp.pad(query, ((0, 0), (0, rows * _QUERIES - length), (0, 0), (0, 0)))
    each = lax.map(head, tuple(jnp.moveaxis(x, 2, 1).reshape(n * heads, x.shape[1], x.shape[3]) for x in (query, key, value)))
    return jnp.moveaxis(each.reshape(n, heads, rows * _QUERIES, -1)[:, :, :length], 1, 2)
