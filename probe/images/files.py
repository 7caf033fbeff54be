"""Reading an image file whole, without waiting for anything that is not a file."""

import os
import stat
from pathlib import Path

from probe.images.decoder import ImageError

MAX_BYTES = 1 << 30  # of one image


def read_image_file(path: bytes | Path) -> tuple[bytes, int]:
    """Returns: the bytes of a regular file and its mtime_ns.

    Raises: ImageError: missing, not-a-file (FIFO, socket, device, folder), too-big, changed while it was read,
      or unreadable for what the system says.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  # opening a device can start something
            raise ImageError("not-a-file", "neither a file nor a link to one")
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            before = os.fstat(file.fileno())
            if before.st_size > MAX_BYTES:
                raise too_many_bytes(before.st_size)
            data = file.read(before.st_size + 1)
            after = os.fstat(file.fileno())
    except (FileNotFoundError, NotADirectoryError) as err:
        raise ImageError("missing", str(err.strerror)) from err
    except (OSError, ValueError) as err:  # ValueError: a NUL in the path
        raise ImageError("unreadable", str(getattr(err, "strerror", None) or err)) from err
    if not len(data) == before.st_size == after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise ImageError("changed", "it was written to while it was read: run again when it is whole")
    return data, after.st_mtime_ns


def too_many_bytes(num_bytes: int) -> ImageError:
    return ImageError("too-big", f"{num_bytes:,} bytes, and {MAX_BYTES:,} are the most that is read of an image")
