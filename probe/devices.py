"""The mesh of devices: batches are divided over it by rows, what every row needs is copied to each device."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from probe.errors import ConfigError

DATA_AXIS = "data"


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The devices along one axis."""
    return Mesh(np.array(devices), (DATA_AXIS,))


def check_divides(num_rows: int, num_devices: int, option: str) -> None:
    """Raises ConfigError, naming the option to change, if a batch cannot be divided evenly over the devices."""
    if num_rows % num_devices:
        raise ConfigError(
            f"a batch of {num_rows} rows cannot be divided over {num_devices} devices: make {option} "
            f"a multiple of {num_devices}"
        )


def by_rows(mesh: Mesh) -> NamedSharding:
    """A batch: each device has its share of the rows."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def whole(mesh: Mesh) -> NamedSharding:
    """Weights: each device has all of them."""
    return NamedSharding(mesh, PartitionSpec())
