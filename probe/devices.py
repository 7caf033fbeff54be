"""The mesh of devices: batches are divided over it by rows, what every row needs is copied to each device.

The devices may be those of several processes (`probe.distributed`), each of which sees the data of its own alone.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from probe.errors import ConfigError

DATA_AXIS = "data"


def data_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """The devices along one axis, those of a process side by side."""
    ordered = sorted(devices, key=lambda device: device.process_index)
    return Mesh(np.array(ordered), (DATA_AXIS,))


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


def own_rows(mesh: Mesh, num_rows: int) -> slice:
    """Which rows of a batch lie on the devices of this process; they follow one another."""
    parts: Any = by_rows(mesh).addressable_devices_indices_map((num_rows,)).values()
    bounds = [part.indices(num_rows) for (part,) in parts]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def put(value: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, as devices are to have it."""
    placed: jax.Array
    if sharding.is_fully_addressable or (isinstance(value, jax.Array) and value.sharding == sharding):
        placed = jax.device_put(value, sharding)
    elif isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(value), sharding)
        placed = jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
    else:
        host = np.asarray(value)
        placed = jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])
    return placed


def put_rows(own: np.ndarray, mesh: Mesh, num_rows: int) -> jax.Array:
    """A batch of so many rows, of which this process has its `own_rows`."""
    placed: jax.Array
    if by_rows(mesh).is_fully_addressable:
        placed = jax.device_put(own, by_rows(mesh))
    else:
        placed = jax.make_array_from_process_local_data(by_rows(mesh), own, (num_rows, *own.shape[1:]))
    return placed


def fetch(tree: Any) -> Any:
    """NumPy copies of arrays, whole also where devices of several processes hold a part each: then all call this."""
    return jax.tree.map(_fetch, tree)


def _fetch(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)
