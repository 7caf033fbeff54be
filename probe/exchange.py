"""`probe cache export|import`: caches as one plain file for other tools, and features that others computed.

Every format has the same columns, and what was exported can be imported again:

    embeddings/<view>  [N, D]   .npz: embeddings_<view>; .parquet: a list per row; on the way in also "embeddings"
    label              names of classes (.parquet), or labels: integers beside class_names (.npz, .h5)
    name, split, group          text; on the way in any of them may be missing
    key                [N, 32]  SHA-256 of each image's bytes (only written)

No file that is imported can run code, reach other files or take more memory than it stores many times over. But the
C library that parses .h5 has had flaws: import such files from people you trust.
"""

import csv
import hashlib
import importlib
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probe.cache import Cache, SafeFile, build_image, safe_open, write_cache
from probe.config import CacheExportConfig, CacheImportConfig
from probe.errors import ConfigError, CorruptError, InputError
from probe.storage import atomic_write_bytes, make_folder

_PREFIX = "embeddings_"
_NAMES = ("names", "name", "path", "paths", "file_name")
_LABELS = ("labels", "label")
_SPLITS = ("splits", "split")
_GROUPS = ("groups", "group")
_SPLIT_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "": None}


def export_cache(config: CacheExportConfig) -> dict[str, Any]:
    """Writes a cache as one file; it is built in memory, which must hold it twice.

    Raises: ConfigError for an unknown suffix; InputError if the file exists; StorageError, CorruptError.
    """
    writers = {".h5": _to_hdf5, ".npz": _to_npz, ".parquet": _to_parquet}
    if config.single.suffix not in writers:
        raise ConfigError(f"--single must end with {', '.join(writers)}, got {config.single.name}")
    if config.single.exists() and not config.overwrite:
        raise InputError(f"{config.single} exists already: choose another name, or pass --overwrite to replace it")
    cache = Cache.open(config.cache)
    data = writers[config.single.suffix](cache)
    make_folder(config.single.absolute().parent)
    atomic_write_bytes(config.single, data)
    return {
        "file": str(config.single),
        "num_rows": len(cache.table),
        "num_bytes": len(data),
        "views": list(cache.views),
    }


def describe_export(summary: dict[str, Any]) -> str:
    """The summary of `export_cache` as text for people."""
    views = ", ".join(summary["views"])
    return f"{summary['file']}: {summary['num_rows']:,} rows, views {views}, {summary['num_bytes'] / 1e6:,.1f} MB"


def import_features(config: CacheImportConfig) -> dict[str, Any]:
    """Makes a cache of features from a file.

    Raises: ConfigError if --table does not fit the format; InputError if the file does not say what is needed.
    """
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise InputError(f"{config.out} exists already: choose another --out")
    readers = {".npz": _from_npz, ".npy": _from_npy, ".parquet": _from_parquet, ".h5": _from_hdf5, ".hdf5": _from_hdf5}
    suffix = config.features.suffix
    if suffix not in readers:
        raise ConfigError(f"{config.features.name}: features must end with {', '.join(readers)}")
    if (suffix == ".npy") != (config.table is not None):
        raise ConfigError("--table is for a .npy file, which has no room for labels, and only for one")
    try:
        columns = readers[suffix](config)
    except OSError as err:
        raise InputError(f"{config.features}: cannot be read ({err.strerror or err})") from err
    except CorruptError as err:  # a stranger's file, not one of ours
        raise InputError(str(err)) from err
    num_rows = _write(config, columns)
    return {"cache": str(config.out), "num_rows": num_rows, "views": list(columns["embeddings"])}


def describe_import(summary: dict[str, Any]) -> str:
    """The summary of `import_features` as text for people."""
    return f"{summary['cache']}: {summary['num_rows']:,} rows, views {', '.join(summary['views'])}"


