"""The decoded images of a source as numbered rows, for training: in memory where they fit, else read anew.

Of several processes each reads its share of the images at first, to know which can be read, and later those of its part
of each batch that it has not read yet.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from probe import distributed
from probe.errors import InputError
from probe.images import Preprocessing, load_images
from probe.progress import Progress
from probe.sources import Example, Source, display_name
from probe.training.steps import Batch, filled_up, make_batch

MAX_BYTES_IN_MEMORY = 4 << 30  # 28,000 images of 224 × 224; above this they are decoded again in every epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRows:
    """The N images of a source that can be read, in its order.

    keys [N, 32] uint8, SHA-256 of each file; labels [N] int; splits, groups [N] str, "" where none is said;
    failures: {"path", "reason", "detail"} of the images that cannot be read, which have no row. in_source: [N] which of
    the source's images each is. pixels: of the source's images [M, H, W, 3] uint8, or None where they do not fit, and
    in_memory [M] bool, which of them are there; reading fills both.
    """

    source: Source
    examples: list[Example]
    preprocessing: Preprocessing
    num_workers: int | None
    keys: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    groups: np.ndarray
    failures: list[dict[str, str]]
    in_source: np.ndarray
    pixels: np.ndarray | None
    in_memory: np.ndarray

    @classmethod
    def decode(
        cls,
        source: Source,
        preprocessing: Preprocessing,
        *,
        num_workers: int | None = None,
        on_error: str = "skip",
        max_bytes: int = MAX_BYTES_IN_MEMORY,
    ) -> "ImageRows":
        """Reads every image once, to know which can be; keeps them where that takes `max_bytes` or less.

        Raises: InputError at the first unreadable image with on_error="fail", or if none can be read.
        """
        shape = (len(source.examples), *preprocessing.image_size, 3)
        pixels = np.empty(shape, np.uint8) if np.prod(shape, dtype=np.int64) <= max_bytes else None
        in_memory = np.zeros(len(source.examples), bool)
        own = range(len(source.examples))[distributed.share(len(source.examples))]

        def read_own() -> list[bytes | dict[str, str]]:
            """The content key of each image, or why it cannot be read."""
            found: list[bytes | dict[str, str]] = []
            items: Any = source.iter_bytes([source.examples[number] for number in own])
            with Progress("decoding", total=len(own), unit="images") as progress:
                for number, image in zip(own, load_images(items, preprocessing, num_workers=num_workers), strict=True):
                    progress.advance(1)
                    if image.failure is None:
                        assert image.pixels is not None
                        assert image.key is not None
                        if pixels is not None:
                            pixels[number], in_memory[number] = image.pixels, True
                        found.append(image.key)
                        continue
                    if on_error == "fail":
                        name = display_name(image.example.name)
                        raise InputError(f"{name}: {image.failure}. Mend it, or pass --on-error skip.")
                    path = os.fsdecode(image.example.name)
                    found.append({"path": path, "reason": image.failure.reason, "detail": str(image.failure)})
            return found

        found = [outcome for part in distributed.on_each(read_own) for outcome in part]
        keys = [key for key in found if isinstance(key, bytes)]
        failures = [failure for failure in found if not isinstance(failure, bytes)]
        if not keys:
            raise InputError(f"{source.root}: none of its {len(failures)} images can be read")
        in_source = np.array([number for number, outcome in enumerate(found) if isinstance(outcome, bytes)])
        examples = [source.examples[number] for number in in_source]
        codes = {name: code for code, name in enumerate(source.class_names)}
        return cls(
            source=source,
            examples=examples,
            preprocessing=preprocessing,
            num_workers=num_workers,
            keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32),
            labels=np.array([codes[example.labels[0]] for example in examples]),
            splits=np.array([example.split or "" for example in examples]),
            groups=np.array([example.group or "" for example in examples]),
            failures=failures,
            in_source=in_source,
            pixels=pixels,
            in_memory=in_memory,
        )

    def batches(self, rows: np.ndarray, batch_size: int, own: slice = slice(None)) -> Iterator[Batch]:
        """Yields the given rows in their order, in batches of one shape, the last padded and masked.

        Args:
          own: of which rows of a batch this process reads the images.
        Raises: InputError if an image that could be read before cannot be read any more.
        """
        parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        filled = [filled_up(part, batch_size) for part in parts]
        images = self._images([part[own] for part in filled])
        for part, whole, inputs in zip(parts, filled, images, strict=True):
            yield make_batch(inputs, self.labels[whole], len(part), examples=whole)

    def _images(self, parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The pixels of each part's rows; what has to be read is read ahead."""
        if self.pixels is None:
            each = [list(dict.fromkeys(part.tolist())) for part in parts]  # a row that fills up comes twice
            decoded = self._decoded([row for part in each for row in part])
            for part, unlike in zip(parts, each, strict=True):
                read = {row: next(decoded) for row in unlike}
                yield np.stack([read[row] for row in part.tolist()])
            return
        every = dict.fromkeys(row for part in parts for row in part[~self.in_memory[self.in_source[part]]].tolist())
        missing, decoded = iter(every), self._decoded(list(every))
        for part in parts:
            at = self.in_source[part]
            while not self.in_memory[at].all():
                number = self.in_source[next(missing)]
                self.pixels[number], self.in_memory[number] = next(decoded), True
            yield self.pixels[at]

    def _decoded(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        items: Any = self.source.iter_bytes([self.examples[row] for row in rows])
        for image in load_images(items, self.preprocessing, num_workers=self.num_workers):
            if image.failure is not None:
                name = display_name(image.example.name)
                raise InputError(f"{name}: {image.failure}, but it could be read when the run began")
            assert image.pixels is not None
            yield image.pixels
