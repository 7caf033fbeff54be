"""The decoded images of a source as numbered rows, for training: in memory where they fit, else read anew."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from probe.errors import InputError
from probe.images import Preprocessing, load_images
from probe.progress import Progress
from probe.sources import Example, Source, display_name
from probe.training.steps import Batch, padded_batch

MAX_BYTES_IN_MEMORY = 4 << 30  # 28,000 images of 224 × 224; above this they are decoded again in every epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRows:
    """The N images of a source that can be read, in its order.

    keys [N, 32] uint8, SHA-256 of each file; labels [N] int; splits, groups [N] str, "" where none is said;
    failures: {"path", "reason", "detail"} of the images that cannot be read, which have no row; pixels
    [N, H, W, 3] uint8, or None where they do not fit.
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
    pixels: np.ndarray | None

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
        examples: list[Example] = []
        keys: list[bytes] = []
        failures: list[dict[str, str]] = []
        with Progress("decoding", total=len(source.examples), unit="images") as progress:
            for image in load_images(source.iter_bytes(source.examples), preprocessing, num_workers=num_workers):
                progress.advance(1)
                if image.failure is None:
                    assert image.pixels is not None
                    assert image.key is not None
                    if pixels is not None:
                        pixels[len(examples)] = image.pixels
                    examples.append(image.example)
                    keys.append(image.key)
                    continue
                name = display_name(image.example.name)
                if on_error == "fail":
                    raise InputError(f"{name}: {image.failure}. Mend it, or pass --on-error skip.")
                path = os.fsdecode(image.example.name)
                failures.append({"path": path, "reason": image.failure.reason, "detail": str(image.failure)})
        if not examples:
            raise InputError(f"{source.root}: none of its {len(failures)} images can be read")
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
            pixels=None if pixels is None else pixels[: len(examples)],
        )

    def batches(self, rows: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """Yields the given rows in their order, in batches of one shape, the last padded and masked.

        Raises: InputError if an image that could be read before cannot be read any more.
        """
        decoded = self._decoded(rows) if self.pixels is None else None
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            if decoded is None:
                assert self.pixels is not None
                inputs = self.pixels[batch]
            else:
                inputs = np.stack([next(decoded) for _ in batch])
            yield padded_batch(inputs, self.labels[batch], batch_size, examples=batch)

    def _decoded(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        items: Any = self.source.iter_bytes([self.examples[row] for row in rows])
        for image in load_images(items, self.preprocessing, num_workers=self.num_workers):
            if image.failure is not None:
                name = display_name(image.example.name)
                raise InputError(f"{name}: {image.failure}, but it could be read when the run began")
            assert image.pixels is not None
            yield image.pixels
