"""Images that are objects of a store, read many at a time: a store answers late, but many requests at once."""

import collections
import functools
import itertools
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from probe.errors import InputError
from probe.images import MAX_BYTES, ImageError, too_many_bytes
from probe.sources.folders import IMAGE_SUFFIXES, Listed, Listing, is_hidden, join, suffix_of
from probe.sources.manifests import Manifest
from probe.sources.source import Example, Source, list_names
from probe.storage import locate

_AT_ONCE = 32  # requests; as many images are held while they are decoded
_LISTED_WHOLE = 100  # a manifest's images in one folder, above which it is listed: 1,000 come with a request

Facts = Mapping[str, Any]  # what a driver says of an object


class ObjectSource(Source):
    """Images that are objects of their own; a name is a path below the root, or an address."""

    def __init__(
        self,
        root: Path,
        examples: list[Example],
        *,
        multi_label: bool = False,
        ignored: Mapping[str, int] | None = None,
        below: Path | None = None,
    ) -> None:
        """
        Args:
          below: what names are relative to (None: root).
        """
        super().__init__(root, examples, multi_label=multi_label, ignored=ignored)
        self._below: Any = below or root

    def read(self, example: Example) -> bytes:
        ((_, content),) = self.iter_bytes([example])
        if isinstance(content, ImageError):
            raise content
        assert isinstance(content, bytes)
        return content

    def opener(self) -> Callable[[], Source]:
        return functools.partial(ObjectSource, self.root, self.examples[:1], below=self._below)

    def iter_bytes(self, examples: Iterable[Example]) -> Iterator[tuple[Example, bytes | Path | ImageError]]:
        with ThreadPoolExecutor(1) as fetching:
            waiting = iter(examples)
            ahead = fetching.submit(self._fetch, list(itertools.islice(waiting, _AT_ONCE)))
            while found := ahead.result():
                ahead = fetching.submit(self._fetch, list(itertools.islice(waiting, _AT_ONCE)))
                yield from found

    def _fetch(self, examples: list[Example]) -> list[tuple[Example, bytes | Path | ImageError]]:
        wanted = [example for example in examples if example.size <= MAX_BYTES]
        keys = [_key_of(self._below, example.name) for example in wanted]
        # `cat` would take [1] in a name for a pattern
        contents = self._below.fs.cat_ranges(keys, None, None, on_error="return") if keys else []
        found = dict(zip((example.name for example in wanted), contents, strict=True))
        return [(example, _judge(example, found.get(example.name))) for example in examples]


def _judge(example: Example, content: Any) -> bytes | ImageError:
    if isinstance(content, bytes):
        return content
    if example.size > MAX_BYTES:
        return too_many_bytes(example.size)
    return ImageError("unreadable", str(content) or type(content).__name__)


def list_objects(root: Any) -> dict[bytes, Facts]:
    """All objects below an address, by name relative to it, sorted; one of name b"" if it is an object itself.

    Raises: InputError if the store cannot be reached, or there is nothing.
    """
    try:
        found = root.fs.find(root.path, detail=True)
    except Exception as err:  # each driver has errors of its own
        raise InputError(f"{root}: cannot be listed: {err}") from err
    if not found:
        raise InputError(f"{root}: there is nothing below this address")
    if root.path in found:
        return {b"": found[root.path]}
    return {os.fsencode(path[len(root.path.rstrip("/")) + 1 :]): facts for path, facts in sorted(found.items())}


def as_listing(found: Mapping[bytes, Facts]) -> Listing:
    """The same as a folder is listed."""
    images: list[Listed] = []
    others: dict[str, list[bytes]] = collections.defaultdict(list)
    num_hidden = 0
    for name, facts in found.items():
        if is_hidden(name):
            num_hidden += 1
        elif suffix_of(name) in IMAGE_SUFFIXES:
            images.append((name, *size_and_time(facts)))
        else:
            others[os.fsdecode(suffix_of(name))].append(name)
    images.sort()
    return Listing(images, others, num_hidden)


