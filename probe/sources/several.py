"""Several sources as one, each name prefixed by the path that its source was given as."""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from probe.images import ImageError
from probe.sources.folders import join
from probe.sources.opening import open_source
from probe.sources.source import Example, Source
from probe.storage import is_remote


class JoinedSource(Source):
    """The examples of several sources, in the order of the sources."""

    def __init__(self, sources: Sequence[tuple[Path, Source]]) -> None:
        """
        Args:
          sources: what was given, and the source that it was opened as.
        Raises: InputError where two of them have an image of one name.
        """
        self._origins: dict[bytes, tuple[Source, Example]] = {}
        examples = []
        for given, source in sources:
            is_image = given == source.root / os.fsdecode(source.examples[0].name)
            for example in source.examples:
                path = os.fsencode(str(given)) if is_image else join(os.fsencode(str(given)), example.name)
                named = dataclasses.replace(example, name=path)
                examples.append(named)
                self._origins[named.name] = source, example
        roots = [given.absolute() for given, _ in sources]
        super().__init__(roots[0] if any(map(is_remote, roots)) else Path(os.path.commonpath(roots)), examples)

    def read(self, example: Example) -> bytes:
        source, original = self._origins[example.name]
        return source.read(original)

    def path(self, example: Example) -> Path | None:
        source, original = self._origins[example.name]
        return source.path(original)

    def iter_bytes(self, examples: Iterable[Example]) -> Iterator[tuple[Example, bytes | Path | ImageError]]:
        for source, group in itertools.groupby(examples, key=lambda example: self._origins[example.name][0]):
            named = list(group)
            originals = [self._origins[example.name][1] for example in named]
            for example, (_, content) in zip(named, source.iter_bytes(originals), strict=True):
                yield example, content


def open_images(paths: Sequence[Path]) -> Source:
    """Images without their labels: one source as it is, or several joined.

    Args:
      paths: each as `open_source` takes it, or a single image.
    Raises: InputError as `open_source` does, and for an image that is given twice.
    """
    if len(paths) == 1:
        return open_source(paths[0], labelled=False)
    return JoinedSource([(path, open_source(path, labelled=False)) for path in paths])
