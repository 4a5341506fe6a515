"""hopjax: forgetting in generative models, seen through the modern Hopfield energy.

Kernels take one state and are jit-, vmap- and grad-able. The general ones are exported here; those of the cluster-plus-outlier
model (`cluster`, `gaps`, `asymptotics`), of diffusion (`correspondence`), of whole data sets (`tiled`), replay buffers (`buffer`) and
learned memories (`boltzmann`, `estimator`) live in their modules.

>>> import jax, hopjax
>>> memories = hopjax.cluster.memories(members=12, dim=50, cosine=0.35)
>>> rise = jax.vmap(lambda x: hopjax.second_order_rise(x, memories, 8.0, epsilon=0.02, sigma=1.0))(memories)

Source: arXiv:2605.27975.
"""

from hopjax import asymptotics, boltzmann, buffer, cluster, correspondence, estimator, gaps, tiled
from hopjax.energy import (
    energy,
    gradient,
    hessian,
    hessian_product,
    hessian_quadratic,
    hessian_trace,
    log_density,
    log_partition,
    log_weights,
    sample_boltzmann,
    sharpness,
    update_map,
    weights,
)
from hopjax.fixed_point import Anderson, FixedPoint, Newton, Picard, fixed_point
from hopjax.forgetting import (
    Antithetic,
    ControlVariate,
    Estimate,
    Plain,
    average_rise,
    energy_change,
    energy_rise,
    paired_energy_change,
    rotation_average,
    sample_rises,
    second_order_rise,
)
from hopjax.replay import (
    average_gain,
    baseline_gain,
    gain,
    gain_matrix,
    log_replay_weight,
    log_weight_matrix,
    raw_gain,
    second_order_gain,
    susceptibility,
)
from hopjax.rotation import (
    DenseLaw,
    PlanarLaw,
    antisymmetric,
    displacement,
    generator_bound,
    half_difference,
    lanczos_size,
    planar_rotation,
    rotation,
    unit_displacement,
    unit_entries,
)

__all__ = [
    "Anderson",
    "Antithetic",
    "ControlVariate",
    "DenseLaw",
    "Estimate",
    "FixedPoint",
    "Newton",
    "Picard",
    "Plain",
    "PlanarLaw",
    "antisymmetric",
    "asymptotics",
    "average_gain",
    "average_rise",
    "baseline_gain",
    "boltzmann",
    "buffer",
    "cluster",
    "correspondence",
    "displacement",
    "energy",
    "energy_change",
    "energy_rise",
    "estimator",
    "fixed_point",
    "gain",
    "gain_matrix",
    "gaps",
    "generator_bound",
    "gradient",
    "half_difference",
    "hessian",
    "hessian_product",
    "hessian_quadratic",
    "hessian_trace",
    "lanczos_size",
    "log_density",
    "log_partition",
    "log_replay_weight",
    "log_weight_matrix",
    "log_weights",
    "paired_energy_change",
    "planar_rotation",
    "raw_gain",
    "rotation",
    "rotation_average",
    "sample_boltzmann",
    "sample_rises",
    "second_order_gain",
    "second_order_rise",
    "sharpness",
    "susceptibility",
    "tiled",
    "unit_displacement",
    "unit_entries",
    "update_map",
    "weights",
]
