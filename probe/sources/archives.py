"""Archives: tar shards in WebDataset layout and zip files, read where they are and never extracted.

A member's name is an opaque key; `../x` and `/abs` lead nowhere. Its size is counted while it is read, whatever
the archive says. An archive that changes after it was listed gives `changed`, not other bytes.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from probe.errors import InputError
from probe.images import MAX_BYTES, ImageError, too_many_bytes
from probe.sources.folders import IMAGE_SUFFIXES, is_hidden, label_by_folder, suffix_of
from probe.sources.manifests import describe_images, is_metadata
from probe.sources.rows import Columns, RowReader
from probe.sources.source import Example, Source, Split, list_names, split_in_name
from probe.storage import is_remote, open_file

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_MAX_LABEL_BYTES = 1 << 20  # of a .cls, .txt or .json member
_LABEL_SUFFIXES = (b".cls", b".json", b".txt")
_NOT_A_FILE = -1  # in place of an offset: a link, a device, a sparse member


class TarSource(Source):
    """Images in tar files, found by their offsets; compressed ones are read forwards."""

    def __init__(
        self,
        root: Path,
        examples: list[Example],
        paths: Sequence[Path],
        members: dict[bytes, tuple[Path, int]],
        ignored: dict[str, int],
        multi_label: bool,
    ) -> None:
        """
        Args:
          paths: the tar files.
          members: name -> tar file, offset in its (uncompressed) bytes; a tar file of which it holds nothing is listed
            when an image of it is read.
        """
        self._paths, self._members = paths, members
        self._open: _OpenTar | None = None  # kept for the next member
        super().__init__(root, examples, multi_label=multi_label, ignored=ignored)

    def opener(self) -> Callable[[], Source]:
        paths = [path.absolute() for path in self._paths]
        return functools.partial(TarSource, self.root.absolute(), self.examples[:1], paths, {}, {}, False)

    def read(self, example: Example) -> bytes:
        path, offset = self._find(example.name)
        if offset == _NOT_A_FILE:
            raise ImageError("not-a-file", "a link, a device or a sparse member")
        if example.size > MAX_BYTES:
            raise too_many_bytes(example.size)
        try:
            if self._open is None or self._open.path != path:
                self.close()
                self._open = _OpenTar(path)
            if self._open.mtime_ns() != example.mtime_ns:
                raise ImageError("changed", f"{path.name} was written to after it was listed: run again")
            data = self._open.read(offset, example.size)
        except (OSError, EOFError, tarfile.TarError, zlib.error) as err:
            raise ImageError("unreadable", f"{path.name}: {err}") from err
        if len(data) != example.size:
            raise ImageError("truncated", f"{path.name} ends within it")
        return data

    def close(self) -> None:
        """Closes the tar file that was read last."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def __del__(self) -> None:
        self.close()

    def _find(self, name: bytes) -> tuple[Path, int]:
        """The tar file that holds an image, and where. Raises: ImageError if none does any more."""
        if name not in self._members:
            for path in self._paths:
                prefix = _prefix(self.root, path)
                if name.startswith(prefix):
                    try:
                        listed = list(_list_tar(path, collections.Counter()))
                    except InputError as err:
                        raise ImageError("unreadable", str(err)) from err
                    self._members = {prefix + member.name: (path, member.offset) for member in listed}
                    break
        if name not in self._members:
            raise ImageError("missing", "no tar file holds it any more")
        return self._members[name]


