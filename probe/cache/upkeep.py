"""Caches joined, and caches made smaller: new plans over shards that stay as they are."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probe.cache.index import KeyIndex
from probe.cache.manifest import check_same, load_manifest
from probe.cache.plan import Inputs, Names, Plan, ShardInfo, list_plans
from probe.cache.reader import Cache
from probe.cache.shards import list_sidecars, load_sidecar, read_shard, shard_files
from probe.cache.writer import CacheWriter
from probe.errors import InputError, StorageError
from probe.interrupt import check
from probe.storage import atomic_write_bytes, make_folder


def merge_caches(roots: Sequence[Path], out: Path, *, prefix: bool) -> Plan:
    """Joins complete caches of equal fingerprint into a new one; each shard is verified and copied as it is.

    Args:
      prefix: put each cache's folder name before the names of its images.
    Returns: the new cache's plan.
    Raises: MismatchError if fingerprints differ; InputError if names clash or `out` exists; CorruptError; StorageError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already: choose another --out")
    caches = [Cache.open(root) for root in roots]
    manifest = load_manifest(roots[0])
    for root in roots[1:]:
        check_same(load_manifest(root), manifest, root)
    plan = _join([cache.plan for cache in caches], [f"{root.resolve().name}/" if prefix else "" for root in roots])
    writer = CacheWriter(out, manifest)
    copied: set[str] = set()
    for root, cache in zip(roots, caches, strict=True):
        for info in cache.plan.shards:
            check()
            if info.name not in copied:
                _copy(root, out, f"shards/{info.name}", read_shard(root, info, verify=True))
                copied.add(info.name)
    absorbed = _copy_sidecars(roots, out, copied)
    return writer.store(dataclasses.replace(plan, absorbed=tuple(sorted(absorbed))))


def prune_cache(root: Path, *, dry_run: bool) -> list[Path]:
    """Removes what the newest revision does not use: shards without a row in it, old plans, facts it has absorbed.

    Returns: the files that were, or would be, removed.
    Raises: InputError if the cache is not complete; CorruptError; StorageError.
    """
    cache = Cache.open(root)
    plan, writer = cache.plan, CacheWriter(root, load_manifest(root))
    used = sorted(set(plan.shard[plan.shard >= 0].tolist()))
    kept = {plan.shards[index].name for index in used}
    files: list[Path] = []
    absorbed = []
    for name, path in list_sidecars(root).items():
        sidecar = load_sidecar(root, path)
        if sidecar.shard is not None and sidecar.shard.name in kept:
            absorbed.append(name)
        else:
            files += shard_files(root, path)
    known = {path.name for path in files}
    files += [
        path
        for path in sorted((root / "shards").glob("*/*.h5"))
        if f"{path.parent.name}/{path.name}" not in kept and path.name not in known
    ]
    renumbered = np.full(len(plan.shards) + 2, -1, np.int32)
    renumbered[used] = np.arange(len(used))
    still = np.isin(plan.known_shard, used)
    pruned = dataclasses.replace(
        plan,
        revision=plan.revision + 1,
        shard=np.where(plan.shard >= 0, renumbered[plan.shard], plan.shard),
        known_key=plan.known_key[still],
        known_shard=renumbered[plan.known_shard[still]],
        known_row=plan.known_row[still],
        shards=tuple(plan.shards[index] for index in used),
        absorbed=tuple(absorbed),
    )
    changed = len(used) < len(plan.shards) or pruned.absorbed != plan.absorbed
    old = list_plans(root / "plan")
    files += [file.path for file in (old if changed else old[:-1])]
    if not dry_run:
        if changed:
            writer.store(pruned)
        for path in files:
            path.unlink(missing_ok=True)
    return files


def remove_cache(root: Path, *, dry_run: bool) -> tuple[list[Path], list[Path]]:
    """Removes a cache, and of its folder what is empty then; the manifest goes last, so that a removal that is cut off
    can be run again.

    Returns: the files that were, or would be, removed, and those of others, which stay.
    Raises: InputError if it is no cache; CorruptError if its manifest says nothing; StorageError.
    """
    load_manifest(root)
    ours = [path for pattern in _FILES for path in sorted(root.glob(pattern)) if path.is_file()]
    others = sorted({path for path in root.rglob("*") if path.is_file()} - set(ours))
    if not dry_run:
        try:
            for path in ours:
                check()
                path.unlink(missing_ok=True)
        except OSError as err:
            raise StorageError(f"{root}: cannot remove it: {err.strerror}: {err.filename}") from err
        for folder in (*root.glob("*/*"), *root.glob("*"), root):
            with contextlib.suppress(OSError):  # something is in it, or it is a file, or the store has no folders
                folder.rmdir()
    return ours, others


_FILES = ("shards/*/*", "plan/*", "failed/*", "cache.json")


