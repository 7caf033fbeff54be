"""Tables that say which label, split and group an image has: CSV, TSV, JSON Lines and Parquet, row by row.

Columns are found by their usual names, or named by `Columns`. What is wrong is collected with its line and raised
once. CSV and JSON text is UTF-8; other bytes pass through unchanged, so that a path finds its file whatever its
encoding is.
"""

import collections
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

from probe.errors import InputError
from probe.sources.source import SPLITS, Split, list_names

TABLE_SUFFIXES = frozenset((".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"))

_PATH_COLUMNS = ("path", "file_name")
_LABEL_COLUMNS = ("label", "labels")
_YES, _NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "")
_MAX_FIELD = 1 << 24  # characters of a CSV field; Python's own limit is 131,072


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns to read, where their names are not the usual ones."""

    path: str | None = None  # None: path or file_name
    labels: tuple[str, ...] = ()  # (): label or labels; several: one column per class that says yes or no
    split: str | None = None  # None: split, where there is one
    group: str | None = None  # None: group, where there is one


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What one row says."""

    path: bytes | None
    labels: tuple[str, ...]
    split: Split | None
    group: str | None


class RowReader:
    """Turns rows into records, and keeps account of what is wrong and of which columns there were."""

    def __init__(self, table: str, columns: Columns) -> None:
        """
        Args:
          table: the table's name, for messages.
        """
        self.table = table
        self.class_names: Mapping[str, Sequence[str]] = {}  # column -> what integers in it stand for
        self.problems: list[str] = []
        self._paths = (columns.path,) if columns.path else _PATH_COLUMNS
        self._labels = columns.labels or _LABEL_COLUMNS
        self._split = columns.split or "split"
        self._group = columns.group or "group"
        self._named = {c for c in (columns.path, *columns.labels, columns.split, columns.group) if c}
        self._one_per_class = len(columns.labels) > 1
        self._found: set[str] = set()
        self._num_lists = self._num_single = 0
        self._interned: dict[tuple[str, ...], tuple[str, ...]] = {}

    @property
    def wanted(self) -> frozenset[str]:
        """The columns that are looked at, where they exist."""
        return frozenset((*self._paths, *self._labels, self._split, self._group))

    def note_columns(self, names: Iterable[str]) -> None:
        """Says which columns the table has, where rows are read without some of them."""
        self._found.update(names)

    @property
    def multi_label(self) -> bool:
        return self._one_per_class or self._num_lists > 0

    @property
    def has_labels(self) -> bool:
        return bool(self._found.intersection(self._labels))

    def says_label(self, row: dict[str, Any]) -> bool:
        return any(column in row for column in self._labels)

    def read(self, where: str, row: dict[str, Any]) -> Record:
        self._found.update(row)
        path = next((row[column] for column in self._paths if row.get(column)), None)
        labels = self._read_labels(where, row)
        split_text = _as_text(row.get(self._split)) or ""
        split = SPLITS.get(split_text.strip().lower())
        if split is None and split_text:
            self.problems.append(f"{where}: split {split_text!r} is none of {', '.join(SPLITS)}")
        return Record(
            self._encode(where, path),
            self._interned.setdefault(labels, labels),
            split,
            self._read_text(where, self._group, row.get(self._group)),
        )

    def finish(self, *, needs_path: bool) -> None:
        """Raises: InputError for all that was wrong."""
        if missing := sorted(self._named - self._found):
            self.problems.append(f"no column {list_names(missing)}; there are {list_names(sorted(self._found))}")
        elif needs_path and self._found.isdisjoint(self._paths):
            self.problems.append(f"no column {' or '.join(self._paths)}; there are {list_names(sorted(self._found))}")
        if self._num_lists and self._num_single:
            self.problems.append(f"{self._num_lists} rows with a list of labels, {self._num_single} with one label")
        raise_problems(self.table, self.problems)

    def _read_labels(self, where: str, row: dict[str, Any]) -> tuple[str, ...]:
        if self._one_per_class:
            return tuple(sorted(column for column in self._labels if self._read_flag(where, column, row.get(column))))
        column = next((column for column in self._labels if column in row), None)
        value = row.get(column) if column else None
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            try:
                value = json.loads(value)
            except ValueError:
                self.problems.append(f'{where}: label {value!r} is no list in JSON, as ["cat", "dog"] is')
                return ()
        if isinstance(value, list):
            self._num_lists += 1
            labels = [self._read_text(where, column or "", item) for item in value]
            return tuple(sorted({label for label in labels if label is not None}))
        label = self._read_text(where, column or "", value)
        self._num_single += label is not None
        return () if label is None else (label,)

    def _read_flag(self, where: str, column: str, value: Any) -> bool:
        text = (_as_text(value) or "").strip().lower()
        if text not in _YES and text not in _NO:
            self.problems.append(f"{where}: {column} is {value!r}, which is neither 0 nor 1")
        return text in _YES

    def _read_text(self, where: str, column: str, value: Any) -> str | None:
        names = self.class_names.get(column)
        if names is not None and isinstance(value, int):
            if 0 <= value < len(names):
                return names[value]
            if value != -1:  # how Hugging Face datasets say that there is no label
                self.problems.append(f"{where}: {column} is {value}, and there are {len(names)} classes")
            return None
        text = _as_text(value)
        if text is None and value is not None and not isinstance(value, float):
            self.problems.append(f"{where}: {column} is {value!r}, where text or a number is meant")
        return text or None

    def _encode(self, where: str, path: Any) -> bytes | None:
        if path is None:
            return None
        try:
            encoded = str(path).encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            self.problems.append(f"{where}: {path!r} cannot be a path")
        return encoded


