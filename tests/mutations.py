"""Breaks hopjax on purpose, one formula at a time, and runs the tests that must notice: `python -m tests.mutations [--list]`.

Each mutation is made in a temporary copy of the package, never in the checkout. Exit status 1 if any survives.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutation(NamedTuple):
    """`old` occurs once in hopjax/`module`.py and becomes `new`; `test` (file::test) must then fail."""

    what: str
    module: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "energy: ½|x|² with the wrong half",
        "energy",
        "return 0.5 * jnp.sum(state**2) -",
        "return jnp.sum(state**2) -",
        "test_energy.py::test_derivatives_are_derivatives",
    ),
    Mutation(
        "Hessian: β² for β",
        "energy",
        "dtype=state.dtype) - _positive(beta, memories) *",
        "dtype=state.dtype) - _positive(beta, memories) ** 2 *",
        "test_energy.py::test_derivatives_are_derivatives",
    ),
    Mutation(
        "Hessian quadratic form: missing square",
        "energy",
        "variance = jnp.sum(p * _deviations(p, _matmul(memories, vector)) ** 2)",
        "variance = jnp.sum(p * _deviations(p, _matmul(memories, vector)))",
        "test_energy.py::test_derivatives_are_derivatives",
    ),
    Mutation(
        "sharpness: d for d − 1",
        "energy",
        "return (state.shape[0] - 1) * square",
        "return state.shape[0] * square",
        "test_energy.py::test_derivatives_are_derivatives",
    ),
    Mutation(
        "Z: β|ξ|² for β|ξ|²/2",
        "energy",
        "jax.nn.logsumexp(0.5 * beta * jnp.sum(memories**2, axis=1))",
        "jax.nn.logsumexp(beta * jnp.sum(memories**2, axis=1))",
        "test_energy.py::test_partition_function_is_the_integral",
    ),
    Mutation(
        "samples: noise β for β^{−1/2}",
        "energy",
        "memories.dtype) / jnp.sqrt(beta)",
        "memories.dtype) / beta",
        "test_energy.py::test_samples_follow_the_density",
    ),
    Mutation(
        "β = ∞ is let through",
        "energy",
        "(value > 0) & (value < jnp.inf)",
        "value > 0",
        "test_energy.py::test_a_beta_that_is_no_temperature_gives_nan",
    ),
    Mutation(
        "implicit gradient: H⁻¹ left out",
        "fixed_point",
        "tangent = _hessian_solve(result.state, moved, memories, beta)",
        "tangent = moved",
        "test_fixed_point.py::test_derivatives_of_the_curie_weiss_magnet",
    ),
    Mutation(
        "Newton never taken",
        "fixed_point",
        "candidate_residual <= 0.25 * residual",
        "candidate_residual <= 0 * residual",
        "test_fixed_point.py::test_newton_is_fast_at_the_onset",
    ),
    Mutation(
        "outlier: K for K − 1",
        "cluster",
        "total = 1 + (members - 1) * cosine  #",
        "total = 1 + members * cosine  #",
        "test_cluster.py::test_bisection_along_the_branch_finds_the_same_outlier",
    ),
    Mutation(
        "cluster member: K for K − 1",
        "cluster",
        "alignment = 1 + (members - 1) * cosine * jnp.exp(-v)",
        "alignment = 1 + members * cosine * jnp.exp(-v)",
        "test_cluster.py::test_branches_end_at_their_folds",
    ),
    Mutation(
        "outlier branch past its fold",
        "cluster",
        "jnp.where(beyond | (root <= -log_members), root, jnp.nan)",
        "root",
        "test_cluster.py::test_branches_end_at_their_folds",
    ),
    Mutation(
        "onset: K − 1 for K",
        "cluster",
        "value = v + members * v / jnp.expm1(v)",
        "value = v + (members - 1) * v / jnp.expm1(v)",
        "test_cluster.py::test_the_onset_is_the_minimum_of_the_printed_curve",
    ),
    Mutation(
        "strong: log K − log β",
        "cluster",
        "needed = jnp.log(members) + jnp.log(beta)",
        "needed = jnp.log(members) - jnp.log(beta)",
        "test_cluster.py::test_regimes_are_their_definitions",
    ),
    Mutation(
        "energy gap: sign of the square",
        "gaps",
        "(_log1p_ratio(leak.outlier) / beta + square)",
        "(_log1p_ratio(leak.outlier) / beta - square)",
        "test_gaps.py::test_gaps_agree_with_many_digits",
    ),
    Mutation(
        "sharpness gap: d for d − 1",
        "gaps",
        "tangent = jnp.asarray(dim).astype(beta.dtype) - 1",
        "tangent = jnp.asarray(dim).astype(beta.dtype)",
        "test_gaps.py::test_known_sharpnesses",
    ),
    Mutation(
        "first-order sharpness: 1 − s for 1 + s",
        "asymptotics",
        "beta).astype(off_weights.dtype) * (1 + similarities)",
        "beta).astype(off_weights.dtype) * (1 - similarities)",
        "test_asymptotics.py::test_first_orders_are_the_two_points",
    ),
    Mutation(
        "asymptotic rise: ε² for ½ε²",
        "asymptotics",
        "scale = 0.5 * jnp.square",
        "scale = jnp.square",
        "test_asymptotics.py::test_gaps_are_differences",
    ),
    Mutation(
        "planar law: χ of one degree too many",
        "rotation",
        "range(dim - 1, dim - size, -1)",
        "range(dim, dim - size + 1, -1)",
        "test_rotation.py::test_in_the_plane_the_angle_is_the_entry",
    ),
    Mutation(
        "planar law: the rest of v one degree short",
        "rotation",
        "outside := dim - 1 - count if projected",
        "outside := max(dim - 2 - count, 0) if projected",
        "test_rotation.py::test_the_two_laws_agree",
    ),
    Mutation(
        "second-order rise: gradient term dropped",
        "forgetting",
        "(sharpness(state, memories, beta) - (state.shape[0] - 1) * slope)",
        "(sharpness(state, memories, beta) - 0 * slope)",
        "test_forgetting.py::test_second_order_is_the_curvature_of_the_average",
    ),
    Mutation(
        "rise: sign",
        "forgetting",
        "return -lax.cond(jnp.all(small), lambda: near, with_far) / beta",
        "return lax.cond(jnp.all(small), lambda: near, with_far) / beta",
        "test_forgetting.py::test_both_branches_of_the_rise_and_its_slope",
    ),
    Mutation(
        "control variate: its mean not put back",
        "forgetting",
        "- (control - control_mean)",
        "- control",
        "test_forgetting.py::test_estimates_are_unbiased",
    ),
    Mutation(
        "control variate: the curvature without β",
        "forgetting",
        "(beta * variance + _matmul(moves.centripetal, p))",
        "(variance + _matmul(moves.centripetal, p))",
        "test_forgetting.py::test_the_residual_of_the_control_variate_is_of_fourth_order",
    ),
    Mutation(
        "standard error: a variance",
        "forgetting",
        "jnp.sqrt(variance / pairs)",
        "variance / pairs",
        "test_forgetting.py::test_standard_errors_are_the_spread_of_the_estimates",
    ),
    Mutation(
        "χ without the 1 + π",
        "replay",
        "return jax.nn.sigmoid(log_weight)",
        "return jnp.exp(log_weight)",
        "test_replay.py::test_laws_of_the_gain",
    ),
    Mutation(
        "second-order gain: β² for β",
        "replay",
        "0.5 * _positive(beta, log_weight) * chi",
        "0.5 * _positive(beta, log_weight) ** 2 * chi",
        "test_replay.py::test_second_order_drops_the_third",
    ),
    Mutation(
        "raw gain: rise not multiplied by β",
        "replay",
        "jax.nn.softplus(log_weight + beta * rise)",
        "jax.nn.softplus(log_weight + rise)",
        "test_replay.py::test_raw_gain_is_the_energy_of_one_more_memory",
    ),
    Mutation(
        "score: scale left out",
        "correspondence",
        "mean = jnp.asarray(scale).astype(state.dtype) * posterior_mean",
        "mean = posterior_mean",
        "test_correspondence.py::test_mixtures_agree_with_fifty_digits",
    ),
    Mutation(
        "signal to noise: square root",
        "correspondence",
        "return alphas_cumprod / (1 - alphas_cumprod)",
        "return jnp.sqrt(alphas_cumprod) / (1 - alphas_cumprod)",
        "test_correspondence.py::test_the_linear_schedule",
    ),
    Mutation(
        "moments: the mean logit moves the wrong way with the top",
        "moments",
        "(part.logit + shift * part.weight)",
        "(part.logit - shift * part.weight)",
        "test_tiled.py::test_moments_keep_the_logit_when_the_top_moves",
    ),
    Mutation(
        "moments: spread with ℓ for ℓ²",
        "moments",
        "ell * scatter - ell**2 *",
        "ell * scatter - ell *",
        "test_tiled.py::test_stored_states_keep_the_digits_of_their_leakage",
    ),
    Mutation(
        "moments: radial second moment for variance",
        "moments",
        "self.over_others(self.moments.radial) - self.slope**2",
        "self.over_others(self.moments.radial)",
        "test_tiled.py::test_one_pass_is_the_one_shot_formula",
    ),
    Mutation(
        "moments: rise without the gradient",
        "moments",
        "- (soft.states.shape[1] - 1) * soft.slope",
        "",
        "test_tiled.py::test_one_pass_is_the_one_shot_formula",
    ),
    Mutation(
        "moments: the own memory's prior forgotten",
        "moments",
        "(self.beta * self.square + _known(self.own_log_prior))",
        "self.beta * self.square",
        "test_tiled.py::test_a_prior_weighs_a_stored_state_too",
    ),
    Mutation(
        "moments: a memory that is not finite has no weight",
        "moments",
        "jnp.where(jnp.isfinite(squares), offset, jnp.nan)",
        "jnp.where(jnp.isfinite(squares), offset, -jnp.inf)",
        "test_tiled.py::test_what_is_not_finite_is_not_a_number",
    ),
    Mutation(
        "tiles: the last tile counts memories twice",
        "tiles",
        "jnp.where(seen, -jnp.inf, lax.dynamic_slice_in_dim(offset, start, rows))",
        "lax.dynamic_slice_in_dim(offset, start, rows)",
        "test_tiled.py::test_one_pass_is_the_one_shot_formula",
    ),
    Mutation(
        "tiles: the last states count twice in the derivative",
        "tiles",
        "jnp.where(fresh.reshape(-1, *(1,) * (a.ndim - 1)), a, 0.0)",
        "a",
        "test_tiled.py::test_the_derivative_streams_to_the_same_numbers",
    ),
    Mutation(
        "tiles: the own memory has a derivative",
        "tiles",
        "of_tile(x, part, beta, offsets, me, needs, first=first, top=high)",
        "of_tile(x, part, beta, offsets, None, needs, first=first, top=high)",
        "test_tiled.py::test_left_out_memories_get_no_derivative_from_their_own_state",
    ),
    Mutation(
        "tiles: each tile's moments relative to its own largest logit in the derivative",
        "tiles",
        "of_tile(x, part, beta, offsets, me, needs, first=first, top=high)",
        "of_tile(x, part, beta, offsets, me, needs, first=first)",
        "test_tiled.py::test_curvature_and_entropy_have_a_derivative_that_streams",
    ),
    Mutation(
        "tiles: −β|ξ|² for −½β|ξ|² in the kernel density",
        "tiles",
        "return -0.5 * _positive(beta, memories)",
        "return -_positive(beta, memories)",
        "test_tiled.py::test_priors_make_the_kernel_energy_and_the_mean",
    ),
    Mutation(
        "mesh: every device takes its memories for the first",
        "mesh",
        "lax.axis_index(MEMORIES) * memories.shape[0]",
        "0 * memories.shape[0]",
        "test_mesh.py::test_one_two_four_and_eight_devices_agree_and_exchange_what_the_layout_counts",
    ),
    Mutation(
        "mesh: states that are not their own memories pass",
        "mesh",
        "check_stored(states, memories, own, begun, begun + default_tile().states)",
        "pass",
        "test_mesh.py::test_what_does_not_fit_is_named_as_on_one_device",
    ),
    Mutation(
        "neighbours: found without a common shift",
        "moments",
        "x, y = states - centre, memories - centre",
        "x, y = states, memories",
        "test_tiled.py::test_neighbours_and_their_distances_survive_a_common_offset",
    ),
    Mutation(
        "perturbation: gentle tilts of the other sign alike",
        "perturbation",
        "-jnp.sum(w * (up / (1 + up)), axis=1)",
        "-jnp.sum(w * up, axis=1)",
        "test_perturbation.py::test_a_pair_is_its_definition",
    ),
    Mutation(
        "perturbation: tilts of one sign",
        "perturbation",
        "jnp.array([1.0, -1.0], states.dtype)",
        "jnp.array([1.0, 1.0], states.dtype)",
        "test_perturbation.py::test_a_pair_is_its_definition",
    ),
    Mutation(
        "perturbation: large tilts by the formula for small ones",
        "perturbation",
        "small = (sums.steepest <= 1)[:, None]",
        "small = (sums.steepest <= 1e9)[:, None]",
        "test_perturbation.py::test_a_pair_is_its_definition",
    ),
    Mutation(
        "buffer: what is left of the rise by the gain of the wrong weight",
        "buffer",
        "-gain(-log_weight, -rise, beta)",
        "rise - gain(-log_weight, rise, beta)",
        "test_buffer.py::test_marginal_gains_agree_with_many_digits",
    ),
    Mutation(
        "buffer: a bound that negative rises lower",
        "buffer",
        "jnp.maximum(terms, 0)",
        "terms",
        "test_buffer.py::test_bounds_are_of_the_nonnegative_rises",
    ),
    Mutation(
        "buffer: no slack for rounding",
        "buffer",
        "slack = 1 + 16 *",
        "slack = 1 + 0 *",
        "test_buffer.py::test_lazy_is_plain_greedy_bit_for_bit",
    ),
    Mutation(
        "log-likelihood: |x|² without the half",
        "boltzmann",
        "- 0.5 * _positive(beta, memories) * jnp.sum(samples**2, axis=1)",
        "- _positive(beta, memories) * jnp.sum(samples**2, axis=1)",
        "test_boltzmann.py::test_the_density_integrates_to_one_and_its_mean_log_is_the_entropy",
    ),
    Mutation(
        "E-step: the last rows counted twice",
        "boltzmann",
        "fresh = start + lax.iota(jnp.int32, rows) >= place * rows",
        "fresh = start + lax.iota(jnp.int32, rows) >= 0 * place",
        "test_boltzmann.py::test_the_e_step_streams_to_the_moments_of_their_definition",
    ),
    Mutation(
        "M-step: β missing from Wright's equation",
        "boltzmann",
        "2 * log_sum + 2 * log_length + jnp.log(beta)) - jnp.log(beta)",
        "2 * log_sum + 2 * log_length) - jnp.log(beta)",
        "test_boltzmann.py::test_the_m_step_is_stationary_at_every_scale",
    ),
    Mutation(
        "M-step: the plain mean for tied weights",
        "boltzmann",
        "return _along(mean, jnp.where(present, jnp.exp(0.5 * log_square(root)), 0.0))",
        "return mean / jnp.sum(length)",
        "test_boltzmann.py::test_no_other_memories_beat_the_m_step",
    ),
    Mutation(
        "fixed norm: learned instead",
        "boltzmann",
        "    if norm is not None:\n        return _along(",
        "    if norm is not None and norm is None:\n        return _along(",
        "test_boltzmann.py::test_weights_follow_norms",
    ),
    Mutation(
        "Adam: second moment not corrected",
        "boltzmann",
        "second / (1 - fast**taken)",
        "second",
        "test_boltzmann.py::test_the_first_step_of_adam_is_the_learning_rate_along_the_sign_of_the_gradient",
    ),
    Mutation(
        "fits: always converged",
        "boltzmann",
        "converged = climb.residual <= tolerance",
        "converged = climb.residual <= jnp.inf",
        "test_boltzmann.py::test_why_a_fit_stopped_is_data",
    ),
    Mutation(
        "fits: the last step for the way that is left",
        "boltzmann",
        "return self.move / (1 - self.ratio)",
        "return self.move",
        "test_boltzmann.py::test_a_slow_climb_ends_within_the_tolerance_of_the_maximum",
    ),
    Mutation(
        "start: seeds never spread",
        "boltzmann",
        "jnp.log(weights), shape=(candidates,)",
        "jnp.log(1 / weights), shape=(candidates,)",
        "test_boltzmann.py::test_the_default_start_finds_well_separated_memories",
    ),
    Mutation(
        "streaming fit: blocks weighed alike",
        "estimator",
        "(len(part) / len(samples), _e_step(",
        "(1 / -(-len(samples) // rows), _e_step(",
        "test_boltzmann.py::test_samples_mapped_from_a_file_are_streamed_to_the_same_fit",
    ),
    Mutation(
        "estimator: the worst start kept",
        "estimator",
        "best = jnp.argmax(",
        "best = jnp.argmin(",
        "test_boltzmann.py::test_the_estimator_keeps_the_best_of_its_starts",
    ),
)


def copy(folder: Path) -> None:
    for name in ("hopjax", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def run_tests(folder: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The copy's tests on the copy's package: the working directory comes before the environment's packages."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", ""]  # slow tests too
    command += [f"tests/hopjax/{test}" for test in dict.fromkeys(tests)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=environment | {"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False)


def survives(mutation: Mutation) -> str:
    """Empty if the test fails as it must; otherwise what happened instead."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(folder)
        path = folder / "hopjax" / f"{mutation.module}.py"
        source = path.read_text()
        if source.count(mutation.old) != 1:
            return f"its formula occurs {source.count(mutation.old)} times in hopjax/{mutation.module}.py"
        path.write_text(source.replace(mutation.old, mutation.new))
        result = run_tests(folder, [mutation.test])
        # pytest's 1 is a failed test; an error in a fixture or at import would also be 1 or 2, but is no kill.
        if result.returncode == 1 and re.search(r"\d+ failed", result.stdout):
            return ""
        return f"pytest exited with {result.returncode}: {(result.stdout + result.stderr).strip()[-200:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the mutations and the tests that must notice")
    parser.add_argument("--workers", type=int, default=2, help="mutations tried at a time (default 2)")
    parser.add_argument("names", nargs="*", help="only mutations whose description contains one of these")
    options = parser.parse_args(arguments)
    chosen = [mutation for mutation in MUTATIONS if not options.names or any(name in mutation.what for name in options.names)]
    if options.list:
        for mutation in chosen:
            print(f"{mutation.what}: {mutation.test}")
        return 0
    with tempfile.TemporaryDirectory() as name:  # a test that fails anyway kills nothing
        copy(Path(name))
        result = run_tests(Path(name), [mutation.test for mutation in chosen])
        if result.returncode:
            print(f"the tests fail without a mutation:\n{result.stdout}{result.stderr}")
            return 1
    survivors = 0
    with ThreadPoolExecutor(options.workers) as pool:
        for count, (mutation, trouble) in enumerate(zip(chosen, pool.map(survives, chosen), strict=True), 1):
            survivors += bool(trouble)
            print(f"[{count}/{len(chosen)}] {'SURVIVED' if trouble else 'killed'} {mutation.what}: {trouble or mutation.test}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
