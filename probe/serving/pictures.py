"""Thumbnails of training images, read when they are first asked for and kept while they are in demand."""

import asyncio
import collections
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from probe.errors import InputError
from probe.images import ImageLoader
from probe.reporting.thumbnails import PREPROCESSING, encode
from probe.serving.neighbours import TrainingImage
from probe.sources.origin import reopen

_KEPT = 4096  # of some 4 kB


class Pictures:
    """Small pictures that we encode ourselves, of images that are still what they were; `missing` says in words why
    there are none at all."""

    def __init__(self, origin: dict[str, Any] | None, images: Sequence[TrainingImage]) -> None:
        """
        Args:
          origin: where the images are, as `describe_origin` has it; None if nobody knows.
          images: those that may be asked for.
        """
        self.missing: str | None = None
        self._images = images
        self._known: collections.OrderedDict[int, str] = collections.OrderedDict()
        self._loader = ImageLoader(PREPROCESSING, num_workers=1)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")  # an archive has one place where it is read
        self._examples = {}
        if origin is None:
            self.missing = "Training images have no picture: it is not recorded where they are. Give --images."
            return
        try:
            self._source = reopen(origin)
        except InputError as err:
            self.missing = f"Training images have no picture: {err}"
            return
        names = {image.name for image in images}
        self._examples = {example.name: example for example in self._source.examples if example.name in names}
        if not self._examples:
            self.missing = f"Training images have no picture: {self._source.root} does not hold them."

    def close(self) -> None:
        """Ends the process that decodes."""
        self._loader.close()
        self._reader.shutdown(cancel_futures=True)

    async def uris(self, indices: Sequence[int]) -> list[str | None]:
        """Data URIs of the images with these indices; None for one that is gone, changed or cannot be read."""
        return list(await asyncio.gather(*map(self._uri, indices)))

    async def _uri(self, index: int) -> str | None:
        if index in self._known:
            self._known.move_to_end(index)
            return self._known[index]
        image = self._images[index]
        example = self._examples.get(image.name)
        if example is None:
            return None
        loop = asyncio.get_running_loop()
        _, content = await loop.run_in_executor(self._reader, lambda: next(self._source.iter_bytes([example])))
        loaded = await asyncio.wrap_future(self._loader.submit(None, content))
        if loaded.pixels is None or loaded.key != image.key:
            return None
        self._known[index] = encode(loaded.pixels)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return self._known[index]
