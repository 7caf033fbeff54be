"""Rows of activations on the disk: a folder of sealed shards, computed once and read in any order.

    activations.json           what determines the rows, and its own checksum
    000003-<SHA-256>.h5        a shard, sealed: its name holds the hash of its bytes
        row          [R] int64          the rows that it holds, R in a row
        activations  [R, D] float32

A shard is built in memory and appears whole (`probe.storage`), so that a run which is killed goes on with the first
that is missing. Its hash is checked when it is first read; after that, HDF5's own checksums guard every chunk. Only
the rows asked for are in memory.
"""

import collections
import contextlib
import hashlib
import math
import re
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from probe.cache import SafeFile, build_image, describe_differences, open_record, read_file, safe_open, seal_record
from probe.errors import CorruptError, InputError, MismatchError
from probe.storage import atomic_write_bytes, make_folder, sweep_partials

FILE_NAME = "activations.json"
FORMAT = 1
SHARD_BYTES = 64 << 20  # what a kill can cost, and what is built in memory: some ten seconds of a CPU's work
_MAX_OPEN = 64  # shards at a time: each is a file descriptor and some metadata
_OpenShards = collections.OrderedDict[int, tuple[contextlib.ExitStack, SafeFile]]  # by number, least used first
_SHARD = re.compile(r"(\d{6,})-([0-9a-f]{64})\.h5")


class Activations:
    """A folder of `num_rows` rows of one shape, float32."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, num_rows: int, shape: tuple[int, ...]) -> None:
        """
        Args:
          folder: to be made by `create`.
          identity: JSON values, all that determines the rows; number and shape are added to it.
          shape: of one row.
        """
        self.folder, self.num_rows, self.shape = folder, num_rows, shape
        self.row_bytes = 4 * math.prod(shape)
        self.shard_rows = max(1, SHARD_BYTES // self.row_bytes)
        self._identity = {**identity, "num_rows": num_rows, "shape": list(shape), "format": FORMAT}
        self._open: _OpenShards = collections.OrderedDict()
        weakref.finalize(self, _close_all, self._open)
        self._verified: set[Path] = set()

    def check_same(self) -> bool:
        """Whether the folder holds such activations; False where it holds nothing.

        Raises: MismatchError, with the fields that differ, if it holds others; InputError if it is something else
          altogether; CorruptError if its record is damaged.
        """
        path = self.folder / FILE_NAME
        if not path.exists():
            if self.folder.exists() and not (self.folder.is_dir() and _is_empty(self.folder)):
                raise InputError(f"{self.folder} exists and holds no {FILE_NAME}: it may be something else of yours")
            return False
        found = open_record(read_file(path), path)
        if found != self._identity:
            raise MismatchError(
                f"{self.folder}: these activations were made in another way. Choose another folder, or remove this "
                f"one. Fields that differ: {describe_differences(found, self._identity)}"
            )
        return True

    def create(self) -> None:
        """Makes the folder where it is missing, and removes what killed writers left in it. Raises: StorageError."""
        make_folder(self.folder)
        sweep_partials(self.folder)
        if not (self.folder / FILE_NAME).exists():
            atomic_write_bytes(self.folder / FILE_NAME, seal_record(self._identity, indent=1))

    def missing(self) -> list[range]:
        """The rows of each shard that is not sealed."""
        sealed = self._sealed()
        numbers = range(-(-self.num_rows // self.shard_rows))
        return [self._rows_of(number) for number in numbers if number not in sealed]

    def num_bytes(self, rows: list[range]) -> int:
        """What shards of these rows take on the disk, within a hundredth."""
        return sum(len(part) * (self.row_bytes + 8) + (self.row_bytes + 8) * len(part) // 100 + 16384 for part in rows)

    def seal(self, rows: range, activations: np.ndarray) -> None:
        """Writes the shard of these rows, one of `missing`; twice writes the same bytes. Raises: StorageError."""
        assert activations.shape == (len(rows), *self.shape)
        assert activations.dtype == np.float32
        flat = np.ascontiguousarray(activations).reshape(len(rows), -1)
        image = build_image({"row": np.arange(rows.start, rows.stop), "activations": flat})
        name = f"{rows.start // self.shard_rows:06d}-{hashlib.sha256(image).hexdigest()}.h5"
        atomic_write_bytes(self.folder / name, image)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """[n, …] activations of the given rows, in that order.

        Raises: CorruptError if a shard of theirs is damaged or missing.
        """
        flat = np.empty((len(rows), math.prod(self.shape)), np.float32)
        numbers = rows // self.shard_rows
        for number in np.unique(numbers):
            (at,) = np.nonzero(numbers == number)
            first = int(number) * self.shard_rows
            shard = self._shard(int(number))
            flat[at] = shard.read("activations", dtypes="float32", rows=(rows[at] - first).tolist())
        return flat.reshape(len(rows), *self.shape)

    def remove(self) -> None:
        """Removes the folder, which `check_same` has found to be ours."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Closes the files that reading has opened."""
        _close_all(self._open)

    def _rows_of(self, number: int) -> range:
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.num_rows))

    def _sealed(self) -> dict[int, Path]:
        """Sealed shards by number. Of twins, made on unlike devices, the first name."""
        found: dict[int, Path] = {}
        for path in sorted(self.folder.glob("*.h5")):
            if match := _SHARD.fullmatch(path.name):
                found.setdefault(int(match[1]), path)
        return found

    def _shard(self, number: int) -> SafeFile:
        """A shard, opened, and proved where this is the first time."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number][1]
        path = self._sealed().get(number)
        if path is None:
            raise CorruptError(f"{self.folder}: shard {number} is missing. Run the same command again to make it anew.")
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(path, "rb"))
                if path not in self._verified and hashlib.file_digest(file, "sha256").hexdigest() != path.stem[-64:]:
                    raise _damaged(path, "its SHA-256 is not the one in its name")
            except OSError as err:
                raise _damaged(path, err.strerror or str(err)) from err
            shard = stack.enter_context(safe_open(file, str(path)))
            rows = self._rows_of(number)
            if shard.read("row", dtypes="int64").tolist() != list(rows):
                raise _damaged(path, f"it does not hold the rows {rows.start} to {rows.stop - 1}")
            if shard.shape("activations") != (len(rows), math.prod(self.shape)):
                raise _damaged(path, f"its rows have the shape {shard.shape('activations')}")
            self._verified.add(path)
            self._open[number] = (stack.pop_all(), shard)
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1][0].close()
        return shard


def _close_all(shards: _OpenShards) -> None:
    while shards:
        shards.popitem()[1][0].close()


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _damaged(path: Path, what: str) -> CorruptError:
    return CorruptError(f"{path}: damaged ({what}). Remove it and run the same command again, which makes it anew.")
