r"""Elastic weight consolidation: a task is learnt while the parameters that an earlier one needs are held where it left them.

To the loss of the new task is added (Kirkpatrick et al. 2017, PNAS 114:3521, Eq. (3))

$$\tfrac\lambda2 \sum_i F_i (\theta_i - \theta^*_i)^2,$$

with $\theta^*$ the parameters after the earlier task and F the diagonal of its Fisher information there. A network that predicts d numbers
with the mean squared error ℓ is a normal law of these numbers, $-\log p = d\,\ell/2s^2$ and a constant, whose variance s² is best the mean
loss $\bar\ell$. Its Fisher information, $E(\partial\log p)^2$, in units of the loss (times $2s^2/d$) is

$$F_i = \frac{d}{2\bar\ell}\, E\left(\frac{\partial\ell}{\partial\theta_i}\right)^2,$$

the mean being over the earlier task's images, timesteps and noise (the empirical Fisher information: errors are those of the data, not
drawn from the model). If the d errors are independent it is the diagonal of the Gauss-Newton matrix of the loss; then the penalty at
λ = 1 is how much the earlier task's own mean loss rises, to second order and without what lies off the diagonal. So λ has no unit and
means the same for images and losses of any size: the weight of the earlier task against the new one.

What lies off the diagonal is most of it, though: training on scikit-learn's digits turned by 30° raised the loss of the upright ones by
0.25, of which the diagonal sees 0.009. So λ is taken larger (`STRENGTH`): of 0, 1, 10, 100, 300, 1000 and 3000 the sum of both losses
was least at 300 and at 1000, at 300 with five eighths of the rise gone and five sixths of what was learnt of the new task kept.
The gradient of the penalty goes through the optimiser with that of the loss: however large λ is, AdamW lets a parameter swing about
θ* by a few of its steps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree, Shaped

from diffusion.backend import compiler_options
from diffusion.objective import Denoising
from diffusion.pixels import checked
from diffusion.space import PixelSpace, Space
from hopjax.cli.tasks import description
from hopjax.data import Images

# A λ that weighs both tasks about equally.
STRENGTH = 300.0
# Gradients of so many images are held at once.
BATCH = 8


class Penalty(NamedTuple):
    """The penalty as a training step takes it: arrays alone.

    Attributes:
        strength: λ.
        anchor: θ*, a tree like the parameters.
        fisher: F, likewise.
    """

    strength: Any
    anchor: Any
    fisher: Any

    def value(self, params: Any) -> Float[Array, ""]:
        """½ λ Σ F (θ − θ*)²."""
        terms = jax.tree.map(lambda f, here, there: jnp.sum(f * jnp.square(here - there)), self.fisher, params, self.anchor)
        return 0.5 * self.strength * sum(jax.tree.leaves(terms))

    def check(self, params: Any) -> None:
        """Refuse parameters that are not those of the anchor.

        Raises: ValueError naming the first that differ.
        """
        wanted = _shapes(params)
        for name, tree in (("anchor", self.anchor), ("Fisher information", self.fisher)):
            found = _shapes(tree)
            for place in dict.fromkeys((*wanted, *found)):
                if wanted.get(place) != found.get(place):
                    raise ValueError(
                        f"the {name} is of another network: parameter {place} has shape {found.get(place)} there, {wanted.get(place)} "
                        "here; consolidate what the same network learnt"
                    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@dataclasses.dataclass(frozen=True, eq=False)
class Consolidation:
    """What a run that starts from a model is to keep of an earlier task.

    Attributes:
        images: of the earlier task.
        strength: λ.
        samples: gradients from which the Fisher information is estimated.

    Raises: ValueError naming the value and its bound; DataError for images that no model is trained on.
    """

    images: Images
    strength: float = STRENGTH
    samples: int = 1024

    def __post_init__(self) -> None:
        """Refuse what holds nothing."""
        checked(self.images)
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength = {self.strength} is out of range: need 0 ≤ strength < ∞")
        if self.samples < 1 or self.samples % BATCH:
            raise ValueError(f"samples = {self.samples} is out of range: need a multiple of {BATCH}, at least {BATCH}")

    def to_json(self) -> dict[str, Any]:
        """All that the penalty depends on, besides the model and the key."""
        return {"strength": self.strength, "samples": self.samples, "data": description(self.images)}

    def penalty(
        self, graphdef: Any, params: Any, objective: Denoising, batch: Any, *, key: Key[Array, ""], space: Space = PixelSpace()
    ) -> Penalty:
        """For a run that starts from `params`, on the host; `batch` is what the space knows of the images."""
        found = fisher(graphdef, params, objective, batch, key=key, samples=self.samples, space=space)
        return jax.device_get(Penalty(np.float32(self.strength), params, found))


@functools.lru_cache
def _program(graphdef: Any, objective: Denoising) -> Callable[..., Any]:
    """One for all models that differ in their parameters alone: adds a batch to the sums of losses and of squared gradients."""

    def loss(params: Any, space: Space, image: Any, key: Key[Array, ""]) -> Float[Array, ""]:
        batch = jax.tree.map(lambda row: row[None], image)
        # The objective splits the key in two, which this one is none of.
        clean = space.clean(batch, jax.random.fold_in(key, 2))
        return objective(space.network(nnx.merge(graphdef, params), batch), clean, key).losses[0]

    def add(total: tuple[Array, Any], params: Any, space: Space, batch: Any, keys: Key[Array, " n"]) -> tuple[Array, Any]:
        losses, gradients = jax.vmap(jax.value_and_grad(loss), in_axes=(None, None, 0, 0))(params, space, batch, keys)
        squares = jax.tree.map(lambda gradient: jnp.sum(jnp.square(gradient), axis=0), gradients)
        return jax.tree.map(jnp.add, total, (jnp.sum(losses), squares))

    return jax.jit(add, donate_argnums=0, compiler_options=compiler_options())


def fisher(
    graphdef: Any,
    params: Any,
    objective: Denoising,
    images: PyTree[Shaped[np.ndarray, "n ..."]],
    *,
    key: Key[Array, ""],
    samples: int = 1024,
    batch: int = BATCH,
    space: Space = PixelSpace(),
) -> Any:
    """F as above, without dropout: a tree like the parameters, float32, on one device.

    Sample i is of image ⌊i n / samples⌋, at the timestep and noise that `objective` draws with `fold_in(key, i)`, whatever the batch.

    Args:
        graphdef: of the network.
        images: of the earlier task, as the space knows them: in that of pixels, as files hold them.
        samples: gradients; the standard error of F_i is F_i √((κ − 1)/samples), κ the kurtosis of its gradient.
        batch: gradients in memory at once, each of the size of the parameters.

    Raises: ValueError if there are no images, or if the samples are not a number of whole batches.
    """
    leaf = jax.tree.leaves(images)[0]
    count = len(leaf)
    if count == 0:
        raise ValueError(f"need at least one image, got shape {leaf.shape}")
    if batch < 1 or samples < 1 or samples % batch:
        raise ValueError(f"samples = {samples} must be a multiple of batch = {batch}, both at least 1")
    program = _program(graphdef, objective)
    total = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    for first in range(0, samples, batch):
        places = np.arange(first, first + batch)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(places))
        chosen = places * count // samples
        total = program(total, params, space, jax.tree.map(lambda rows, chosen=chosen: jnp.asarray(rows[chosen]), images), keys)
    loss, squares = total
    # (d / 2ℓ̄) × mean of squares: the number of samples cancels.
    numbers = jax.eval_shape(lambda: space.clean(jax.tree.map(lambda rows: jnp.asarray(rows[:1]), images), key)).size
    scale = numbers / (2 * loss)
    return jax.tree.map(lambda square: scale * square, squares)
