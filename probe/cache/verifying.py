"""Reads every byte of a cache and says what is damaged."""

import collections
import dataclasses
from pathlib import Path

import numpy as np

from probe.cache.manifest import FILE_NAME, Manifest, load_manifest
from probe.cache.plan import Plan, ShardInfo, list_plans, load_plan
from probe.cache.shards import list_sidecars, load_sidecar, read_shard, shard_keys, shard_view
from probe.errors import CorruptError
from probe.interrupt import check


@dataclasses.dataclass
class Verification:
    """What was found: `damage` names the files to remove, `notes` tell what is odd but harmless."""

    damage: dict[Path, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    num_shards: int = 0
    num_rows: int = 0
    num_bytes: int = 0
    num_plans: int = 0


def verify_cache(root: Path) -> Verification:
    """Checks every file of the cache in `root` against its hash, and every shard against its sidecar and the plan.

    Raises: InputError if `root` is no cache; MismatchError if a later version made it.
    """
    found = Verification()
    manifest = _load_manifest(root, found)
    keys = _verify_sidecars(root, manifest, found)
    newest = _verify_plans(root, found)
    shards = {info.name: info for info, _ in keys.values()}
    shards |= {info.name: info for info in (newest.shards if newest else ())}
    for name, info in sorted(shards.items()):
        check()
        try:
            _verify_shard(root, info, keys[name][1] if name in keys else None, manifest)
        except CorruptError as err:
            found.damage[root / "shards" / name] = str(err)
        found.num_shards += 1
        found.num_rows += info.num_rows
        found.num_bytes += info.num_bytes
    on_disk = {f"{path.parent.name}/{path.name}" for path in (root / "shards").glob("*/*.h5")}
    found.notes += [f"{name}: no sidecar and no plan knows this shard" for name in sorted(on_disk - set(shards))]
    return found


def remove_damaged(root: Path, damage: dict[Path, str]) -> list[Path]:
    """Removes damaged files, and the sidecars of damaged shards, so that the next `embed` makes them anew."""
    removed = []
    for path in damage:
        for file in {path, path.with_suffix(".json")} if path.suffix == ".h5" else {path}:
            if file.exists() and root in file.parents:
                file.unlink()
                removed.append(file)
    return sorted(removed)


def _load_manifest(root: Path, found: Verification) -> Manifest | None:
    try:
        return load_manifest(root)
    except CorruptError as err:
        found.damage[root / FILE_NAME] = str(err)
        return None


def _verify_sidecars(
    root: Path, manifest: Manifest | None, found: Verification
) -> dict[str, tuple[ShardInfo, np.ndarray]]:
    """Each shard that has a sidecar, by name, and the keys that this says it holds, row by row."""
    shards: dict[str, tuple[ShardInfo, np.ndarray]] = {}
    times_made: collections.Counter[str] = collections.Counter()
    for name, path in list_sidecars(root).items():
        check()
        times_made[name.rpartition("-")[0]] += 1
        try:
            sidecar = load_sidecar(root, path)
        except CorruptError as err:
            found.damage[path] = str(err)
            continue
        if manifest is not None and sidecar.fingerprint != manifest.fingerprint:
            found.damage[path] = f"{path}: made in another way than this cache"
        elif sidecar.shard is not None:
            facts, keys = sidecar.facts, np.zeros((sidecar.shard.num_rows, 32), np.uint8)
            keys[facts.rows[facts.rows >= 0]] = facts.keys[facts.rows >= 0]
            shards[sidecar.shard.name] = (sidecar.shard, keys)
    found.notes += [
        f"{stem}: made {count} times, with unlike bytes; the first by name counts"
        for stem, count in times_made.items()
        if count > 1
    ]
    return shards


def _verify_plans(root: Path, found: Verification) -> Plan | None:
    """The newest plan that is sound."""
    newest = None
    for file in list_plans(root / "plan"):
        try:
            newest = load_plan(file.path)
            found.num_plans += 1
        except CorruptError as err:
            found.damage[file.path] = str(err)
    return newest


def _verify_shard(root: Path, info: ShardInfo, keys: np.ndarray | None, manifest: Manifest | None) -> None:
    """Raises: CorruptError unless the shard is whole and holds what its sidecar says."""
    image = read_shard(root, info, verify=True)
    stored = shard_keys(image, root, info)
    if keys is not None and not np.array_equal(stored, keys):
        raise CorruptError(f"{root / 'shards' / info.name}: its keys are not those of its sidecar")
    for view, width in (manifest.identity["views"] if manifest else {}).items():
        shard_view(image, root, info, view, width)
