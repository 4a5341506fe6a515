"""One parameter point: what --json prints, held against mpmath."""

import json
import math

import mpmath
import pytest

from theory_checks import point

PAPER = (12, 0.35, 8.0, 50)
KEYS = {
    "K cosine beta dim outlier_self outlier_leak cluster_self cluster_other cluster_outlier",
    "E_outlier E_cluster E_gap S_outlier S_cluster S_gap",
    "chi_oo chi_cc chi_cc2 chi_co chi_oc beta_c log_outlier_self log_outlier_leak log_cluster_self log_cluster_other log_cluster_outlier",
    "log_E_gap log_S_gap sign_E_gap sign_S_gap beta_over_beta_c beta_outlier_leakage beta_cluster_leakage strength exists localised strong",
    "reason asymptotic",
}


def _state_numbers(weights, gram, beta, dim):
    """E and S at the fixed point with these weights, by (1) and (74) from inner products alone."""
    overlaps = [mpmath.fdot(row, weights) for row in gram]
    square = mpmath.fdot(weights, overlaps)
    energy = square / 2 - mpmath.log(mpmath.fsum(mpmath.exp(beta * overlap) for overlap in overlaps)) / beta
    trace = dim - beta * (1 - square)
    form = square - beta * (mpmath.fdot(weights, [overlap**2 for overlap in overlaps]) - square**2)
    return energy, square * trace - form


def _oracle(members, cosine, beta, dim):
    """Everything at a point by iterating x ← T(x) over all K + 1 weights, in 40 digits."""
    with mpmath.workdps(40):
        c, beta = mpmath.mpf(cosine), mpmath.mpf(beta)
        size = members + 1
        gram = [[mpmath.mpf(1) if i == j else c if max(i, j) < members else mpmath.mpf(0) for j in range(size)] for i in range(size)]
        found = {}
        for name, start in (("outlier", members), ("cluster", 0)):
            weights = [mpmath.mpf(i == start) for i in range(size)]
            for _ in range(500):
                boltzmann = [mpmath.exp(beta * mpmath.fdot(row, weights)) for row in gram]
                total = mpmath.fsum(boltzmann)
                weights = [weight / total for weight in boltzmann]
            found[name] = weights
        out, clu = found["outlier"], found["cluster"]
        values = {
            "outlier_self": out[members],
            "outlier_leak": out[0],
            "cluster_self": clu[0],
            "cluster_other": clu[1],
            "cluster_outlier": clu[members],
        }
        chi = {"chi_oo": out[members], "chi_cc": clu[0], "chi_cc2": clu[1], "chi_co": clu[members], "chi_oc": out[0]}
        values |= {f"log_{key}": mpmath.log(value) for key, value in values.items()}
        values |= {key: weight / (1 + weight) for key, weight in chi.items()}
        (e_o, s_o), (e_c, s_c) = (_state_numbers(weights, gram, beta, dim) for weights in (out, clu))
        values |= {"E_outlier": e_o, "E_cluster": e_c, "E_gap": e_o - e_c, "S_outlier": s_o, "S_cluster": s_c, "S_gap": s_o - s_c}
        values |= {"log_E_gap": mpmath.log(abs(e_o - e_c)), "log_S_gap": mpmath.log(abs(s_o - s_c))}
        slope = mpmath.findroot(lambda v: 1 + members * mpmath.diff(lambda t: t / mpmath.expm1(t), v), 3)
        values["beta_c"] = (slope + members * slope / mpmath.expm1(slope)) / (1 - c)
        return values


def test_the_paper_s_point_against_iteration_in_40_digits():
    values = point.evaluate(*PAPER)
    assert set(values) >= set(" ".join(KEYS).split())
    oracle = _oracle(*PAPER)
    for key, value in oracle.items():
        # β/β_c = 1.08: near the fold a rounding is amplified by the fixed point's condition, here below 20.
        assert values[key] == pytest.approx(float(value), rel=1e-13), key
    assert values["sign_E_gap"] == values["sign_S_gap"] == 1
    assert values["exists"] is True
    assert values["localised"] is False
    assert values["reason"] is None


def test_small_numbers_underflow_but_their_logarithms_do_not():
    values = point.evaluate(12, 0.35, 3000.0, 50)
    assert values["outlier_leak"] == values["cluster_other"] == values["E_gap"] == 0.0
    assert values["log_cluster_other"] == pytest.approx(-3000 * 0.65, rel=1e-15)
    assert values["log_E_gap"] == pytest.approx(math.log(11 / 3000) - 3000 * 0.65, rel=1e-15)
    asymptotic = values["asymptotic"]
    for name in ("E", "S"):
        assert asymptotic[f"log_{name}_gap"] == pytest.approx(values[f"log_{name}_gap"], rel=1e-14)
        assert asymptotic[f"{name}_gap"] == 0.0
    assert "log |E_o − E_c|" in point.render(values)


@pytest.mark.parametrize(("beta", "missing", "there"), [(3.0, ("outlier", "cluster"), ()), (6.0, ("cluster",), ("outlier",))])
def test_what_does_not_exist_is_null_with_a_reason(beta, missing, there):
    values = json.loads(json.dumps(point.evaluate(12, 0.35, beta, 50), allow_nan=False))
    for name in missing:
        assert values[f"{name}_self"] is values[f"log_{name}_self"] is values[f"E_{name}"] is values[f"S_{name}"] is None
        assert f"no {name} fixed point: β = {beta:g} is below the fold at β ≈ " in values["reason"]
    for name in there:
        assert values[f"{name}_self"] > 0.9
        assert values[f"E_{name}"] < 0
        assert f"no {name} fixed" not in values["reason"]
    assert values["E_gap"] is values["sign_S_gap"] is None
    assert values["chi_cc"] is None
    assert "—" in point.render(values)


def test_the_fold_named_is_where_the_fixed_point_begins():
    reason = point.evaluate(12, 0.35, 6.0, 50)["reason"]
    fold = float(reason.split("β ≈ ")[1].split(";")[0])
    assert point.evaluate(12, 0.35, fold * (1 + 2e-5), 50)["reason"] is None
    assert point.evaluate(12, 0.35, fold * (1 - 2e-5), 50)["reason"] is not None


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((1, 0.3, 8.0, 50), ("--K 1", "2 ≤ K", "take K = 2")),
        ((2**60, 0.3, 8.0, 2**61), ("--K", "2^53")),
        ((12, 1.0, 8.0, 50), ("--cosine 1.0", "c < 1", "take c")),
        ((12, -0.1, 8.0, 50), ("--cosine -0.1", "-0.0909091", "take c")),
        ((12, math.nan, 8.0, 50), ("--cosine nan", "take c")),
        ((12, 0.3, 0.0, 50), ("--beta 0.0", "0 < β", "take β")),
        ((12, 0.3, math.nan, 50), ("--beta nan", "take β")),
        ((12, 0.3, math.inf, 50), ("--beta inf", "take β")),
        ((12, 0.3, 8.0, 12), ("--dim 12", "13 ≤ d", "take --dim 13")),
    ],
)
def test_bad_points_name_the_value_the_bound_and_the_fix(arguments, names):
    with pytest.raises(ValueError) as raised:  # noqa: PT011, each message is looked at below
        point.check_point(*arguments)
    message = str(raised.value)
    assert "\n" not in message
    for name in names:
        assert name in message


def test_a_boundary_cosine_is_accepted():
    point.check_point(4, -1 / 3, 8.0, 5)
    assert point.evaluate(4, -1 / 3, 8.0, 5)["outlier_self"] > 0.99
