"""What one replayed sample saves: the exact identity, its baseline, and the response to the energy rise: Eqs. (86)-(97), Remark D.1."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from mpmath import mpf

import hopjax
from hopjax import gaps
from theory_checks.claim import EPS, QUICK_COMPILE, Finding, Measurement, Setting, claim, z_score
from theory_checks.ensemble import GAINS, ensemble
from theory_checks.ladder import fit_order, order_is

# (target, replayed) as rows of the model's memories: the outlier is the last, members 0 and 1 stand for c and c′.
CANONICAL = {"o ← o": (-1, -1), "c ← c": (0, 0), "c ← c′": (0, 1), "c ← o": (0, -1), "o ← c": (-1, 0)}

# Smallest π tried is e^{−460} = 1e-200: that many digits are lost when two energies are subtracted, and 50 are to be left.
DIGITS = 270


def _generator(setting: Setting, stream: int) -> np.random.Generator:
    return np.random.default_rng([setting.seed, stream])


@partial(jax.jit, compiler_options=QUICK_COMPILE)
def _gains(log_weight: jax.Array, rise: jax.Array, beta: jax.Array) -> dict[str, jax.Array]:
    """Everything of `hopjax.replay` that takes log π, over flat arrays."""

    def one(log_weight: jax.Array, rise: jax.Array, beta: jax.Array) -> dict[str, jax.Array]:
        return {
            "raw": hopjax.raw_gain(log_weight, rise, beta),
            "baseline": hopjax.baseline_gain(log_weight, beta),
            "gain": hopjax.gain(log_weight, rise, beta),
            "slope": jax.grad(hopjax.gain, argnums=1)(log_weight, 0 * rise, beta),
            "susceptibility": hopjax.susceptibility(log_weight),
            "second order": hopjax.second_order_gain(log_weight, rise, beta),
        }

    return jax.vmap(one)(log_weight, rise, beta)


def _log_sum(logits: list[Any]) -> Any:
    top = max(logits)
    return top + mpmath.log(mpmath.fsum(mpmath.exp(value - top) for value in logits))


def _relative_error(values: Any, reference: list[Any]) -> list[float]:
    return [float(abs((mpf(float(value)) - exact) / exact)) for value, exact in zip(np.asarray(values), reference, strict=True)]


@claim(
    "replay-identity",
    "Eqs. (86)-(91)",
    "G_raw = E(x; RX) − E(x; RX ∪ {z}) = β⁻¹ log(1 + π e^{βΔE}) for any memories, state, rotation and replayed sample.",
)
def replay_identity(setting: Setting) -> Finding:
    rng, dim, count = _generator(setting, 1), 4, 5
    cases: list[dict[str, Any]] = []
    with mpmath.workdps(DIGITS):

        def energy(state: Any, memories: list[Any], beta: Any) -> Any:
            return mpmath.fdot(state, state) / 2 - _log_sum([beta * mpmath.fdot(memory, state) for memory in memories]) / beta

        for log_pi in (-0.3, -1.0, -3.0, -20.0, -100.0, -460.517, 2.0):
            memories, state, sample, upper = (rng.normal(size=shape) for shape in ((count, dim), (dim,), (dim,), (dim, dim)))
            beta = float(rng.uniform(1, 10))
            generator = np.triu(upper, 1) - np.triu(upper, 1).T
            turn = mpmath.expm(mpmath.matrix(generator.tolist()))
            x, old = [mpf(value) for value in state], [[mpf(value) for value in row] for row in memories]
            new = [list(turn * mpmath.matrix(row)) for row in old]
            # z is moved along x until it has the weight wanted: a tiny π is a sample far from the target.
            log_z = _log_sum([beta * mpmath.fdot(row, x) for row in old])
            shift = (log_z + mpf(log_pi) - beta * mpmath.fdot(sample.tolist(), x)) / (beta * mpmath.fdot(x, x))
            z = [mpf(value) + shift * along for value, along in zip(sample, x, strict=True)]
            log_weight = beta * mpmath.fdot(z, x) - log_z  # (86)
            rise = energy(x, new, beta) - energy(x, old, beta)
            direct = energy(x, new, beta) - energy(x, [*new, z], beta)  # (87)
            identity = mpmath.log1p(mpmath.exp(log_weight + beta * rise)) / beta  # (91)
            cases.append(
                {"log_weight": float(log_weight), "rise": float(rise), "beta": beta, "direct": direct, "identity": identity}
                | {"arrays": (state, np.array(z, float), memories, np.array(new, float))}
            )
        residual = max(float(abs(case["identity"] - case["direct"]) / case["direct"]) for case in cases)
        log_weight, rise, beta_values = (np.array([case[name] for case in cases]) for name in ("log_weight", "rise", "beta"))
        raw = _gains(log_weight, rise, beta_values)["raw"]
        # The exponent log π + βΔE rounds before it is exponentiated.
        condition = 4 * EPS * (1 + np.abs(log_weight) + beta_values * np.abs(rise))
        errors = _relative_error(raw, [case["direct"] for case in cases]) / condition

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def from_arrays(states: jax.Array, samples: jax.Array, old: jax.Array, new: jax.Array, beta: jax.Array) -> jax.Array:
        log_weight = jax.vmap(hopjax.log_replay_weight)(states, samples, old, beta)
        return jnp.stack([log_weight, jax.vmap(hopjax.energy_change)(states, old, new, beta)])

    stacked = [np.stack(part) for part in zip(*(case["arrays"] for case in cases), strict=True)]
    pipeline = np.asarray(from_arrays(*stacked, beta_values))
    norms = [np.max(np.linalg.norm(part, axis=-1).reshape(len(cases), -1), axis=1) for part in stacked]
    # Logits of size β|x||ξ| are sums of d products, each rounded.
    scale = 4 * dim * EPS * (1 + beta_values * norms[0] * np.maximum(norms[1], norms[2]))
    ends = np.maximum(np.abs(pipeline[0] - log_weight), beta_values * np.abs(pipeline[1] - rise)) / scale
    return Finding(
        [
            Measurement("largest relative difference of (91) from (87), 7 random cases, π from 1e-200 to e²", residual, "<=", 1e-50),
            Measurement("float64 G_raw against (87), in units of its rounding", float(np.max(errors)), "<=", 1.0),
            Measurement("float64 log π and βΔE from the vectors, in units of their rounding", float(np.max(ends)), "<=", 1.0),
        ],
        note=f"In {DIGITS} digits, since two energies are subtracted whose difference is as small as 1e-200.",
    )


@claim(
    "replay-baseline",
    "Eqs. (92)-(93)",
    "At R = I the gain is β⁻¹ log(1 + π), what a duplicate of a memory gives; less this, G = β⁻¹ log[(1 + πe^{βΔE})/(1 + π)].",
)
def replay_baseline(setting: Setting) -> Finding:
    grid = [(p, h) for p in (-460.517, -60.0, -5.0, -0.7, 1.0) for h in (-2.0, -1e-3, -1e-12, 1e-12, 1e-3, 0.9, 1.1, 5.0)]
    log_weight, exponent = (np.array(column) for column in zip(*grid, strict=True))
    beta = np.full_like(log_weight, 7.0)
    rise = exponent / beta
    values = _gains(log_weight, rise, beta)
    with mpmath.workdps(DIGITS):
        weights = [mpmath.exp(mpf(value)) for value in log_weight]
        responses = [mpmath.exp(mpf(b) * mpf(r)) for b, r in zip(beta, rise, strict=True)]
        baseline = [mpmath.log1p(w) / 7 for w in weights]
        gain = [mpmath.log1p(w * e) / 7 - base for w, e, base in zip(weights, responses, baseline, strict=True)]
        # log π is exact here; exp of it rounds by |log π| eps, exp of βΔE by |βΔE| eps, and expm1 keeps the digits of a small one.
        # Where |βΔE| ≥ 1 log(1 + π) is subtracted as it is, which costs its size over the gain's.
        condition = 8 * EPS * (1 + np.abs(log_weight) + np.abs(exponent))
        baseline_errors = _relative_error(values["baseline"], baseline) / condition
        gain_errors = _relative_error(values["gain"], gain)
        far = [float(abs(exact)) for exact in gain]
        subtraction = np.where(np.abs(exponent) < 1, 1.0, 1 + (1 + np.abs(exponent)) / (7 * np.array(far)))
    at_rest = _gains(log_weight, 0 * rise, beta)
    return Finding(
        [
            Measurement("|raw gain − baseline| at ΔE = 0", float(jnp.max(jnp.abs(at_rest["raw"] - at_rest["baseline"]))), "<=", 0.0),
            Measurement("|G| at ΔE = 0", float(jnp.max(jnp.abs(at_rest["gain"]))), "<=", 0.0),
            Measurement("float64 baseline against 270 digits, in units of its rounding", float(np.max(baseline_errors)), "<=", 1.0),
            Measurement(
                "float64 G against 270 digits, in units of its rounding", float(np.max(gain_errors / condition / subtraction)), "<=", 1.0
            ),
        ],
        note="π from 1e-200 to e, βΔE from −2 to 5 and down to 1e-12.",
    )


@claim(
    "replay-response",
    "Eqs. (94)-(96)",
    "The susceptibility χ = π/(1+π) is ∂G/∂ΔE at 0, and G = χΔE + ½βχ(1−χ)ΔE² + O(ΔE³).",
)
def replay_response(setting: Setting) -> Finding:
    beta, exponents = 7.0, 0.3 * 0.5 ** np.arange(9)
    # Not π = 1: there χ = ½ and the third order vanishes.
    log_weights = (-40.0, -5.0, -1.5, 1.5)
    ladder = np.concatenate([exponents, -exponents])
    rise = np.tile(ladder / beta, len(log_weights))
    log_weight = np.repeat(log_weights, len(ladder))
    values = {name: np.asarray(part) for name, part in _gains(log_weight, rise, np.full_like(rise, beta)).items()}
    weights = np.exp(log_weight)
    chi_error = np.abs(values["susceptibility"] / (weights / (1 + weights)) - 1) / (4 * EPS * (1 + np.abs(log_weight)))
    slope_error = np.abs(values["slope"] / values["susceptibility"] - 1) / (4 * EPS)
    measurements = [
        Measurement("χ against π/(1 + π), in units of rounding", float(np.max(chi_error)), "<=", 1.0),
        Measurement("∂G/∂ΔE at 0 by automatic differentiation against χ, in units of rounding", float(np.max(slope_error)), "<=", 1.0),
    ]
    remainder = (values["gain"] - values["second order"]).reshape(len(log_weights), 2, -1)
    for row, value in zip(remainder, log_weights, strict=True):
        for sign, part in zip(("ΔE > 0", "ΔE < 0"), row, strict=True):
            measurements.append(order_is(f"G less (96) at log π = {value}, {sign}", fit_order(exponents / beta, part), 3.0))
    return Finding(measurements)


def canonical_gains(values: np.ndarray) -> dict[str, np.ndarray]:
    """The five canonical entries of (…, target, observable) values."""
    gains = values[..., GAINS:]
    return {name: gains[..., target, replayed] for name, (target, replayed) in CANONICAL.items()}


@claim(
    "replay-average",
    "Eq. (97), Remark D.1",
    "Averaged over small rotations the gain is the susceptibility times the energy rise: ⟨G⟩ ≈ χ⟨ΔE⟩, up to O(ε⁴).",
    per_preset=True,
)
def replay_average(setting: Setting) -> Finding:
    runs, preset = ensemble(setting), setting.preset
    # χ from the symmetric solution, which shares nothing with the softmax weights that the gains were computed from.
    symmetric = jax.jit(gaps.replay_log_weights, compiler_options=QUICK_COMPILE)(float(preset.members), preset.cosine, preset.beta)
    chi = {name: 1 / (1 + np.exp(-float(log_weight))) for name, log_weight in zip(CANONICAL, symmetric, strict=True)}
    limit, limit_error = (canonical_gains(part) for part in runs.richardson())
    means, full = canonical_gains(runs.mean), canonical_gains(runs.pooled()[0])
    measurements, fractions = [], []
    for name, (target, _) in CANONICAL.items():
        linear = chi[name] * runs.second_order[:, target]
        square = linear[0] / runs.epsilons[0] ** 2
        measurements += [
            z_score(f"{name}: ⟨G⟩/ε² extrapolated to ε = 0 less χ·½σ²S", float(limit[name] - square), float(limit_error[name])),
            order_is(f"{name}: ⟨G⟩ less χ⟨ΔE⟩ in ε", fit_order(runs.epsilons, means[name] - linear[None]), 4.0),
        ]
        fractions.append(f"{name} {full[name] / runs.pooled()[0][target, 2]:.2g}")
    return Finding(
        measurements,
        note=f"Fractions ⟨G⟩/⟨ΔE⟩ of the rise recovered at ε = {preset.epsilon} (Remark D.1): {', '.join(fractions)}.",
    )
