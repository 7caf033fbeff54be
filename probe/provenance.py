"""How a run came about: the command, when, how long, on what machine, from which cache and images.

A file of the run folder, `made.json`, that no figure depends on; reports show it, and find images and embeddings
again by it. The package versions are in config.json.
"""

import contextlib
import datetime
import json
import os
import platform
import shlex
import time
from pathlib import Path
from typing import Any

FILE_NAME = "made.json"
_command: list[str] | None = None


def set_command(arguments: list[str] | None) -> None:
    """Remembers the command line of this process, program name left out; None: it was called from Python."""
    global _command
    _command = arguments


class Made:
    """Runs from the moment it is made until `to_bytes`."""

    def __init__(self) -> None:
        self._started = datetime.datetime.now(datetime.UTC)
        self._clock = time.monotonic()

    def to_bytes(self, *, cache: dict[str, Any] | None = None, source: dict[str, Any] | None = None) -> bytes:
        """The content of made.json.

        Args:
          cache: its path, fingerprint and plan, as JSON values. source: what `Source.origin` said of the images.
        """
        record = {
            "command": None if _command is None else shlex.join(["probe", *_command]),
            "folder": str(Path.cwd()),
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 3),
            "hardware": hardware(),
            "cache": cache,
            "source": source,
        }
        return json.dumps(record, indent=2).encode() + b"\n"  # ASCII: a path may be no text at all


def load(run: Path) -> dict[str, Any]:
    """What is known of how a run came about; empty where it was not recorded."""
    path = run / FILE_NAME
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def hardware() -> dict[str, Any]:
    """The machine and the devices that jax computes on."""
    import jax

    from probe.machine import memory_bytes

    devices = jax.devices()
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "device": devices[0].device_kind,
        "num_devices": len(devices),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):  # Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
