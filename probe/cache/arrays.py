"""A cache from embeddings that are already there: made elsewhere, or synthetic."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probe.cache.hdf5 import all_finite
from probe.cache.manifest import make_manifest
from probe.cache.plan import make_inputs
from probe.cache.shards import Facts, ShardContents
from probe.cache.writer import CacheWriter
from probe.errors import InputError

_SHARD_ROWS = 16384


def write_cache(
    root: Path,
    embeddings: np.ndarray | Mapping[str, np.ndarray],
    *,
    names: Sequence[bytes] | None = None,
    labels: np.ndarray | Sequence[Sequence[str]] | None = None,
    class_names: Sequence[str] = (),
    multi_label: bool = False,
    splits: Sequence[str | None] | None = None,
    groups: Sequence[str | None] | None = None,
    keys: np.ndarray | None = None,
    identity: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    shard_rows: int = _SHARD_ROWS,
) -> None:
    """Writes a complete cache in `root`.

    Args:
      embeddings: [N, D] float32 or float16 (other numbers become float32), or one such array per view; a
        single one is the view "pooler".
      names: N distinct byte strings (default: the row's number).
      labels: int [N], indices into `class_names`, -1 for none; or the names of each input's classes.
      splits, groups: N strings, None or "" for none; splits are "train", "val" or "test".
      keys: [N, 32] uint8, distinct for distinct embeddings (default: SHA-256 of each row's bytes).
      identity: what makes two such caches the same besides views and element type; it goes into the
        fingerprint.
      provenance: stored, but it does not count; "backbone" is what people will read.
    Raises: InputError if the arrays do not fit together or hold values that are not finite; MismatchError if
      `root` is a cache that was made in another way; StorageError.
    """
    views = {"pooler": embeddings} if isinstance(embeddings, np.ndarray) else dict(embeddings)
    views = {view: _as_stored(view, array) for view, array in views.items()}
    num = len(next(iter(views.values())))
    listed = [str(row).encode() for row in range(num)] if names is None else list(names)
    classes = _classes(labels, class_names, num)
    columns = {"names": listed, "labels": classes, "splits": splits, "groups": groups, "keys": keys, **views}
    if uneven := {
        column: len(values) for column, values in columns.items() if values is not None and len(values) != num
    }:
        raise InputError(f"{num} embeddings, but {uneven}: every column needs one item per embedding")
    if len(set(listed)) != num:
        raise InputError(f"{num - len(set(listed))} names are not distinct: every embedding needs a name of its own")
    stored_dtype = sorted({array.dtype.name for array in views.values()})
    if len(stored_dtype) != 1:
        raise InputError(f"views of different element types ({', '.join(stored_dtype)}): convert them to one")
    manifest = make_manifest(
        {
            "views": {view: array.shape[1] for view, array in views.items()},
            "stored_dtype": stored_dtype[0],
            "backbone_fingerprint": "none",
            **(identity or {}),
        },
        {"backbone": "features from elsewhere", "backbone_revision": None, "preprocessor_config": {}}
        | dict(provenance or {}),
        shard_rows,
    )
    writer = CacheWriter(root, manifest)
    plan = writer.plan(
        make_inputs(
            listed,
            labels=classes,
            splits=splits or [None] * num,
            groups=groups or [None] * num,
            sizes=[sum(array[0].nbytes for array in views.values())] * num,
            mtimes_ns=[0] * num,
            class_names=class_names,
            multi_label=multi_label,
        ),
        rehash=True,  # arrays have no times: equal names say nothing about equal values
    )
    for number in range(writer.num_shards(plan)):
        rows = writer.shard_rows(plan, number)
        part = {view: array[rows] for view, array in views.items()}
        row_keys = _row_keys(part) if keys is None else keys[rows]
        facts = Facts(
            names=[listed[row] for row in rows],
            sizes=plan.inputs.size[rows].tolist(),
            mtimes_ns=[0] * len(rows),
            keys=row_keys,
            rows=np.arange(len(rows), dtype=np.int32),
        )
        writer.seal(plan, number, ShardContents(facts, row_keys, part, ()), {"origin": "arrays"})
    writer.complete(plan)


def _as_stored(view: str, array: np.ndarray) -> np.ndarray:
    stored = array if array.dtype in (np.float32, np.float16) else array.astype(np.float32)
    if stored.ndim != 2 or not len(stored):
        raise InputError(f"embeddings of view {view!r} have shape {array.shape}, and [rows, width] is meant")
    if not all_finite(stored):
        rows = np.flatnonzero(~np.isfinite(stored).all(axis=1))
        raise InputError(f"embeddings of view {view!r} are not finite in {len(rows)} rows, the first is row {rows[0]}")
    return np.ascontiguousarray(stored)


def _classes(labels: Any, class_names: Sequence[str], num: int) -> Sequence[Sequence[str]]:
    if labels is None:
        return [()] * num
    if not isinstance(labels, np.ndarray):
        unknown = {name for classes in labels for name in classes} - set(class_names)
        if unknown:
            raise InputError(f"labels {sorted(unknown)} are not among the classes {sorted(class_names)}")
        return list(labels)
    if labels.size and not (labels.min() >= -1 and labels.max() < len(class_names)):
        raise InputError(
            f"labels from {labels.min()} to {labels.max()}, and there are {len(class_names)} class names: "
            "a label is an index into them, or -1 for none"
        )
    return [(class_names[label],) if label >= 0 else () for label in labels.tolist()]


def _row_keys(views: dict[str, np.ndarray]) -> np.ndarray:
    """SHA-256 of each row's embeddings, all views together."""
    digests = (
        hashlib.sha256(b"".join(row.tobytes() for row in rows)).digest() for rows in zip(*views.values(), strict=True)
    )
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
