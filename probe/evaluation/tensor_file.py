"""A safetensors file with a header of our own: JSON under "probe" in its metadata, with a format version."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from probe.errors import CorruptError

T = TypeVar("T")


def to_bytes(version: int, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """The file's content; the same arguments give the same bytes. Args: tensors: arrays of any shape, by name."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    metadata = {"probe": json.dumps({"format_version": version, **header})}
    return bytes(safetensors.numpy.save(contiguous, metadata=metadata))


def load(path: Path, version: int, build: Callable[[dict[str, Any], dict[str, np.ndarray]], T]) -> T:
    """Reads a file of that version back.

    Args:
      build: (header, tensors by name) -> what the file means.
    Raises: CorruptError if it is damaged, lacks what `build` asks for, or is of another format version.
    """
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads(file.metadata()["probe"])
            if header["format_version"] != version:
                raise CorruptError(
                    f"{path}: format version {header['format_version']}, but this program reads {version}. "
                    "Use the version of probe that config.json names, or train again."
                )
            return build(header, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  no mapping
    except (SafetensorError, ValueError, TypeError, KeyError) as err:
        raise CorruptError(f"{path}: damaged: {err}. Restore it from a copy, or train again.") from err
