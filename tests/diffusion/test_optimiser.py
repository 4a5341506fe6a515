"""The moving average against its closed form, the learning rate against a table, and what is decayed and clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.optimiser import Adafactor, AdamW, averaged, newest_weight

pytestmark = pytest.mark.usefixtures("as_run")
EPS = float(np.finfo(np.float32).eps)


def closed_form(values, decay):
    """Σ dᵗ⁻ⁱ pᵢ / Σ dᵗ⁻ⁱ in float64."""
    weights = float(decay) ** np.arange(len(values))[::-1]
    return np.tensordot(weights / weights.sum(), values, 1)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.995, 0.9999])
@pytest.mark.parametrize("steps", [1, 2, 7, 4000])
def test_the_average_is_the_debiased_one(decay, steps):
    values = np.random.default_rng(steps).normal(size=(steps, 6)).astype(np.float32)

    @jax.jit
    def run(values):
        def update(ema, now):
            step, value = now
            return averaged({"p": ema}, {"p": value}, step, decay)["p"], None

        start = jnp.full(6, 1e3, jnp.float32)  # of which nothing may be left
        return jax.lax.scan(update, start, (jnp.arange(1, len(values) + 1, dtype=jnp.int32), values))[0]

    found = run(values)
    assert found.dtype == jnp.float32
    # A step rounds twice, numbers below 5, and what it leaves of that shrinks as the share of a value does: over as many steps as the
    # average is long the errors add up like a random walk. The first step leaves ε of the start, which shrinks in the same way.
    long = min(steps, 1 / (1 - decay))
    share = decay ** (steps - 1) * (1 - decay) / (1 - decay**steps)
    np.testing.assert_allclose(found, closed_form(values.astype(float), decay), rtol=0, atol=2 * 5 * EPS * long**0.5 + 1e3 * EPS * share)


@pytest.mark.parametrize("decay", [0.5, 0.995, 0.9999])
def test_what_does_not_change_is_its_own_average(decay):
    """Bit for bit: weights that do not add up to one in float32 would shrink or grow it by 1e-4 in a long run."""
    value = jax.random.normal(jax.random.key(1), (1000,), jnp.float32)
    for step in (1, 2, 100, 10**6):
        np.testing.assert_array_equal(averaged(value, value, jnp.int32(step), decay), value)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9995, 0.9999])
def test_the_newest_weight_to_float32(decay):
    steps = np.array([1, 2, 3, 10, 100, 10_000, 10**7])
    found = jax.vmap(lambda step: newest_weight(step, decay))(jnp.asarray(steps, jnp.int32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (1 - decay) / (1 - decay**steps), rtol=8 * EPS)
    assert found[0] == 1
    assert np.all(found <= 1)


def test_averages_that_never_forget_are_refused():
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"ema = {decay} is out of range: need 0 ≤ ema < 1"):
            newest_weight(jnp.int32(1), decay)


def rates(optimiser, steps):
    return np.asarray(jax.vmap(optimiser.rate(steps))(jnp.arange(steps, dtype=jnp.int32)))


def test_the_rate_rises_stays_and_falls():
    found = rates(AdamW(0.1, warmup=4, decay=0.3), 20)
    rise, fall = [1 / 5, 2 / 5, 3 / 5, 4 / 5], [6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 0.1 * np.array([*rise, *[1] * 10, *fall]), rtol=4 * EPS)


@pytest.mark.parametrize(("warmup", "decay", "steps"), [(0, 0.0, 5), (0, 1.0, 5), (10, 1.0, 5), (3, 0.5, 1), (500, 0.0, 100), (2, 0.01, 7)])
def test_the_rate_is_never_zero_and_never_above(warmup, decay, steps):
    found = rates(AdamW(0.1, warmup=warmup, decay=decay), steps)
    assert np.all(found > 0)
    assert np.all(found <= np.float32(0.1))
    rise = np.minimum(np.arange(1, steps + 1) / (warmup + 1), 1)
    falling = round(decay * steps)
    fall = np.minimum((steps - np.arange(steps)) / (falling + 1), 1)
    np.testing.assert_allclose(found, 0.1 * rise * fall, rtol=4 * EPS)


def test_a_longer_run_begins_like_a_shorter_one():
    optimiser = AdamW(warmup=10, decay=0.2)
    np.testing.assert_array_equal(rates(optimiser, 100)[:80], rates(optimiser, 1000)[:80])


PARAMS = {
    "conv": {"kernel": np.full((2, 3), 2.0, np.float32), "bias": np.full(3, 2.0, np.float32)},
    "norm": {"scale": np.full(3, 2.0, np.float32), "bias": np.full(3, 2.0, np.float32)},
}


def step(optimiser, gradients, params=PARAMS, steps=10):
    transformation = optimiser.transformation(steps)
    return transformation.update(gradients, transformation.init(params), params)[0]


def test_weights_are_decayed_and_nothing_else():
    updates = step(AdamW(0.1, warmup=0, weight_decay=0.03), jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(updates["conv"]["kernel"], -0.1 * 0.03 * 2, rtol=4 * EPS)
    for name, leaf in (("conv", "bias"), ("norm", "scale"), ("norm", "bias")):
        np.testing.assert_array_equal(updates[name][leaf], 0)


def test_the_first_step_is_adam_s_of_the_clipped_gradient():
    """m̂/(√v̂ + 1e-8) of the first step is g/(|g| + 1e-8): with tiny gradients their scale, and so the clipping, can be seen."""
    norm = 1e-7
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    count = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    updates = step(AdamW(0.1, warmup=0, weight_decay=0.0, clip=norm), gradients)
    entry = norm / count**0.5
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, -0.1 * entry / (entry + 1e-8), rtol=1e-5)
    # A shorter one is left alone.
    short = jax.tree.map(lambda g: g * jnp.float32(1e-8), gradients)
    for leaf in jax.tree.leaves(step(AdamW(0.1, warmup=0, weight_decay=0.0, clip=norm), short)):
        np.testing.assert_allclose(leaf, -0.1 / 2, rtol=1e-5)


def test_every_kernel_of_a_network_is_decayed():
    """And as many parameters stay as there are biases and normalisations."""
    from flax import nnx

    from diffusion.config import PRESETS
    from diffusion.optimiser import _kernels
    from diffusion.unet import UNet

    params = nnx.state(nnx.eval_shape(lambda: UNet(PRESETS["digits-8"], rngs=nnx.Rngs(0))), nnx.Param)
    mask = jax.tree.leaves(_kernels(params))
    # Products and convolutions have two axes or more, all else one.
    assert mask == [leaf.ndim > 1 for leaf in jax.tree.leaves(params)]
    assert any(mask)


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("learning_rate", 0.0, "0 < learning_rate < ∞"),
        ("learning_rate", float("nan"), "0 < learning_rate < ∞"),
        ("clip", 0.0, "0 < clip < ∞"),
        ("clip", float("inf"), "0 < clip < ∞"),
        ("warmup", -1, "0 ≤ warmup < ∞"),
        ("weight_decay", -0.1, "0 ≤ weight_decay < ∞"),
        ("decay", 1.5, "0 ≤ decay ≤ 1"),
        ("decay", float("nan"), "0 ≤ decay ≤ 1"),
    ],
)
def test_what_cannot_be_trained_with_is_refused(name, value, bound):
    with pytest.raises(ValueError, match=rf"^{name} = {value} is out of range: need {bound}$"):
        AdamW(**{name: value})


# ---- Less memory ---------------------------------------------------------------------------------------------------------


def bytes_of(optimiser, params):
    state = jax.eval_shape(optimiser.transformation(10).init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.shape)


def test_moments_take_the_memory_that_they_are_said_to():
    params = {"kernel": jax.ShapeDtypeStruct((3, 3, 256, 512), np.float32), "bias": jax.ShapeDtypeStruct((512,), np.float32)}
    count = 9 * 256 * 512 + 512
    assert bytes_of(AdamW(), params) == 8 * count
    assert bytes_of(AdamW(first_moments="bfloat16"), params) == 6 * count
    # Rows and columns of the kernel, second moments of the bias, and a number each for what there is not.
    assert bytes_of(Adafactor(), params) == 4 * (9 * (256 + 512) + 512 + 3)


def test_first_moments_of_half_the_bytes_change_updates_by_their_rounding():
    random = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), PARAMS) for _ in range(5)]
    ends = []
    for moments in ("float32", "bfloat16"):
        transformation = AdamW(0.1, warmup=0, weight_decay=0.0, first_moments=moments).transformation(10)
        state = transformation.init(PARAMS)
        for one in gradients:
            updates, state = transformation.update(one, state, PARAMS)
        ends.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(updates)]))
    assert ends[1].dtype == np.float32
    # Five roundings to 8 digits of numbers of the moments' size.
    assert 1e-5 < np.abs(ends[1] - ends[0]).max() / np.abs(ends[0]).max() < 5 * 2.0**-8


def adafactor(gradients, params, rate, decay, clip):
    """Algorithm 4 of Shazeer and Stern in float64, of one matrix and of one vector, without the scale of parameters."""
    rows, columns, all_ = 0.0, 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        share = step**-0.8
        square = gradient**2 + 1e-30
        if gradient.ndim == 2:
            rows = (1 - share) * rows + share * square.mean(axis=1)
            columns = (1 - share) * columns + share * square.mean(axis=0)
            second = np.outer(rows, columns) / rows.mean()
        else:
            second = all_ = (1 - share) * all_ + share * square
        update = gradient / np.sqrt(second)
        update /= max(1.0, np.sqrt(np.mean(update**2)) / clip)
        params = params - rate * (update + (decay if gradient.ndim == 2 else 0) * params)
    return params


@pytest.mark.parametrize("clip", [0.7, 100.0])
def test_adafactor_is_the_published_algorithm(clip):
    random = np.random.default_rng(1)
    params = {"kernel": random.normal(size=(128, 130)), "bias": random.normal(size=130)}
    gradients = [{name: random.normal(size=p.shape) * 10.0**-n for name, p in params.items()} for n in range(4)]
    transformation = Adafactor(0.1, warmup=0, weight_decay=0.3, clip=clip).transformation(10)
    now = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    state = transformation.init(now)
    for one in gradients:
        updates, state = transformation.update(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), one), state, now)
        now = optax.apply_updates(now, updates)
    for name, start in params.items():
        expected = adafactor([one[name] for one in gradients], start, 0.1, 0.3, clip)
        np.testing.assert_allclose(now[name], expected, rtol=0, atol=30 * EPS * np.abs(expected).max())


def test_adafactor_warms_up_and_decays_as_adamw_does(unchecked):
    for warmup, decay in ((4, 0.3), (0, 0.0)):
        np.testing.assert_array_equal(
            rates(Adafactor(0.1, warmup=warmup, decay=decay), 20), rates(AdamW(0.1, warmup=warmup, decay=decay), 20)
        )
    with pytest.raises(ValueError, match=r"^clip = 0 is out of range: need 0 < clip < ∞$"):
        Adafactor(clip=0)
    with pytest.raises(ValueError, match=r"^first_moments = 'float16' is not known: take float32 or bfloat16$"):
        AdamW(first_moments="float16")  # type: ignore[arg-type]
