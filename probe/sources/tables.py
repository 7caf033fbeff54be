"""Images inside tables: Parquet files with a column of bytes, and Hugging Face datasets saved on disk (Arrow).

Both are read with pyarrow alone. The image column is the one that the table's own features call Image, or else
one of bytes; it holds bytes, or {"bytes", "path"} where the path leads to a file if there are no bytes.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from probe.errors import InputError
from probe.images import MAX_BYTES, ImageError, read_image_file, too_many_bytes
from probe.sources.rows import Columns, RowReader, class_label_names, hugging_face_features, import_pyarrow
from probe.sources.source import SPLITS, Example, Source, Split, list_names, split_in_name
from probe.storage import is_remote, open_file

_ROWS_AT_ONCE = 16  # images that are decompressed together
_TABLE_ERRORS = (OSError, ValueError, TypeError, RuntimeError, KeyError)  # pyarrow's own are among these


@dataclasses.dataclass(frozen=True)
class Table:
    """One file of a table source."""

    path: Path
    prefix: bytes  # of its examples' names
    split: Split | None


class TableSource(Source):
    """Images in the rows of Parquet or Arrow files; a name is the file's and the number of the row."""

    def __init__(self, root: Path, tables: Sequence[Table], columns: Columns, *, labelled: bool) -> None:
        """Raises: InputError: a damaged table, no image column or several, labels not understood."""
        self._files: list[_Rows] = []
        self._places: dict[bytes, tuple[int, int]] = {}  # name -> file, row
        self._cursor: tuple[int, int, Iterator[dict[str, Any]]] | None = None  # file, next row, rows from there
        self._image_columns: list[str] = []
        examples = []
        # The column of the images is named by Columns.path, and no other path is looked for.
        reader = RowReader(str(root), dataclasses.replace(columns, path=None))
        for index, table in enumerate(tables):
            try:
                rows = _Rows.open(table.path)
                mtime_ns = rows.mtime_ns()
                image_column = find_image_column(rows.schema, columns)
                if image_column is None:
                    raise InputError(f"{table.path}: no column of images; there are {list_names(rows.schema.names)}")
                self._files.append(rows)
                self._image_columns.append(image_column)
                reader.note_columns(rows.schema.names)
                reader.class_names = class_label_names(rows.schema)
                described = [name for name in rows.schema.names if name in reader.wanted - {image_column}]
                for number, row in enumerate(rows.read(described if labelled else [], 0, 4096)):
                    name = table.prefix + b"%d" % number
                    record = reader.read(list_names([name]), row)
                    split = record.split or table.split
                    examples.append(Example(name, record.labels, split, record.group, 0, mtime_ns))
                    self._places[name] = (index, number)
            except _TABLE_ERRORS as err:
                raise InputError(f"{table.path}: cannot be read: {err}") from err
        reader.finish(needs_path=False)
        super().__init__(root, examples, multi_label=labelled and reader.multi_label)

    def read(self, example: Example) -> bytes:
        index, number = self._places[example.name]
        rows, column = self._files[index], self._image_columns[index]
        try:
            if rows.mtime_ns() != example.mtime_ns:
                raise ImageError("changed", f"{rows.path.name} was written to after it was listed: run again")
            value = self._seek(index, number)[column]
        except _TABLE_ERRORS as err:
            self._cursor = None
            raise ImageError("unreadable", f"{rows.path.name}: {err}") from err
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None and path and is_remote(rows.path):
            raise ImageError("unreadable", "the row names a file, which is read for tables of this machine alone")
        if data is None and path:
            return read_image_file(rows.path.parent / str(path))[0]
        if not isinstance(data, bytes):
            raise ImageError("empty", "the row holds no image")
        if len(data) > MAX_BYTES:
            raise too_many_bytes(len(data))
        return data

    def _seek(self, index: int, number: int) -> dict[str, Any]:
        """One row, read forwards from the last one where that is near."""
        file, at, rows = self._cursor or (-1, 0, iter(()))
        if file != index or not at <= number < at + _ROWS_AT_ONCE:
            at, rows = number, self._files[index].read([self._image_columns[index]], number, _ROWS_AT_ONCE)
        for row in rows:
            at += 1
            if at > number:
                self._cursor = (index, at, rows)
                return row
        raise ValueError(f"row {number} is missing")


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of one file, which can be read from any row on."""

    path: Path
    schema: Any
    parquet: Any | None  # ParquetFile
    arrow: Any | None  # memory-mapped Table
    at_opening: int  # mtime_ns

    @classmethod
    def open(cls, path: Path) -> "_Rows":
        pyarrow, at_opening = import_pyarrow(), path.stat().st_mtime_ns
        if path.suffix == ".parquet":
            # row groups may be as large as the file: read them piece by piece
            file = pyarrow.parquet.ParquetFile(_openable(path), pre_buffer=False, buffer_size=1 << 20)
            return cls(path, file.schema_arrow, file, None, at_opening)
        mapped = pyarrow.memory_map(os.fspath(path))
        table = pyarrow.ipc.open_stream(mapped).read_all()
        return cls(path, table.schema, None, table, at_opening)

    def mtime_ns(self) -> int:
        # A store is asked once: what it gives after that is of the object that was opened.
        return self.at_opening if is_remote(self.path) else self.path.stat().st_mtime_ns

    def read(self, columns: list[str], start: int, at_once: int) -> Iterator[dict[str, Any]]:
        if self.arrow is not None:
            for first in range(start, self.arrow.num_rows, at_once):
                yield from _row_dicts(self.arrow.slice(first, at_once).select(columns))
        elif self.parquet is not None:
            group, skip = 0, start
            while group < self.parquet.num_row_groups and skip >= self.parquet.metadata.row_group(group).num_rows:
                skip -= self.parquet.metadata.row_group(group).num_rows
                group += 1
            groups = list(range(group, self.parquet.num_row_groups))
            for batch in self.parquet.iter_batches(batch_size=at_once, row_groups=groups, columns=columns):
                if skip < batch.num_rows:
                    yield from _row_dicts(batch.slice(skip))
                skip = max(0, skip - batch.num_rows)


def _openable(path: Path) -> Any:
    """A path as pyarrow takes it."""
    return open_file(path) if is_remote(path) else path


def _row_dicts(batch: Any) -> Iterator[dict[str, Any]]:
    if batch.num_columns == 0:  # to_pylist would give no rows
        return iter([{} for _ in range(batch.num_rows)])
    return iter(batch.to_pylist())


def find_image_column(schema: Any, columns: Columns) -> str | None:
    """The column that holds images, if there is one. Raises: InputError if there are several to choose from."""
    pyarrow = import_pyarrow()
    if columns.path is not None:
        return columns.path if columns.path in schema.names and _holds_bytes(pyarrow, schema, columns.path) else None
    features = hugging_face_features(schema)
    found = [name for name in schema.names if (features.get(name) or {}).get("_type") == "Image"]
    found = found or [name for name in schema.names if _holds_bytes(pyarrow, schema, name)]
    if len(found) > 1 and "image" not in found:
        raise InputError(f"several columns may hold the images: {list_names(found)}. Say which one to read.")
    return "image" if "image" in found else found[0] if found else None


def _holds_bytes(pyarrow: Any, schema: Any, column: str) -> bool:
    kind = schema.field(column).type
    if pyarrow.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def parquet_holds_images(path: Path, columns: Columns) -> bool:
    """Whether a Parquet file holds images, and is not a manifest of paths. Raises: InputError if damaged."""
    try:
        return find_image_column(import_pyarrow().parquet.read_schema(_openable(path)), columns) is not None
    except _TABLE_ERRORS as err:
        raise InputError(f"{path}: cannot be read: {err}") from err


def open_parquets(root: Path, paths: Sequence[Path], columns: Columns, *, labelled: bool) -> TableSource:
    """Opens Parquet files that hold images; the split is in the file's name where no column says it."""
    tables = []
    for path in paths:
        inside = os.fsencode(str(path.relative_to(root))) + b"/" if path != root else b""
        tables.append(Table(path, inside, split_in_name(os.fsdecode(inside) or path.name)))
    return TableSource(root, tables, columns, labelled=labelled)


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of Hugging Face datasets."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_saved_dataset(folder: Path, columns: Columns, *, labelled: bool) -> TableSource:
    """Opens what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote. Raises: InputError."""
    if not (folder / "dataset_dict.json").is_file():
        return TableSource(folder, _saved_tables(folder, b"", None), columns, labelled=labelled)
    splits = [str(name) for name in _read_json(folder / "dataset_dict.json").get("splits", ())]
    if strange := sorted(name for name in splits if name.lower() not in SPLITS):
        raise InputError(f"{folder}: splits {list_names(strange)} are none of {', '.join(SPLITS)}")
    tables = []
    for name in sorted(splits):
        tables += _saved_tables(folder / name, os.fsencode(name) + b"/", SPLITS[name.lower()])
    return TableSource(folder, tables, columns, labelled=labelled)


def _saved_tables(folder: Path, prefix: bytes, split: Split | None) -> list[Table]:
    state = _read_json(folder / "state.json")
    if state.get("_indices_files"):
        raise InputError(f"{folder}: saved with an index; load it and save it again after flatten_indices()")
    files = [str(file["filename"]) for file in state.get("_data_files", ())]
    split = split or SPLITS.get(str(state.get("_split")).lower())
    return [Table(folder / name, prefix + os.fsencode(name) + b"/", split) for name in files]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as err:
        raise InputError(f"{path}: not what save_to_disk writes: {err}") from err
