"""A disk that keeps a diary and fails on request, for tests of what a crash or a full disk can leave behind.

`Disk` stands between `probe.storage` and the real file system. `crash_states` replays its diary as SQLite's tests do:
up to every operation (the process was killed), with the last write torn, and with operations dropped that no fsync
had made durable (the power failed).
"""

import contextlib
import dataclasses
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from probe import storage


@dataclasses.dataclass(frozen=True)
class Operation:
    kind: str  # mkdir, create, write, sync, rename, unlink; or ack: the caller was told that all is safe
    path: str  # relative to the root
    data: bytes = b""  # of a write
    target: str = ""  # of a rename; of an ack, what was acknowledged


class Disk:
    """Records every operation below `root`; the `fail_at`-th raises instead (if `persistent`, all after it, too)."""

    def __init__(self, root: Path, *, fail_at: int | None = None, persistent: bool = False) -> None:
        self.root = root.resolve()
        self.diary: list[Operation] = []
        self.num_operations = 0
        self._fail_at, self._persistent = fail_at, persistent
        self._real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "unlink", "mkdir")}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in self._real:
                stack.enter_context(mock.patch.object(os, name, getattr(self, f"_{name}")))
            stack.enter_context(mock.patch.object(storage, "open", self._create, create=True))
            yield

    def acknowledge(self, what: str) -> None:
        self.diary.append(Operation("ack", "", target=what))

    def _name(self, path: Any) -> str | None:
        path = Path(os.path.abspath(path))  # noqa: PTH100  # resolve() would follow links
        return str(path.relative_to(self.root)) if path == self.root or self.root in path.parents else None

    def _count(self, kind: str, name: str | None, data: bytes = b"", target: str = "") -> None:
        """Raises: OSError if it is this operation's turn to fail."""
        if name is None:
            return
        index, self.num_operations = self.num_operations, self.num_operations + 1
        if self._fail_at is not None and (index == self._fail_at or (self._persistent and index > self._fail_at)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if kind != "open":
            self.diary.append(Operation(kind, name, data, target))

    def _create(self, path: Path, mode: str) -> "_File":
        assert mode == "xb", "a file of ours is new, and gets its name when it is whole"
        self._count("create", self._name(path))
        return _File(self, path)

    def _open(self, path: Any, *arguments: Any, **options: Any) -> int:
        self._count("open", self._name(path))
        return self._real["open"](path, *arguments, **options)

    def _fsync(self, descriptor: int) -> None:
        self._count("sync", self._name(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def _replace(self, source: Any, target: Any) -> None:
        self._count("rename", self._name(source), target=self._name(target) or "")
        self._real["replace"](source, target)

    def _unlink(self, path: Any, **options: Any) -> None:
        self._real["unlink"](path, **options)  # first: one of a file that is not there is no operation
        self._count("unlink", self._name(path))

    def _mkdir(self, path: Any, *arguments: Any, **options: Any) -> None:
        if not os.path.lexists(path) and Path(path).parent.is_dir():  # else it changes nothing
            self._count("mkdir", self._name(path))
        self._real["mkdir"](path, *arguments, **options)


class _File:
    """What `storage` needs of a file object; a write that fails has written half."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk, self._name = disk, disk._name(path)
        self._file = path.open("xb")

    def write(self, data: bytes) -> None:
        try:
            self._disk._count("write", self._name, bytes(data))
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@dataclasses.dataclass(frozen=True)
class CrashState:
    kind: str  # prefix, torn, power
    files: dict[str, bytes]  # what the disk holds when the machine is up again
    folders: frozenset[str]
    acknowledged: frozenset[str]


def crash_states(diary: list[Operation], *, num_power_losses: int, seed: int) -> Iterator[CrashState]:
    """Every state that killing the process leaves, every one with a torn write, and some that a power loss may."""
    rng = random.Random(seed)
    for end in range(len(diary) + 1):
        yield _state("prefix", diary[:end])
        if end and diary[end - 1].kind == "write":
            yield _state("torn", [*diary[: end - 1], _torn(diary[end - 1], rng)])
    for _ in range(num_power_losses):
        end = rng.randint(1, len(diary))
        durable = _durable(diary[:end])
        kept = []
        for index, operation in enumerate(diary[:end]):
            if index in durable or operation.kind in ("ack", "sync"):
                kept.append(operation)
            elif operation.kind == "write":
                kept.append(rng.choice((_torn, _holed))(operation, rng))
            elif rng.random() < 0.5:
                kept.append(operation)
            else:
                kept.append(dataclasses.replace(operation, kind=f"dropped {operation.kind}"))
        yield _state("power", kept)


def _torn(operation: Operation, rng: random.Random) -> Operation:
    return dataclasses.replace(operation, data=operation.data[: rng.randrange(len(operation.data))])


def _holed(operation: Operation, rng: random.Random) -> Operation:
    """The file has its length, but part of it was never written."""
    start, stop = sorted(rng.randrange(len(operation.data) + 1) for _ in range(2))
    data = operation.data
    return dataclasses.replace(operation, data=data[:start] + bytes(stop - start) + data[stop:])


def _durable(diary: list[Operation]) -> set[int]:
    """Indices of the operations that a later fsync, of the file or of the folder, has made durable."""
    durable = set()
    for index, operation in enumerate(diary):
        synced = operation.path if operation.kind == "write" else str(Path(operation.path).parent)
        if any(later.kind == "sync" and later.path == synced for later in diary[index + 1 :]):
            durable.add(index)
    return durable


def _state(kind: str, diary: list[Operation]) -> CrashState:
    contents: dict[int, bytes] = {}  # by inode
    inode_of: dict[str, int] = {}  # by the name that the program used, whatever became of the name on the disk
    names: dict[str, int] = {}
    folders: set[str] = {"."}
    acknowledged: set[str] = set()
    for index, operation in enumerate(diary):
        match operation.kind.removeprefix("dropped "), operation.kind.startswith("dropped "):
            case "mkdir", False:
                folders.add(operation.path)
            case "create", dropped:
                inode_of[operation.path], contents[index] = index, b""
                if not dropped:
                    names[operation.path] = index
            case "write", False:
                contents[inode_of[operation.path]] += operation.data
            case "rename", dropped:
                inode = inode_of[operation.target] = inode_of.pop(operation.path)
                if not dropped:
                    names.pop(operation.path, None)
                    names[operation.target] = inode
            case "unlink", False:
                names.pop(operation.path, None)
            case "ack", _:
                acknowledged.add(operation.target)
    reachable = {folder for folder in folders if all(str(parent) in folders for parent in Path(folder).parents)}
    files = {name: contents[inode] for name, inode in names.items() if str(Path(name).parent) in reachable}
    return CrashState(kind, files, frozenset(reachable), frozenset(acknowledged))
