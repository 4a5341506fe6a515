"""What a CPU computes in another way: the same functions as the plain formulations, and the same derivatives of every kind."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import backend
from tests.compiled import quickly

PAIRS: dict[str, tuple[Any, Any, Any]] = {
    "normalise": (
        lambda x, scale, bias: backend._normalise_by_channel(x, scale, bias, 3, 1e-5),
        lambda x, scale, bias: backend._normalise(x, scale, bias, 3, 1e-5),
        ((2, 5, 4, 6), (6,), (6,)),
    ),
    "convolve_doubled": (
        backend._convolve_phases,
        lambda x, kernel: backend._convolve_repeated(x, kernel, (6, 8)),
        ((2, 3, 4, 3), (3, 3, 3, 2)),
    ),
    "convolve": (
        lambda x, kernel: backend._convolve_by_taps(x, kernel, (1, 2), ((1, 1), (0, 1))),
        lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 2), ((1, 1), (0, 1)), dimension_numbers=backend._LAYOUT),
        ((2, 2, 3, 3), (3, 3, 3, 2)),
    ),
    # Two full rows of queries and a part of one.
    "attend": (backend._attend_by_rows, backend._attend, ((2, 9, 2, 3), (2, 5, 2, 3), (2, 5, 2, 4))),
}


@pytest.fixture(autouse=True)
def _few_queries(monkeypatch):
    monkeypatch.setattr(backend, "_QUERIES", 4)


def draws(key, shapes):
    return [jax.random.normal(k, shape) for k, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)]


def derivatives(function, primals, tangents, cotangent):
    """Forwards, forwards in the image alone, backwards, batched, and the derivative of the gradient of a loss with curvature of its own."""

    def pull(*primals):
        return jax.vjp(function, *primals)[1](cotangent)

    def gradient(*primals):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), argnums=tuple(range(len(primals))))(*primals)

    return {
        "forward": jax.jvp(function, primals, tangents),
        "forward in the image": jax.jvp(lambda x: function(x, *primals[1:]), primals[:1], tangents[:1]),
        "backward": pull(*primals),
        "batched": jax.vmap(pull)(*(jnp.stack(pair) for pair in zip(primals, tangents, strict=True))),
        "second": jax.jvp(gradient, primals, tangents)[1],
    }


@pytest.mark.parametrize("name", PAIRS)
def test_both_formulations_have_the_same_derivatives(name, key):
    cpu, plain, shapes = PAIRS[name]
    one, two, three = jax.random.split(key, 3)
    primals, tangents = tuple(draws(one, shapes)), tuple(draws(two, shapes))
    cotangent = jax.random.normal(three, jax.eval_shape(plain, *primals).shape)
    found, expected = (quickly(lambda *a, f=f: derivatives(f, *a))(primals, tangents, cotangent) for f in (cpu, plain))
    for kind in expected:
        for a, b in zip(found[kind], expected[kind], strict=True):
            # Fewer than 200 products of numbers of order one in a sum, differentiated twice at most.
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * float(jnp.max(jnp.abs(b))), err_msg=kind)


def test_a_cpu_sums_an_image_over_space_once_for_scale_and_group(key):
    """The derivative in the image and in scale and bias takes two sums over images of this size, beside two of the statistics."""
    x, scale, bias = draws(key, ((2, 5, 4, 6), (6,), (6,)))
    pull = jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(jnp.sin(backend._normalise_by_channel(*a, 3, 1e-5))), argnums=(0, 1, 2)))(
        x, scale, bias
    )
    sums = [e for e in pull.eqns if e.primitive.name == "reduce_sum" and e.invars[0].aval.shape == x.shape and e.outvars[0].aval.shape]
    assert len(sums) == 4


@pytest.mark.parametrize("where", ["middle", "corner", "looked at", "row", "everywhere"])
def test_pixels_that_stand_out_cost_no_digits_wherever_they_are(where, key):
    """In float32, against float64: rounding of 4,096 sums, and of the mean where that is large."""
    image = np.array(jax.random.normal(key, (1, 64, 64, 4), np.float32))
    out: dict[str, tuple[Any, ...]] = {
        "middle": (32, 32),
        "corner": (0, 0),
        "looked at": (slice(0, None, 4), slice(0, None, 4)),
        "row": (5,),
        "everywhere": (),
    }
    image[(0, *out[where])] += 1000
    found = jax.jit(lambda x: backend._normalise_by_channel(x, jnp.ones(4, x.dtype), jnp.zeros(4, x.dtype), 2, 1e-5))
    exact = np.asarray(found(image.astype(np.float64)))
    spread = image.astype(float).reshape(64 * 64, 2, 2).std(axis=(0, 2)).repeat(2)
    error = np.abs(np.asarray(found(image)) - exact).max(axis=(0, 1, 2))
    # Units in the last place of the image's numbers, and of a variance beside which 16 times as much is subtracted.
    assert (error <= 4 * 2**-24 * (np.abs(image).max() / spread + 17 * np.abs(exact).max())).all()


def test_options_are_for_cpus_that_know_them(monkeypatch):
    backend.compiler_options.cache_clear()
    known = backend.compiler_options()
    assert known is not None
    assert jax.jit(lambda x: x + 1, compiler_options=known)(1) == 2
    monkeypatch.setattr(backend, "_CPU_OPTIONS", {"xla_cpu_no_such_option": "1"})
    backend.compiler_options.cache_clear()
    assert backend.compiler_options() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backend, "_CPU_OPTIONS", known)
    backend.compiler_options.cache_clear()
    assert backend.compiler_options() is None
    backend.compiler_options.cache_clear()


def test_accelerators_get_the_plain_formulations(monkeypatch, key):
    x, kernel, heads, few = draws(key, ((2, 12, 12, 3), (3, 3, 3, 2), (1, 9, 2, 3), (2, 2, 4, 3)))
    plain = {"dimension_numbers": backend._LAYOUT}

    def programs():
        return [
            str(jax.make_jaxpr(f)(*a))
            for f, a in (
                (lambda x: backend.normalise(x, jnp.ones(3), jnp.zeros(3), groups=1, eps=1e-5), (x,)),
                # A new function each time, or the trace is remembered.
                (lambda x, k: backend.convolve_doubled(x, k, (24, 24)), (x, kernel)),
                (lambda x: backend.attend(x, x, x), (heads,)),
                (lambda x, k: backend.convolve(x, k, (1, 1), ((1, 1), (1, 1)), **plain), (few, kernel)),
            )
        ]

    here = programs()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    there = programs()
    assert "custom_jvp" in here[0]
    assert (here[1].count("conv_general_dilated["), there[1].count("conv_general_dilated[")) == (4, 1)
    assert "scan" in here[2]
    assert ("conv_general_dilated[" in here[3], "conv_general_dilated[" in there[3]) == (False, True)
    assert not any("custom_jvp" in one or "scan" in one for one in there)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [(0, 1), (1, 1), (1, 0), (2, 2)])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 4), (5, 1), (3, 4)])
def test_small_images_are_convolved_by_the_taps_that_see_them(size, padding, stride, key):
    x, kernel = draws(key, ((2, *size, 3), (3, 3, 3, 2)))
    arguments = (x, kernel, (stride, stride), (padding, padding))
    expected = jax.lax.conv_general_dilated(*arguments, dimension_numbers=backend._LAYOUT)
    found = backend._convolve_by_taps(*arguments)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [(2, 2), (3, 2), (3, 3), (3, 4), (4, 3)])
def test_small_images_and_cut_ones_are_doubled_as_they_are(size, key):
    """The four convolutions are for whole images, and add the taps of the kernel up: that has to pay."""
    x, kernel = draws(key, ((1, (size[0] + 1) // 2, (size[1] + 1) // 2, 3), (3, 3, 3, 2)))
    program = str(jax.make_jaxpr(lambda x, k: backend.convolve_doubled(x, k, size))(x, kernel))
    # Fewer than nine pixels are a product with the taps that see them.
    assert program.count("conv_general_dilated[") == (size[0] * size[1] >= 9)
