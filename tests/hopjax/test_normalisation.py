"""Normalisations of images, and the rules for β that go with them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hopjax import normalisation, tiled
from hopjax.correspondence import linear_alphas_cumprod, signal_to_noise
from hopjax.temperature import Fixed, Perplexity, SelfWeight, Timestep
from tests.strategies import powers, seeds


def images(count: int = 60, dim: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(count, dim)).astype(np.float32) * np.linspace(0.2, 1, count, dtype=np.float32)[:, None]


@given(seeds(), st.sampled_from(sorted(normalisation.NORMALISATIONS)), powers(-3, 3))
@settings(max_examples=40)
def test_what_a_normalisation_is(seed, name, scale):
    rows = images(seed=seed) * np.float32(scale)
    fitted = normalisation.fit(name, rows)
    found = fitted(rows)
    assert found.dtype == np.float32
    assert fitted.name == name
    expected = rows.astype(float) - (rows.astype(float).mean(axis=0) if name == "centred" else 0)
    norms = np.linalg.norm(expected, axis=1)
    divisor = 1 if name == "none" else np.sqrt(np.mean(norms**2))
    expected = expected if name == "none" else expected / norms[:, None]
    # An image that is close to the mean one keeps fewer digits.
    bound = 8 * 1.2e-7 * (np.max(np.abs(expected)) if name == "none" else np.max(np.linalg.norm(rows, axis=1)) / norms.min())
    assert np.max(np.abs(found - expected)) <= bound
    assert fitted.divisor == pytest.approx(divisor, rel=1e-5)
    # β in units of the normalised data is divisor² times β in units of the images: the logits agree where all norms do.
    equal = rows / np.linalg.norm(rows, axis=1, keepdims=True) * np.float32(scale)
    unit = normalisation.fit("unit", equal)
    assert 2.0 * equal[0] @ equal[1] == pytest.approx(2.0 * unit.divisor**2 * (unit(equal)[0] @ unit(equal)[1]), rel=1e-5)


def test_task_2_gets_the_normalisation_of_task_1():
    one, two = images(), images(seed=1) + 1
    fitted = normalisation.fit("centred", one)
    assert fitted.shift is not None
    np.testing.assert_allclose(fitted.shift, one.mean(axis=0), rtol=1e-6)
    moved = two - one.mean(axis=0)
    np.testing.assert_allclose(fitted(two), moved / np.linalg.norm(moved, axis=1, keepdims=True), rtol=0, atol=1e-6)


def test_rows_without_a_direction_are_named():
    rows = images()
    rows[7] = 0
    with pytest.raises(ValueError, match=r"row 7 is black \(all zero\) and has no direction"):
        normalisation.fit("unit", rows)(rows)
    assert normalisation.fit("unit", rows).directed(rows).tolist() == [row != 7 for row in range(60)]
    assert normalisation.fit("none", rows).directed(rows).all()
    assert normalisation.fit("centred", rows[:1]).directed(rows).tolist() == [row != 0 for row in range(60)]
    assert normalisation.fit("none", rows)(rows) is rows
    rows[5, 2] = np.nan
    with pytest.raises(ValueError, match="row 5 holds a number that is not finite"):
        normalisation.fit("unit", rows)
    with pytest.raises(ValueError, match="no normalisation is named 'l2': choose from unit, none, centred"):
        normalisation.fit("l2", rows)


# ---- β -------------------------------------------------------------------------------------------------------------------


@given(seeds(), st.floats(1.5, 40), st.sampled_from(["unit", "none", "centred"]))
@settings(max_examples=15)
def test_perplexity_is_reached(seed, target, name):
    rows = images(seed=seed)
    rows = normalisation.fit(name, rows)(rows)
    beta = Perplexity(target).solve(rows)
    others = beta * rows.astype(float) @ rows.T.astype(float)
    np.fill_diagonal(others, -np.inf)
    p = np.exp(others - others.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1)
    # β is found to 1e-4; the entropy changes with log β by the variance of the logits, which is of order log² m.
    assert np.exp(entropy.mean()) == pytest.approx(target, rel=3e-3)


@given(seeds(), st.floats(0.05, 0.95))
@settings(max_examples=15)
def test_self_weight_is_reached(seed, target):
    rows = images(seed=seed)
    rows = normalisation.fit("unit", rows)(rows)
    beta = SelfWeight(target).solve(rows)
    logits = beta * rows.astype(float) @ rows.T.astype(float)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert np.mean(np.diag(p) / p.sum(axis=1)) == pytest.approx(target, rel=3e-3)


def test_the_scale_of_the_data_goes_through_beta():
    """Data divided by s are seen as before at s² times β."""
    rows = images()
    assert Perplexity(10.0).solve(rows * np.float32(8)) == pytest.approx(Perplexity(10.0).solve(rows) / 64, rel=1e-3)
    step = Timestep(500.0, 2.0).solve(rows)
    assert step == pytest.approx(4 * float(signal_to_noise(linear_alphas_cumprod())[500]), rel=1e-6)
    assert Fixed(3.5).solve(rows) == 3.5


def test_a_sample_of_the_states_gives_nearly_the_beta_of_all():
    rows = images(400)
    rows = normalisation.fit("unit", rows)(rows)
    every, some = Perplexity(20.0, sample=400).solve(rows), Perplexity(20.0, sample=100).solve(rows)
    assert some == Perplexity(20.0, sample=100).solve(rows)
    assert some == pytest.approx(every, rel=0.1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Fixed(0.0), "beta=0.0: need 0 < beta"),
        (Timestep(1000.0, 1.0), "timestep=1000.0: need 0 ≤ timestep ≤ 999"),
        (Timestep(500.0, 0.0), "scale=0.0: need 0 < scale"),
        (Perplexity(1.0), "perplexity=1.0: need 1 < perplexity < 59, the number of other samples"),
        (Perplexity(59.0), "perplexity=59.0: need 1 < perplexity < 59"),
        (SelfWeight(0.01), r"self_weight=0.01: need 0.0167 < self_weight < 1 for 60 samples"),
        (SelfWeight(1.0), "self_weight=1.0: need"),
    ],
)
def test_targets_that_cannot_be(rule, message):
    with pytest.raises(ValueError, match=message):
        rule.solve(images())


def test_what_the_data_do_not_allow_is_said_with_what_they_do():
    twice = np.repeat(np.eye(20, dtype=np.float32), 2, axis=0)  # no sample can weigh more than its double
    with pytest.raises(ValueError, match=r"self_weight=0.9: no β gives it on these data; from β = .* it goes from 0.02.* to 0.5$"):
        SelfWeight(0.9).solve(twice)
    huge = images() * np.float32(1e25)  # whose products no float32 holds
    with pytest.raises(ValueError, match=r"perplexity=10.0: no β gives it on these data; .* from nan to nan$"):
        Perplexity(10.0).solve(huge)
    assert float(jnp.exp(tiled.summarise(twice, twice, 50.0, ["log_self_weight"], own=np.arange(40))["log_self_weight"]).mean()) < 0.51