def _write(config: CacheImportConfig, columns: dict[str, Any]) -> int:
    """Columns to a cache; `labels` are integers into `class_names`, or the names themselves."""
    labels, class_names = columns["labels"], columns["class_names"]
    multi_label = False
    if isinstance(labels, np.ndarray) and labels.ndim == 2:
        multi_label = True
        labels = [[class_names[code] for code in np.flatnonzero(row)] for row in labels]
    elif labels is not None and not isinstance(labels, np.ndarray):
        multi_label = any(isinstance(label, (list, tuple)) for label in labels)
        labels = [_as_list(label) for label in labels]
        class_names = class_names or sorted({name for names in labels for name in names})
    splits = columns["splits"]
    if splits is not None:
        if unknown := sorted(set(splits) - set(_SPLIT_OF)):
            raise InputError(f"{config.features}: splits {unknown}; only {sorted(filter(None, _SPLIT_OF))} are known")
        splits = [_SPLIT_OF[name] for name in splits]
    write_cache(
        config.out,
        columns["embeddings"],
        names=columns["names"],
        labels=labels,
        class_names=class_names or (),
        multi_label=multi_label,
        splits=splits,
        groups=columns["groups"],
        identity={"extractor": config.extractor or hashlib.sha256(config.features.read_bytes()).hexdigest()},
        provenance={"backbone": config.extractor or f"features imported from {config.features.name}"},
    )
    return len(next(iter(columns["embeddings"].values())))


def _as_list(label: Any) -> list[str]:
    if label is None or label == "":
        return []
    return [str(name) for name in label] if isinstance(label, (list, tuple)) else [str(label)]


def _columns(file: Path, table: Mapping[str, Any], embeddings: dict[str, np.ndarray]) -> dict[str, Any]:
    """Columns by their usual names out of whatever a file has."""
    if not embeddings:
        raise InputError(f"{file}: no embeddings among its columns {sorted(table)}")

    def first(names: Sequence[str]) -> Any:
        return next((table[name] for name in names if name in table), None)

    def texts(values: Any) -> list[str] | None:
        return None if values is None else [_text(value) for value in values]

    names, class_names, labels = texts(first(_NAMES)), texts(table.get("class_names")), first(_LABELS)
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iub" and class_names is None:
        class_names = [str(code) for code in range(int(labels.max(initial=-1)) + 1)]  # numbers are their names
    elif labels is not None and not isinstance(labels, np.ndarray):
        labels = [list(map(_text, label)) if isinstance(label, (list, tuple)) else _text(label) for label in labels]
    return {
        "embeddings": embeddings,
        "names": None if names is None else [name.encode("utf-8", "surrogateescape") for name in names],
        "labels": labels,
        "class_names": class_names,
        "splits": texts(first(_SPLITS)),
        "groups": texts(first(_GROUPS)),
    }


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return "" if value is None else str(value)


def _plain_columns(cache: Cache) -> dict[str, np.ndarray]:
    """What .npz and .h5 hold besides embeddings: fixed-length bytes and numbers."""
    table = cache.table
    return {
        "names": _fixed(table.names),
        "labels": table.labels,
        "class_names": _fixed(name.encode() for name in cache.class_names),
        "splits": _fixed(split.encode() for split in table.splits.tolist()),
        "groups": _fixed(group.encode() for group in table.groups.tolist()),
        "key": table.keys,
    }


def _fixed(values: Any) -> np.ndarray:
    array = np.array(list(values), np.bytes_)
    return array.astype("S1") if array.dtype.itemsize == 0 else array


def _to_hdf5(cache: Cache) -> bytes:
    columns = _plain_columns(cache)
    columns["labels"] = columns["labels"].astype(np.uint8) if cache.multi_label else columns["labels"]
    return build_image({**columns, **{f"embeddings/{view}": cache.embeddings(view) for view in cache.views}})


def _from_hdf5(config: CacheImportConfig) -> dict[str, Any]:
    with safe_open(config.features.read_bytes(), str(config.features)) as file:
        embeddings = _hdf5_embeddings(file)
        wanted = ("class_names", *_NAMES, *_LABELS, *_SPLITS, *_GROUPS)
        table: dict[str, Any] = {name: file.read(name) for name in wanted if file.has(name)}
    for name, array in table.items():
        if array.dtype.kind == "S":
            table[name] = array.tolist()
        elif array.ndim == 2:
            table[name] = array.astype(bool)
    return _columns(config.features, table, embeddings)


def _hdf5_embeddings(file: SafeFile) -> dict[str, np.ndarray]:
    views = file.children("embeddings")
    if views is None:
        return {"pooler": file.read("embeddings")} if file.has("embeddings") else {}
    return {view: file.read(f"embeddings/{view}") for view in views}


