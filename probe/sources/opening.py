"""`open_source`: which kind of source a path is."""

import os
from collections.abc import Sequence
from pathlib import Path

from probe.errors import InputError
from probe.sources.archives import TAR_SUFFIXES, open_tars, open_zip
from probe.sources.folders import IMAGE_SUFFIXES, FileSource, Listing, list_folder, suffix_of
from probe.sources.manifests import describe_images, is_metadata, open_manifest, read_manifest
from probe.sources.objects import (
    Facts,
    ObjectSource,
    as_listing,
    list_objects,
    open_named_objects,
    size_and_time,
)
from probe.sources.rows import TABLE_SUFFIXES, Columns
from probe.sources.source import Example, Source, list_names
from probe.sources.tables import is_saved_dataset, open_parquets, open_saved_dataset, parquet_holds_images
from probe.storage import is_remote, open_file


def open_source(
    path: Path, *, labelled: bool = True, columns: Columns | None = None, image_root: Path | None = None
) -> Source:
    """Opens a source of images, whatever it is.

    Args:
      path: one of
        - a folder of images: root/class/* or root/{train,val,test}/class/*, with metadata.{csv,jsonl,parquet}
          beside the images or without; a flat folder has no labels
        - a manifest: .csv, .tsv, .jsonl or .parquet, whose rows name image files, or objects of a store
        - a .parquet file, or a folder of them, with the images inside
        - a .tar file, or a folder of them, in WebDataset layout; a .zip file of class folders
        - a folder that `save_to_disk` of Hugging Face datasets wrote
        - an address of any of these but the last on an object store.
      labelled: False: a folder of any shape or a single image; what labels there are are not read.
      columns: names of a table's columns, where they are not the usual ones.
      image_root: what a manifest's paths are relative to (None: the folder that it is in).
    Raises: InputError: missing, empty, ambiguous, or a table and files that disagree, with a list.
    """
    columns = columns or Columns()
    try:
        if is_remote(path):
            objects = list_objects(path)
            if b"" in objects:
                return _open_file(path, columns, image_root, labelled=labelled, facts=objects[b""])
            return _open_listing(path, as_listing(objects), columns, labelled=labelled)
        path = Path(path)
        if path.is_dir():
            if is_saved_dataset(path):
                return open_saved_dataset(path, columns, labelled=labelled)
            return _open_listing(path, list_folder(path), columns, labelled=labelled)
        if not path.is_file():
            found = "is neither file nor folder" if path.exists() else "does not exist"
            raise InputError(f"{path} {found}: give a folder of images, a manifest, tar shards or a zip file")
        return _open_file(path, columns, image_root, labelled=labelled)
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err}") from err


def _open_file(
    path: Path, columns: Columns, image_root: Path | None, *, labelled: bool, facts: Facts | None = None
) -> Source:
    """facts: of an object."""
    name = path.name.lower()
    if name.endswith(TAR_SUFFIXES):
        return open_tars(path, [path], columns, labelled=labelled)
    if name.endswith(".zip"):
        return open_zip(path, columns, labelled=labelled)
    if name.endswith(".parquet") and image_root is None and parquet_holds_images(path, columns):
        return open_parquets(path, [path], columns, labelled=labelled)
    if path.suffix.lower() in TABLE_SUFFIXES:
        manifest, root = read_manifest(path, columns), image_root or path.parent
        if is_remote(root):
            return open_named_objects(manifest, root, labelled=labelled)
        if any(b"://" in name for name in manifest.records):
            return open_named_objects(manifest, None, labelled=labelled)
        return open_manifest(manifest, root, labelled=labelled)
    if suffix_of(os.fsencode(path.name)) in IMAGE_SUFFIXES:
        if labelled:
            raise InputError(f"{path} is a single image, where a folder of images is meant")
        if facts is not None:
            example = Example(os.fsencode(path.name), (), None, None, *size_and_time(facts))
            return ObjectSource(path.parent, [example])
        status = path.stat()
        example = Example(os.fsencode(path.name), (), None, None, status.st_size, status.st_mtime_ns)
        return FileSource(path.parent, [example])
    raise InputError(
        f"{path} is a file, where a folder of images is meant, or a manifest ({', '.join(sorted(TABLE_SUFFIXES))}), "
        "a .tar or a .zip"
    )


def _open_listing(folder: Path, listing: Listing, columns: Columns, *, labelled: bool) -> Source:
    """What is in a folder, of this machine or of a store."""
    names = sorted(name for of_suffix in listing.others.values() for name in of_suffix)
    if not listing.images and (archives := _open_archives(folder, names, columns, labelled=labelled)) is not None:
        return archives
    examples, multi_label = describe_images(
        folder,
        listing.images,
        [name for name in names if is_metadata(name)],
        lambda name: open_file(folder / os.fsdecode(name)),
        columns,
        labelled=labelled,
    )
    source = ObjectSource if is_remote(folder) else FileSource
    return source(folder, examples, multi_label=multi_label, ignored=listing.ignored)


def _open_archives(folder: Path, names: Sequence[bytes], columns: Columns, *, labelled: bool) -> Source | None:
    """The tar or Parquet files of a folder without images; None if there are none."""
    tars = [folder / os.fsdecode(name) for name in names if name.lower().endswith(_TARS)]
    parquets = [folder / os.fsdecode(name) for name in names if name.lower().endswith(b".parquet")]
    if tars and parquets:
        both = [os.fsencode(path.name) for path in (tars[0], parquets[0])]
        raise InputError(f"{folder}: both tar and Parquet files ({list_names(both)}): give one kind")
    if tars:
        return open_tars(folder, tars, columns, labelled=labelled)
    return open_parquets(folder, parquets, columns, labelled=labelled) if parquets else None


_TARS = tuple(suffix.encode() for suffix in TAR_SUFFIXES)
