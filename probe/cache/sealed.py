"""Small JSON records that prove themselves: a SHA-256 over the rest of the file stands in its first line."""

import hashlib
import json
from pathlib import Path
from typing import Any

from probe.errors import CorruptError

_HEAD, _TAIL = b'{"check":"', b'",\n'
_BODY = len(_HEAD) + 64 + len(_TAIL)


def canonical_json(value: Any) -> bytes:
    """One spelling for equal values: sorted keys, no spaces, ASCII. Raises: ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def seal_record(record: dict[str, Any], *, indent: int | None = None) -> bytes:
    """The record as the bytes of a JSON file whose first line holds their checksum."""
    separators = (",", ":") if indent is None else (",", ": ")
    body = json.dumps(record, sort_keys=True, indent=indent, separators=separators, allow_nan=False)[1:].lstrip()
    data = body.encode("ascii") + b"\n"
    return _HEAD + hashlib.sha256(data).hexdigest().encode() + _TAIL + data


def open_record(data: bytes, path: Path) -> dict[str, Any]:
    """The record that `seal_record` sealed.

    Raises: CorruptError, naming `path`, if a single bit has changed.
    """
    digest = data[len(_HEAD) : len(_HEAD) + 64]
    if (
        not data.startswith(_HEAD)
        or data[_BODY - len(_TAIL) : _BODY] != _TAIL
        or hashlib.sha256(data[_BODY:]).hexdigest().encode() != digest
    ):
        raise CorruptError(f"{path}: damaged (its contents do not match its own checksum)")
    record: dict[str, Any] = json.loads(data)
    del record["check"]
    return record


def read_file(path: Path) -> bytes:
    """All bytes of a file of ours. Raises: CorruptError if it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except OSError as err:
        raise CorruptError(f"{path}: cannot be read ({err.strerror or err})") from err
