"""Sealed shards: what is known about bytes, never about names.

    shards/0000/<plan>-<number>-<first 12 hex digits of its SHA-256>.h5
        key                [R, 32] u1                SHA-256 of each image's bytes
        embeddings/<view>  [R, D] float32 or float16
    shards/0000/<same name>.json    the sidecar: full hash, rows, who made it, what was learned in making it,
                                    (name, size, mtime) → key and row, of every input
    failed/<plan>-<number>-<hash>.jsonl    one record per image that has no embedding, and why

The sidecar is written last and makes the shard count: without it, a shard is made again, to the same bytes.
Work that brought no new embedding (files that only moved) leaves a sidecar alone.
"""

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probe.cache.hdf5 import build_image, safe_open
from probe.cache.plan import FAILED, Failure, ShardInfo
from probe.cache.sealed import open_record, read_file, seal_record
from probe.errors import CorruptError, MismatchError
from probe.storage import atomic_write_bytes, make_folder

KNOWN = -1  # in place of a row: the embedding lies in an older shard
_FOLDER_SHARDS = 1000  # per folder: some file systems slow down in large ones
_SIDECAR = re.compile(r"(\d{6}-[0-9a-f]{12})-(\d{5,})-([0-9a-f]{12})\.json")
_NO_SHARD = "0" * 12


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """What was learned about n inputs by reading them, in the plan's order."""

    names: Sequence[bytes]
    sizes: Sequence[int]
    mtimes_ns: Sequence[int]
    keys: np.ndarray
    """[n, 32] uint8, zeros where the bytes could not be read."""
    rows: np.ndarray
    """[n] int32: the row in this shard, KNOWN or FAILED."""


