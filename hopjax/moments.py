r"""What a softmax over memories has to be asked: moments of disjoint sets of memories, how they merge, and the quantities they give.

A state x weighs memory ξ by $w = e^{l - \mathrm{top}}$, $l = \beta\,\xi\cdot x + \log\pi_\xi$. A handful of sums over the memories, kept
relative to the largest logit, determines the energy, its curvature and the weights' summaries. Sums over disjoint sets of memories
`merge` like a commutative monoid: tile by tile on one device, by `all_reduce` over many.

Memories are measured from the state (ξ − x), and a state that is itself stored is left out of the sums and put back in closed form: with
$\Lambda = \log\sum_\mathrm{others} e^{l} - l_\mathrm{own}$ and the leakage $\ell = 1/(1+e^{-\Lambda})$ every correction is proportional
to ℓ, so it keeps its digits where the own weight rounds to one. Source: arXiv:2605.27975, Eqs. (1), (2), (35), (56), (59), (74), (75).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hopjax.energy import _matmul

NO_INDEX = jnp.iinfo(jnp.int32).max  # larger than every index, so that a minimum over indices forgets it


class Moments(NamedTuple):
    """Sums over a set of memories of n states' weights w = exp(l − top); fields that nobody asked for are None.

    Attributes:
        top: the largest logit, −inf for no memories.
        weight: Σ w.
        logit: Σ w (l − top).
        radial: Σ w [(ξ − x)·x]².
        square: Σ w |ξ|².
        mean: Σ w ξ.
        heaviest: index of the memory with the largest logit.
        nearest: index of the nearest memory.
        closest: its squared distance.
    """

    top: Float[Array, " n"]
    weight: Float[Array, " n"]
    logit: Float[Array, " n"] | None = None
    radial: Float[Array, " n"] | None = None
    square: Float[Array, " n"] | None = None
    mean: Float[Array, "n d"] | None = None
    heaviest: Int[Array, " n"] | None = None
    nearest: Int[Array, " n"] | None = None
    closest: Float[Array, " n"] | None = None


_Field = TypeVar("_Field")


def _known(field: _Field | None) -> _Field:
    assert field is not None, "a moment that was not asked for"
    return field


def empty(states: Float[Array, "n d"], needs: Collection[str]) -> Moments:
    """Moments over no memories: the neutral element of `merge`."""
    count, dtype = states.shape[0], states.dtype
    fields = {name: jnp.zeros(count, dtype) for name in ("logit", "radial", "square")}
    fields |= {"mean": jnp.zeros(states.shape, dtype), "closest": jnp.full(count, jnp.inf, dtype)}
    fields |= {name: jnp.full(count, NO_INDEX, jnp.int32) for name in ("heaviest", "nearest")}
    return Moments(jnp.full(count, -jnp.inf, dtype), jnp.zeros(count, dtype), **{name: fields[name] for name in needs})


def of_tile(
    states: Float[Array, "n d"],
    memories: Float[Array, "m d"],
    beta: Float[Array, ""],
    offset: Float[Array, " m"],
    own: Int[Array, " n"] | None,
    needs: Collection[str],
    *,
    first: Int[Array, ""] | int = 0,
    floor: Float[Array, " n"] | float = -jnp.inf,
    top: Float[Array, " n"] | None = None,
) -> Moments:
    """Moments over one tile of memories, small enough that the n × m overlaps are held.

    Args:
        offset: what is added to the memories' logits: log π, or −inf for a memory that does not count.
        own: index of the state itself among all memories, which is left out; negative where it is not stored.
        first: index of the tile's first memory among all.
        floor: a lower bound on `top`: the largest logit so far, so that merging need not rescale the tile.
        top: the largest logit of all memories, where it is known: all tiles are then relative to the same.
    """
    # Behind a barrier: else the exponentials are fused into the product, which then is slow.
    overlaps = lax.optimization_barrier(_matmul(states, memories.T))
    index = first + lax.iota(jnp.int32, memories.shape[0])
    squares = jnp.sum(memories**2, axis=1)
    # A memory that is not finite could have a logit of −inf and pass as one without weight.
    offset = jnp.where(jnp.isfinite(squares), offset, jnp.nan)
    logits = beta * overlaps + offset[None]
    if own is not None:
        logits = jnp.where(index[None] == own[:, None], -jnp.inf, logits)
    largest = jnp.max(logits, axis=1)
    top = jnp.maximum(largest, floor) if top is None else top
    # No memory at all: −inf − (−inf) is no number, and nothing has weight.
    below = logits - jnp.where(top == -jnp.inf, 0.0, top)[:, None]
    w = jnp.exp(below)

    def where_best(values: Array, best: Array) -> Array:
        found = jnp.min(jnp.where(values == best[:, None], index[None], NO_INDEX), axis=1)
        return jnp.where(jnp.isfinite(best), found, NO_INDEX)  # no memory counts, or a number is none

    def nearest() -> tuple[Array, Array]:
        """Which memory it is, found after a common shift, which leaves little to cancel; and its squared distance, taken directly."""
        centre = jnp.mean(jnp.where(jnp.isfinite(states), states, 0.0), axis=0)[None]
        x, y = states - centre, memories - centre
        squared = jnp.sum(y**2, axis=1)[None] + (jnp.sum(x**2, axis=1)[:, None] - 2 * lax.optimization_barrier(_matmul(x, y.T)))
        squared = jnp.where(logits > -jnp.inf, squared, jnp.inf)
        least = jnp.min(squared, axis=1)
        found = where_best(squared, least)
        away = states - jnp.take(memories, found - first, axis=0, mode="clip")
        return found, jnp.where(found == NO_INDEX, least, jnp.sum(away**2, axis=1))

    neighbour = nearest() if "closest" in needs else None
    fields: dict[str, Callable[[], Array]] = {
        "logit": lambda: jnp.sum(w * jnp.where(w > 0, below, 0.0), axis=1),
        "radial": lambda: jnp.sum(w * (overlaps - jnp.sum(states**2, axis=1)[:, None]) ** 2, axis=1),
        "square": lambda: _matmul(w, squares),
        "mean": lambda: _matmul(w, memories),
        "heaviest": lambda: where_best(logits, largest),
        "nearest": lambda: _known(neighbour)[0],
        "closest": lambda: _known(neighbour)[1],
    }
    return Moments(top, jnp.sum(w, axis=1), **{name: fields[name]() for name in needs})


def _rebase(part: Moments, top: Array) -> dict[str, Array]:
    """The sums of `part` with weights relative to another `top`."""
    shift = jnp.where(part.top > -jnp.inf, part.top - top, 0.0)  # over no memories every sum is zero, whatever the scale
    scale = jnp.exp(shift)
    sums = {name: scale * value for name in ("weight", "radial", "square") if (value := getattr(part, name)) is not None}
    if part.logit is not None:
        sums["logit"] = scale * (part.logit + shift * part.weight)
    if part.mean is not None:
        sums["mean"] = scale[:, None] * part.mean
    return sums


def merge(a: Moments, b: Moments) -> Moments:
    """Moments over both sets of memories: commutative and associative up to rounding; ties go to the smaller index."""
    top = jnp.maximum(a.top, b.top)
    one, other = _rebase(a, top), _rebase(b, top)
    fields = {name: one[name] + other[name] for name in one}

    def chosen(index_a: Array, index_b: Array, order: Array) -> Array:
        return jnp.where(order > 0, index_a, jnp.where(order < 0, index_b, jnp.minimum(index_a, index_b)))

    if a.heaviest is not None:
        fields["heaviest"] = chosen(a.heaviest, _known(b.heaviest), _order(a.top, b.top))
    if a.nearest is not None:
        fields["nearest"] = chosen(a.nearest, _known(b.nearest), _order(_known(b.closest), _known(a.closest)))
    if a.closest is not None:
        fields["closest"] = jnp.minimum(a.closest, _known(b.closest))
    return Moments(top, **fields)


def _order(a: Array, b: Array) -> Array:
    """1 where a > b, −1 where a < b, 0 elsewhere; infinities may be equal."""
    return (a > b).astype(jnp.int32) - (a < b).astype(jnp.int32)


def all_reduce(part: Moments, axis: str) -> Moments:
    """`merge` over the devices along a mesh axis, inside `jax.shard_map`; only pairs of (top, sums) travel, never memories."""
    top = lax.pmax(part.top, axis)
    fields = {name: lax.psum(value, axis) for name, value in _rebase(part, top).items()}

    def smallest_index(index: Array, best: Array) -> Array:
        return lax.pmin(jnp.where(best, index, NO_INDEX), axis)

    if part.heaviest is not None:
        fields["heaviest"] = smallest_index(part.heaviest, part.top == top)
    if part.closest is not None:
        fields["closest"] = lax.pmin(part.closest, axis)
    if part.nearest is not None:
        fields["nearest"] = smallest_index(part.nearest, part.closest == fields["closest"])
    return Moments(top, **fields)


@dataclass(frozen=True)
class Softmax:
    """A state's softmax over all memories, of which `moments` are those of the others if the state is stored.

    Attributes:
        moments: over the memories other than the states themselves.
        states: the n states.
        beta: inverse temperature.
        own_log_prior: log π of each state's own memory; None if the states are not stored.
    """

    moments: Moments
    states: Float[Array, "n d"]
    beta: Float[Array, ""]
    own_log_prior: Float[Array, " n"] | None

    @property
    def square(self) -> Array:
        """|x|²."""
        return jnp.sum(self.states**2, axis=1)

    @property
    def log_others(self) -> Array:
        """log Σ exp(l) over the other memories."""
        return self.moments.top + jnp.log(self.moments.weight)

    @property
    def odds(self) -> Array:
        """Λ: log odds of the other memories against the own one."""
        return self.log_others - (self.beta * self.square + _known(self.own_log_prior))

    @property
    def leakage(self) -> Array:
        """ℓ: weight of the other memories, 1 for a state that is not stored."""
        return jnp.ones_like(self.square) if self.own_log_prior is None else jax.nn.sigmoid(self.odds)

    def over_others(self, moment: Array | None) -> Array:
        """Mean under the weights of the other memories; zero if there are none."""
        weight = jnp.where(self.moments.weight == 0, 1.0, self.moments.weight)
        value = _known(moment)
        return value / weight.reshape(weight.shape + (1,) * (value.ndim - 1))

    @property
    def pull(self) -> Array:
        """T − x over the other memories alone."""
        weighed = (self.moments.weight != 0)[:, None]
        return jnp.where(weighed, self.over_others(self.moments.mean) - self.states, 0.0)

    @property
    def spread(self) -> Array:
        """Σ p|ξ − T|² = ℓ⟨|ξ − x|²⟩ − ℓ²|⟨ξ − x⟩|²."""
        ell, pull = self.leakage, self.pull
        scatter = self.over_others(self.moments.square) - self.square - 2 * jnp.sum(self.states * pull, axis=1)
        return ell * scatter - ell**2 * jnp.sum(pull**2, axis=1)

    @property
    def radial(self) -> Array:
        """Variance of ξ·x."""
        return self.leakage * self.over_others(self.moments.radial) - self.slope**2

    @property
    def slope(self) -> Array:
        """x·∇E = x·(x − T)."""
        return -self.leakage * jnp.sum(self.states * self.pull, axis=1)


def _excess(soft: Softmax) -> Array:
    if soft.own_log_prior is None:
        return soft.square - soft.log_others / soft.beta
    return -(jax.nn.softplus(soft.odds) + soft.own_log_prior) / soft.beta


def _energy(soft: Softmax) -> Array:
    return _excess(soft) - 0.5 * soft.square


def _leave_one_out(soft: Softmax) -> Array:
    return 0.5 * soft.square - soft.log_others / soft.beta


def _others_entropy(soft: Softmax) -> Array:
    return jnp.log(soft.moments.weight) - soft.over_others(soft.moments.logit)


def _entropy(soft: Softmax) -> Array:
    if soft.own_log_prior is None:
        return _others_entropy(soft)
    ell, log_ell, log_own = soft.leakage, -jax.nn.softplus(-soft.odds), -jax.nn.softplus(soft.odds)
    return -(1 - ell) * log_own + jnp.where(ell > 0, ell * (_others_entropy(soft) - log_ell), 0.0)


def _update(soft: Softmax) -> Array:
    return soft.states + soft.leakage[:, None] * soft.pull


def _hessian_trace(soft: Softmax) -> Array:
    return soft.states.shape[1] - soft.beta * soft.spread


def _sharpness(soft: Softmax) -> Array:
    return (soft.states.shape[1] - 1) * soft.square - soft.beta * (soft.square * soft.spread - soft.radial)


def _rise(soft: Softmax) -> Array:
    return _sharpness(soft) - (soft.states.shape[1] - 1) * soft.slope


def _index(name: str, soft: Softmax) -> Array:
    index = _known(getattr(soft.moments, name))
    return jnp.where(index == NO_INDEX, -1, index)


class Quantity(NamedTuple):
    """Something to be known of each state.

    Attributes:
        needs: the fields of `Moments`, besides `top` and `weight`, that it is made from.
        of: its formula.
        meaning: what it is, in a line.
        stored: whether it is defined for states that are memories only.
    """

    needs: frozenset[str]
    of: Callable[[Softmax], Array]
    meaning: str
    stored: bool = False


_CURVATURE = frozenset({"mean", "square", "radial"})

QUANTITIES: Mapping[str, Quantity] = {
    "energy": Quantity(frozenset(), _energy, "E(x), Eq. (1)"),
    "excess": Quantity(frozenset(), _excess, "E(x) + ½|x|²; −β⁻¹ log(1 + e^Λ) for a stored state, to full relative accuracy"),
    "log_odds": Quantity(
        frozenset(),
        lambda soft: soft.odds,
        "Λ, log odds of the others' weight against the own: orders stored states as the excess does",
        True,
    ),
    "log_leakage": Quantity(frozenset(), lambda soft: -jax.nn.softplus(-soft.odds), "log ℓ: weight of the other memories, Eq. (35)", True),
    "log_self_weight": Quantity(frozenset(), lambda soft: -jax.nn.softplus(soft.odds), "log weight of the state's own memory", True),
    "leave_one_out": Quantity(frozenset(), _leave_one_out, "energy without the state's own memory", True),
    "entropy": Quantity(frozenset({"logit"}), _entropy, "entropy of the softmax weights, in nats"),
    "others_entropy": Quantity(frozenset({"logit"}), _others_entropy, "entropy of the other memories' weights among themselves, in nats"),
    "heaviest": Quantity(
        frozenset({"heaviest"}), partial(_index, "heaviest"), "index of the heaviest memory, other than its own; −1 for none"
    ),
    "nearest": Quantity(
        frozenset({"nearest", "closest"}), partial(_index, "nearest"), "index of the nearest memory, other than its own; −1 for none"
    ),
    "distance": Quantity(frozenset({"closest"}), lambda soft: jnp.sqrt(_known(soft.moments.closest)), "distance to the nearest memory"),
    "update": Quantity(frozenset({"mean"}), _update, "T(x), Eq. (2)"),
    "slope": Quantity(frozenset({"mean"}), lambda soft: soft.slope, "x·∇E(x)"),
    "hessian_trace": Quantity(frozenset({"mean", "square"}), _hessian_trace, "tr H(x), Eq. (56)"),
    "sharpness": Quantity(_CURVATURE, _sharpness, "S(x), Eq. (74)"),
    "rise": Quantity(_CURVATURE, _rise, "S(x) − (d−1) x·∇E(x): the rotation-averaged rise is ½ε²σ² times this, Eqs. (9), (59)"),
}

# Moments that are differentiable; what is made from these alone is, too.
SMOOTH = frozenset({"logit", "radial", "square", "mean"})


def needed(quantities: Sequence[str], stored: bool) -> tuple[str, ...]:
    """The moments that these quantities are made from. Raises ValueError for a name that is none, or needs states to be stored."""
    for name in quantities:
        if name not in QUANTITIES:
            raise ValueError(f"no quantity is named {name!r}: choose from {', '.join(QUANTITIES)}")
        if QUANTITIES[name].stored and not stored:
            raise ValueError(f"{name!r} is defined for stored states only: give `own`, each state's index among the memories")
    return tuple(sorted(frozenset().union(*(QUANTITIES[name].needs for name in quantities))))
