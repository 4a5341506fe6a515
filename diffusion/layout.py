"""Where a training state and its batches lie on a mesh of devices: data parallel, parameters sharded (FSDP), or both.

Batches are split over all devices. Parameters, their average and the optimiser's moments are split over the axis `fsdp`, along the
largest axis of an array that divides evenly; small arrays are kept whole. XLA derives all communication from that.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

# Arrays below this are not worth the communication.
WHOLE_BELOW = 2**12


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many devices share the data, and the parameters.

    Attributes:
        replicas: groups of devices, each with a copy of the parameters; by default as many as the devices give.
        fsdp: devices over which each copy is split.
    """

    replicas: int | None = None
    fsdp: int = 1

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        for name, value in (("replicas", self.replicas), ("fsdp", self.fsdp)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} is out of range: need {name} ≥ 1")

    def mesh(self) -> Mesh:
        """The devices of all processes, as replicas × fsdp.

        Raises: ValueError unless that is how many there are.
        """
        devices = jax.device_count()
        replicas = max(1, devices // self.fsdp) if self.replicas is None else self.replicas
        if replicas * self.fsdp != devices:
            raise ValueError(f"replicas × fsdp = {replicas} × {self.fsdp} must be the number of devices, {devices}")
        return jax.make_mesh((replicas, self.fsdp), ("replicas", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def sharded_batch(mesh: Mesh, batch: PyTree[Shaped[np.ndarray, "n ..."]]) -> PyTree[Shaped[Array, "n ..."]]:
    """A batch split over all devices; each process passes the whole batch and keeps its part.

    Raises: ValueError if the batch does not divide.
    """
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def split(array: Shaped[np.ndarray, "n ..."]) -> Shaped[Array, "n ..."]:
        if len(array) % mesh.size:
            raise ValueError(f"batch_size = {len(array)} must be a multiple of the number of devices, {mesh.size}")
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(split, batch)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """The sharding of each array of a training state (real or abstract)."""
    pieces = mesh.shape["fsdp"]

    def of(array: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(array.shape) if size % pieces == 0]
        if pieces == 1 or array.size < WHOLE_BELOW or not axes:
            return NamedSharding(mesh, PartitionSpec())
        widest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * widest, "fsdp"))

    return jax.tree.map(of, state)
