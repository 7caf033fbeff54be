"""One code path for one device or many: batches are divided over a mesh, parameters copied to it or divided as well."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from probe.devices import DATA_AXIS, by_rows, check_divides, data_mesh, own_rows, put, put_rows, whole
from probe.training.steps import Batch


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where arrays go: a mesh of devices along one axis; fsdp divides the parameters over it, too."""

    mesh: Mesh
    fsdp: bool

    @classmethod
    def over_all_devices(cls, batch_size: int, *, fsdp: bool = False) -> "Placement":
        """Every device that jax has, those of other processes included.

        Args:
          batch_size: rows that one forward pass takes.
          fsdp: divide parameters, gradients and optimizer state instead of copying them.
        Raises: ConfigError if the rows cannot be divided evenly.
        """
        devices = jax.devices()
        check_divides(batch_size, len(devices), "--batch-size (÷ --accumulate)")
        return cls(data_mesh(devices), fsdp)

    @classmethod
    def over_own_devices(cls, batch_size: int, *, fsdp: bool = False) -> "Placement":
        """Every device of this process alone. Raises: ConfigError, as above."""
        devices = jax.local_devices()
        check_divides(batch_size, len(devices), "--batch-size")
        return cls(data_mesh(devices), fsdp)

    def place(self, tree: Any) -> Any:
        """Puts parameters or a train state on the mesh."""
        return jax.tree.map(lambda leaf: put(leaf, self._sharding(np.shape(leaf))), tree)

    def own_rows(self, batch_size: int) -> slice:
        """Which rows of a batch this process reads: all, unless there are others."""
        return own_rows(self.mesh, batch_size)

    def place_batch(self, batch: Batch) -> Batch:
        """Puts a batch on the mesh, its rows divided; of the inputs it has this process's own rows."""
        num_rows = len(batch.mask)
        rows, once = by_rows(self.mesh), whole(self.mesh)
        told = dataclasses.replace(batch, inputs=None)  # what every process knows of all rows
        placed: Batch = jax.tree.map(lambda leaf: put(leaf, rows if np.ndim(leaf) else once), told)
        return dataclasses.replace(placed, inputs=put_rows(batch.inputs, self.mesh, num_rows))

    def _sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Along the longest axis that divides evenly, or on every device whole."""
        spec: list[str | None] = [None] * len(shape)
        fitting = [axis for axis, size in enumerate(shape) if size and size % self.mesh.size == 0]
        if self.fsdp and fitting:
            spec[max(fitting, key=lambda axis: shape[axis])] = DATA_AXIS
        return NamedSharding(self.mesh, PartitionSpec(*spec))
