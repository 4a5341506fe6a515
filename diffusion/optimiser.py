"""Optimisers as settings that give an optax transformation, and the moving average of parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def _kernels(params: Any) -> Any:
    """True for the weights of convolutions and products: biases and normalisations are not decayed."""
    return jax.tree.map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW with a linear warm-up, gradients clipped to a global norm, and decay of weights alone (no biases, no norms).

    The defaults are those of arXiv:2605.27975 for pixels (learning rate, weight decay, warm-up); the clipping is ours.

    Attributes:
        learning_rate: after the warm-up.
        warmup: steps over which the rate grows from 0.
        decay: fraction of the run, at its end, over which the rate falls linearly to 0; until then it stays, so that a longer run begins
            like a shorter one.
        weight_decay: fraction of a weight that is taken off in a step, times the learning rate.
        clip: largest norm of a gradient; a longer one is shortened to it.

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

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """For a run of so many steps."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(self.rate(steps), weight_decay=self.weight_decay, mask=_kernels),
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