def _to_npz(cache: Cache) -> bytes:
    stream = io.BytesIO()
    embeddings = {f"{_PREFIX}{view}": cache.embeddings(view) for view in cache.views}
    np.savez(stream, allow_pickle=False, **_plain_columns(cache), **embeddings)
    return stream.getvalue()


def _from_npz(config: CacheImportConfig) -> dict[str, Any]:
    try:
        with np.load(io.BytesIO(config.features.read_bytes()), allow_pickle=False) as file:
            table: dict[str, Any] = {name: file[name] for name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as err:
        raise InputError(f"{config.features}: not an .npz file of plain arrays ({err})") from err
    embeddings = {name.removeprefix(_PREFIX): array for name, array in table.items() if name.startswith(_PREFIX)}
    if "embeddings" in table:
        embeddings["pooler"] = table["embeddings"]
    for name, array in table.items():
        if array.dtype.kind in "SU":
            table[name] = array.tolist()
    return _columns(config.features, table, embeddings)


def _from_npy(config: CacheImportConfig) -> dict[str, Any]:
    assert config.table is not None
    try:
        embeddings = np.load(io.BytesIO(config.features.read_bytes()), allow_pickle=False)
    except ValueError as err:
        raise InputError(f"{config.features}: not a .npy file of one plain array ({err})") from err
    try:
        with config.table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error) as err:
        raise InputError(f"{config.table}: cannot be read as CSV ({err})") from err
    if not isinstance(embeddings, np.ndarray) or len(rows) != len(embeddings):
        raise InputError(f"{config.table} has {len(rows)} lines, and {config.features} has {len(embeddings)} rows")
    table = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
    return _columns(config.features, table, {"pooler": embeddings})


def _to_parquet(cache: Cache) -> bytes:
    arrow, parquet = _pyarrow()
    table, names = cache.table, cache.class_names
    if cache.multi_label:
        labels: list[Any] = [[names[code] for code in np.flatnonzero(row)] for row in table.labels]
    else:
        labels = [names[code] if code >= 0 else None for code in table.labels.tolist()]
    columns = {
        "name": arrow.array(list(table.names), arrow.binary()),
        "label": arrow.array(labels, arrow.list_(arrow.string()) if cache.multi_label else arrow.string()),
        "split": arrow.array(table.splits.tolist(), arrow.string()),
        "group": arrow.array(table.groups.tolist(), arrow.string()),
        "key": arrow.array([key.tobytes() for key in table.keys], arrow.binary(32)),
    }
    for view in cache.views:
        flat = arrow.array(cache.embeddings(view).ravel())
        columns[f"{_PREFIX}{view}"] = arrow.FixedSizeListArray.from_arrays(flat, cache.width(view))
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.table(columns), sink)
    return bytes(sink.getvalue())


def _from_parquet(config: CacheImportConfig) -> dict[str, Any]:
    arrow, parquet = _pyarrow()
    try:
        read = parquet.read_table(arrow.BufferReader(config.features.read_bytes()))
    except arrow.ArrowException as err:
        raise InputError(f"{config.features}: not a Parquet file ({err})") from err
    embeddings, table = {}, {}
    for name in read.column_names:
        view = name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else "pooler"
        if name.startswith(_PREFIX) or name in ("embedding", "embeddings"):
            embeddings[view] = _matrix(config.features, name, read.column(name))
        else:
            table[name] = read.column(name).to_pylist()
    for name in _LABELS:
        if name in table and table[name] and all(isinstance(label, int) for label in table[name]):
            table[name] = np.array(table[name])
    return _columns(config.features, table, embeddings)


def _matrix(file: Path, name: str, column: Any) -> np.ndarray:
    """A column of equally long lists of numbers as one array."""
    rows = column.combine_chunks()
    flat = rows.flatten().to_numpy(zero_copy_only=False)
    if not len(rows) or rows.null_count or len(flat) % len(rows):
        raise InputError(f"{file}: column {name!r} does not hold one list of numbers of equal length per row")
    lengths = {len(row) for row in (rows[0], rows[len(rows) - 1])}
    if lengths != {len(flat) // len(rows)}:
        raise InputError(f"{file}: lists of unequal length in column {name!r}")
    return np.asarray(flat).reshape(len(rows), -1)


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as err:
        raise InputError("Parquet files need pyarrow: pip install pyarrow") from err
