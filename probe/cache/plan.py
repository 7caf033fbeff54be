"""The plan: what people say about images, in order, and where each image's embedding lies.

    plan/<revision>-<first 12 hex digits of the file's SHA-256>.h5         complete
    plan/<revision>-<first 12 hex digits of the file's SHA-256>-open.h5    some inputs are still to be
    embedded

A plan file is immutable: when all inputs of an open plan are done, the next revision says where they lie.
Whatever changes (a label, a name, a split) makes a new revision too, which takes over what older ones know,
so that only unknown bytes are ever embedded. Columns have one row per input:

    name/offsets [N + 1] i8, name/blob u1      opaque bytes: file names need not be text
    size, mtime_ns [N] i8                      of the file, for the fast path that skips hashing
    label/codes i4, label/offsets [N + 1] i8   indices into class_names; any number of them per input
    split [N] u1, group [N] i4                 codes into SPLITS and into the header's groups (-1: none)
    key [N, 32] u1, shard, row [N] i4          SHA-256 of the image's bytes, and where its embedding is;
                                               shard is an index into the header's shards, PENDING or FAILED
    known/key, known/shard, known/row          the same for embeddings that no input of this revision uses
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from probe.cache.hdf5 import build_image, safe_open
from probe.cache.sealed import canonical_json, read_file
from probe.errors import CorruptError

PENDING, FAILED = -1, -2  # values of the column `shard`
SPLITS = ("", "train", "val", "test")
_FILE = re.compile(r"((\d{6})-([0-9a-f]{12}))(-open)?\.h5")
_SHARD_NAME = re.compile(r"\d{4}/\d{6}-[0-9a-f]{12}-\d{5,}-[0-9a-f]{12}\.h5")


class Names(Sequence[bytes]):
    """N byte strings in two arrays: a hundredth of the objects, and a form that HDF5 can hold."""

    def __init__(self, offsets: np.ndarray, blob: np.ndarray) -> None:
        self.offsets, self.blob = offsets, blob
        self._bytes = blob.tobytes()

    @classmethod
    def of(cls, names: Iterable[bytes]) -> "Names":
        """From any byte strings."""
        listed = list(names)
        offsets = np.zeros(len(listed) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, listed), np.int64, len(listed)), out=offsets[1:])
        return cls(offsets, np.frombuffer(b"".join(listed), np.uint8))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._bytes[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[bytes]:
        for start, stop in itertools.pairwise(self.offsets.tolist()):
            yield self._bytes[start:stop]

    def take(self, rows: np.ndarray) -> "Names":
        """Those of `rows`, in that order."""
        offsets, picks = _ragged_take(self.offsets, rows)
        return Names(offsets, self.blob[picks])


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Inputs:
    """What a source says about its images, in the plan's order; the arrays are columns as described above."""

    names: Names
    size: np.ndarray
    mtime_ns: np.ndarray
    label_codes: np.ndarray
    label_offsets: np.ndarray
    split: np.ndarray
    group: np.ndarray
    class_names: tuple[str, ...]
    groups: tuple[str, ...]
    multi_label: bool

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """Hex SHA-256 of everything said: equal exactly if nothing changed."""
        columns = [*_input_columns(self).items()]
        head = {"sizes": [array.size for _, array in columns], "header": _input_header(self)}
        digest = hashlib.sha256(canonical_json(head))
        for _, array in columns:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def labels(self) -> np.ndarray:
        """int32 [N], -1 where there is none; or bool [N, C] if an input may have several."""
        counts = np.diff(self.label_offsets)
        if self.multi_label:
            table = np.zeros((len(self), len(self.class_names)), bool)
            table[np.repeat(np.arange(len(self)), counts), self.label_codes] = True
            return table
        labels = np.full(len(self), -1, np.int32)
        labels[counts > 0] = self.label_codes
        return labels

    def counts(self) -> dict[str, dict[str, int]]:
        """{split: {class: number of inputs}}, for the splits that there are, "" among them; {} without classes."""
        if not self.class_names:
            return {}
        of_label = np.repeat(self.split, np.diff(self.label_offsets))
        table = {}
        for code in np.unique(self.split).tolist():
            numbers = np.bincount(self.label_codes[of_label == code], minlength=len(self.class_names)).tolist()
            table[SPLITS[code]] = dict(zip(self.class_names, numbers, strict=True))
        return table

    def take(self, rows: np.ndarray) -> "Inputs":
        """The inputs of `rows`, in that order."""
        label_offsets, picks = _ragged_take(self.label_offsets, rows)
        return dataclasses.replace(
            self,
            names=self.names.take(rows),
            size=self.size[rows],
            mtime_ns=self.mtime_ns[rows],
            label_codes=self.label_codes[picks],
            label_offsets=label_offsets,
            split=self.split[rows],
            group=self.group[rows],
        )


