"""Durable writes: a file or folder appears under its name whole, or not at all.

Every other module that writes what must survive a crash calls this one. The order is the whole idea:
write under a name of our own in the same folder, fsync, rename, fsync the folder. A process killed at any
point leaves either nothing under the final name or all of it; what it may leave is a file whose name starts
with `PARTIAL_PREFIX`, which nobody reads and `sweep_partials` removes. A folder cannot be renamed over another, so one
that is replaced is moved aside first; whoever wants it next finds it there, if the process died before the other came.

On an object store (s3://, gs://, what else fsspec knows) there is no rename, and none is needed: an object appears
whole when its upload ends, or not at all. Such a path is a UPath, which reads as pathlib's do; see `locate`.
"""

import contextlib
import errno
import hashlib
import io
import itertools
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from probe.errors import ConfigError, InputError, StorageError

PARTIAL_PREFIX = ".partial-"
_BLOCK_BYTES = 4 << 20  # asked of a store at once, where it is read forwards
_STALE_SECONDS = 24 * 3600  # a partial this old belongs to nobody: no shard takes a day to write
_in_progress: set[Path] = set()  # partials of this process, for `remove_partials`


class _Writer:
    tag = ""  # stands in the names of this process's partials


def tag_partials(tag: str) -> None:
    """Has this process's partials name it, so that who outlives it can remove them at once: see `sweep_partials`."""
    _Writer.tag = tag


def locate(address: str) -> Path:
    """The path that a user names: in the file system, or below an address as s3://bucket/folder.

    Raises: ConfigError if what reads such addresses is not installed.
    """
    scheme, is_address, rest = address.partition("://")
    if not is_address:
        return Path(address)
    if scheme in ("file", "local"):
        return Path(rest)
    try:
        from upath import UPath

        path = UPath(address, use_listings_cache=False)  # what another host has written meanwhile must be seen
        path.fs  # noqa: B018  # imports the driver of this scheme
    except (ImportError, ValueError) as err:
        raise ConfigError(f"{address}: {err}. Addresses need pip install 'probe-jax[remote]'.") from err
    return cast(Path, path)  # it is none, but has the methods of one


def is_remote(path: Path) -> bool:
    """Whether a path is on an object store."""
    return hasattr(path, "fs")


def open_file(path: Path) -> IO[bytes]:
    """Opens a file or an object, to be read from any place in it.

    Raises: OSError, and reading too, whatever a store's driver raises.
    """
    return io.BufferedReader(_Object(path)) if is_remote(path) else path.open("rb")


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that a crash leaves the old content, or the new, and nothing between.

    Args:
      path: the final name; its folder exists.
      data: the whole content.
    Raises: StorageError if the disk is full, read-only or failing; no partial file is left then.
    """
    if is_remote(path):
        _put_object(path, data)
        return
    partial = _partial_name(path)
    _in_progress.add(partial)
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_folder(path.parent)
    except OSError as err:
        raise _storage_error(path, len(data), err) from err
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)  # there only if something failed
        _in_progress.discard(partial)


@contextlib.contextmanager
def atomic_folder(path: Path, *, replacing: str | None = None) -> Iterator[Path]:
    """Yields an empty folder to fill, which becomes `path` when the block ends without an exception.

    Args:
      path: the final name; its parent is made where missing.
      replacing: as in `require_free`; what is replaced is removed only once the new folder is whole.
    Raises:
      InputError as `require_free` does, before the block runs.
      StorageError if the disk is full, read-only or failing; nothing is left under `path` then.
    """
    require_free(path, replacing=replacing)
    partial = _partial_name(path)
    _in_progress.add(partial)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                _fsync_path(Path(folder, name))
            _fsync_path(Path(folder))
        require_free(path, replacing=replacing)  # again: what was free when the block began may be so no more
        aside = _aside_name(path)
        while True:
            if path.exists():
                shutil.rmtree(aside, ignore_errors=True)  # replaced before, by a process that died removing it
                os.replace(path, aside)
            try:
                os.replace(partial, path)
                break
            except OSError as err:
                if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise  # else a reader has put it back meanwhile: see `recover_folder`
        fsync_folder(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as err:
        raise _storage_error(path, None, err) from err
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _in_progress.discard(partial)


def recover_folder(path: Path) -> None:
    """Puts a folder back under its name if a crash came between the two renames of its replacement.

    For who reads a folder that `atomic_folder` replaces; writers do it by themselves.
    """
    aside = _aside_name(path)
    if aside.is_dir() and not path.exists():
        with contextlib.suppress(OSError):  # a disk that is read-only, or a twin was first
            os.replace(aside, path)
            fsync_folder(path.parent)


def require_writable(path: Path) -> None:
    """Checks, before any work is done, that something may be written there. Raises: StorageError."""
    if is_remote(path):
        return
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise StorageError(f"{there} is a file, and --out needs a folder there")
    if not os.access(there, os.W_OK):
        raise StorageError(f"{there} is not writable: choose another --out, or change its permissions")


def require_free(path: Path, *, replacing: str | None = None) -> None:
    """Checks, before any work is done, that `atomic_folder` may write `path`: nothing is there, or what may go.

    Args:
      replacing: a folder that holds a file of this name is one of ours, which the user asked to overwrite. No other
        folder is ever replaced: it may be somebody's photos.
    Raises: InputError if something else is there.
    """
    if is_remote(path):
        raise InputError(f"{path}: this is written to a folder of this machine, and copied from there: choose another")
    if path.name in ("", ".."):
        raise InputError(f"{path}: this folder is made and named by the run: give --out the name of a new one")
    require_writable(path.absolute().parent)
    recover_folder(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if replacing is None:
        raise InputError(f"{path} exists already: choose another --out, or pass --overwrite to replace it")
    if not (path / replacing).is_file():
        raise InputError(
            f"{path}: --overwrite replaces only what an earlier run wrote, and this holds no {replacing}: it may be "
            "something else of yours. Choose another --out."
        )


def require_file(path: Path, *, overwrite: bool) -> None:
    """Checks, before any work is done, that `atomic_write_bytes` may write `path`, and makes its folder.

    Raises: InputError if something is there; StorageError if the folder cannot be made.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file to --out")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already: choose another --out, or pass --overwrite to replace it")
    make_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Makes `folder` and what is missing above it, durably. Raises: StorageError."""
    if is_remote(folder):
        return  # there are names with slashes only
    missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            fsync_folder(path.parent)
    except OSError as err:
        raise _storage_error(folder, None, err) from err


def remove_partials() -> None:
    """Removes what this process is in the middle of writing: for one that is about to end at once."""
    for partial in tuple(_in_progress):
        with contextlib.suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable. Raises: OSError."""
    _fsync_path(folder)


