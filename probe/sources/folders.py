"""Folders of images: root/class/*, root/{train,val,test}/class/*, or images without labels.

A file is taken for an image by its extension; what it holds is found out when it is read, so that a web page
saved as .jpg is reported as a failed image and a README is left out. Folders within a class folder are searched,
links to folders followed (each folder once); hidden names are left out. Nothing is opened here: a FIFO, a socket
or a dangling link with the name of an image is listed, and fails by itself later.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from probe.errors import InputError
from probe.images import read_image_file
from probe.sources.source import SPLITS, Example, Source, Split, list_names

IMAGE_SUFFIXES = frozenset(
    b".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .avif .heic .heif".split()
)
_JUNK_FOLDERS = {b"__MACOSX", b"@eaDir"}  # what macOS puts in zips, and Synology beside photos


Listed = tuple[bytes, int, int]  # name, size, mtime_ns


@dataclasses.dataclass(frozen=True)
class Listing:
    """What lies below a folder, by name relative to it."""

    images: list[Listed]  # sorted by name
    others: dict[str, list[bytes]]  # suffix -> names of the other files
    hidden: int
    empty: list[bytes] = dataclasses.field(default_factory=list)  # folders with neither images nor folders in them

    @property
    def ignored(self) -> dict[str, int]:
        counts = {suffix: len(names) for suffix, names in self.others.items()}
        if self.empty:
            counts[f"folder(s) without images ({list_names(self.empty)})"] = len(self.empty)
        return counts | ({"hidden": self.hidden} if self.hidden else {})


class FileSource(Source):
    """Images that are files of their own."""

    def read(self, example: Example) -> bytes:
        return read_image_file(self._path(example))[0]

    def path(self, example: Example) -> Path:
        return Path(os.fsdecode(self._path(example)))

    def opener(self) -> Callable[[], Source]:
        return functools.partial(FileSource, self.root.absolute(), self.examples[:1])

    def _path(self, example: Example) -> bytes:
        return join(os.fsencode(self.root), example.name)


def label_by_folder(
    root: Path, images: Sequence[Listed], *, labelled: bool = True, is_archive: bool = False
) -> list[Example]:
    """Examples whose class and split the folders of their names say, in the order of `images`.

    Args:
      is_archive: pass over folders that all names share, as archives often hold one.
    Raises: InputError where that is ambiguous: images beside folders of images, or splits beside classes.
    """
    if not labelled:
        return [Example(name, (), None, None, size, mtime_ns) for name, size, mtime_ns in images]
    shared = _shared_folders([name for name, _, _ in images]) if is_archive and images else b""
    depth = _class_depth(root, [name[len(shared) :] for name, _, _ in images])
    labels: dict[bytes, tuple[str, ...]] = {}
    examples = []
    for name, size, mtime_ns in images:
        parts = name[len(shared) :].split(b"/", 2)
        split: Split | None = SPLITS[os.fsdecode(parts[0]).lower()] if depth.has_splits else None
        folder = parts[depth.of_class] if depth.of_class is not None else b""
        if folder not in labels:
            labels[folder] = (os.fsdecode(folder),) if folder else ()
        examples.append(Example(name, labels[folder], split, None, size, mtime_ns))
    return examples


def split_of_folder(name: bytes) -> Split | None:
    """The split that the top folder of a name says."""
    top, slash, _ = name.partition(b"/")
    return SPLITS.get(os.fsdecode(top).lower()) if slash else None


def _shared_folders(names: list[bytes]) -> bytes:
    """What stands before class folders or splits in all names: b"photos/" of photos/cat/1.jpg, photos/dog/1.jpg."""
    shared = b""
    while True:
        top, slash, _ = names[0][len(shared) :].partition(b"/")
        longer = shared + top + slash
        if not slash or split_of_folder(top + slash) or not all(name.startswith(longer) for name in names):
            return shared
        if top != b"." and not all(b"/" in name[len(longer) :] for name in names):
            return shared  # images directly in it: it is a class
        shared = longer


@dataclasses.dataclass(frozen=True)
class _Depth:
    of_class: int | None  # which part of a name is the class; None: unlabelled
    has_splits: bool  # the first part is a split


def _class_depth(root: Path, names: list[bytes]) -> _Depth:
    direct: dict[bytes, bytes] = {}  # top folder -> one image directly in it
    nested: dict[bytes, bytes] = {}  # top folder -> one image further down
    loose = []
    for name in names:
        top, slash, rest = name.partition(b"/")
        if not slash:
            loose.append(name)
        elif b"/" in rest:
            nested.setdefault(top, name)
        else:
            direct.setdefault(top, name)
    tops = direct.keys() | nested.keys()
    if loose and tops:
        raise InputError(
            f"{root}: images in no class folder ({list_names(loose)}) beside the folders {list_names(sorted(tops))}"
        )
    splits = {top for top in tops if os.fsdecode(top).lower() in SPLITS}
    if not tops:
        return _Depth(None, has_splits=False)
    if splits == tops:
        if both := sorted(top for top in tops if top in direct and top in nested):
            raise InputError(
                f"{root}: images in no class folder ({list_names([direct[top] for top in both])}) beside class folders "
                f"in {list_names(both)}"
            )
        if direct and nested:
            raise InputError(
                f"{root}: class folders in {list_names(sorted(nested))}, but none in {list_names(sorted(direct))}"
            )
        if len({SPLITS[os.fsdecode(top).lower()] for top in tops}) < len(tops):
            raise InputError(f"{root}: two folders for one split: {list_names(sorted(tops))}")
        return _Depth(1 if nested else None, has_splits=True)
    if splits and not any(top in direct for top in splits):
        raise InputError(
            f"{root}: {list_names(sorted(splits))} look like splits with class folders inside, but beside them are "
            f"{list_names(sorted(tops - splits))}. Move those away, or rename what is a class."
        )
    return _Depth(0, has_splits=False)


def list_folder(root: Path) -> Listing:
    """Walks everything below `root`. Raises: InputError listing folders that cannot be read."""
    images: list[Listed] = []
    others: dict[str, list[bytes]] = collections.defaultdict(list)
    hidden = 0
    empty: list[bytes] = []
    unreadable: list[str] = []
    seen: set[tuple[bytes, int, int]] = set()  # folders, by top folder: a link may lead to another class, not back
    base = os.fsencode(root)
    top_identity = _identity(base)
    folders, links = [b""], list[bytes]()
    while folders or links:
        folder = folders.pop() if folders else links.pop()  # links last, so that real names win
        path = join(base, folder)
        inner: list[bytes] = []
        before = len(images), len(links)
        try:
            identity = _identity(path)
            if (folder and identity == top_identity) or (folder.split(b"/", 1)[0], *identity) in seen:
                continue
            seen.add((folder.split(b"/", 1)[0], *identity))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = join(folder, entry.name)
                    if _is_hidden_part(entry.name):
                        hidden += 1
                    elif _is_folder(entry):
                        (links if entry.is_symlink() else inner).append(name)
                    elif (suffix := suffix_of(entry.name)) in IMAGE_SUFFIXES:
                        images.append((name, *_facts(entry)))
                    else:
                        others[os.fsdecode(suffix)].append(name)
        except OSError as err:
            unreadable.append(f"{list_names([folder or b'.'])} ({err.strerror})")
        if folder and not inner and (len(images), len(links)) == before:
            empty.append(folder)
        folders += sorted(inner, reverse=True)
        links.sort(reverse=True)
    if unreadable:
        raise InputError(f"{root}: folders that cannot be read: {', '.join(sorted(unreadable))}")
    images.sort()
    return Listing(images, {suffix: sorted(names) for suffix, names in others.items()}, hidden, sorted(empty))


def join(folder: bytes, name: bytes) -> bytes:
    """The path of `name` as seen from where `folder` is seen."""
    return folder + b"/" + name if folder and not name.startswith(b"/") else name


def is_hidden(name: bytes) -> bool:
    """Whether any part of a name is one that `list_folder` would leave out."""
    return any(map(_is_hidden_part, name.split(b"/")))


def _is_hidden_part(part: bytes) -> bool:
    return (part.startswith(b".") and part not in (b".", b"..")) or part in _JUNK_FOLDERS


def suffix_of(name: bytes) -> bytes:
    """The extension in lower case, with its dot: b".jpg"; b"" if there is none."""
    _, dot, extension = name.rpartition(b".")
    return dot + extension.lower() if dot else b""


def _identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116  # bytes
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _facts(entry: os.DirEntry[bytes]) -> tuple[int, int]:
    """Size and mtime_ns, or zeros: why a file cannot be had is found out when it is read."""
    try:
        status = entry.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