def open_named_objects(manifest: Manifest, root: Path | None, *, labelled: bool) -> ObjectSource:
    """The objects that a table names, by addresses or by paths relative to `root`.

    Args:
      root: on a store; None: every name is an address.
    Raises: InputError listing the rows that name no object, one of another store, or what cannot be understood.
    """
    reader = manifest.reader
    first = next(name for name in manifest.records if b"://" in name) if root is None else b""
    below: Any = root or locate(os.fsdecode(b"/".join(first.split(b"/")[:3])))
    scheme = str(below).partition("://")[0]
    keys: dict[str, bytes] = {}
    for name, (where, _) in manifest.records.items():
        of_store, is_address, _ = os.fsdecode(name).partition("://")
        if is_address and of_store != scheme:
            reader.problems.append(f"{where}: {list_names([name])} is not on the store {scheme}://, as the others are")
        elif not is_address and root is None:
            reader.problems.append(
                f"{where}: {list_names([name])} is a path, and other rows name addresses: say by --image-root "
                f"{scheme}://... what it is relative to"
            )
        elif (twin := keys.setdefault(_key_of(below, name), name)) != name:
            reader.problems.append(f"{where}: {list_names([name])} is the object {list_names([twin])} again")
    found = _look_up(below, list(keys))
    examples = []
    for key, name in keys.items():
        if (facts := found.get(key)) is None:
            reader.problems.append(f"{manifest.records[name][0]}: there is no object {list_names([name])}")
        else:
            examples.append(manifest.example(name, *size_and_time(facts), labelled=labelled))
    reader.finish(needs_path=True)
    examples.sort(key=lambda example: example.name)
    multi_label = labelled and reader.multi_label
    return ObjectSource(manifest.path, examples, multi_label=multi_label, below=below)


def _look_up(root: Any, keys: list[str]) -> dict[str, Facts]:
    """What the store says of those objects that there are: asked for one by one, or by folders that hold many."""
    by_folder: dict[str, list[str]] = collections.defaultdict(list)
    for key in keys:
        by_folder[key.rpartition("/")[0]].append(key)

    questions = [
        question
        for folder, wanted in by_folder.items()
        for question in ([(folder, wanted)] if len(wanted) > _LISTED_WHOLE else [(key, [key]) for key in wanted])
    ]

    def ask(question: tuple[str, list[str]]) -> list[tuple[str, Facts]]:
        path, wanted = question
        try:
            if wanted == [path]:
                return [(path, root.fs.info(path))]
            kept = set(wanted)
            return [(facts["name"], facts) for facts in root.fs.ls(path, detail=True) if facts["name"] in kept]
        except FileNotFoundError:
            return []

    try:
        with ThreadPoolExecutor(_AT_ONCE) as asking:
            parts = list(asking.map(ask, questions))
    except Exception as err:  # each driver has errors of its own
        raise InputError(f"{root}: cannot be listed: {err}") from err
    return {key: facts for part in parts for key, facts in part if facts.get("type") != "directory"}


def _key_of(root: Any, name: bytes) -> str:
    """The path of a named object, as drivers take it."""
    text = os.fsdecode(name)
    if "://" in text:
        return str(root.fs._strip_protocol(text))
    key = os.fsdecode(join(os.fsencode(root.path.rstrip("/")), name))
    return posixpath.normpath(key) if ".." in key.split("/") else key  # a store has no folders to step out of


def size_and_time(facts: Facts) -> tuple[int, int]:
    """Bytes, and mtime_ns: when an object was written, under whichever name a driver says it; 0 if it does not."""
    when = next((facts[name] for name in ("LastModified", "mtime", "updated", "created") if facts.get(name)), None)
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    if isinstance(when, datetime):
        mtime_ns = int(when.timestamp()) * 10**9 + when.microsecond * 1000
    else:
        mtime_ns = int(when * 10**9) if when else 0
    return int(facts.get("size") or 0), mtime_ns
