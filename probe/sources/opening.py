"""`open_source`: which kind of source a path is."""

from pathlib import Path

from probe.errors import InputError
from probe.sources.folders import IMAGE_SUFFIXES, FileSource, label_by_folder, list_folder
from probe.sources.source import Example, Source


def open_source(path: Path, *, labelled: bool = True) -> Source:
    """Opens a source of images.

    Args:
      path: a folder of images, root/class/* or root/{train,val,test}/class/*; a flat one has no labels.
      labelled: False: a folder of any shape or a single image; what labels there are are not read.
    Raises: InputError: missing, empty, or of an ambiguous layout.
    """
    path = Path(path)
    if path.is_dir():
        listing = list_folder(path)
        examples = label_by_folder(path, listing.images, labelled=labelled)
        return FileSource(path, examples, ignored=listing.ignored)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file() and path.suffix.lower().encode() in IMAGE_SUFFIXES and not labelled:
        status = path.stat()
        name = path.name.encode("utf-8", "surrogateescape")
        return FileSource(path.parent, [Example(name, (), None, None, status.st_size, status.st_mtime_ns)])
    raise InputError(f"{path} is a file, where a folder of images is meant")