@dataclasses.dataclass(frozen=True, eq=False)
class ShardContents:
    """A shard before it is sealed: `keys` [R, 32] uint8 and, for each view, embeddings [R, D]."""

    facts: Facts
    keys: np.ndarray
    embeddings: dict[str, np.ndarray]
    failures: tuple[Failure, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Sidecar:
    """A sealed shard as its sidecar describes it; `shard` is None where no new embedding came of it."""

    name: str
    fingerprint: str
    shard: ShardInfo | None
    facts: Facts
    failures: tuple[Failure, ...]


def seal_shard(
    root: Path,
    plan_id: str,
    number: int,
    contents: ShardContents,
    *,
    fingerprint: str,
    made_by: dict[str, Any],
) -> None:
    """Writes one shard of the cache in `root`. To do it twice, or in two processes, writes the same bytes.

    Raises: StorageError if the disk is full or failing; what was written so far does not count and is no
      obstacle.
    """
    folder = root / "shards" / _folder(number)
    make_folder(folder)
    stem = f"{plan_id}-{number:05d}"
    shard: dict[str, Any] | None = None
    if len(contents.keys):
        image = build_image(
            {
                "key": contents.keys,
                **{f"embeddings/{view}": rows for view, rows in contents.embeddings.items()},
            }
        )
        digest = hashlib.sha256(image).hexdigest()
        shard = {"sha256": digest, "bytes": len(image), "rows": len(contents.keys)}
        atomic_write_bytes(folder / f"{stem}-{digest[:12]}.h5", image)
    failed = _write_failures(root, stem, contents.failures) if contents.failures else None
    facts = contents.facts
    record = {
        "fingerprint": fingerprint,
        "shard": shard,
        "failed": failed,
        "made_by": made_by,
        "facts": {
            "names": [name_to_text(name) for name in facts.names],
            "sizes": list(facts.sizes),
            "mtimes_ns": list(facts.mtimes_ns),
            "keys": base64.b64encode(facts.keys.tobytes()).decode("ascii"),
            "rows": facts.rows.tolist(),
        },
    }
    suffix = shard["sha256"][:12] if shard else _NO_SHARD
    atomic_write_bytes(folder / f"{stem}-{suffix}.json", seal_record(record))


def list_sidecars(root: Path) -> dict[str, Path]:
    """Every sidecar of the cache in `root`: its path below shards/ → its path; in order of names."""
    paths = sorted((root / "shards").glob("*/*.json"))
    return {f"{path.parent.name}/{path.name}": path for path in paths if _SIDECAR.fullmatch(path.name)}


def sealed_numbers(root: Path, plan_id: str, number: int | None = None) -> dict[int, Path]:
    """Which shards of a plan are sealed: number → sidecar. Of twins, made on unlike devices, the first name.

    Args:
      number: look for this shard alone.
    """
    pattern = f"*/{plan_id}-*.json" if number is None else f"{_folder(number)}/{plan_id}-{number:05d}-*.json"
    sealed: dict[int, Path] = {}
    for path in sorted((root / "shards").glob(pattern)):
        match = _SIDECAR.fullmatch(path.name)
        if match is None or (match[3] != _NO_SHARD and not path.with_suffix(".h5").is_file()):
            continue
        sealed.setdefault(int(match[2]), path)
    return sealed


def load_sidecar(root: Path, path: Path, fingerprint: str | None = None) -> Sidecar:
    """Reads one sidecar.

    Raises: CorruptError if it or its list of failures is damaged, or does not make sense; MismatchError if it is of a
      cache with another fingerprint: two processes may have created this one at once, each in its own way.
    """
    record = open_record(read_file(path), path)
    name = f"{path.parent.name}/{path.name}"
    try:
        facts, shard = record["facts"], record["shard"]
        sidecar = Sidecar(
            name=name,
            fingerprint=record["fingerprint"],
            shard=ShardInfo(name.removesuffix(".json") + ".h5", shard["sha256"], shard["bytes"], shard["rows"])
            if shard
            else None,
            facts=Facts(
                names=[text_to_name(text) for text in facts["names"]],
                sizes=facts["sizes"],
                mtimes_ns=facts["mtimes_ns"],
                keys=np.frombuffer(base64.b64decode(facts["keys"]), np.uint8).reshape(-1, 32),
                rows=np.array(facts["rows"], np.int32),
            ),
            failures=_read_failures(root, record["failed"]) if record["failed"] else (),
        )
        sane = _is_consistent(sidecar)
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise CorruptError(f"{path}: does not make sense ({err!r})") from err
    if not sane:
        raise CorruptError(f"{path}: does not make sense (its facts contradict each other)")
    if fingerprint not in (None, sidecar.fingerprint):
        raise MismatchError(
            f"{path}: made in another way than this cache. Run `probe cache verify {root} --repair`, which removes it, "
            "and then the same `probe embed` again."
        )
    return sidecar


def _is_consistent(sidecar: Sidecar) -> bool:
    facts = sidecar.facts
    num_rows = sidecar.shard.num_rows if sidecar.shard else 0
    failed = {name for name, row in zip(facts.names, facts.rows, strict=True) if row == FAILED}
    return (
        len(facts.names) == len(facts.sizes) == len(facts.mtimes_ns) == len(facts.keys) == len(facts.rows)
        and bool(((facts.rows >= FAILED) & (facts.rows < num_rows)).all())
        and failed == {failure.name for failure in sidecar.failures}
    )


def shard_files(root: Path, sidecar: Path) -> list[Path]:
    """The files of one sealed shard: its sidecar first, so that what remains of a removal does not count."""
    record = open_record(read_file(sidecar), sidecar)
    files = [sidecar]
    if record["shard"]:
        files.append(sidecar.with_suffix(".h5"))
    if record["failed"]:
        files.append(root / "failed" / Path(record["failed"]["file"]).name)
    return files


def read_shard(root: Path, info: ShardInfo, *, verify: bool) -> bytes:
    """The bytes of a shard.

    Raises: CorruptError if it is missing, has another length or, where `verify`, is not what its hash says.
    """
    path = root / "shards" / info.name
    image = read_file(path)
    if len(image) != info.num_bytes:
        raise damaged(root, info, f"{len(image):,} bytes where {info.num_bytes:,} were written")
    if verify and hashlib.sha256(image).hexdigest() != info.sha256:
        raise damaged(root, info, "its SHA-256 is not the one it was sealed with")
    return image


def shard_view(image: bytes, root: Path, info: ShardInfo, view: str, width: int) -> np.ndarray:
    """[R, width] embeddings of one view, float32 or float16, out of a shard's bytes. Raises: CorruptError."""
    with safe_open(image, str(root / "shards" / info.name)) as file:
        rows = file.read(f"embeddings/{view}", dtypes="float32 float16")
    if rows.shape != (info.num_rows, width):
        raise damaged(root, info, f"embeddings of shape {rows.shape} where {(info.num_rows, width)} is meant")
    return rows


def shard_keys(image: bytes, root: Path, info: ShardInfo) -> np.ndarray:
    """[R, 32] uint8 content keys out of a shard's bytes. Raises: CorruptError."""
    with safe_open(image, str(root / "shards" / info.name)) as file:
        keys = file.read("key", dtypes="uint8")
    if keys.shape != (info.num_rows, 32):
        raise damaged(root, info, f"keys of shape {keys.shape} where {(info.num_rows, 32)} is meant")
    return keys


def damaged(root: Path, info: ShardInfo, what: str) -> CorruptError:
    """The error for a shard that is not as it was sealed, with the way out."""
    return CorruptError(
        f"{root / 'shards' / info.name}: damaged ({what}). Run `probe cache verify {root} --repair`, which "
        "removes damaged shards, and then the same `probe embed` again, which makes them anew."
    )


def name_to_text(name: bytes) -> str:
    """A name as JSON can hold it, whatever its bytes are."""
    return name.decode("utf-8", "surrogateescape")


def text_to_name(text: str) -> bytes:
    """The inverse of `name_to_text`."""
    return text.encode("utf-8", "surrogateescape")


def _folder(number: int) -> str:
    return f"{number // _FOLDER_SHARDS:04d}"


def _write_failures(root: Path, stem: str, failures: Sequence[Failure]) -> dict[str, str]:
    lines = [
        json.dumps({"name": name_to_text(failure.name), "reason": failure.reason, "detail": failure.detail})
        for failure in failures
    ]
    data = "".join(line + "\n" for line in lines).encode("ascii")
    digest = hashlib.sha256(data).hexdigest()
    folder = root / "failed"
    make_folder(folder)
    atomic_write_bytes(folder / f"{stem}-{digest[:12]}.jsonl", data)
    return {"file": f"{stem}-{digest[:12]}.jsonl", "sha256": digest}


def _read_failures(root: Path, reference: dict[str, str]) -> tuple[Failure, ...]:
    path = root / "failed" / Path(reference["file"]).name
    data = read_file(path)
    if hashlib.sha256(data).hexdigest() != reference["sha256"]:
        raise CorruptError(f"{path}: damaged (its SHA-256 is not the one it was sealed with)")
    return tuple(
        Failure(text_to_name(record["name"]), record["reason"], record["detail"])
        for record in map(json.loads, data.splitlines())
    )
