"""HDF5 as a layout of bytes in memory: the only module that calls h5py.

HDF5 never touches the disk here. A file that it writes itself does not survive a kill while it grows, and a
full disk ended h5py in a segmentation fault 200 times of 200; an image built in memory and written by
`probe.storage` survived every one. Reading, too, is from bytes whose hash was checked first, and through
`safe_open`, since a file of 2 KB can otherwise read other files, take gigabytes, or never return.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

import h5py
import numpy as np

from probe.errors import CorruptError

_CHUNK_BYTES = 512 << 10  # large enough to stream at memory speed, small enough that one row is cheap to reach
_MAX_CHUNK_BYTES = 64 << 20
_MAX_BYTES = 64 << 30  # of one dataset, as it would stand in memory
_MAX_RATIO = 200  # bytes in memory per byte stored: real features compress by 1.2, a bomb by 1000
_MAX_DIMENSIONS = 2
_FINITE_BLOCK = 1 << 17  # elements
_MAX_CHILDREN = 100
_KINDS = "fiuS"  # floats, integers, fixed-length bytes: nothing that points elsewhere in the file
_FILTERS = {
    h5py.h5z.FILTER_DEFLATE: "deflate",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
}


def build_image(datasets: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of an HDF5 file that holds `datasets`, by path; equal datasets give equal bytes.

    Chunked with checksums and nothing else: no compression (real features gain 4-13 % at a tenth of the
    speed), no attributes, no variable-length types and no timestamps.
    """
    size = sum(array.nbytes for array in datasets.values())
    with h5py.File(
        "image", "w", driver="core", backing_store=False, libver=("v110", "v110"), block_size=size + (1 << 20)
    ) as file:
        for path, array in datasets.items():
            if array.size:
                row_bytes = max(1, array.nbytes // len(array))
                rows = min(len(array), max(1, _CHUNK_BYTES // row_bytes))
                file.create_dataset(path, data=array, chunks=(rows, *array.shape[1:]), fletcher32=True)
            else:
                file.create_dataset(path, data=array)
        file.flush()
        return bytes(file.id.get_file_image())


class SafeFile:
    """The datasets of an HDF5 image, each checked before a byte of it is read. Made by `safe_open`."""

    def __init__(self, file: h5py.File, where: str) -> None:
        self._file, self._where = file, where
        self._found: dict[str, h5py.Dataset] = {}  # by path, those that were checked

    def shape(self, path: str) -> tuple[int, ...]:
        """Raises: CorruptError as `read` does."""
        return tuple(self._checked(path).shape)

    def has(self, path: str) -> bool:
        """Whether there is anything at `path`, which may still be unfit to read."""
        return self._link(path) is not None

    def children(self, path: str) -> list[str] | None:
        """Names in the group at `path`, sorted; None if there is no group. Raises: CorruptError if there are many."""
        if type(self._link(path)) is not h5py.HardLink:
            return None
        group = self._file[path]
        if not isinstance(group, h5py.Group):
            return None
        if len(group) > _MAX_CHILDREN:
            raise self._error(path, f"is a group of {len(group):,} items")
        return sorted(group)

    def read(self, path: str, *, dtypes: str | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        """The whole dataset, or some of its rows.

        Args:
          path: its place in the file, as "embeddings/pooler".
          rows: one or more, in any order; no more of the file is read than the chunks that hold them.
          dtypes: names of the element types that will do, separated by spaces (default: any number or fixed
            bytes).
        Raises: CorruptError if the dataset is missing, is not plainly stored in this file, is absurdly large,
          has another element type, or holds a value that is not finite.
        """
        dataset = self._checked(path)
        if dtypes is not None and dataset.dtype.name not in dtypes.split():
            raise self._error(path, f"has elements of type {dataset.dtype.name} where {dtypes} is meant")
        try:
            array: np.ndarray = dataset[...] if rows is None else np.stack([dataset[row] for row in rows])
        except (OSError, RuntimeError, ValueError) as err:
            raise self._error(path, f"cannot be read ({err})") from err
        if array.dtype.kind == "f" and not all_finite(array):
            raise self._error(path, "holds values that are not finite")
        return array

    def _link(self, path: str) -> object:
        """The link at `path`, or the first one on the way there that is not a plain link inside this file."""
        node, link = self._file, None
        for part in path.split("/"):
            if not isinstance(node, h5py.Group):
                return None
            link = node.get(part, getlink=True, default=None)
            if type(link) is not h5py.HardLink:
                return link
            node = node[part]
        return link

    def _checked(self, path: str) -> h5py.Dataset:
        if path in self._found:
            return self._found[path]
        try:
            link = self._link(path)
            if link is None:
                raise self._error(path, "is missing")
            if type(link) is not h5py.HardLink:
                raise self._error(path, f"is reached through a link ({type(link).__name__})")
            dataset = self._file[path]
            if not isinstance(dataset, h5py.Dataset):
                raise self._error(path, "is a group where a dataset is meant")
            fault = _fault(dataset)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as err:
            raise self._error(path, f"cannot be opened ({err})") from err
        if fault is not None:
            raise self._error(path, fault)
        self._found[path] = dataset
        return dataset

    def _error(self, path: str, fault: str) -> CorruptError:
        return CorruptError(f"{self._where}: `{path}` {fault}")


@contextlib.contextmanager
def safe_open(image: bytes | BinaryIO, where: str) -> Iterator[SafeFile]:
    """Opens an HDF5 file that lies in memory, or one that is too large for it.

    Args:
      image: the bytes of the file, or the file, open for reading, whose bytes were checked.
      where: what to call it in an error.
    Raises: CorruptError if it is not an HDF5 file.
    """
    try:
        file = h5py.File(io.BytesIO(image) if isinstance(image, bytes) else image, "r")
    except (OSError, RuntimeError, ValueError) as err:
        raise CorruptError(f"{where}: not a readable HDF5 file ({err})") from err
    with file:
        yield SafeFile(file, where)


def all_finite(array: np.ndarray) -> bool:
    """Whether no element is infinite or NaN.

    Looks at exponent bits, block by block: NumPy's test is ten times slower in half precision, and memory for the
    answer costs as much as the test.
    """
    bits, exponent = {2: (np.uint16, 0x7C00), 4: (np.uint32, 0x7F800000)}.get(array.itemsize, (None, 0))
    if bits is None or not array.size:
        return bool(np.isfinite(array).all())
    flat = np.ascontiguousarray(array).view(bits).ravel()
    blocks = (flat[start : start + _FINITE_BLOCK] for start in range(0, len(flat), _FINITE_BLOCK))
    return not any((block & bits(exponent)).max() == exponent for block in blocks)


def _fault(dataset: h5py.Dataset) -> str | None:
    """Why `dataset` must not be read, from its description alone."""
    plan = dataset.id.get_create_plist()
    if dataset.is_virtual:
        return "is virtual: its values would come from other files"
    if plan.get_external_count():
        return "is stored outside this file"
    if dataset.dtype.kind not in _KINDS or dataset.dtype.hasobject:
        return f"has elements of type {dataset.dtype}"
    if not 1 <= dataset.ndim <= _MAX_DIMENSIONS:
        return f"has {dataset.ndim} dimensions"
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    if foreign := [code for code in filters if code not in _FILTERS]:
        return f"needs filters {foreign}, and only {sorted(_FILTERS.values())} may run"
    if dataset.nbytes > _MAX_BYTES:
        return f"would take {dataset.nbytes:,} bytes"
    chunk_bytes = dataset.dtype.itemsize
    for length in dataset.chunks or ():
        chunk_bytes *= int(length)
    if chunk_bytes > _MAX_CHUNK_BYTES:
        return f"has chunks of {chunk_bytes:,} bytes"
    stored = dataset.id.get_storage_size()
    if dataset.nbytes > _MAX_RATIO * stored:
        return f"would take {dataset.nbytes:,} bytes but stores only {stored:,}"
    return None
