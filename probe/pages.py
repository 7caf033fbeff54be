"""Huge pages for the arrays of a long computation.

XLA asks the C library for the temporary memory of every step anew, and the kernel then hands it out in pages of 4 kB:
of a training step of ViT-B/32 in bfloat16 that is a sixth of the processors' time. Linux has pages of 2 MB, and glibc
asks for them where it is told to, but only by the environment that a process starts with.
"""

import os
import sys
from pathlib import Path

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES, _ASK = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def huge_page_environment() -> dict[str, str]:
    """What the environment lacks for huge pages; nothing where they need not be asked for or are not to be had."""
    tunables = os.environ.get(_TUNABLES, "")
    if "glibc.malloc.hugetlb" in tunables or not sys.platform.startswith("linux"):
        return {}
    try:
        on_request = "[madvise]" in _SWITCH.read_text()
    except OSError:
        return {}
    return {_TUNABLES: f"{tunables}:{_ASK}".lstrip(":")} if on_request else {}


def restart_with_huge_pages() -> None:
    """Replaces this process by itself, started anew under the same id, where that gives it huge pages; else returns.

    To be called before anything is done. What the user has set in GLIBC_TUNABLES wins.
    """
    if lacking := huge_page_environment():
        os.environ.update(lacking)  # with it the new process does not restart again
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  (no shell is the point)
