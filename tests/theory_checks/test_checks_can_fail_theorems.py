"""Checks of the theorems notice a wrong formula: each is run with one function of hopjax broken."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import hopjax
from theory_checks import digits, enclosure, ensemble
from theory_checks.claim import PRESETS, REGISTRY, Setting

for module in ("theorem_4_1", "sharpness", "replay_identity", "theorem_5_1", "correspondence", "synthetic", "digits"):
    importlib.import_module(f"theory_checks.{module}")


def _forget_compiled() -> None:
    jax.clear_caches()
    ensemble.ensemble.cache_clear()
    digits.digits.cache_clear()


@pytest.fixture(autouse=True)
def _recompiled() -> Iterator[None]:
    """What was compiled before the break, and with it, must not be used again."""
    _forget_compiled()
    yield
    _forget_compiled()


def scaled(factor: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function times a factor (every array that it returns)."""
    return lambda function: lambda *args, **kwargs: jax.tree.map(lambda value: value * factor, function(*args, **kwargs))


def with_field(**changes: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function with fields of the named tuple that it returns changed."""

    def broken(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            return result._replace(**{name: change(getattr(result, name)) for name, change in changes.items()})

        return call

    return broken


def at_beta(factor: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function at another β, its last positional argument."""
    return lambda function: lambda *args, **kwargs: function(*args[:-1], args[-1] * factor, **kwargs)


# Claim, what is broken, how; a mistake of 1 % or a sign where nothing else is said.
BREAKS: list[tuple[str, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = [
    ("rise-asymptotics", "hopjax.asymptotics.sharpnesses", with_field(gap=lambda gap: 1.01 * gap)),
    ("theorem-4-1-sign", "hopjax.gaps.sharpnesses", with_field(log_gap=lambda log_gap: log_gap + 1e-9)),
    ("remark-b-6", "hopjax.cluster.memories", lambda function: lambda k, d, c: function(k, d, c + 1e-6)),
    ("energy-expansion", "hopjax.asymptotics.energies", with_field(cluster=lambda value: 1.0001 * value)),
    ("sharpness-definition", "hopjax.sharpness", scaled(1 + 1e-9)),
    ("sharpness-definition", "hopjax.antisymmetric", scaled(1.2)),
    ("perturbation-sharpness", "hopjax.hessian_trace", scaled(1.05)),
    ("replay-identity", "hopjax.raw_gain", scaled(1 + 1e-10)),
    ("replay-baseline", "hopjax.gain", scaled(1 + 1e-10)),
    ("replay-response", "hopjax.susceptibility", scaled(1 + 1e-9)),
    ("susceptibility-asymptotics", "hopjax.asymptotics.log_susceptibilities", with_field(cluster_other=lambda value: 0.99 * value)),
    ("theorem-5-1-limit", "hopjax.gaps.sharpnesses", with_field(sign=lambda sign: -1e3 * sign)),
    ("variance-exploding", "hopjax.correspondence.ve_implicit_energy", scaled(1 + 1e-9)),
    ("variance-preserving", "hopjax.correspondence.vp_implicit_energy", scaled(1.01)),
    ("exact-denoiser", "hopjax.correspondence.posterior_mean", scaled(1 + 1e-9)),
    ("signal-to-noise", "hopjax.correspondence.signal_to_noise", scaled(1 + 1e-9)),
    ("appendix-e-2", "hopjax.gain_matrix", lambda function: lambda *args: function(*args).T[::-1]),
]

# What takes minutes in all: everything is compiled again for each, and the rotations are run.
SLOW_BREAKS: list[tuple[str, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = [
    ("remark-b-6", "hopjax.gaps.sharpnesses", with_field(sign=jnp.abs)),
    ("energy-expansion", "hopjax.asymptotics.first_order_energy", scaled(1.0001)),
    ("energy-gap", "hopjax.gaps.energies", with_field(log_gap=lambda log_gap: log_gap + 0.01)),
    ("sharpness-gap", "hopjax.asymptotics.first_order_sharpness", scaled(1.0001)),
    ("replay-identity", "hopjax.log_replay_weight", at_beta(1 + 1e-9)),
    ("replay-baseline", "hopjax.baseline_gain", scaled(1 + 1e-10)),
    ("replay-response", "hopjax.second_order_gain", scaled(1.01)),
    ("theorem-5-1-limit", "hopjax.gaps.replay_log_weights", with_field(cluster_other=lambda value: 1.5 * value)),
    ("exact-denoiser", "hopjax.correspondence.mixture_score", scaled(1 + 1e-9)),
    ("signal-to-noise", "hopjax.correspondence.timestep_at_beta", scaled(1 + 1e-9)),
    ("appendix-e-1", "hopjax.second_order_rise", scaled(1 + 1e-9)),
    ("theorem-4-1", "hopjax.second_order_rise", scaled(1.001)),
    ("theorem-4-1", "hopjax.forgetting.energy_rise", scaled(1.001)),
    ("theorem-4-1-plain", "hopjax.forgetting.energy_rise", scaled(-1.0)),
    ("replay-average", "hopjax.gain", scaled(1.001)),
    ("replay-average", "hopjax.log_weight_matrix", lambda function: lambda *args: function(*args).T),
    ("theorem-5-1", "hopjax.gain", scaled(-1.0)),
    ("digits-second-order", "hopjax.second_order_rise", scaled(1.001)),
    ("digits-energy-rise", "hopjax.second_order_rise", scaled(-1.0)),
    ("digits-energy-rise-fixed-point", "hopjax.energy", scaled(-1.0)),
]


def _broken_check_fails(monkeypatch: pytest.MonkeyPatch, name: str, target: str, broken: Callable[..., Any]) -> None:
    path, attribute = target.rsplit(".", 1)
    owner = importlib.import_module(path)
    monkeypatch.setattr(owner, attribute, broken(getattr(owner, attribute)))
    assert not REGISTRY[name].check(Setting(PRESETS["paper"])).passed


@pytest.mark.parametrize(("name", "target", "broken"), BREAKS, ids=[f"{name}-{target}" for name, target, _ in BREAKS])
def test_a_wrong_formula_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str, target: str, broken: Callable[..., Any]) -> None:
    _broken_check_fails(monkeypatch, name, target, broken)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target", "broken"), SLOW_BREAKS, ids=[f"{name}-{target}" for name, target, _ in SLOW_BREAKS])
def test_a_wrong_formula_is_noticed_slowly(monkeypatch: pytest.MonkeyPatch, name: str, target: str, broken: Callable[..., Any]) -> None:
    _broken_check_fails(monkeypatch, name, target, broken)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["theorem-4-1-everywhere", "theorem-5-1-everywhere"])
def test_the_theorems_fail_only_at_the_onset(name: str) -> None:
    finding = REGISTRY[name].check(Setting(PRESETS["paper"]))
    assert not finding.passed
    assert [entry["failures"] > 0 for entry in finding.series["maps"]] == [True, False, False]


def test_the_enclosures_contain_the_values_of_the_full_map() -> None:
    members, cosine, beta, dim = 5, 0.4, 14.0, 9
    memories = hopjax.cluster.memories(members, dim, cosine)
    states = [hopjax.fixed_point(memories[index], memories, beta).state for index in (-1, 0)]
    sharpness = [float(hopjax.sharpness(state, memories, beta)) for state in states]
    energy = [float(hopjax.energy(state, memories, beta)) for state in states]
    enclosed = enclosure.enclose(members, cosine, beta, dim)
    assert enclosed is not None
    assert float(enclosed.sharpness_gap) == pytest.approx(sharpness[0] - sharpness[1], abs=1e-11)
    assert float(enclosed.energy_gap) == pytest.approx(energy[0] - energy[1], abs=1e-13)