def make_inputs(
    names: Iterable[bytes],
    *,
    labels: Iterable[Sequence[str]],
    splits: Iterable[str | None],
    groups: Iterable[str | None],
    sizes: Iterable[int],
    mtimes_ns: Iterable[int],
    class_names: Sequence[str],
    multi_label: bool,
) -> Inputs:
    """Columns from records: each argument but the last two has one item per input, in the same order.

    A label is the classes of one input: none where it is unknown. Splits are "train", "val", "test" or None.
    """
    code_of = {name: code for code, name in enumerate(class_names)}
    split_of: dict[str | None, int] = {None: 0, **{name: code for code, name in enumerate(SPLITS)}}
    group_of: dict[str | None, int] = {None: -1, "": -1}
    codes: list[int] = []
    offsets = [0]
    for classes in labels:
        codes.extend(code_of[name] for name in classes)
        offsets.append(len(codes))
    group = [group_of.setdefault(name, len(group_of) - 2) for name in groups]
    inputs = Inputs(
        names=Names.of(names),
        size=np.fromiter(sizes, np.int64),
        mtime_ns=np.fromiter(mtimes_ns, np.int64),
        label_codes=np.array(codes, np.int32),
        label_offsets=np.array(offsets, np.int64),
        split=np.array([split_of[name] for name in splits], np.uint8),
        group=np.array(group, np.int32),
        class_names=tuple(class_names),
        groups=tuple(str(name) for name in list(group_of)[2:]),
        multi_label=multi_label,
    )
    lengths = {len(column) for column in (inputs.names, inputs.size, inputs.mtime_ns, inputs.split, inputs.group)}
    assert lengths == {len(offsets) - 1}, "columns of unequal length"
    return inputs


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """One sealed shard that a plan refers to."""

    name: str
    """Path of the HDF5 file below shards/."""
    sha256: str
    num_bytes: int
    num_rows: int


@dataclasses.dataclass(frozen=True)
class Failure:
    """One image without an embedding: its name, a short code, and what exactly was wrong."""

    name: bytes
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """One revision. `key`, `shard` and `row` are columns as described above."""

    revision: int
    complete: bool
    rehash: bool
    """Whether unchanged size and time were not trusted (--verify-content)."""
    inputs: Inputs
    inputs_digest: str
    key: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    known_key: np.ndarray
    known_shard: np.ndarray
    known_row: np.ndarray
    shards: tuple[ShardInfo, ...]
    failures: tuple[tuple[int, str, str], ...]
    """(row of the plan, reason, detail) of each input marked FAILED."""
    absorbed: tuple[str, ...]
    """Sidecars whose facts this plan holds, so that planning the next revision need not read them."""
    id: str = ""
    """Revision and hash, as in the file's name; empty until the plan is stored."""

    @property
    def work(self) -> np.ndarray:
        """Rows still to be embedded, in order."""
        return np.flatnonzero(self.shard == PENDING)

    def encode(self) -> tuple[str, bytes]:
        """The name and bytes of the plan's file."""
        header = {
            "complete": self.complete,
            "revision": self.revision,
            "rehash": self.rehash,
            "inputs": self.inputs_digest,
            "shards": [dataclasses.astuple(shard) for shard in self.shards],
            "failures": self.failures,
            "absorbed": self.absorbed,
            **_input_header(self.inputs),
        }
        image = build_image(
            {
                "header": np.frombuffer(canonical_json(header), np.uint8),
                **_input_columns(self.inputs),
                "key": self.key,
                "shard": self.shard,
                "row": self.row,
                "known/key": self.known_key,
                "known/shard": self.known_shard,
                "known/row": self.known_row,
            }
        )
        name = f"{self.revision:06d}-{hashlib.sha256(image).hexdigest()[:12]}"
        return f"{name}.h5" if self.complete else f"{name}-open.h5", image


@dataclasses.dataclass(frozen=True, order=True)
class PlanFile:
    """A plan file by its name alone; the greatest is the one that holds."""

    revision: int
    complete: bool
    path: Path = dataclasses.field(compare=False)


def list_plans(folder: Path) -> list[PlanFile]:
    """The plan files in `folder`, oldest first; of twins, the one whose name comes first is the newest."""
    found = []
    for path in sorted(folder.glob("*.h5"), reverse=True):
        if match := _FILE.fullmatch(path.name):
            found.append(PlanFile(int(match[2]), match[4] is None, path))
    return sorted(found)  # stable: twins stay in reverse order of their names


