"""Optimisers as settings that give an optax transformation, and the moving average of parameters."""

import abc
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def _kernels(params: Any) -> Any:
    """True for the weights of convolutions and products: biases and normalisations are not decayed."""
    return jax.tree.map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


@dataclasses.dataclass(frozen=True)
class Optimiser(abc.ABC):
    """Settings that give an optax transformation; immutable and hashable.

    Attributes:
        learning_rate: after the warm-up.
        warmup: steps over which the rate grows from 0.
        decay: fraction of the run, at its end, over which the rate falls linearly to 0; until then it stays, so that a longer run begins
            like a shorter one.
        weight_decay: fraction of a weight that is taken off in a step, times the learning rate; of weights alone (no biases, no norms).
        clip: bound of what a step does, see each.

    Raises: ValueError naming the value and its bound.
    """

    learning_rate: float = 2e-4
    warmup: int = 500
    decay: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        for name, value in (("learning_rate", self.learning_rate), ("clip", self.clip)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} = {value} is out of range: need 0 < {name} < ∞")
        for name, value in (("warmup", self.warmup), ("weight_decay", self.weight_decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} = {value} is out of range: need 0 ≤ {name} < ∞")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay = {self.decay} is out of range: need 0 ≤ decay ≤ 1")

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate at each step of a run of so many; neither the first step's nor the last step's is 0."""
        falling = round(self.decay * steps)

        def at(step: Int[Array, ""]) -> Float[Array, ""]:
            # In whole numbers: the quotients are rounded once.
            rising = jnp.minimum(step + 1, self.warmup + 1) / (self.warmup + 1)
            left = jnp.minimum(steps - step, falling + 1) / (falling + 1)
            return jnp.asarray(self.learning_rate * rising * left, jnp.float32)

        return at

    @abc.abstractmethod
    def transformation(self, steps: int) -> optax.GradientTransformation:
        """For a run of so many steps."""


@dataclasses.dataclass(frozen=True)
class AdamW(Optimiser):
    """AdamW with a linear warm-up, gradients clipped to a global norm, and decay of weights alone (no biases, no norms).

    The defaults are those of arXiv:2605.27975 for pixels (learning rate, weight decay, warm-up); the clipping is ours. Beside the
    parameters there are two numbers for each of them in memory, its moments.

    Attributes:
        learning_rate: after the warm-up.
        warmup: steps over which the rate grows from 0.
        decay: fraction of the run, at its end, over which the rate falls linearly to 0; until then it stays, so that a longer run begins
            like a shorter one.
        weight_decay: fraction of a weight that is taken off in a step, times the learning rate.
        clip: largest norm of a gradient; a longer one is shortened to it.
        first_moments: their dtype; bfloat16 takes half the memory. Second moments are float32: they change by a thousandth in a step.

    Raises: ValueError naming the value and its bound.
    """

    first_moments: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        super().__post_init__()
        if self.first_moments not in ("float32", "bfloat16"):
            raise ValueError(f"first_moments = {self.first_moments!r} is not known: take float32 or bfloat16")

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """For a run of so many steps."""
        moments = None if self.first_moments == "float32" else jnp.dtype(self.first_moments)
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(self.rate(steps), weight_decay=self.weight_decay, mask=_kernels, mu_dtype=moments),
        )


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimiser):
    """Adafactor without momentum: second moments of a matrix are the product of those of its rows and columns, which take next to no
    memory; for arrays with two axes of 128 or more, whose two largest are the rows and columns.

    The rate is the size of a step relative to 1, as AdamW's is, and not to the parameters. The average of squared gradients begins as
    a plain mean and grows longer, step t counting for t^−0.8 of it. Source: Shazeer and Stern 2018 (arXiv:1804.04235), Algorithm 4.

    Attributes:
        learning_rate: after the warm-up.
        warmup: steps over which the rate grows from 0.
        decay: fraction of the run, at its end, over which the rate falls linearly to 0.
        weight_decay: fraction of a weight that is taken off in a step, times the learning rate; of weights alone (no biases, no norms).
        clip: largest root mean square of an array's update, before the rate; a larger one is scaled down. (Of gradients there is none:
            their size does not matter.)

    Raises: ValueError naming the value and its bound.
    """

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """For a run of so many steps."""
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(self.clip),
            optax.add_decayed_weights(self.weight_decay, mask=_kernels),
            optax.scale_by_learning_rate(self.rate(steps)),
        )


def averaged(ema: Any, params: Any, step: Int[Array, ""], decay: float) -> Any:
    """The exponential moving average of the parameters after each of the steps 1 … `step`, without a share of where it started.

    The weight of the newest is (1 − d)/(1 − dᵗ): one at t = 1, so that nothing of the initial parameters remains, and 1 − d in the
    end. Equal to Adam's bias-corrected average.

    Accuracy: a few units of rounding of float32 for each of the 1/(1 − d) steps that it reaches over, without a preferred sign.
    """
    weight = newest_weight(step, decay)
    # Not w p + (1 − w) ema: w and 1 − w, each rounded, do not add up to one, and over 1/w steps that shrinks the average by up to ε/2w.
    return jax.tree.map(lambda old, new: old + weight * (new - old), ema, params)


def newest_weight(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """(1 − d)/(1 − dᵗ), float32; through expm1, because 1 − dᵗ would lose three digits at the first steps."""
    if not 0 <= decay < 1:
        raise ValueError(f"ema = {decay} is out of range: need 0 ≤ ema < 1")
    log_decay = jnp.log1p(jnp.asarray(decay - 1, jnp.float32))  # −∞ for 0: the weight is 1
    return jnp.minimum(1.0, jnp.float32(1 - decay) / -jnp.expm1(step.astype(jnp.float32) * log_decay))
