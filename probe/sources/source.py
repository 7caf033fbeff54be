"""What a source of images is: examples in a fixed order, and a way to their bytes.

A name is opaque bytes, unique within its source: a path below the root, or a member of an archive. It is never
decoded to find a file again, and shown to people only through `display_name`.
"""

import abc
import collections
import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from probe.errors import InputError
from probe.images import ImageError

Split = Literal["train", "val", "test"]
SPLITS: dict[str, Split] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

_SHOWN = 10  # names in an error message, before "and 12 more"


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One image and what people say about it."""

    name: bytes
    labels: tuple[str, ...]  # () if unlabelled; one, or any number where the source is multi_label
    split: Split | None
    group: str | None  # examples of one group (a patient, a film) belong on the same side of a split
    size: int  # bytes; 0 where only reading the image would tell
    mtime_ns: int  # of the file, or of the archive that it is in


class Source(abc.ABC):
    """Examples in a fixed order (sorted by name; in archives as they are stored), and a way to their bytes."""

    def __init__(
        self,
        root: Path,
        examples: list[Example],
        *,
        multi_label: bool = False,
        ignored: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
          root: the folder or file that was opened.
          ignored: kind of file (".txt", "hidden") -> how many were left out.
        Raises: InputError for no examples, two of one name, or class names that are not text.
        """
        self.root = root
        self.examples = examples
        self.class_names: tuple[str, ...] = tuple(sorted({label for e in examples for label in e.labels}))
        self.multi_label = multi_label
        self.ignored: dict[str, int] = dict(ignored or {})
        if not examples:
            left_out = ", ".join(f"{n} {kind or 'without extension'}" for kind, n in sorted(self.ignored.items()))
            found = f"no images found (left out: {left_out})" if left_out else "no images found"
            raise InputError(f"{root}: {found}. Give a folder with root/class/* or root/{{train,val,test}}/class/*.")
        names = collections.Counter(e.name for e in examples)
        if len(names) < len(examples):
            twins = [name for name, count in names.items() if count > 1]
            raise InputError(f"{root}: names that occur more than once: {list_names(twins)}")
        if foreign := [name for name in self.class_names if any("\ud800" <= c <= "\udfff" for c in name)]:
            raise InputError(f"{root}: class names that are not UTF-8: {list_names(foreign)}. Rename them.")

    @abc.abstractmethod
    def read(self, example: Example) -> bytes:
        """The bytes of an example's image. Raises: ImageError."""

    def path(self, example: Example) -> Path | None:
        """The plain file that holds the image, which another process may open itself; None inside an archive."""
        return None

    def opener(self) -> "Callable[[], Source] | None":
        """What opens these images on another host for reading alone, without listing them; None if nothing does."""
        return None

    def iter_bytes(self, examples: Iterable[Example]) -> Iterator[tuple[Example, bytes | Path | ImageError]]:
        """What `load_images` takes, for these examples in this order: a path, bytes, or why there are none.

        Archives are read fastest in the order of `self.examples`, or a part of it.
        """
        for example in examples:
            content: bytes | Path | ImageError | None = self.path(example)
            if content is None:
                try:
                    content = self.read(example)
                except ImageError as err:
                    content = err
            yield example, content


def check_labels(source: Source) -> None:
    """Raises: InputError unless a classifier can be trained on these labels and judged on the other splits."""
    root = source.root
    if not source.class_names:
        raise InputError(f"{root}: no labels. Put images in one folder per class, or give a manifest with labels.")
    by_look: dict[str, list[str]] = collections.defaultdict(list)
    for name in source.class_names:
        by_look[" ".join(unicodedata.normalize("NFC", name).split())].append(name)
    if twins := [names for names in by_look.values() if len(names) > 1]:
        pairs = "; ".join(" and ".join(map(repr, names)) for names in twins)
        raise InputError(f"{root}: classes that differ only in spaces or in how they are encoded: {pairs}")
    if source.multi_label:
        return
    if unlabelled := [e.name for e in source.examples if not e.labels]:
        raise InputError(f"{root}: images without a label: {list_names(unlabelled)}")
    if len(source.class_names) < 2:
        raise InputError(
            f"{root}: one class only, {source.class_names[0]!r}: give each class a folder, or a label, of its own"
        )
    by_split: dict[str | None, set[str]] = collections.defaultdict(set)
    for example in source.examples:
        by_split[example.split].update(example.labels)
    known = by_split["train"] | by_split[None]
    if not known:
        raise InputError(f"{root}: no training images, only {' and '.join(s for s in ('val', 'test') if by_split[s])}")
    for split in ("val", "test"):
        if strange := sorted(by_split[split] - known):
            raise InputError(
                f"{root}: classes in {split} that train lacks: {list_names(strange)}; "
                f"train has {list_names(sorted(known))}. Add training images of them, or take them out."
            )


def split_in_name(name: str) -> Split | None:
    """The split that the name of a shard says: imagenet-train-0001.tar, validation-00000-of-00001.parquet."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS]
    return SPLITS[words[-1]] if words else None


def display_name(name: bytes | str) -> str:
    """A name as printable text that no terminal, log or table misreads; different names stay different.

    Bytes that are not UTF-8 become \\xff; control characters, line ends, direction marks and other unprintable
    characters \\x1b or \\u202e; a backslash is doubled.
    """
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(_display_character(character) for character in text)


def _display_character(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was not UTF-8
        code -= 0xDC00
        return f"\\x{code:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def list_names(names: Sequence[bytes | str]) -> str:
    """The first few names, for a message."""
    shown = ", ".join(display_name(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