def load_plan(path: Path) -> Plan:
    """Reads one plan file.

    Raises: CorruptError if it is not what its name says, bit for bit, or does not make sense.
    """
    image = read_file(path)
    match = _FILE.fullmatch(path.name)
    if match is None or hashlib.sha256(image).hexdigest()[:12] != match[3]:
        raise CorruptError(f"{path}: damaged (its contents do not match its name)")
    with safe_open(image, str(path)) as file:
        try:
            header = json.loads(file.read("header", dtypes="uint8").tobytes())
            inputs = Inputs(
                names=Names(file.read("name/offsets", dtypes="int64"), file.read("name/blob", dtypes="uint8")),
                size=file.read("size", dtypes="int64"),
                mtime_ns=file.read("mtime_ns", dtypes="int64"),
                label_codes=file.read("label/codes", dtypes="int32"),
                label_offsets=file.read("label/offsets", dtypes="int64"),
                split=file.read("split", dtypes="uint8"),
                group=file.read("group", dtypes="int32"),
                class_names=tuple(header["class_names"]),
                groups=tuple(header["groups"]),
                multi_label=bool(header["multi_label"]),
            )
            plan = Plan(
                revision=int(header["revision"]),
                complete=bool(header["complete"]),
                rehash=bool(header["rehash"]),
                inputs=inputs,
                inputs_digest=str(header["inputs"]),
                key=file.read("key", dtypes="uint8"),
                shard=file.read("shard", dtypes="int32"),
                row=file.read("row", dtypes="int32"),
                known_key=file.read("known/key", dtypes="uint8"),
                known_shard=file.read("known/shard", dtypes="int32"),
                known_row=file.read("known/row", dtypes="int32"),
                shards=tuple(ShardInfo(*fields) for fields in header["shards"]),
                failures=tuple((int(row), str(reason), str(detail)) for row, reason, detail in header["failures"]),
                absorbed=tuple(header["absorbed"]),
                id=match[1],
            )
            sane = _is_consistent(plan)
        except (ValueError, KeyError, TypeError, IndexError) as err:
            raise CorruptError(f"{path}: does not make sense ({err!r})") from err
    if not sane:
        raise CorruptError(f"{path}: does not make sense (its columns contradict each other)")
    return plan


def _input_columns(inputs: Inputs) -> dict[str, np.ndarray]:
    return {
        "name/offsets": inputs.names.offsets,
        "name/blob": inputs.names.blob,
        "size": inputs.size,
        "mtime_ns": inputs.mtime_ns,
        "label/codes": inputs.label_codes,
        "label/offsets": inputs.label_offsets,
        "split": inputs.split,
        "group": inputs.group,
    }


def _input_header(inputs: Inputs) -> dict[str, Any]:
    return {"class_names": inputs.class_names, "groups": inputs.groups, "multi_label": inputs.multi_label}


def _is_consistent(plan: Plan) -> bool:
    """Whether every offset, code and shard index points at something: a plan made by a stranger may lie."""
    inputs, num = plan.inputs, len(plan.inputs)
    return (
        all(
            column.shape == (num,)
            for column in (inputs.size, inputs.mtime_ns, inputs.split, inputs.group, plan.shard, plan.row)
        )
        and plan.key.shape == (num, 32)
        and plan.known_key.shape == (len(plan.known_shard), 32)
        and _are_offsets(inputs.names.offsets, len(inputs.names.blob))
        and _are_offsets(inputs.label_offsets, len(inputs.label_codes))
        and len(inputs.label_offsets) == num + 1
        and (inputs.multi_label or bool((np.diff(inputs.label_offsets) <= 1).all()))
        and _within(inputs.label_codes, 0, len(inputs.class_names))
        and _within(inputs.split, 0, len(SPLITS))
        and _within(inputs.group, -1, len(inputs.groups))
        and _within(plan.shard, FAILED, len(plan.shards))
        and _within(plan.known_shard, 0, len(plan.shards))
        and all(_SHARD_NAME.fullmatch(shard.name) for shard in plan.shards)
        and _point_at_rows(plan.shards, plan.shard, plan.row)
        and _point_at_rows(plan.shards, plan.known_shard, plan.known_row)
        and all(0 <= row < num for row, _, _ in plan.failures)
        and not (plan.complete and (plan.shard == PENDING).any())
    )


def _point_at_rows(shards: Sequence[ShardInfo], shard: np.ndarray, row: np.ndarray) -> bool:
    num_rows = np.array([info.num_rows for info in shards], np.int64)
    present = shard >= 0
    rows = row[present]
    return row.shape == shard.shape and bool(((rows >= 0) & (rows < num_rows[shard[present]])).all())


def _are_offsets(offsets: np.ndarray, end: int) -> bool:
    return bool(
        offsets.ndim == 1
        and len(offsets) > 0
        and offsets[0] == 0
        and offsets[-1] == end
        and (np.diff(offsets) >= 0).all()
    )


def _within(values: np.ndarray, low: int, high: int) -> bool:
    return values.ndim == 1 and (not values.size or bool(low <= values.min() and values.max() < high))


def _ragged_take(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the runs picked, and the index of each of their elements."""
    lengths = (offsets[1:] - offsets[:-1])[rows]
    taken = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=taken[1:])
    return taken, np.arange(taken[-1]) + np.repeat(offsets[:-1][rows] - taken[:-1], lengths)
