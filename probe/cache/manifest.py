"""cache.json: what a cache is made of, fixed by whoever creates it and read by all who continue it."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from probe.cache.sealed import canonical_json, open_record, read_file, seal_record
from probe.errors import InputError, MismatchError

FORMAT_VERSION = 1
FILE_NAME = "cache.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`identity` is all that two caches must share to be joined; `names` are stored but do not count."""

    identity: dict[str, Any]
    names: dict[str, Any]
    shard_rows: int

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the identity."""
        return hashlib.sha256(canonical_json(self.identity)).hexdigest()

    def encode(self) -> bytes:
        """The bytes of cache.json."""
        record = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "names": self.names,
            "shard_rows": self.shard_rows,
        }
        return seal_record(record, indent=1)


def make_manifest(identity: dict[str, Any], names: dict[str, Any], shard_rows: int) -> Manifest:
    """A manifest of values as JSON will return them: tuples become lists."""
    return Manifest(json.loads(canonical_json(identity)), json.loads(canonical_json(names)), shard_rows)


def load_manifest(root: Path) -> Manifest:
    """Reads the manifest of the cache in `root`.

    Raises: InputError if `root` is no cache; MismatchError if a later version made it; CorruptError if it is
      damaged.
    """
    path = root / FILE_NAME
    if not path.is_file():
        what = "is not a folder" if root.exists() and not root.is_dir() else f"has no {FILE_NAME}"
        raise InputError(f"{root} is not a cache: it {what}. Make one with `probe embed IMAGES --out {root}`.")
    record = open_record(read_file(path), path)
    if record["format_version"] != FORMAT_VERSION:
        raise MismatchError(
            f"{path}: format version {record['format_version']}, and this program reads version "
            f"{FORMAT_VERSION}. Use the probe that made it, or embed the images again into another folder."
        )
    return Manifest(record["identity"], record["names"], record["shard_rows"])


def check_same(found: Manifest, wanted: Manifest, root: Path) -> None:
    """Raises: MismatchError that lists every field in which the cache in `root` is not what is wanted now."""
    if found.fingerprint == wanted.fingerprint:
        return
    differences = describe_differences(found.identity, wanted.identity)
    raise MismatchError(
        f"{root}: this cache was made with {found.names.get('backbone')}, in another way than with "
        f"{wanted.names.get('backbone')} now, and embeddings of both do not go together. Give the backbone and the "
        f"options that the cache was made with, or choose another --out. Fields that differ: {differences}"
    )


def describe_differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The fields in which two identities differ, and both sides of each."""
    return "; ".join(
        f"{field} is {_spell(there)} there and {_spell(now)} now" for field, there, now in _differences(theirs, ours)
    )


_ABSENT = object()


def _differences(theirs: Any, ours: Any, field: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            difference
            for key in sorted({*theirs, *ours})
            for difference in _differences(
                theirs.get(key, _ABSENT), ours.get(key, _ABSENT), f"{field}.{key}" if field else key
            )
        ]
    return [] if theirs == ours else [(field, theirs, ours)]


def _spell(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
