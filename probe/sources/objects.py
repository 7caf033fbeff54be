"""Folders of images on an object store, read many at a time: a store answers late, but many requests at once."""

import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from probe.errors import InputError
from probe.images import MAX_BYTES, ImageError, too_many_bytes
from probe.sources.folders import IMAGE_SUFFIXES, Listed, is_hidden, join, suffix_of
from probe.sources.manifests import describe_images, is_metadata
from probe.sources.rows import Columns
from probe.sources.source import Example, Source

_AT_ONCE = 32  # requests; as many images are held while they are decoded


class ObjectSource(Source):
    """Images that are objects of their own."""

    def read(self, example: Example) -> bytes:
        ((_, content),) = self.iter_bytes([example])
        if isinstance(content, ImageError):
            raise content
        assert isinstance(content, bytes)
        return content

    def opener(self) -> Callable[[], Source]:
        return functools.partial(ObjectSource, self.root, self.examples[:1])

    def iter_bytes(self, examples: Iterable[Example]) -> Iterator[tuple[Example, bytes | Path | ImageError]]:
        with ThreadPoolExecutor(1) as fetching:
            waiting = iter(examples)
            ahead = fetching.submit(self._fetch, list(itertools.islice(waiting, _AT_ONCE)))
            while found := ahead.result():
                ahead = fetching.submit(self._fetch, list(itertools.islice(waiting, _AT_ONCE)))
                yield from found

    def _fetch(self, examples: list[Example]) -> list[tuple[Example, bytes | Path | ImageError]]:
        root: Any = self.root
        paths = {example.name: _key(root, example.name) for example in examples}
        wanted = [paths[example.name] for example in examples if example.size <= MAX_BYTES]
        contents = root.fs.cat(wanted, on_error="return") if wanted else {}
        return [(example, _judge(example, contents.get(paths[example.name]))) for example in examples]


def _judge(example: Example, content: Any) -> bytes | ImageError:
    if isinstance(content, bytes):
        return content
    if example.size > MAX_BYTES:
        return too_many_bytes(example.size)
    return ImageError("unreadable", str(content) or type(content).__name__)


def open_objects(root: Any, columns: Columns, *, labelled: bool) -> ObjectSource:
    """Opens a folder on an object store: class folders, split or not, with metadata files or without.

    Args:
      root: a path as `storage.locate` makes it.
    Raises: InputError as for folders; if the store cannot be reached; for a single object, as a manifest or archive.
    """
    try:
        found = root.fs.find(root.path, detail=True)
    except Exception as err:  # each driver has errors of its own
        raise InputError(f"{root}: cannot be listed: {err}") from err
    if not found:
        raise InputError(f"{root}: there is nothing below this address")
    if root.path in found:
        raise InputError(
            f"{root} is a single object: on an object store IMAGES is a folder of image files. Copy manifests and "
            "archives to this machine."
        )
    images: list[Listed] = []
    metadata: list[bytes] = []
    ignored: collections.Counter[str] = collections.Counter()
    for path, facts in sorted(found.items()):
        name = os.fsencode(path[len(root.path.rstrip("/")) + 1 :])
        if is_hidden(name):
            ignored["hidden"] += 1
        elif suffix_of(name) in IMAGE_SUFFIXES:
            images.append((name, facts["size"], _mtime_ns(facts)))
        elif is_metadata(name):
            metadata.append(name)
        else:
            ignored[os.fsdecode(suffix_of(name))] += 1
    images.sort()
    examples, multi_label = describe_images(
        root, images, metadata, lambda name: root.fs.open(_key(root, name), "rb"), columns, labelled=labelled
    )
    return ObjectSource(root, examples, multi_label=multi_label, ignored=ignored)


def _key(root: Any, name: bytes) -> str:
    return os.fsdecode(join(os.fsencode(root.path.rstrip("/")), name))


def _mtime_ns(facts: dict[str, Any]) -> int:
    """When an object was written, under whichever name a driver says it; 0 if it does not."""
    when = next((facts[name] for name in ("LastModified", "mtime", "updated", "created") if facts.get(name)), None)
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    if isinstance(when, datetime):
        return int(when.timestamp()) * 10**9 + when.microsecond * 1000
    return int(when * 10**9) if when else 0
