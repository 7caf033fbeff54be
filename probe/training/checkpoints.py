"""Training checkpoints: what a run needs to go on to the bit, written by Orbax, proved by hashes of our own.

A folder of checkpoints belongs to one run and holds

    000007-step-1200-best/   a checkpoint; it gets this name only when it is whole and on the disk
        arrays/              what Orbax wrote: every leaf of the tree under its path
        checkpoint.json      the step, the dtype and shape of every array, and the record that came with them
        SHA256SUMS           one line per file above, as sha256sum writes them and `sha256sum -c` checks them

The first number counts the saves. `last` is the highest; `best` is the highest of those that were the best so
far when they were saved. Orbax alone restored 62 of 94 flipped bytes as other weights, without a word; here
nothing is read before the sums agree, so a flipped byte is an error and never another model.

In a run of several processes, which share the folder, all of them save and load together: Orbax has each write the
parts of arrays that its devices hold; sums, names and all else is the work of the first. What so many processes saved,
any other number of them can load.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from probe import distributed
from probe.errors import ConfigError, CorruptError, MismatchError, StorageError
from probe.storage import PARTIAL_PREFIX, atomic_folder

ARRAYS, MANIFEST, SUMS = "arrays", "checkpoint.json", "SHA256SUMS"
FORMAT = 1

Which = Literal["last", "best"]
_NAME = re.compile(r"(\d{6,})-step-(\d+)(-best)?")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What `load` found: the folder, the number of steps done, the tree of arrays, and the JSON record."""

    path: Path
    step: int
    tree: Any
    record: dict[str, Any]


def save(
    folder: Path, step: int, tree: Any, record: Mapping[str, Any], *, best: bool = False, max_to_keep: int = 2
) -> Path:
    """Writes a checkpoint that a crash leaves whole or not at all, and then removes those no longer wanted.

    Args:
      folder: of this run's checkpoints, made where missing. A second writer waits for the first.
      step: steps done so far.
      tree: any pytree of jax (random keys too) and NumPy arrays; they are stored to the bit.
      record: JSON values: what must agree on resuming (digests of config and data), history, and the like.
      best: whether this is the best state so far.
      max_to_keep: newest checkpoints to keep, at least 2; the best is kept besides.
    Returns: the checkpoint's folder.
    Raises:
      StorageError if the disk is full, read-only or failing; the older checkpoints are untouched then.
      ConfigError if `max_to_keep` is below 2: if the newest is damaged there must be another.
    """
    if max_to_keep < 2:
        raise ConfigError(f"keep 2 checkpoints or more, in case the newest is damaged; got {max_to_keep}")
    leaves = _leaves(tree)
    manifest = {
        "format": FORMAT,
        "step": step,
        "best": best,
        "arrays": {name: _describe(leaf) for name, leaf in leaves.items()},
        "record": record,
    }
    with contextlib.ExitStack() as lock, contextlib.ExitStack() as unsealed:

        def begin() -> tuple[Path, Path]:
            lock.enter_context(_sole_writer(folder))
            _sweep(folder)
            serial = 1 + max((int(_parse(path)[1]) for path in _checkpoints(folder)), default=0)
            path = folder / f"{serial:06d}-step-{step}{'-best' if best else ''}"
            return path, unsealed.enter_context(atomic_folder(path))

        path, partial = distributed.on_first(begin)
        distributed.on_each(lambda: _write_arrays(partial / ARRAYS, leaves))

        def seal() -> None:
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            (partial / SUMS).write_text(_render(_hash_files(partial)))
            unsealed.close()
            _prune(folder, max_to_keep)

        distributed.on_first(seal)
    return path


def find(folder: Path, which: Which) -> Path | None:
    """The folder of the last or the best checkpoint, unread; None where there is none."""
    paths = [path for path in _checkpoints(folder) if which == "last" or _parse(path)[3]]
    return paths[-1] if paths else None


def describe(folder: Path, which: Which) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record of a checkpoint, and for each path of its tree an empty array of the dtype and shape stored.

    For who must know how far a run had come before the tree to `load` can be named.
    Raises: CorruptError as `load` does.
    """
    path = _find_sound(folder, which)
    manifest = json.loads((path / MANIFEST).read_text())
    arrays = {}
    for name, text in manifest["arrays"].items():
        dtype, _, shape = text.removesuffix("]").partition("[")
        if not dtype.startswith("key<"):  # random keys are of the train state, whose form is known
            arrays[name] = np.empty([int(size) for size in shape.split(",") if size], jnp.dtype(dtype))
    return manifest["record"], arrays


def load(folder: Path, which: Which, like: Any, *, expect: Mapping[str, Any] | None = None) -> Checkpoint:
    """Reads a checkpoint back, after proving that not a byte of it has changed.

    Args:
      folder: of a run's checkpoints.
      which: the last one saved, or the best.
      like: a tree of the form that was saved. A NumPy array comes back as one; a jax array or a
        `jax.ShapeDtypeStruct` as a jax array, placed by its sharding or, without one, on the first device.
      expect: entries that the record must hold with these very values.
    Raises:
      CorruptError if there is none, or if files are damaged, missing or too many: all are named.
      MismatchError if arrays or entries of the record are not those asked for: both sides are listed.
    """
    path = _find_sound(folder, which)
    manifest = json.loads((path / MANIFEST).read_text())
    leaves = _leaves(like)
    _check(path, manifest, {name: _describe(leaf) for name, leaf in leaves.items()}, expect or {})
    found = _read_arrays(path / ARRAYS, leaves)
    tree = jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in leaves])
    return Checkpoint(path, manifest["step"], tree, manifest["record"])


def _find_sound(folder: Path, which: Which) -> Path:
    """The checkpoint, once its sums agree."""

    def look() -> Path:
        path = find(folder, which)
        if path is None:
            raise CorruptError(f"{folder} holds no checkpoint" + (" marked best" if which == "best" else ""))
        _verify(path)
        return path

    return distributed.on_first(look)


# Orbax: a flat dict of arrays in, the same out.


def _write_arrays(path: Path, leaves: Mapping[str, Any]) -> None:
    stored = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in _stored(leaves)}
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(path.absolute(), stored)
    except ValueError as err:  # TensorStore's form of an OSError
        code = re.search(r"os_error_code='(\d+)'", str(err))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from err


def _read_arrays(path: Path, leaves: Mapping[str, Any]) -> dict[str, Any]:
    wanted = {name: _restore_as(leaf) for name, leaf in _stored(leaves)}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        found = dict(checkpointer.restore(path.absolute(), wanted))
    for name, leaf in leaves.items():
        if not leaf.size:
            found[name] = jnp.empty(leaf.shape, leaf.dtype) if _is_jax(leaf) else leaf
        elif _is_key(leaf):
            impl = jax.random.key_impl(jnp.empty(0, leaf.dtype))  # it takes no abstract key
            found[name] = jax.random.wrap_key_data(found[name], impl=impl)
    return found


def _stored(leaves: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The leaves that have elements: Orbax refuses the others, and there is nothing in them to be stored."""
    return [(name, leaf) for name, leaf in leaves.items() if leaf.size]


