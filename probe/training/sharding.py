"""One code path for one device or many: batches are divided over a mesh, parameters copied to it or divided as well."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from probe.devices import DATA_AXIS, by_rows, check_divides, data_mesh, whole
from probe.training.steps import Batch


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where arrays go: a mesh of devices along one axis; fsdp divides the parameters over it, too."""

    mesh: Mesh
    fsdp: bool

    @classmethod
    def over_all_devices(cls, batch_size: int, *, fsdp: bool = False) -> "Placement":
        """Every device that jax has.

        Args:
          batch_size: rows that one forward pass takes.
          fsdp: divide parameters, gradients and optimizer state instead of copying them.
        Raises: ConfigError if the rows cannot be divided evenly.
        """
        devices = jax.devices()
        check_divides(batch_size, len(devices), "--batch-size (÷ --accumulate)")
        return cls(data_mesh(devices), fsdp)

    def place(self, tree: Any) -> Any:
        """Puts parameters or a train state on the mesh."""
        return jax.tree.map(lambda leaf: jax.device_put(leaf, self._sharding(np.shape(leaf))), tree)

    def place_batch(self, batch: Batch) -> Batch:
        """Puts a batch on the mesh, its rows divided."""
        rows, once = by_rows(self.mesh), whole(self.mesh)
        placed: Batch = jax.tree.map(lambda leaf: jax.device_put(leaf, rows if np.ndim(leaf) else once), batch)
        return placed

    def _sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Along the longest axis that divides evenly, or on every device whole."""
        spec: list[str | None] = [None] * len(shape)
        fitting = [axis for axis, size in enumerate(shape) if size and size % self.mesh.size == 0]
        if self.fsdp and fitting:
            spec[max(fitting, key=lambda axis: shape[axis])] = DATA_AXIS
        return NamedSharding(self.mesh, PartitionSpec(*spec))
