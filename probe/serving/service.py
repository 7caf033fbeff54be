"""From the bytes of one image to its answer: decoded in a worker process, classified with whoever else asks now."""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from probe.images import ImageError, ImageLoader
from probe.predictor import Predictor
from probe.serving.batching import Batcher, Room
from probe.serving.neighbours import Neighbours
from probe.serving.pictures import Pictures

_WAIT_S = 0.005  # that a batch waits for those who are on the way


@dataclasses.dataclass(frozen=True, eq=False)
class _Result:
    probabilities: np.ndarray  # [C]
    nearest: np.ndarray  # [K] indices of training images
    cosines: np.ndarray  # [K]


class Service:
    """One classifier, and what it takes to answer many clients."""

    def __init__(
        self,
        predictor: Predictor,
        neighbours: Neighbours | None,
        pictures: Pictures | None,
        *,
        queue: int,
        max_pixels: int,
        num_workers: int | None = None,
    ) -> None:
        """
        Args:
          queue: images that may be under way at once.
          max_pixels: width x height that is still decoded. num_workers: processes that decode; None: one per core.
        """
        self.predictor, self.neighbours, self.pictures = predictor, neighbours, pictures
        self.room = Room(queue)
        self._loader = ImageLoader(predictor.preprocessing, num_workers=num_workers, max_pixels=max_pixels)
        self._batcher = Batcher(
            self._step, batch_size=predictor.batch_size, wait_s=_WAIT_S, num_expected=lambda: self.room.num_inside
        )

    @property
    def num_answered(self) -> int:
        """Images classified so far."""
        return self._batcher.num_items

    @property
    def num_steps(self) -> int:
        """Steps of the device that they took."""
        return self._batcher.num_batches

    def warm_up(self) -> None:
        """Compiles what there is to compile, and starts the processes."""
        self._loader.start()
        self._step([np.zeros((*self.predictor.preprocessing.image_size, 3), np.uint8)])

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Images are classified within it; at its end the processes end."""
        try:
            async with self._batcher.running():
                yield
        finally:
            self._loader.close()
            if self.pictures is not None:
                self.pictures.close()

    def place(self) -> contextlib.AbstractContextManager[None]:
        """What a request must hold from its first byte to its answer. Raises: BusyError."""
        return self.room.place(lambda: self._batcher.seconds_per_item)

    async def classify(self, data: bytes, *, thumbnails: bool) -> dict[str, Any]:
        """The answer to one image, as JSON values: what `Prediction` of the OpenAPI description says.

        Args:
          thumbnails: training images come with a picture, where they are still there.
        Raises: ImageError if it cannot be read.
        """
        image = await asyncio.wrap_future(self._loader.submit(None, data))
        if image.failure is not None or image.pixels is None:
            raise image.failure or ImageError("unreadable", "it could not be read")
        result = await self._batcher(image.pixels)
        names = self.predictor.classifier.class_names
        return {
            "predicted": self.predictor.decide(result.probabilities),
            "probabilities": dict(zip(names, map(float, result.probabilities), strict=True)),
            "trained_on": image.key in self.predictor.classifier.seen,
            "nearest": await self._describe(result, thumbnails),
        }

    async def _describe(self, result: _Result, thumbnails: bool) -> list[dict[str, Any]]:
        if self.neighbours is None:
            return []
        indices = result.nearest.tolist()
        uris: list[str | None] = [None] * len(indices)
        if thumbnails and self.pictures is not None:
            uris = await self.pictures.uris(indices)
        return [
            {
                "path": os.fsdecode(self.neighbours.images[index].name),
                "labels": list(self.neighbours.images[index].labels),
                "cosine": round(float(cosine), 4),
                "thumbnail": uri,
            }
            for index, cosine, uri in zip(indices, result.cosines, uris, strict=True)
        ]

    def _step(self, pixels: list[np.ndarray]) -> list[_Result]:
        answers = self.predictor(pixels)
        num = len(pixels)
        if self.neighbours is None:
            none = np.zeros((num, 0), np.int64)
            return [_Result(*row) for row in zip(answers.probabilities, none, none, strict=True)]
        padded = np.zeros((self.predictor.batch_size, answers.embeddings.shape[1]), np.float32)
        padded[:num] = answers.embeddings
        rows, cosines = self.neighbours.search(padded)
        return [_Result(*row) for row in zip(answers.probabilities, rows[:num], cosines[:num], strict=True)]
