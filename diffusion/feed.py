"""Data feeding: batch i of epoch e is a function of (seed, e, i) alone, so that a resumed run sees what it would have seen.

An epoch holds every image of the new task once, in a random order, with images of a replay buffer strewn among them.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, Int64, PyTree, Shaped

# What the second entry of a seed stands for.
_ORDER, _BUFFER = 0, 1


def _permutation(seed: int, stream: int, number: int, count: int) -> Int64[np.ndarray, " {count}"]:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, number)))).permutation(count)


def filled_batches(count: int, batch: int) -> list[Int32[np.ndarray, " b"]]:
    """The places of images in order, batch by batch; the last is filled up with the last image, else it would be another program.

    Raises: ValueError if there is no image, or none in a batch.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"{count} images in batches of {batch}: need one or more of each")
    size = min(batch, count)
    return [np.minimum(np.arange(first, first + size, dtype=np.int32), count - 1) for first in range(0, count, size)]


@dataclasses.dataclass(frozen=True, eq=False)
class Feed:
    """Batches of images in memory or mapped from a file; only the rows of a batch are ever read.

    Attributes:
        images: the task's, an array of uint8 or float32; or a tree of arrays with a row for each image, of which batches are such trees.
        batch_size: images in a batch, of both kinds; what is left of an epoch after its last whole batch is left out.
        seed: of the order.
        replay: images of an earlier task, of the same shape and dtype; None for none.
        replay_ratio: the expected fraction of replayed images in a batch, 0 < ratio < 1. By default each of them is seen as often as
            each new one: with 25,000 new and 5,000 replayed images, one in six (the effective set of arXiv:2605.27975).

    Raises: ValueError naming what does not fit and what would.
    """

    images: PyTree[Shaped[np.ndarray, "n ..."]]
    batch_size: int
    seed: int = 0
    replay: PyTree[Shaped[np.ndarray, "m ..."]] | None = None
    replay_ratio: float | int | None = None

    def __post_init__(self) -> None:
        """Refuse what gives no batch."""
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed} must be at least 0")
        if self.replay is None:
            if self.replay_ratio is not None:
                raise ValueError(f"replay_ratio = {self.replay_ratio} needs a replay buffer: give one, or no ratio")
        else:
            if _count(self.replay) == 0:
                raise ValueError("the replay buffer is empty: leave it out")
            new, old = (_like(images) for images in (self.images, self.replay))
            if new != old:
                raise ValueError(f"replayed images are {old}, new ones {new}: they must be alike")
            if self.replay_ratio is not None and not 0 < self.replay_ratio < 1:
                raise ValueError(f"replay_ratio = {self.replay_ratio} is out of range: need 0 < replay_ratio < 1")
        if not 1 <= self.batch_size <= self.epoch_size:
            raise ValueError(
                f"batch_size = {self.batch_size} is out of range: need 1 ≤ batch_size ≤ {self.epoch_size}, the images of an epoch"
            )

    @property
    def new(self) -> int:
        """Images of the new task, each of which is once in an epoch."""
        return _count(self.images)

    @property
    def replayed(self) -> int:
        """Replayed images in an epoch."""
        if self.replay is None:
            return 0
        if self.replay_ratio is None:
            return _count(self.replay)
        return max(1, round(self.new * self.replay_ratio / (1 - self.replay_ratio)))

    @property
    def epoch_size(self) -> int:
        """Images in an epoch, of both kinds."""
        return self.new + self.replayed

    @property
    def epoch_batches(self) -> int:
        """Whole batches in an epoch."""
        return self.epoch_size // self.batch_size

    def places(self, batch: int) -> Int64[np.ndarray, " {self.batch_size}"]:
        """Where batch number `batch` (counted from the start of training) is: below n a new image, from n on a replayed one."""
        epoch, i = divmod(batch, self.epoch_batches)
        return self._epoch(epoch)[i * self.batch_size : (i + 1) * self.batch_size]

    def batch(self, number: int) -> PyTree[Shaped[np.ndarray, "{self.batch_size} ..."]]:
        """The images of a batch, counted from the start of training."""
        places = self.places(number)
        if self.replay is None:
            return jax.tree.map(lambda images: images[places], self.images)
        new = places < self.new

        def mixed(images: Shaped[np.ndarray, "n ..."], replay: Shaped[np.ndarray, "m ..."]) -> Shaped[np.ndarray, "k ..."]:
            batch = np.empty((self.batch_size, *images.shape[1:]), images.dtype)
            batch[new] = images[places[new]]
            batch[~new] = replay[places[~new] - len(images)]
            return batch

        return jax.tree.map(mixed, self.images, self.replay)

    def _epoch(self, epoch: int) -> Int64[np.ndarray, " {self.epoch_size}"]:
        return _epoch(self.seed, epoch, self.new, 0 if self.replay is None else _count(self.replay), self.replayed)


def _count(images: PyTree[Shaped[np.ndarray, "n ..."]]) -> int:
    return len(jax.tree.leaves(images)[0])


def _like(images: Any) -> str:
    """What images must have in common to be in a batch together."""
    return ", ".join(f"{array.dtype} {array.shape[1:]}" for array in jax.tree.leaves(images))


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, new: int, buffer: int, replayed: int) -> Int64[np.ndarray, " {new+replayed}"]:
    """The order of an epoch. Replayed places continue from epoch to epoch through ever new orders of the buffer: none is seen twice
    before all have been seen once."""
    places = np.arange(new + replayed)
    first = epoch * replayed
    for turn in range(first // buffer, -(-(first + replayed) // buffer)) if buffer else ():
        low, high = max(turn * buffer, first), min((turn + 1) * buffer, first + replayed)
        places[new + low - first : new + high - first] = (
            new + _permutation(seed, _BUFFER, turn, buffer)[low - turn * buffer : high - turn * buffer]
        )
    return places[_permutation(seed, _ORDER, epoch, new + replayed)]