def open_tars(root: Path, paths: Sequence[Path], columns: Columns, *, labelled: bool) -> TarSource:
    """Opens tar files: key.jpg with its label in key.cls, key.json or key.txt, or class folders without such files.

    Args:
      root: the tar file, or the folder that the tar files are in; names are relative to it.
    Raises: InputError: a damaged tar file, a sample with two images, labels that cannot be understood.
    """
    reader = RowReader(str(root), columns)
    examples: list[Example] = []
    members: dict[bytes, tuple[Path, int]] = {}
    ignored: collections.Counter[str] = collections.Counter()
    for path in paths:
        prefix = _prefix(root, path)
        status = path.stat()
        listed = list(_list_tar(path, ignored))
        split = split_in_name(os.fsdecode(prefix) or path.name)
        images = _find_samples(listed, reader if labelled else None, prefix, split, status.st_mtime_ns)
        if images is None:  # no labels beside the images: the folders in the tar file may say them
            files = [m for m in listed if suffix_of(m.name) in IMAGE_SUFFIXES]
            facts = [(prefix + m.name, m.size, status.st_mtime_ns) for m in files]
            by_folder = labelled and not prefix
            images = label_by_folder(root, facts, labelled=by_folder, is_archive=True)
            images = [dataclasses.replace(e, split=e.split or split) for e in images]
        examples += images
        offsets = {prefix + m.name: m.offset for m in listed}
        members |= {example.name: (path, offsets[example.name]) for example in images}
        ignored.update(os.fsdecode(suffix_of(m.name)) for m in listed if prefix + m.name not in members)
    reader.finish(needs_path=False)
    return TarSource(root, examples, paths, members, ignored, reader.multi_label)


def _prefix(root: Path, path: Path) -> bytes:
    """What stands before the names of a tar file's members."""
    return b"" if path == root else os.fsencode(str(path.relative_to(root))) + b"/"