def _restore_as(leaf: Any) -> Any:
    """What tells Orbax the dtype, shape and place of an array, so that it has to guess none of them."""
    if not _is_jax(leaf):
        return leaf
    raw: Any = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def _leaves(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their paths, such as opt_state/0/mu/head/kernel, in the tree's order."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf if _is_jax(leaf) else np.asarray(leaf)
        for path, leaf in pairs
    }
    assert len(leaves) == len(pairs), "two leaves have one path"
    return leaves


def _is_jax(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


# The proof that a checkpoint is what was saved.


def _hash_files(path: Path) -> dict[str, str]:
    """Hex SHA-256 of every file of a checkpoint but the sums themselves, by its path within."""
    sums = {}
    for file in sorted(file for file in path.rglob("*") if not file.is_dir() and file != path / SUMS):
        with open(file, "rb") as stream:
            sums[file.relative_to(path).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def _render(sums: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items())


def _verify(path: Path) -> None:
    """Raises a CorruptError that names every file which is not as it was saved."""
    try:
        recorded, actual = (path / SUMS).read_bytes(), _hash_files(path)
    except OSError as err:
        raise CorruptError(f"{err.filename or path}: {err.strerror}. {_way_out(path)}") from err
    if recorded == _render(actual).encode():  # as text: a flip in the sums, wherever it falls, counts as well
        return
    lines = (line.partition("  ") for line in recorded.decode(errors="replace").split("\n") if line)
    listed = {name: digest for digest, _, name in lines}
    damaged = sorted(name for name in listed.keys() & actual if listed[name] != actual[name])
    raise CorruptError(
        f"{path}: files are not as they were saved (by {SUMS}).\n"
        f"  damaged: {', '.join(damaged) or 'none'}\n"
        f"  missing: {', '.join(sorted(listed.keys() - actual)) or 'none'}\n"
        f"  unknown: {', '.join(sorted(actual.keys() - listed)) or 'none'}\n"
        f"  {_way_out(path)}"
    )


def _way_out(path: Path) -> str:
    others = [other.name for other in _checkpoints(path.parent) if other != path]
    if not others:
        return "There is no other checkpoint: start the run anew."
    return f"Remove this folder to go on from another checkpoint; there are {', '.join(others)}."


def _check(path: Path, manifest: Any, arrays: Mapping[str, str], expect: Mapping[str, Any]) -> None:
    """Raises one MismatchError with all that keeps this checkpoint from continuing this run."""
    if manifest["format"] != FORMAT:
        raise MismatchError(f"{path}: format {manifest['format']}, and this version of probe reads {FORMAT}")
    expect = json.loads(json.dumps(expect))  # tuples as lists, as the record came back
    record = {name: value for name, value in manifest["record"].items() if name in expect}
    problems = _differences("record", record, expect) + _differences("array", manifest["arrays"], arrays)
    if problems:
        raise MismatchError("\n".join([f"{path} belongs to another run:", *problems]))


def _differences(kind: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"  {kind} {name}: the checkpoint has {_show(found, name)}, this run {_show(wanted, name)}"
        for name in sorted(found.keys() | wanted.keys())
        if name not in found or name not in wanted or found[name] != wanted[name]
    ]


def _show(values: Mapping[str, Any], name: str) -> str:
    return str(values[name]) if name in values else "none"


# The folder.


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("*-step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_parse(path)[1]))


def _parse(path: Path) -> re.Match[str]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return match


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Waits until no other process writes here. The system lets go of the lock when its owner dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as err:
        raise StorageError(f"{folder}: cannot keep checkpoints here: {err.strerror}") from err
    try:
        with contextlib.suppress(OSError):  # a file system without locks: a twin would get a StorageError
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Removes what killed processes left; while the lock is held, no partial here belongs to a living one."""
    for partial in folder.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(partial, ignore_errors=True)


def _prune(folder: Path, max_to_keep: int) -> None:
    paths = _checkpoints(folder)
    keep = {*paths[-max_to_keep:], find(folder, "best")}
    for path in paths:
        if path not in keep:
            # Renamed first: a kill must not leave half a checkpoint under a checkpoint's name.
            doomed = folder / f"{PARTIAL_PREFIX}{uuid.uuid4().hex}"
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
