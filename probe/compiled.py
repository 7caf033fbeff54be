"""Compiled programs, kept in the user's cache folder: the next run of a kind starts at once."""

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
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
        folder = _default_folder()
        _check_writable(folder)
        tag = folder.parents[1] / "CACHEDIR.TAG"  # backups leave such a folder out: https://bford.info/cachedir
        if not tag.exists():
            tag.write_text(_TAG)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", _LEAST_SECONDS)


def why_not_kept() -> str | None:
    """Why what the command line compiles is compiled again by every run; None where it is kept."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named == "":
        return "JAX_COMPILATION_CACHE_DIR is empty: unset it"
    if named and "://" in named:
        return None  # an object store, which jax writes to itself
    try:
        folder = Path(named) if named else _default_folder()
    except RuntimeError as err:
        return f"{err} Let JAX_COMPILATION_CACHE_DIR name a folder."
    try:
        _check_writable(folder)
    except OSError as err:
        why = err.strerror or type(err).__name__
        return f"{folder} cannot be written to ({why}): mend that, or let JAX_COMPILATION_CACHE_DIR name another"
    return None


def _check_writable(folder: Path) -> None:
    """Makes the folder, as jax would, and a file in it, which goes again. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _default_folder() -> Path:
    """Raises: RuntimeError where there is no home."""
    return _cache_home() / "probe" / "compiled" / _processor()


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
