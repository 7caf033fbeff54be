"""`open_source`: which kind of source a path is."""

import os
from pathlib import Path

from probe.errors import InputError
from probe.sources.archives import TAR_SUFFIXES, open_tars, open_zip
from probe.sources.folders import IMAGE_SUFFIXES, FileSource, list_folder, suffix_of
from probe.sources.manifests import describe_images, is_metadata, open_manifest
from probe.sources.objects import open_objects
from probe.sources.rows import TABLE_SUFFIXES, Columns
from probe.sources.source import Example, Source, list_names
from probe.sources.tables import is_saved_dataset, open_parquets, open_saved_dataset, parquet_holds_images
from probe.storage import is_remote


def open_source(
    path: Path, *, labelled: bool = True, columns: Columns | None = None, image_root: Path | None = None
) -> Source:
    """Opens a source of images, whatever it is.

    Args:
      path: one of
        - a folder of images: root/class/* or root/{train,val,test}/class/*, with metadata.{csv,jsonl,parquet}
          beside the images or without; a flat folder has no labels
        - a manifest: .csv, .tsv, .jsonl or .parquet, whose rows name image files
        - a .parquet file, or a folder of them, with the images inside
        - a .tar file, or a folder of them, in WebDataset layout; a .zip file of class folders
        - a folder of images on an object store
        - a folder that `save_to_disk` of Hugging Face datasets wrote.
      labelled: False: a folder of any shape or a single image; what labels there are are not read.
      columns: names of a table's columns, where they are not the usual ones.
      image_root: what a manifest's paths are relative to (None: the folder that it is in).
    Raises: InputError: missing, empty, ambiguous, or a table and files that disagree, with a list.
    """
    columns = columns or Columns()
    if is_remote(path):
        return open_objects(path, columns, labelled=labelled)
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path, columns, labelled=labelled)
        if not path.is_file():
            found = "is neither file nor folder" if path.exists() else "does not exist"
            raise InputError(f"{path} {found}: give a folder of images, a manifest, tar shards or a zip file")
        return _open_file(path, columns, image_root, labelled=labelled)
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err}") from err


def _open_file(path: Path, columns: Columns, image_root: Path | None, *, labelled: bool) -> Source:
    name = path.name.lower()
    if name.endswith(TAR_SUFFIXES):
        return open_tars(path, [path], columns, labelled=labelled)
    if name.endswith(".zip"):
        return open_zip(path, columns, labelled=labelled)
    if name.endswith(".parquet") and image_root is None and parquet_holds_images(path, columns):
        return open_parquets(path, [path], columns, labelled=labelled)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return open_manifest(path, columns, image_root=image_root, labelled=labelled)
    if suffix_of(os.fsencode(path.name)) in IMAGE_SUFFIXES:
        if labelled:
            raise InputError(f"{path} is a single image, where a folder of images is meant")
        status = path.stat()
        example = Example(os.fsencode(path.name), (), None, None, status.st_size, status.st_mtime_ns)
        return FileSource(path.parent, [example])
    raise InputError(
        f"{path} is a file, where a folder of images is meant, or a manifest ({', '.join(sorted(TABLE_SUFFIXES))}), "
        "a .tar or a .zip"
    )


def _open_folder(folder: Path, columns: Columns, *, labelled: bool) -> Source:
    if is_saved_dataset(folder):
        return open_saved_dataset(folder, columns, labelled=labelled)
    listing = list_folder(folder)
    others = sorted(name for names in listing.others.values() for name in names)
    if not listing.images:
        tars = [folder / os.fsdecode(name) for name in others if name.lower().endswith(_TARS)]
        parquets = [folder / os.fsdecode(name) for name in others if name.lower().endswith(b".parquet")]
        if tars and parquets:
            both = [os.fsencode(path.name) for path in (tars[0], parquets[0])]
            raise InputError(f"{folder}: both tar and Parquet files ({list_names(both)}): give one kind")
        if tars:
            return open_tars(folder, tars, columns, labelled=labelled)
        if parquets:
            return open_parquets(folder, parquets, columns, labelled=labelled)
    metadata = [name for name in others if is_metadata(name)]
    examples, multi_label = describe_images(
        folder,
        listing.images,
        metadata,
        lambda name: (folder / os.fsdecode(name)).open("rb"),
        columns,
        labelled=labelled,
    )
    return FileSource(folder, examples, multi_label=multi_label, ignored=listing.ignored)


_TARS = tuple(suffix.encode() for suffix in TAR_SUFFIXES)
