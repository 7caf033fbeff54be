"""The reading side: a cache is trusted only if it proves itself."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from probe.cache.manifest import Manifest, load_manifest
from probe.cache.plan import SPLITS, Failure, Names, Plan, ShardInfo, list_plans, load_plan
from probe.cache.shards import damaged, load_sidecar, read_shard, sealed_numbers, shard_view
from probe.cache.writer import resolve
from probe.errors import InputError
from probe.notebook import facts

T = TypeVar("T")

_CHUNK_ROWS = 16384
_AHEAD = 2  # shards, or chunks, that are read while one is used


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """What is said about the N inputs that have an embedding, in the plan's order."""

    names: Names
    """Path relative to the source's root, or member name: opaque bytes."""
    labels: np.ndarray
    """int32 [N], -1 where unlabelled; or bool [N, C] if an input may have several classes."""
    splits: np.ndarray
    """str [N]: "train", "val", "test" or ""."""
    groups: np.ndarray
    """str [N]: what must not be torn apart by a split, or ""."""
    keys: np.ndarray
    """uint8 [N, 32]: SHA-256 of each input's bytes."""

    def __len__(self) -> int:
        return len(self.names)


class Cache:
    """A cache folder, opened for reading: `table` says what the rows are, `embeddings` and `chunks` give
    them.

    Rows are numbered as in `table`; inputs that failed have none and never shift another's.
    """

    def __init__(self, root: Path, manifest: Manifest, plan: Plan, *, verify: bool) -> None:
        self.root = root
        self.plan = plan
        self._manifest, self._verify = manifest, verify
        self._verified: set[str] = set()
        self._rows = np.flatnonzero(plan.shard >= 0)
        self._shard, self._row = plan.shard[self._rows], plan.row[self._rows]
        inputs = plan.inputs if len(self._rows) == len(plan.inputs) else plan.inputs.take(self._rows)
        self.table = Table(
            names=inputs.names,
            labels=inputs.labels(),
            splits=np.array(SPLITS)[inputs.split],
            groups=np.array([*inputs.groups, ""])[inputs.group],  # -1 is the last
            keys=plan.key[self._rows],
        )

    @classmethod
    def open(cls, root: Path, *, verify: bool = True, partial: bool = False) -> Self:
        """Opens the newest revision.

        Args:
          root: the cache folder.
          verify: check each shard's SHA-256 when it is first touched.
          partial: accept a cache whose embedding has not finished, with the rows that it has.
        Raises: InputError if there is no cache, or an unfinished one; MismatchError if a later version made
          it; CorruptError if something is damaged or missing.
        """
        manifest = load_manifest(root)
        files = list_plans(root / "plan")
        if not files:
            raise InputError(f"{root}: nothing is embedded yet. Run `probe embed IMAGES --out {root}`.")
        plan = load_plan(files[-1].path)
        if not plan.complete:
            sealed = sealed_numbers(root, plan.id)
            if not partial:
                num_shards = -(-len(plan.work) // manifest.shard_rows)
                raise InputError(
                    f"{root}: embedding has not finished ({len(sealed)} of {num_shards} shards). Run "
                    "the same `probe embed` again to continue it."
                )
            sidecars = {number: load_sidecar(root, path, manifest.fingerprint) for number, path in sealed.items()}
            plan = resolve(plan, manifest, sidecars)
        for info in plan.shards:
            try:
                size = (root / "shards" / info.name).stat().st_size
            except OSError as err:
                raise damaged(root, info, err.strerror or str(err)) from err
            if size != info.num_bytes:
                raise damaged(root, info, f"{size:,} bytes where {info.num_bytes:,} were written")
        return cls(root, manifest, plan, verify=verify)

    def _repr_html_(self) -> str:
        about = {
            "cache": self.root,
            "embeddings": len(self.table),
            "views": ", ".join(f"{view} [{self.width(view)}]" for view in self.views),
            "classes": len(self.class_names),
            "backbone": self.provenance.get("backbone", "unknown"),
            "fingerprint": self.fingerprint[:12],
            "failures": len(self.plan.failures),
        }
        return facts("embeddings", about)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that determines an embedding besides the image."""
        return self._manifest.fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """What the fingerprint is made of."""
        return self._manifest.identity

    @property
    def provenance(self) -> dict[str, Any]:
        """How the embeddings were made: the fields of the fingerprint, and names that do not count."""
        return {**self._manifest.names, **self._manifest.identity}

    @property
    def origin(self) -> dict[str, Any] | None:
        """Where its creator read the images, as `sources.describe_origin` says it; None if that was not recorded."""
        origin: dict[str, Any] | None = self._manifest.names.get("source")
        return origin

    @property
    def reference(self) -> dict[str, Any]:
        """Which cache this is, as JSON values: path, fingerprint, and the revision of its plan."""
        return {"path": str(self.root.absolute()), "fingerprint": self.fingerprint, "plan": self.plan.id}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the labels' codes."""
        return self.plan.inputs.class_names

    @property
    def multi_label(self) -> bool:
        """Whether an input may have several classes."""
        return self.plan.inputs.multi_label

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the kinds of embedding that are stored."""
        return tuple(self._manifest.identity["views"])

    def width(self, view: str = "pooler") -> int:
        """D of a view. Raises: InputError if there is no such view."""
        if view not in self._manifest.identity["views"]:
            raise InputError(f"{self.root}: no view {view!r}; there are {', '.join(self.views)}")
        return int(self._manifest.identity["views"][view])

    @property
    def failures(self) -> list[Failure]:
        """The inputs that have no embedding, and why."""
        return [Failure(self.plan.inputs.names[row], reason, detail) for row, reason, detail in self.plan.failures]

    @property
    def num_revisions(self) -> int:
        """Plan files that there are, open ones included."""
        return len(list_plans(self.root / "plan"))

    @property
    def num_pending(self) -> int:
        """Inputs still to be embedded: 0 unless the cache was opened with partial=True."""
        return len(self.plan.work)

    def embeddings(self, view: str = "pooler", rows: np.ndarray | None = None) -> np.ndarray:
        """float32 [n, D] embeddings of `rows` (all of them if None), in that order.

        Raises: InputError if there is no such view; CorruptError if a shard is damaged.
        """
        wanted = np.arange(len(self.table)) if rows is None else np.asarray(rows)
        out = np.empty((len(wanted), self.width(view)), np.float32)
        filled = 0
        for at, block in self.blocks(view, wanted):
            out[_as_slice(at)] = block
            filled += len(at)
        assert filled == len(wanted)
        return out

    def chunks(
        self, view: str = "pooler", rows: np.ndarray | None = None, chunk_rows: int = _CHUNK_ROWS
    ) -> Iterator[np.ndarray]:
        """The same, at most `chunk_rows` at a time: for caches that do not fit into memory.

        Rows in ascending order read each shard once or twice; scattered ones read many shards per chunk.
        """
        wanted = np.arange(len(self.table)) if rows is None else np.asarray(rows)
        parts = [wanted[start : start + chunk_rows] for start in range(0, len(wanted), chunk_rows)]
        with ThreadPoolExecutor(_AHEAD) as pool:
            yield from _ahead(pool, lambda part: self.embeddings(view, part), parts)

    def blocks(self, view: str, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions in `wanted`, their embeddings as stored), shard by shard: each is read once, whatever the order.

        Raises: InputError if there is no such view; CorruptError if a shard is damaged.
        """
        shards = self._shard[wanted]
        order = np.argsort(shards, kind="stable")
        numbers, starts = np.unique(shards[order], return_index=True)
        groups = np.split(order, starts[1:]) if len(numbers) else []
        with ThreadPoolExecutor(_AHEAD) as pool:
            infos = [self.plan.shards[number] for number in numbers]
            for at, rows in zip(groups, _ahead(pool, lambda info: self._load(view, info), infos), strict=True):
                yield at, rows[_as_slice(self._row[wanted[at]])]

    def _load(self, view: str, info: ShardInfo) -> np.ndarray:
        image = read_shard(self.root, info, verify=self._verify and info.name not in self._verified)
        self._verified.add(info.name)
        return shard_view(image, self.root, info, view, self.width(view))


def _ahead(pool: Executor, load: Callable[[T], np.ndarray], items: Iterable[T]) -> Iterator[np.ndarray]:
    """What `load` makes of each item, in order; the next ones are read while one is used."""
    loading: collections.deque[Future[np.ndarray]] = collections.deque()
    for item in items:
        loading.append(pool.submit(load, item))  # hashing, reading and converting leave Python's lock
        if len(loading) > _AHEAD:
            yield loading.popleft().result()
    while loading:
        yield loading.popleft().result()


def _as_slice(indices: np.ndarray) -> slice | np.ndarray:
    """The same indices, as a slice where they are consecutive: half the time of copying rows."""
    if len(indices) and (np.diff(indices) == 1).all():
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices
