"""Durable writes: whole or not at all, in the order that makes it so. Crashes are in tests/test_faults.py."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from probe import storage
from probe.errors import InputError, StorageError
from tests.disk import Disk


def left_over(folder: Path) -> list[Path]:
    return list(folder.rglob(f"{storage.PARTIAL_PREFIX}*"))


def test_a_file_is_written_synced_renamed_and_its_name_synced(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with disk.installed():
        storage.atomic_write_bytes(tmp_path / "file", b"content")
    assert [operation.kind for operation in disk.diary] == ["create", "write", "sync", "rename", "sync"]
    partial = disk.diary[0].path
    assert partial.startswith(storage.PARTIAL_PREFIX)
    assert [operation.path for operation in disk.diary] == [partial, partial, partial, partial, "."]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_old_content_is_replaced_and_names_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    for content in (b"old", b"", b"new"):
        storage.atomic_write_bytes(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_failing_disk_is_a_clear_error_and_leaves_the_old_content(error: int, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    storage.atomic_write_bytes(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match=f"file: cannot write 3 bytes: {os.strerror(error)}") as raised:
        storage.atomic_write_bytes(path, b"new")
    assert ("Free some space" in str(raised.value)) == (error in (errno.ENOSPC, errno.EDQUOT))
    assert path.read_bytes() == b"old"
    assert not left_over(tmp_path)


def test_twins_do_not_disturb_each_other(tmp_path: Path) -> None:
    contents = [bytes([letter]) * 100_000 for letter in b"abcd"]
    threads = [
        threading.Thread(target=lambda c=content: [storage.atomic_write_bytes(tmp_path / "file", c) for _ in range(10)])
        for content in contents
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "file").exists():
            assert (tmp_path / "file").read_bytes() in contents
    for thread in threads:
        thread.join()
    assert not left_over(tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new/run"
    with pytest.raises(ZeroDivisionError), storage.atomic_folder(path) as folder:
        assert (folder / "half").write_text("half") / 0
    assert not path.exists()
    with storage.atomic_folder(path) as folder:
        (folder / "whole").write_text("x")
        assert not path.exists()
    assert [item.name for item in path.iterdir()] == ["whole"]
    assert not left_over(tmp_path)


def test_a_folder_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    with storage.atomic_folder(path) as folder:  # an empty one is in nobody's way
        (folder / "first").write_text("")
    with pytest.raises(InputError, match=r"exists already.*--overwrite"), storage.atomic_folder(path):
        pytest.fail("the block must not run")
    with pytest.raises(ZeroDivisionError), storage.atomic_folder(path, replacing="first"):
        assert 1 / 0
    assert [item.name for item in path.iterdir()] == ["first"]
    with storage.atomic_folder(path, replacing="first") as folder:
        (folder / "second").write_text("")
    assert [item.name for item in path.iterdir()] == ["second"]
    assert not left_over(tmp_path)


def test_a_folder_is_made_under_a_name_and_found_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one stands in it, it is `.`; what is written would have to be renamed to that."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for path in (".", "..", "/", "below/.."):
        with pytest.raises(InputError, match="give --out the name of a new one"):
            storage.require_free(Path(path), replacing="run.json")
        storage.recover_folder(Path(path))  # there is nothing to recover
    assert storage._aside_name(Path()) == storage._aside_name(tmp_path / "run")


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").write_text("")
    with (
        pytest.raises(InputError, match=r"holds no run\.json.*Choose another --out"),
        storage.atomic_folder(tmp_path / "photos", replacing="run.json"),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "photos/holiday.jpg").exists()


KILLED_AT_RENAME = """
import os, signal, sys
from pathlib import Path
from probe import storage
rename, countdown = os.replace, int(sys.argv[2])
def replace(*names):
    global countdown
    if not countdown:
        os.kill(os.getpid(), signal.SIGKILL)
    countdown -= 1
    rename(*names)
os.replace = replace
with storage.atomic_folder(Path(sys.argv[1]), replacing="run.json") as folder:
    (folder / "run.json").write_text("new")
    (folder / "more").mkdir()