def read_rows(reader: RowReader, suffix: str, file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with where they stand ("line 2"), for `reader.read`. Raises: InputError if it cannot be parsed."""
    try:
        if suffix == ".parquet":
            yield from _read_parquet(file, reader)
        elif suffix in (".jsonl", ".ndjson"):
            yield from _read_jsonl(file)
        else:
            yield from _read_csv(file, delimiter="\t" if suffix == ".tsv" else ",")
    except (ValueError, TypeError, RuntimeError, csv.Error, OSError) as err:  # pyarrow's errors are among these
        raise InputError(f"{reader.table}: cannot be read: {err}") from err


def raise_problems(table: str, problems: Sequence[str]) -> None:
    """Raises: InputError with the first few problems, one a line, if there are any."""
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError("\n  ".join([f"{table}: {count}:", *problems[:10], *more]))


def import_pyarrow() -> Any:
    """The package pyarrow. Raises: InputError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("Parquet and Arrow files need one more package: pip install 'probe-jax[parquet]'") from None
    return pyarrow


def hugging_face_features(schema: Any) -> dict[str, Any]:
    """Column -> feature, as Hugging Face writes them into a pyarrow schema; {} where it did not."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError):
        return {}


def class_label_names(schema: Any) -> dict[str, Sequence[str]]:
    """Column -> what integers in it stand for, for ClassLabel columns and lists of them."""
    features = hugging_face_features(schema)
    return {column: names for column, feature in features.items() if (names := _feature_names(feature))}


def _feature_names(feature: Any) -> list[str] | None:
    if not isinstance(feature, dict):
        return None
    return feature.get("names") if feature.get("_type") == "ClassLabel" else _feature_names(feature.get("feature"))


def _read_csv(file: IO[bytes], *, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(_MAX_FIELD)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(rows, [])
        if twice := [name for name, count in collections.Counter(header).items() if count > 1]:
            raise ValueError(f"columns that occur twice: {list_names(twice)}")
        for row in rows:
            if row and len(row) != len(header):
                raise ValueError(f"line {rows.line_num} has {len(row)} fields, the header {len(header)}")
            if row:
                yield f"line {rows.line_num}", dict(zip(header, row, strict=True))
    finally:
        text.detach()  # the file is its opener's to close


def _read_jsonl(file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8", "surrogateescape"))
            except ValueError as err:
                raise ValueError(f"line {number} is not JSON: {err}") from err
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            yield f"line {number}", row


def _read_parquet(file: IO[bytes], reader: RowReader) -> Iterator[tuple[str, dict[str, Any]]]:
    table = import_pyarrow().parquet.ParquetFile(file)
    reader.note_columns(table.schema_arrow.names)
    reader.class_names = class_label_names(table.schema_arrow)
    columns = [name for name in table.schema_arrow.names if name in reader.wanted]
    number = 0
    for batch in table.iter_batches(batch_size=4096, columns=columns):
        for row in batch.to_pylist():
            yield f"row {number}", row
            number += 1


def _as_text(value: Any) -> str | None:
    """Text, an integer, a whole number written as a float; None for nothing, NaN and what is neither."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, str | int) else None
