"""A check that cannot fail is no check: each must notice one formula of `hopjax` made wrong on purpose."""

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import hopjax
from hopjax import asymptotics, cluster
from theory_checks.claim import PRESETS, REGISTRY, Setting

MODULES = {f"theory_checks.{room}" for room in ("curvature", "density", "fixed_points", "localisation", "onset", "rotations", "weights")}
for _module in sorted(MODULES):
    importlib.import_module(_module)


class Mutation(NamedTuple):
    """A function of `hopjax` and what is done to its result."""

    claim: str
    owner: Any
    name: str
    wrong: Callable[..., Any]


def _scaled(factor: float) -> Callable[..., Any]:
    return lambda result, *_, **__: jax.tree.map(lambda leaf: leaf * jnp.asarray(factor, leaf.dtype), result)


def _plus(offset: float) -> Callable[..., Any]:
    return lambda result, *_, **__: result + offset


def _replaced(**parts: Callable[[Any], Any]) -> Callable[..., Any]:
    """Changes some fields of a named tuple."""
    return lambda result, *_, **__: result._replace(**{name: change(getattr(result, name)) for name, change in parts.items()})


def _without_gradient(_: Any, state: Any, memories: Any, beta: Any, *, epsilon: Any, sigma: Any) -> Any:
    return 0.5 * (jnp.asarray(epsilon) * sigma) ** 2 * hopjax.sharpness(state, memories, beta)


def _without_cosine(_: Any, off_weights: Any, similarities: Any, beta: Any, dim: float) -> Any:
    return dim - 1 - jnp.sum(off_weights * (1 - similarities) * (2 * (dim - 1) + beta))


def _unmoved(result: Any, start: Any, *_: Any, **__: Any) -> Any:
    return result._replace(state=start)


# Identities must notice a relative error of 1e-8 or less, asymptotics a wrong leading order, samples a few per cent.
QUICK = [
    Mutation("energy-definition", hopjax, "energy", _scaled(1 + 1e-12)),
    Mutation("boltzmann-mixture", hopjax, "log_partition", _plus(1e-9)),
    Mutation("forgetting-density-ratio", hopjax, "energy_change", _plus(1e-9)),
    Mutation("pattern-onset", cluster, "critical_effective_beta", _scaled(1 + 1e-12)),
    Mutation("onset-bounds", cluster, "critical_effective_beta_bounds", lambda result, *_: (result[0] + 0.5, result[1])),
    Mutation("onset-asymptotics", cluster, "critical_effective_beta", _scaled(1 + 1e-12)),
    Mutation("leakage", cluster, "log_cluster_leakage", _plus(1e-2)),
    Mutation("localisation-condition", cluster, "log_cluster_leakage", _plus(3.0)),
    Mutation("inclusion-chain", cluster, "critical_beta", _scaled(1.5)),
    Mutation("outlier-weights", asymptotics, "log_weights", _replaced(outlier_member=lambda log: 0.99 * log)),
    Mutation("hessian-leakage", hopjax, "hessian", _scaled(1.001)),
    Mutation("leakage-expansion", asymptotics, "first_order_sharpness", _without_cosine),
]
THOROUGH = [
    Mutation("energy-definition", hopjax, "update_map", _scaled(1 + 1e-12)),
    Mutation("boltzmann-mixture", hopjax, "log_density", _plus(1e-9)),
    Mutation("boltzmann-mixture", hopjax, "sample_boltzmann", _scaled(1.03)),
    Mutation("rotation-identity", hopjax, "rotation", _scaled(1 + 1e-9)),
    Mutation("exact-planar-law", hopjax, "antisymmetric", _scaled(1.05)),
    Mutation("rotation-moments", hopjax, "antisymmetric", _scaled(1.05)),
    Mutation("rotation-averaged-rise", hopjax, "second_order_rise", _without_gradient),
    Mutation("rotation-averaged-rise", sys.modules["hopjax.forgetting"], "sharpness", _scaled(1.001)),
    Mutation("symmetric-fixed-points", cluster, "cluster_point", _replaced(log_other=lambda log: log + 1e-10)),
    Mutation("symmetric-fixed-points", cluster, "outlier_point", _replaced(log_member=lambda log: log * (1 + 1e-10))),
    Mutation("symmetric-fixed-points", hopjax, "log_weights", _scaled(1 + 1e-9)),
    Mutation("pattern-onset", hopjax, "fixed_point", _unmoved),
    Mutation("onset-bounds", cluster, "critical_effective_beta_bounds", lambda result, *_: (result[0], result[1] * 0.98)),
    Mutation("first-order-onset", hopjax, "fixed_point", _unmoved),
    Mutation("leakage", cluster, "outlier_point", _replaced(log_member=lambda log: 0.99 * log)),
    Mutation("leakage-feedback", cluster, "cluster_point", _replaced(log_outlier=lambda log: 0.99 * log)),
    Mutation("cluster-weights", asymptotics, "log_weights", _replaced(cluster_other=lambda log: 0.99 * log)),
    Mutation("cluster-weights", cluster, "outlier_point", _replaced(log_member=lambda log: 1.01 * log)),
    Mutation("hessian", hopjax, "hessian", _scaled(1 + 1e-8)),
    Mutation("hessian", hopjax, "hessian_trace", _plus(1e-7)),
    Mutation("hessian", hopjax, "sharpness", _plus(1e-7)),
    Mutation("leakage-expansion", hopjax, "second_order_rise", _scaled(1.001)),
]


@pytest.mark.parametrize(
    "mutation", [*QUICK, *(pytest.param(mutation, marks=pytest.mark.slow) for mutation in THOROUGH)], ids=lambda m: f"{m.claim}-{m.name}"
)
def test_check_fails_when_a_formula_is_wrong(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(mutation.owner, mutation.name)
    monkeypatch.setattr(mutation.owner, mutation.name, lambda *args, **options: mutation.wrong(right(*args, **options), *args, **options))
    assert not REGISTRY[mutation.claim].check(Setting(PRESETS["asymptotic"])).passed


@pytest.mark.parametrize("claim", sorted({mutation.claim for mutation in QUICK}))
def test_check_passes_when_nothing_is_wrong(claim: str) -> None:
    finding = REGISTRY[claim].check(Setting(PRESETS["asymptotic"]))
    assert finding.passed, [measurement for measurement in finding.measurements if not measurement.passed]


def test_every_claim_that_holds_has_a_mutation() -> None:
    # Both fail as they should without any mutation: see expected.toml.
    failing = {"onset-convexity", "working-regime"}
    registered = {claim.name for claim in REGISTRY.values() if claim.check.__module__ in MODULES}
    assert registered - failing == {mutation.claim for mutation in (*QUICK, *THOROUGH)}