class _OpenTar:
    """A tar file that members are read from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at_opening = path.stat().st_mtime_ns
        with contextlib.ExitStack() as files:
            file = files.enter_context(open_file(path))
            tar = files.enter_context(tarfile.open(fileobj=file))
            self._uncompressed: Any = tar.fileobj
            self._files = files.pop_all()

    def mtime_ns(self) -> int:
        # A store is asked once: what it gives after that is of the object that was opened.
        return self._at_opening if is_remote(self.path) else self.path.stat().st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        self._uncompressed.seek(offset)
        return bytes(self._uncompressed.read(size))

    def close(self) -> None:
        self._files.close()


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    name: bytes
    offset: int  # in the uncompressed tar file, or _NOT_A_FILE
    size: int
    label: bytes | None  # the content, if it may be a label


def _list_tar(path: Path, ignored: collections.Counter[str]) -> Iterator[_Member]:
    try:
        with (
            open_file(path) as file,
            tarfile.open(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                name = member.name.encode("utf-8", "surrogateescape")
                if member.isdir():
                    continue
                if is_hidden(name):
                    ignored["hidden"] += 1
                elif not member.isreg() or member.issparse():
                    yield _Member(name, _NOT_A_FILE, 0, None)
                else:
                    label = None
                    if suffix_of(name) in _LABEL_SUFFIXES and member.size <= _MAX_LABEL_BYTES:
                        label = tar.fileobj.read(member.size)  # type: ignore[union-attr]
                    yield _Member(name, member.offset_data, member.size, label)
            end = tar.offset
            tar.fileobj.seek(end)  # type: ignore[union-attr]
            if tar.fileobj.read(512) != bytes(512):  # type: ignore[union-attr]  # tarfile would stop in silence
                raise tarfile.ReadError(f"damaged or cut short at byte {end:,}")
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as err:
        raise InputError(f"{path}: not a whole tar file: {err}") from err


def _find_samples(
    listed: list[_Member], reader: RowReader | None, prefix: bytes, split: Split | None, mtime_ns: int
) -> list[Example] | None:
    """The samples of a tar file in WebDataset layout: members that share a name up to its first dot.

    Returns: None if no image has a label member.
    """
    images: dict[bytes, _Member] = {}
    second: list[str] = []
    labels: dict[bytes, dict[bytes, bytes]] = collections.defaultdict(dict)
    for member in listed:
        folder, slash, file_name = member.name.rpartition(b"/")
        stem, dot, extension = file_name.partition(b".")
        key, suffix = folder + slash + stem, dot + extension.lower()
        if member.label is not None and suffix in _LABEL_SUFFIXES:
            labels[key][suffix] = member.label
        elif suffix in IMAGE_SUFFIXES:
            if key in images:
                second.append(f"{list_names([prefix + member.name])} is the second image of one sample")
            images[key] = member
    if not images.keys() & labels.keys():
        return None
    examples = []
    if reader is not None:
        reader.problems += second
    for key, member in images.items():
        name, where = prefix + member.name, list_names([prefix + key])
        if reader is None:
            examples.append(Example(name, (), split, None, member.size, mtime_ns))
            continue
        try:
            record = reader.read(where, _sample_row(labels.get(key, {}), reader))
        except (ValueError, RecursionError) as err:
            reader.problems.append(f"{where}: its .json is not JSON: {err}")
            continue
        examples.append(Example(name, record.labels, record.split or split, record.group, member.size, mtime_ns))
    return examples


def _sample_row(labels: dict[bytes, bytes], reader: RowReader) -> dict[str, Any]:
    row = json.loads(labels[b".json"]) if b".json" in labels else {}
    if not isinstance(row, dict):
        raise ValueError("no object")
    for suffix in (b".cls", b".txt"):
        if suffix in labels and not reader.says_label(row):
            row["label"] = labels[suffix].decode("utf-8", "surrogateescape").strip()
    return row


class ZipSource(Source):
    """Images in a zip file."""

    def __init__(
        self,
        root: Path,
        archive: zipfile.ZipFile,
        members: dict[bytes, zipfile.ZipInfo],
        examples: list[Example],
        ignored: dict[str, int],
        multi_label: bool,
    ) -> None:
        super().__init__(root, examples, multi_label=multi_label, ignored=ignored)
        self._archive = archive
        self._members = members

    def read(self, example: Example) -> bytes:
        info = self._members[example.name]
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ImageError("not-a-file", "a link")
        if info.file_size > MAX_BYTES:
            raise too_many_bytes(info.file_size)
        try:
            with self._archive.open(info) as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as err:  # RuntimeError: encrypted
            raise ImageError("unreadable", str(err)) from err
        if len(data) != info.file_size:
            raise ImageError("corrupt", f"{len(data):,} bytes, where the archive says {info.file_size:,}")
        return data


def open_zip(path: Path, columns: Columns, *, labelled: bool) -> ZipSource:
    """Opens a zip file of class folders, with or without metadata files.

    Raises: InputError: a damaged zip file, or as for folders.
    """
    try:
        archive = zipfile.ZipFile(open_file(path) if is_remote(path) else path)
        infos = archive.infolist()
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as err:
        raise InputError(f"{path}: not a whole zip file: {err}") from err
    mtime_ns = path.stat().st_mtime_ns
    members: dict[bytes, zipfile.ZipInfo] = {}
    metadata = []
    images = []
    ignored: collections.Counter[str] = collections.Counter()
    for info in infos:
        name = _raw_name(info)
        if info.is_dir():
            continue
        if is_hidden(name):
            ignored["hidden"] += 1
        elif suffix_of(name) in IMAGE_SUFFIXES:
            images.append((name, info.file_size, mtime_ns))
            members[name] = info
        elif is_metadata(name):
            metadata.append(name)
            members[name] = info
        else:
            ignored[os.fsdecode(suffix_of(name))] += 1
    images.sort()
    examples, multi_label = describe_images(
        path,
        images,
        metadata,
        lambda name: archive.open(members[name]),
        columns,
        labelled=labelled,
        is_archive=True,
    )
    return ZipSource(path, archive, members, examples, ignored, multi_label)


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    """The bytes of a member's name, which zipfile has decoded."""
    try:
        return info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    except UnicodeEncodeError:
        return info.orig_filename.encode("utf-8", "surrogateescape")
