"""Compiled programs, kept in the user's cache folder: the next run of a kind starts at once."""

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path

_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Programs that probe has compiled. It makes them anew.\n"
_LEAST_SECONDS = "0.1"  # of compilation, below which a program is not worth a file


def keep_compiled_programs() -> None:
    """Tells jax where to keep what it compiles; without a folder that can be written to it compiles every time.

    By the environment, which jax reads when it is imported: what the user has set there wins, and a program that has
    imported jax already is left as it is.
    """
    if "jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home, a file in the way, a disk that is full or read-only
        folder = _cache_home() / "probe" / "compiled" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            tag = folder.parents[1] / "CACHEDIR.TAG"  # backups leave such a folder out: https://bford.info/cachedir
            if not tag.exists():
                tag.write_text(_TAG)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
            os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", _LEAST_SECONDS)


def _cache_home() -> Path:
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path.home() / ".cache"


def _processor() -> str:
    """Names the kind of processor: programs for one may not run on another, and a home may be shared by both."""
    facts = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
