"""`probe cache ls|verify|merge|prune|rm`: the upkeep of caches."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from probe.cache import Cache, merge_caches, prune_cache, remove_cache, remove_damaged, verify_cache
from probe.config import CacheLsConfig, CacheMergeConfig, CachePruneConfig, CacheRmConfig, CacheVerifyConfig
from probe.errors import CorruptError, MismatchError
from probe.images import ImageError
from probe.interrupt import check
from probe.sources import display_name, list_names, open_source

_NAMED = 10  # damaged files that a message lists


def ls(config: CacheLsConfig) -> dict[str, Any]:
    """What is in a cache. Raises: InputError, CorruptError, MismatchError."""
    cache = Cache.open(config.cache, partial=True)
    splits, labels = cache.table.splits, cache.table.labels
    counts: dict[str, dict[str, int]] = {}
    for split in sorted(set(splits.tolist())):
        of_split = labels[splits == split]
        per_class = (
            of_split.sum(axis=0)
            if cache.multi_label
            else np.bincount(of_split[of_split >= 0], minlength=len(cache.class_names))
        )
        counts[split or "all"] = dict(zip(cache.class_names, per_class.tolist(), strict=True))
    return {
        "cache": str(config.cache),
        "fingerprint": cache.fingerprint,
        "provenance": cache.provenance,
        "num_images": len(cache.plan.inputs),
        "num_embedded": len(cache.table),
        "num_distinct": len(np.unique(cache.table.keys, axis=0)),
        "num_failed": len(cache.plan.failures),
        "num_pending": cache.num_pending,
        "num_shards": len(cache.plan.shards),
        "num_revisions": cache.num_revisions,
        "num_bytes": sum(path.stat().st_size for path in config.cache.rglob("*") if path.is_file()),
        "counts": counts,
    }


def describe_ls(summary: dict[str, Any]) -> str:
    """The summary of `ls` as text for people."""
    provenance = summary["provenance"]
    views = ", ".join(f"{view} [{width}] {provenance['stored_dtype']}" for view, width in provenance["views"].items())
    lines = [
        f"{summary['cache']}: {summary['num_embedded']:,} of {summary['num_images']:,} images have embeddings "
        f"({summary['num_distinct']:,} distinct), {summary['num_failed']:,} failed, {summary['num_pending']:,} pending",
        f"backbone: {provenance['backbone']}",
        f"views: {views}",
        f"fingerprint: {summary['fingerprint']}",
        f"disk: {summary['num_bytes'] / 1e6:,.1f} MB in {summary['num_shards']:,} shards, "
        f"{summary['num_revisions']} plan revisions",
    ]
    for split, counts in summary["counts"].items():
        lines.append(f"{split}: " + ", ".join(f"{display_name(name)} {count:,}" for name, count in counts.items()))
    return "\n".join(lines)


def verify(config: CacheVerifyConfig) -> dict[str, Any]:
    """Reads every byte of a cache.

    Returns: counts of what was read, what was removed (--repair), and notes on what is odd but harmless.
    Raises: CorruptError listing what is damaged (without --repair); MismatchError if an image is not what was
      embedded under its name (--deep); InputError.
    """
    found = verify_cache(config.cache)
    if found.damage and not config.repair:
        faults = [fault.split(". Run ")[0] for fault in found.damage.values()]
        raise CorruptError(
            f"{config.cache}: damaged: {'; '.join(faults[:_NAMED])}"
            + (f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else "")
            + f". Run `probe cache verify {config.cache} --repair`, which removes them, and `probe embed` again."
        )
    removed = remove_damaged(config.cache, found.damage)
    deep = _verify_inputs(Cache.open(config.cache), config.deep) if config.deep and not found.damage else None
    return {
        "cache": str(config.cache),
        "num_shards": found.num_shards,
        "num_rows": found.num_rows,
        "num_bytes": found.num_bytes,
        "num_plans": found.num_plans,
        "notes": found.notes,
        "removed": [str(path) for path in removed],
        "deep": deep,
    }


def describe_verify(summary: dict[str, Any]) -> str:
    """The summary of `verify` as text for people."""
    lines = [f"note: {note}" for note in summary["notes"]]
    lines += [f"removed: {path}" for path in summary["removed"]]
    if summary["removed"]:
        lines.append(f"{summary['cache']}: run the same `probe embed` again to make anew what was removed")
    else:
        lines.append(
            f"{summary['cache']}: sound: {summary['num_rows']:,} embeddings in {summary['num_shards']:,} shards "
            f"({summary['num_bytes'] / 1e6:,.1f} MB), {summary['num_plans']} plan revisions"
        )
    if deep := summary["deep"]:
        lines.append(f"{deep['num_same']:,} images are what was embedded, {deep['num_unknown']:,} are not in the cache")
    return "\n".join(lines)


def _verify_inputs(cache: Cache, images: Path) -> dict[str, int]:
    """Raises: MismatchError listing images whose bytes are not those that were embedded under their names."""
    source = open_source(images, labelled=False)
    keys = dict(zip(cache.table.names, cache.table.keys, strict=True))
    changed, num_same, num_unknown = [], 0, 0
    for example in source.examples:
        check()
        key = keys.get(example.name)
        if key is None:
            num_unknown += 1
            continue
        try:
            same = hashlib.sha256(source.read(example)).digest() == key.tobytes()
        except ImageError:
            same = False
        if same:
            num_same += 1
        else:
            changed.append(example.name)
    if changed:
        raise MismatchError(
            f"{images}: {len(changed)} images are not what was embedded under their names: {list_names(changed)}. "
            "Run `probe embed` again with --verify-content."
        )
    return {"num_same": num_same, "num_unknown": num_unknown}


def merge(config: CacheMergeConfig) -> dict[str, Any]:
    """Joins complete caches of equal fingerprint into a new one.

    Raises: MismatchError if fingerprints differ; InputError if names clash or `out` exists; CorruptError; StorageError.
    """
    plan = merge_caches(config.caches, config.out, prefix=config.prefix)
    return {
        "cache": str(config.out),
        "num_images": len(plan.inputs),
        "num_embedded": int((plan.shard >= 0).sum()),
        "num_failed": len(plan.failures),
        "num_shards": len(plan.shards),
    }


def describe_merge(summary: dict[str, Any]) -> str:
    """The summary of `merge` as text for people."""
    return (
        f"{summary['cache']}: {summary['num_embedded']:,} of {summary['num_images']:,} images have embeddings, "
        f"in {summary['num_shards']:,} shards; {summary['num_failed']:,} failed"
    )


def prune(config: CachePruneConfig) -> dict[str, Any]:
    """Removes what the newest revision of a cache does not use.

    Raises: InputError if the cache is not complete; CorruptError; StorageError.
    """
    before = {path: path.stat().st_size for path in config.cache.rglob("*") if path.is_file()}
    removed = prune_cache(config.cache, dry_run=config.dry_run)
    return {
        "cache": str(config.cache),
        "dry_run": config.dry_run,
        "removed": [str(path) for path in removed],
        "num_bytes": sum(before.get(path, 0) for path in removed),
    }


def describe_prune(summary: dict[str, Any]) -> str:
    """The summary of `prune` as text for people."""
    verb = "would be" if summary["dry_run"] else "were"
    return (
        f"{summary['cache']}: {len(summary['removed']):,} files ({summary['num_bytes'] / 1e6:,.1f} MB) {verb} removed"
    )


def rm(config: CacheRmConfig) -> dict[str, Any]:
    """Removes a cache, and nothing else. Raises: InputError if it is none; CorruptError; StorageError."""
    sizes = {path: path.stat().st_size for path in config.cache.rglob("*") if path.is_file()}
    removed, others = remove_cache(config.cache, dry_run=config.dry_run)
    return {
        "cache": str(config.cache),
        "dry_run": config.dry_run,
        "removed": [str(path) for path in removed],
        "num_bytes": sum(sizes.get(path, 0) for path in removed),
        "left": [str(path) for path in others],
    }


def describe_rm(summary: dict[str, Any]) -> str:
    """The summary of `rm` as text for people."""
    left = summary["left"]
    named = ", ".join(map(display_name, left[:_NAMED])) + (", …" if len(left) > _NAMED else "")
    return describe_prune(summary) + (f"; not the cache's own, and left: {named}" if left else "")
