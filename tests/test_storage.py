"""Durable writes: whole or not at all, in the order that makes it so. Crashes are in tests/test_faults.py."""

import errno
import os
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


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/holiday.jpg").write_text("")
    with (
        pytest.raises(InputError, match=r"holds no run\.json.*Choose another --out"),
        storage.atomic_folder(tmp_path / "photos", replacing="run.json"),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "photos/holiday.jpg").exists()


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
