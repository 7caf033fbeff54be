"""Manifests: a table whose rows name image files, and metadata files that stand among the images they describe."""

import dataclasses
import os
import posixpath
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from probe.errors import InputError
from probe.sources.folders import FileSource, Listed, join, label_by_folder, split_of_folder
from probe.sources.rows import TABLE_SUFFIXES, Columns, Record, RowReader, read_rows
from probe.sources.source import Example, list_names
from probe.storage import open_file

_METADATA = {f"metadata{suffix}".encode(): suffix for suffix in TABLE_SUFFIXES}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a table says, before anything was looked for."""

    path: Path
    reader: RowReader
    records: dict[bytes, tuple[str, Record]]  # path of an image -> where it stands in the table, what is said of it

    def example(self, name: bytes, size: int, mtime_ns: int, *, labelled: bool) -> Example:
        """An image of it that is there."""
        record = self.records[name][1]
        return Example(name, record.labels if labelled else (), record.split, record.group, size, mtime_ns)


def read_manifest(path: Path, columns: Columns) -> Manifest:
    """Reads a table whose rows name images; what is wrong with it is kept in `reader` until somebody finishes that."""
    reader = RowReader(str(path), columns)
    records: dict[bytes, tuple[str, Record]] = {}
    with open_file(path) as file:
        for where, row in read_rows(reader, path.suffix.lower(), file):
            record = reader.read(where, row)
            if record.path is None:
                reader.problems.append(f"{where}: no path")
            elif record.path in records:
                name, first = list_names([record.path]), records[record.path][0]
                reader.problems.append(f"{where}: {name} stood in {first} already")
            else:
                records[record.path] = where, record
    return Manifest(path, reader, records)


def open_manifest(manifest: Manifest, root: Path, *, labelled: bool = True) -> FileSource:
    """The image files that a table names, by paths relative to `root`.

    Raises: InputError listing the rows that name no file, a file twice, or what cannot be understood.
    """
    base, reader = os.fsencode(root), manifest.reader
    examples = []
    for name, (where, _) in manifest.records.items():
        try:
            status = os.stat(join(base, name))  # noqa: PTH116  # bytes
            size, mtime_ns = status.st_size, status.st_mtime_ns
            if stat.S_ISDIR(status.st_mode):
                reader.problems.append(f"{where}: {list_names([name])} is a folder")
        except (FileNotFoundError, NotADirectoryError, ValueError):
            reader.problems.append(f"{where}: there is no file {list_names([name])}")
            continue
        except OSError:  # a link to itself, a folder that may not be searched: it fails when it is read
            size = mtime_ns = 0
        examples.append(manifest.example(name, size, mtime_ns, labelled=labelled))
    reader.finish(needs_path=True)
    examples.sort(key=lambda example: example.name)
    return FileSource(root, examples, multi_label=labelled and reader.multi_label)


def is_metadata(name: bytes) -> bool:
    """Whether a file describes the images beside it, as in Hugging Face's `imagefolder`."""
    return name.rpartition(b"/")[2] in _METADATA


def describe_images(
    root: Path,
    images: Sequence[Listed],
    metadata: Sequence[bytes],
    open_file: Callable[[bytes], IO[bytes]],
    columns: Columns,
    *,
    labelled: bool,
    is_archive: bool = False,
) -> tuple[list[Example], bool]:
    """Examples labelled by the folders that they are in and by the metadata files among them.

    A metadata file describes the images in its folder and below, by paths relative to it; what it says (label,
    split, group) goes before what folders say.

    Returns: examples, multi_label.
    Raises: InputError listing rows without an image and images without a row.
    """
    if not labelled or not metadata:
        return label_by_folder(root, images, labelled=labelled, is_archive=is_archive), False
    names = {name for name, _, _ in images}
    records: dict[bytes, Record] = {}
    readers = []
    for table in metadata:
        folder, _, file_name = table.rpartition(b"/")
        reader = RowReader(f"{root}: {list_names([table])}", columns)
        readers.append(reader)
        with open_file(table) as file:
            for where, row in read_rows(reader, _METADATA[file_name], file):
                record = reader.read(where, row)
                name = posixpath.normpath(join(folder, record.path or b""))
                if record.path is None:
                    reader.problems.append(f"{where}: no path")
                elif name not in names:
                    reader.problems.append(f"{where}: there is no image {list_names([name])}")
                elif name in records:
                    reader.problems.append(f"{where}: {list_names([name])} has a row already")
                else:
                    records[name] = record
        reader.finish(needs_path=True)
    if missing := sorted(names - records.keys()):
        raise InputError(
            f"{root}: images without a row in {list_names(metadata)}: {list_names(missing)}. Add them; or, to use the "
            "rows alone, give the metadata file itself in place of the folder."
        )
    has_labels = any(reader.has_labels for reader in readers)
    examples = []
    for example in label_by_folder(root, images, labelled=not has_labels, is_archive=is_archive):
        record = records[example.name]
        labels = record.labels if has_labels else example.labels
        split = record.split or example.split or split_of_folder(example.name)
        examples.append(dataclasses.replace(example, labels=labels, split=split, group=record.group))
    return examples, any(reader.multi_label for reader in readers)