def sweep_partials(folder: Path, tag: str | None = None) -> None:
    """Removes partial files and folders directly in `folder` that a killed process left over a day ago.

    Args:
      tag: remove those of this one instead, whatever their age. It is dead, or what it writes no longer counts.
    """
    if is_remote(folder):
        return
    oldest = time.time() - _STALE_SECONDS
    for partial in folder.glob(f"{PARTIAL_PREFIX}*" if tag is None else f"{PARTIAL_PREFIX}{tag}*"):
        with contextlib.suppress(OSError):
            if tag is not None or partial.lstat().st_mtime < oldest:
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


class _Object(io.RawIOBase):
    """An object of a store as a file, whose errors are those of files; it is read in blocks, ahead."""

    def __init__(self, path: Any) -> None:
        self._path = path
        with self._as_os_errors():
            # The drivers of S3 and Google's store read on only what is still the object that was opened.
            self._file = path.fs.open(path.path, "rb", block_size=_BLOCK_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with self._as_os_errors():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    @contextlib.contextmanager
    def _as_os_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            raise
        except Exception as err:  # each driver has errors of its own
            raise OSError(f"{self._path}: {err}") from err


def _put_object(path: Any, data: bytes) -> None:
    try:
        path.fs.pipe_file(path.path, data)
    except Exception as err:  # each driver has errors of its own
        raise StorageError(f"{path}: cannot write {len(data):,} bytes: {err}. Run the same command again.") from err


def _partial_name(path: Path) -> Path:
    # A name of its own: neither a twin process nor a leftover can stand in the way. It does not contain the
    # final name, which may already be as long as the file system allows.
    return path.with_name(f"{PARTIAL_PREFIX}{_Writer.tag}{uuid.uuid4().hex}")


def _aside_name(path: Path) -> Path:
    """Where a folder stands while another takes its name: the same in every process, and as short as a partial's."""
    path = path.absolute()  # "." has no name
    return path.parent / f".replaced-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}"


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(path: Path, num_bytes: int | None, err: OSError) -> StorageError:
    what = f"{path}: cannot write" + (f" {num_bytes:,} bytes" if num_bytes is not None else "")
    if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(f"{what}: {err.strerror}. Free some space and run the same command again.")
    return StorageError(f"{what}: {err.strerror or err}")
