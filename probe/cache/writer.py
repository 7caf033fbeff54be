"""The writing side: plan what is unknown, seal shards one by one, say where everything lies.

Any number of processes may do this at once, without locks: who plans the same inputs writes the same plan,
who makes the same shard writes the same bytes, and what counts is only what stands sealed under its name.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from probe.cache.index import KeyIndex
from probe.cache.manifest import FILE_NAME, Manifest, check_same, load_manifest
from probe.cache.plan import FAILED, PENDING, Inputs, Plan, ShardInfo, list_plans, load_plan
from probe.cache.shards import (
    KNOWN,
    ShardContents,
    Sidecar,
    list_sidecars,
    load_sidecar,
    seal_shard,
    sealed_numbers,
)
from probe.errors import CorruptError
from probe.storage import atomic_write_bytes, make_folder, sweep_partials


class CacheWriter:
    """A cache folder that this process may add to."""

    def __init__(self, root: Path, wanted: Manifest) -> None:
        """Creates the cache, or continues one that was made in the same way.

        Args:
          root: the cache folder.
          wanted: how this process will make embeddings.
        Raises: MismatchError listing the fields that differ from an existing cache; StorageError;
          CorruptError.
        """
        self.root = root
        if not (root / FILE_NAME).exists():
            make_folder(root / "plan")
            make_folder(root / "shards")
            atomic_write_bytes(root / FILE_NAME, wanted.encode())
        # Read back even if just written: of two processes that create the cache at once, one has the last
        # word.
        self.manifest = load_manifest(root)
        check_same(self.manifest, wanted, root)
        self.sweep()

    def sweep(self, tag: str | None = None) -> None:
        """Removes what killed processes left behind: a day ago, or the one of this tag (`storage.tag_partials`)."""
        for folder in (self.root, self.root / "plan", self.root / "failed", *(self.root / "shards").glob("*")):
            sweep_partials(folder, tag)

    def plan(self, inputs: Inputs, *, rehash: bool = False, retry_failed: bool = False) -> Plan:
        """The plan to work on for `inputs`, stored: an old one if it still fits, else a new revision.

        Args:
          inputs: what the source says now.
          rehash: read every file again, also where name, size and time are unchanged.
          retry_failed: try again what failed before.
        Returns: a plan whose `work` is empty if nothing is to be embedded.
        """
        plan = draft_plan(self.root, inputs, rehash=rehash, retry_failed=retry_failed)
        return plan if plan.id else self.store(plan)

    def plan_file(self, plan: Plan) -> Path:
        """Where a stored plan lies."""
        return self.root / "plan" / (f"{plan.id}.h5" if plan.complete else f"{plan.id}-open.h5")

    def shard_rows(self, plan: Plan, number: int) -> np.ndarray:
        """Rows of the plan that shard `number` of its work is made from, in order."""
        size = self.manifest.shard_rows
        return plan.work[number * size : (number + 1) * size]

    def num_shards(self, plan: Plan) -> int:
        """How many shards the plan's work makes."""
        return -(-len(plan.work) // self.manifest.shard_rows)

    def sealed(self, plan: Plan) -> dict[int, Path]:
        """Which of them are sealed already: number → sidecar."""
        return sealed_numbers(self.root, plan.id)

    def find_sealed(self, plan: Plan, number: int) -> Path | None:
        """The sidecar of one shard, if it is sealed by now."""
        return sealed_numbers(self.root, plan.id, number).get(number)

    def load_sidecar(self, path: Path) -> Sidecar:
        """Raises: CorruptError if it is damaged; MismatchError if another process sealed it in another way."""
        return load_sidecar(self.root, path, self.manifest.fingerprint)

    def seal(self, plan: Plan, number: int, contents: ShardContents, made_by: dict[str, Any]) -> None:
        """Writes shard `number` of the plan's work. Raises: StorageError."""
        seal_shard(self.root, plan.id, number, contents, fingerprint=self.manifest.fingerprint, made_by=made_by)

    def complete(self, plan: Plan) -> Plan | None:
        """The revision in which every input of `plan` is done, stored; None while shards are missing.

        Raises: CorruptError if a sidecar is damaged or does not belong to the plan.
        """
        sealed = self.sealed(plan)
        if len(sealed) < self.num_shards(plan):
            return None
        done = resolve(plan, self.manifest, {number: self.load_sidecar(path) for number, path in sealed.items()})
        if len(done.work):
            raise CorruptError(
                f"{self.root}: {len(done.work)} inputs are said to be known, but no shard has them. "
                f"Run `probe cache verify {self.root} --repair` and the same command again."
            )
        return self.store(dataclasses.replace(done, revision=plan.revision + 1, complete=True, rehash=False))

    def store(self, plan: Plan) -> Plan:
        """Writes a plan, whose shards are in place, as the revision that it says. Raises: StorageError."""
        name, image = plan.encode()
        make_folder(self.root / "plan")
        atomic_write_bytes(self.root / "plan" / name, image)
        return dataclasses.replace(plan, id=name.removesuffix(".h5").removesuffix("-open"))


def newest_complete(root: Path) -> Plan | None:
    """The newest complete plan of the cache in `root`, if there is one. Raises: CorruptError."""
    files = [file for file in list_plans(root / "plan") if file.complete]
    return load_plan(files[-1].path) if files else None


def draft_plan(root: Path, inputs: Inputs, *, rehash: bool = False, retry_failed: bool = False) -> Plan:
    """The plan for `inputs`, as `CacheWriter.plan` would store it; one without an `id` is not stored yet."""
    # Sidecars first: one that another process seals from now on is of a plan that is listed then.
    sidecars = list_sidecars(root)
    files = list_plans(root / "plan")
    newest = files[-1] if files else None
    digest = inputs.digest()
    for file in reversed(files):
        if newest is None or (file.revision, file.complete) != (newest.revision, newest.complete):
            break
        plan = load_plan(file.path)
        fits = plan.inputs_digest == digest and not (retry_failed and (plan.shard == FAILED).any())
        if fits and rehash == (plan.rehash and not plan.complete) and not _lost(root, plan):
            return plan
    facts = _Facts()
    if complete := next((load_plan(file.path) for file in reversed(files) if file.complete), None):
        facts.add_plan(complete, _lost(root, complete))
    for name in sorted(sidecars.keys() - facts.absorbed):
        sidecar = load_sidecar(root, sidecars[name], load_manifest(root).fingerprint)
        if sidecar.shard is None or _is_there(root, sidecar.shard):
            facts.add_sidecar(sidecar)
    return _make_plan(inputs, digest, facts, newest.revision + 1 if newest else 0, rehash, retry_failed)


def resolve(plan: Plan, manifest: Manifest, sidecars: dict[int, Sidecar]) -> Plan:
    """`plan` with the facts of its own sealed shards filled in; inputs of missing shards stay PENDING.

    Args:
      sidecars: by number of the shard.
    Raises: CorruptError if a sidecar does not belong to the plan.
    """
    key, shard, row = plan.key.copy(), plan.shard.copy(), plan.row.copy()
    shards, failures, work = list(plan.shards), list(plan.failures), plan.work
    elsewhere: list[np.ndarray] = []
    for number, sidecar in sorted(sidecars.items()):
        rows = work[number * manifest.shard_rows : (number + 1) * manifest.shard_rows]
        facts = sidecar.facts
        if list(facts.names) != [plan.inputs.names[i] for i in rows]:
            raise CorruptError(f"{sidecar.name}: does not belong to plan {plan.id}. Remove it and embed again.")
        key[rows] = facts.keys
        if sidecar.shard is not None:
            shards.append(sidecar.shard)
        here = facts.rows >= 0
        shard[rows[here]] = len(shards) - 1
        row[rows[here]] = facts.rows[here]
        shard[rows[facts.rows == FAILED]] = FAILED
        elsewhere.append(rows[facts.rows == KNOWN])
        reasons = {failure.name: failure for failure in sidecar.failures}
        for index in rows[facts.rows == FAILED].tolist():
            failure = reasons[plan.inputs.names[index]]
            failures.append((index, failure.reason, failure.detail))
    duplicates = np.concatenate([np.zeros(0, np.int64), *elsewhere])
    if len(duplicates):
        has = np.flatnonzero(shard >= 0)
        index = KeyIndex(np.concatenate([key[has], plan.known_key]))
        places = index.find(key[duplicates])
        at_shard = np.concatenate([shard[has], plan.known_shard])
        at_row = np.concatenate([row[has], plan.known_row])
        found = places >= 0
        shard[duplicates[found]], row[duplicates[found]] = at_shard[places[found]], at_row[places[found]]
    spare = KeyIndex(key[shard >= 0]).find(plan.known_key) < 0
    return dataclasses.replace(
        plan,
        key=key,
        shard=shard,
        row=row,
        known_key=plan.known_key[spare],
        known_shard=plan.known_shard[spare],
        known_row=plan.known_row[spare],
        shards=tuple(shards),
        failures=tuple(sorted(failures)),
        absorbed=tuple(sorted({*plan.absorbed, *(sidecar.name for sidecar in sidecars.values())})),
    )


def known_keys(plan: Plan) -> KeyIndex:
    """The content keys whose embeddings older revisions have."""
    return KeyIndex(np.concatenate([plan.key[plan.shard >= 0], plan.known_key]))


def _lost(root: Path, plan: Plan) -> set[int]:
    """Indices of the plan's shards that are not on the disk in the length they were sealed with."""
    return {index for index, shard in enumerate(plan.shards) if not _is_there(root, shard)}


def _is_there(root: Path, shard: ShardInfo) -> bool:
    try:
        return (root / "shards" / shard.name).stat().st_size == shard.num_bytes
    except OSError:
        return False


class _Facts:
    """What older revisions know: (name, size, mtime) → key or failure, and key → place of the embedding."""

    def __init__(self) -> None:
        self.shards: list[ShardInfo] = []
        self.absorbed: set[str] = set()
        self._names: list[bytes] = []
        self._columns: list[tuple[np.ndarray, ...]] = []  # size, mtime_ns, key, shard (or FAILED or KNOWN), row
        self._known: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # key, shard, row; without names
        self._reasons: dict[int, tuple[str, str]] = {}

    def add_plan(self, plan: Plan, lost: set[int]) -> None:
        """All rows of a complete plan, except those of shards that are lost."""
        kept = [index for index in range(len(plan.shards)) if index not in lost]
        renumbered = np.full(len(plan.shards) + 2, PENDING, np.int32)  # FAILED and PENDING may index it, too
        renumbered[kept] = np.arange(len(kept)) + len(self.shards)
        self.shards += [plan.shards[index] for index in kept]
        self.absorbed |= set(plan.absorbed)
        for row, reason, detail in plan.failures:
            self._reasons[len(self._names) + row] = (reason, detail)
        self._names += plan.inputs.names
        shard = np.where(plan.shard >= 0, renumbered[plan.shard], plan.shard)
        self._columns.append((plan.inputs.size, plan.inputs.mtime_ns, plan.key, shard, plan.row))
        still = renumbered[plan.known_shard] >= 0
        self._known.append((plan.known_key[still], renumbered[plan.known_shard[still]], plan.known_row[still]))

    def add_sidecar(self, sidecar: Sidecar) -> None:
        """The facts of one shard that no complete plan holds yet."""
        facts = sidecar.facts
        here = len(self.shards)
        if sidecar.shard is not None:
            self.shards.append(sidecar.shard)
        self.absorbed.add(sidecar.name)
        reasons = {failure.name: (failure.reason, failure.detail) for failure in sidecar.failures}
        for offset, (name, row) in enumerate(zip(facts.names, facts.rows, strict=True)):
            if row == FAILED:
                self._reasons[len(self._names) + offset] = reasons[name]
        self._names += facts.names
        # KNOWN stands for itself until all shards are in: the embedding may be in one that is still to come.
        shard = np.where(facts.rows >= 0, here, np.where(facts.rows == FAILED, FAILED, _ELSEWHERE))
        size, mtime_ns = np.array(facts.sizes, np.int64), np.array(facts.mtimes_ns, np.int64)
        self._columns.append((size, mtime_ns, facts.keys, shard.astype(np.int32), facts.rows))

    def settle(self) -> "_Settled":
        """All facts as arrays, every key resolved to a place."""
        empty = (np.zeros(0, np.int64),) * 2 + (np.zeros((0, 32), np.uint8),) + (np.zeros(0, np.int32),) * 2
        size, mtime_ns, key, shard, row = (np.concatenate(c) for c in zip(empty, *self._columns, strict=True))
        known = zip(*((empty[2], empty[3], empty[4]), *self._known), strict=True)
        known_key, known_shard, known_row = (np.concatenate(c) for c in known)
        has = shard >= 0
        place_key = np.concatenate([key[has], known_key])
        place_shard = np.concatenate([shard[has], known_shard])
        place_row = np.concatenate([row[has], known_row])
        index = KeyIndex(place_key)
        lost = np.flatnonzero((shard == _ELSEWHERE) | (shard == PENDING))
        places = index.find(key[lost])
        found = places >= 0
        shard[lost], row[lost] = PENDING, -1
        shard[lost[found]], row[lost[found]] = place_shard[places[found]], place_row[places[found]]
        return _Settled(
            {name: position for position, name in enumerate(self._names)},  # of several, the latest holds
            *(size, mtime_ns, key, shard, row),
            *(place_key, place_shard, place_row),
            self._reasons,
        )


_ELSEWHERE = -3  # in a column `shard` of `_Facts`: to be found by its key


@dataclasses.dataclass(frozen=True, eq=False)
class _Settled:
    position: dict[bytes, int]
    size: np.ndarray
    mtime_ns: np.ndarray
    key: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    place_key: np.ndarray
    place_shard: np.ndarray
    place_row: np.ndarray
    reasons: dict[int, tuple[str, str]]


def _make_plan(inputs: Inputs, digest: str, facts: _Facts, revision: int, rehash: bool, retry_failed: bool) -> Plan:
    """A new revision: inputs with known (name, size, mtime) take over what is known, the rest is work."""
    num = len(inputs)
    key = np.zeros((num, 32), np.uint8)
    shard, row = np.full(num, PENDING, np.int32), np.full(num, -1, np.int32)
    failures: list[tuple[int, str, str]] = []
    settled = facts.settle()
    if not rehash and settled.position:
        position = np.fromiter((settled.position.get(name, -1) for name in inputs.names), np.int64, num)
        mine = np.flatnonzero(position >= 0)
        at = position[mine]
        same = (settled.size[at] == inputs.size[mine]) & (settled.mtime_ns[at] == inputs.mtime_ns[mine])
        if retry_failed:
            same &= settled.shard[at] != FAILED
        mine, at = mine[same], at[same]
        key[mine], shard[mine], row[mine] = settled.key[at], settled.shard[at], settled.row[at]
        failed = shard[mine] == FAILED
        for index, source in zip(mine[failed].tolist(), at[failed].tolist(), strict=True):
            failures.append((index, *settled.reasons[source]))
    order, renumbered = _by_name(facts.shards)
    shard = np.where(shard >= 0, renumbered[shard], shard)
    spare = _unused(settled, key[shard >= 0])
    return Plan(
        revision=revision,
        complete=not (shard == PENDING).any(),
        rehash=rehash and bool((shard == PENDING).any()),
        inputs=inputs,
        inputs_digest=digest,
        key=key,
        shard=shard,
        row=row,
        known_key=settled.place_key[spare],
        known_shard=renumbered[settled.place_shard[spare]],
        known_row=settled.place_row[spare],
        shards=tuple(facts.shards[index] for index in order),
        failures=tuple(sorted(failures)),
        absorbed=tuple(sorted(facts.absorbed)),
    )


def _by_name(shards: list[ShardInfo]) -> tuple[list[int], np.ndarray]:
    """Shards in the order of their names, so that equal knowledge makes equal plans; and old index → new."""
    order = sorted(range(len(shards)), key=lambda index: shards[index].name)
    renumbered = np.zeros(len(shards) + 2, np.int32)
    renumbered[order] = np.arange(len(order))
    return order, renumbered


def _unused(settled: _Settled, used: np.ndarray) -> np.ndarray:
    """Places of embeddings that no input uses, one per key, in the order of the keys."""
    spare = np.flatnonzero(KeyIndex(used).find(settled.place_key) < 0)
    if not len(spare):
        return spare
    _, first = np.unique(settled.place_key[spare], axis=0, return_index=True)
    return spare[first]