def _join(plans: Sequence[Plan], prefixes: Sequence[str]) -> Plan:
    """One complete plan over the inputs of all. Raises: InputError listing names that clash."""
    if len({plan.inputs.multi_label for plan in plans}) > 1:
        raise InputError("some of these caches have one label per image and others several: they cannot be joined")
    all_inputs = [_renamed(plan.inputs, prefix) for plan, prefix in zip(plans, prefixes, strict=True)]
    inputs = _concatenated(all_inputs)
    shards: dict[str, tuple[int, ShardInfo]] = {}
    for plan in plans:
        for info in plan.shards:
            shards.setdefault(info.name, (len(shards), info))

    def renumber(plan: Plan, column: np.ndarray) -> np.ndarray:
        numbers = np.array([shards[info.name][0] for info in plan.shards] + [-1, -1], np.int32)
        return np.where(column >= 0, numbers[column], column)

    starts = np.cumsum([0, *(len(plan.inputs) for plan in plans)]).tolist()
    key = np.concatenate([plan.key for plan in plans])
    rows = _without_repetition(inputs, key)
    new_row = {old: new for new, old in enumerate(rows.tolist())}
    known_key = np.concatenate([plan.known_key for plan in plans])
    shard = np.concatenate([renumber(plan, plan.shard) for plan in plans])
    spare = KeyIndex(key[shard >= 0]).find(known_key) < 0
    taken = inputs.take(rows)
    return Plan(
        revision=0,
        complete=True,
        rehash=False,
        inputs=taken,
        inputs_digest=taken.digest(),
        key=key[rows],
        shard=shard[rows],
        row=np.concatenate([plan.row for plan in plans])[rows],
        known_key=known_key[spare],
        known_shard=np.concatenate([renumber(plan, plan.known_shard) for plan in plans])[spare],
        known_row=np.concatenate([plan.known_row for plan in plans])[spare],
        shards=tuple(info for _, info in shards.values()),
        failures=tuple(
            sorted(
                (new_row[start + row], reason, detail)
                for start, plan in zip(starts, plans, strict=False)
                for row, reason, detail in plan.failures
                if start + row in new_row
            )
        ),
        absorbed=(),
    )


def _renamed(inputs: Inputs, prefix: str) -> Inputs:
    if not prefix:
        return inputs
    start = prefix.encode("utf-8", "surrogateescape")
    return dataclasses.replace(inputs, names=Names.of(start + name for name in inputs.names))


def _concatenated(parts: Sequence[Inputs]) -> Inputs:
    """All inputs under one list of classes and one of groups."""
    class_names = sorted({name for part in parts for name in part.class_names})
    groups = list(dict.fromkeys(group for part in parts for group in part.groups))
    class_code = {name: code for code, name in enumerate(class_names)}
    group_code = {name: code for code, name in enumerate(groups)}
    counts = np.concatenate([np.diff(part.label_offsets) for part in parts])
    return Inputs(
        names=Names.of(name for part in parts for name in part.names),
        size=np.concatenate([part.size for part in parts]),
        mtime_ns=np.concatenate([part.mtime_ns for part in parts]),
        label_codes=np.concatenate([_recoded(part.label_codes, part.class_names, class_code) for part in parts]),
        label_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        split=np.concatenate([part.split for part in parts]),
        group=np.concatenate([_recoded(part.group, part.groups, group_code) for part in parts]),
        class_names=tuple(class_names),
        groups=tuple(groups),
        multi_label=parts[0].multi_label,
    )


def _recoded(codes: np.ndarray, names: Sequence[str], code_of: dict[str, int]) -> np.ndarray:
    """Codes into `names` as codes into another list; -1 stays."""
    recoded: np.ndarray = np.array([*(code_of[name] for name in names), -1], np.int32)[codes]
    return recoded


def _without_repetition(inputs: Inputs, key: np.ndarray) -> np.ndarray:
    """Rows to keep: of inputs that agree in everything, the first. Raises: InputError if others share a name."""
    first: dict[bytes, int] = {}
    rows, clashes = [], []
    labels = [tuple(codes) for codes in np.split(inputs.label_codes, inputs.label_offsets[1:-1])]
    for row, name in enumerate(inputs.names):
        before = first.setdefault(name, row)
        if before == row:
            rows.append(row)
        elif not (
            np.array_equal(key[before], key[row])
            and labels[before] == labels[row]
            and inputs.split[before] == inputs.split[row]
            and inputs.group[before] == inputs.group[row]
        ):
            clashes.append(name)
    if clashes:
        shown = ", ".join(repr(name.decode("utf-8", "replace")) for name in clashes[:10])
        raise InputError(
            f"{len(clashes)} names stand for unlike images, labels or splits in these caches: {shown}"
            f"{' …' if len(clashes) > 10 else ''}. Pass --prefix to put the caches' folder names before them."
        )
    return np.array(rows, np.int64)


def _copy_sidecars(roots: Sequence[Path], out: Path, shards: set[str]) -> set[str]:
    """Copies the sidecars of these shards, with their failures; returns their names."""
    copied = set()
    for root in roots:
        for name, path in list_sidecars(root).items():
            sidecar = load_sidecar(root, path)
            if name not in copied and (sidecar.shard is None or sidecar.shard.name in shards):
                for file in reversed(shard_files(root, path)):  # the sidecar last
                    if file.suffix != ".h5":
                        _copy(root, out, str(file.relative_to(root)), file.read_bytes())
                copied.add(name)
    return copied


def _copy(root: Path, out: Path, name: str, data: bytes) -> None:
    target = out / name
    make_folder(target.parent)
    atomic_write_bytes(target, data)