"""


@pytest.mark.parametrize("num_renames", [0, 1, 2])
@pytest.mark.parametrize("name", ["run", "ü" * 127])
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new(num_renames, name, tmp_path: Path) -> None:
    path = tmp_path / name
    with storage.atomic_folder(path) as folder:
        (folder / "run.json").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED_AT_RENAME, str(path), str(num_renames)])
    assert done.returncode == (0 if num_renames == 2 else -signal.SIGKILL)
    assert path.exists() == (num_renames != 1)
    with pytest.raises(InputError, match=r"exists already"):  # not free: the old one is put back
        storage.require_free(path)
    assert (path / "run.json").read_text() == ("new" if num_renames == 2 else "old")
    with storage.atomic_folder(path, replacing="run.json") as folder:
        (folder / "run.json").write_text("newest")
    assert (path / "run.json").read_text() == "newest"
    left = {item for item in tmp_path.iterdir() if item != path}
    assert all(item.name.startswith(storage.PARTIAL_PREFIX) for item in left)  # those are swept in a day
    assert len(left) == (num_renames < 2)


def test_a_kill_while_what_was_replaced_is_removed(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "run"
    for content in ("old", "new"):
        if content == "new":
            monkeypatch.setattr(storage.shutil, "rmtree", lambda *arguments, **options: None)
        with storage.atomic_folder(path, replacing="run.json") as folder:
            (folder / "run.json").write_text(content)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    storage.recover_folder(path)
    assert (path / "run.json").read_text() == "new"
    with storage.atomic_folder(path, replacing="run.json") as folder:
        (folder / "run.json").write_text("newest")
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_a_reader_that_puts_the_old_folder_back_is_no_obstacle(tmp_path: Path, monkeypatch) -> None:
    """It cannot tell a dead writer from one that is between its two renames."""
    path, rename = tmp_path / "run", os.replace
    with storage.atomic_folder(path) as folder:
        (folder / "run.json").write_text("old")
    seen = []

    def replace(source: Path, target: Path) -> None:
        if target == path and not seen:
            seen.append(source)
            monkeypatch.setattr(os, "replace", rename)
            storage.recover_folder(path)
            assert (path / "run.json").read_text() == "old"
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with storage.atomic_folder(path, replacing="run.json") as folder:
        (folder / "run.json").write_text("new")
    assert seen
    assert (path / "run.json").read_text() == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_what_has_come_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path, theirs = tmp_path / "run", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").touch()
    with pytest.raises(InputError, match="exists already"), storage.atomic_folder(path):
        shutil.copytree(theirs, path)
    assert [item.name for item in path.iterdir()] == ["file"]
    assert not left_over(tmp_path)


def test_make_folder_makes_each_name_durable(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with disk.installed():
        storage.make_folder(tmp_path / "a/b")
        storage.make_folder(tmp_path / "a/b")
    assert [(o.kind, o.path) for o in disk.diary if o.kind == "mkdir"] == [("mkdir", "a"), ("mkdir", "a/b")]
    assert sorted(o.path for o in disk.diary if o.kind == "sync") == [".", "a"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/below"):
        storage.make_folder(tmp_path / "file/below")


def test_only_old_leftovers_are_swept(tmp_path: Path) -> None:
    old, new = (tmp_path / f"{storage.PARTIAL_PREFIX}{name}" for name in ("old", "new"))
    for path in (old, new, tmp_path / "file"):
        path.write_text("")
    folder = tmp_path / f"{storage.PARTIAL_PREFIX}folder"
    (folder / "below").mkdir(parents=True)
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (old, folder, tmp_path / "file"):
        os.utime(path, (two_days_ago, two_days_ago))
    storage.sweep_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "file"]


def test_what_is_in_progress_can_be_removed_at_once(tmp_path: Path, monkeypatch) -> None:
    def end_now(descriptor: int) -> None:
        assert left_over(tmp_path)
        storage.remove_partials()
        assert not left_over(tmp_path)

    monkeypatch.setattr(storage, "_fsync_path", lambda path: None)
    monkeypatch.setattr(os, "fsync", end_now)
    with pytest.raises(StorageError):
        storage.atomic_write_bytes(tmp_path / "file", b"")
    assert not list(tmp_path.iterdir())
