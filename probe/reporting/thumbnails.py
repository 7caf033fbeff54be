"""Thumbnails: small pictures that we encode ourselves, of images that are still what they were.

No byte of an original reaches a page: pixels are decoded in worker processes, as for the backbone, and encoded
again, without metadata.
"""

import base64
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from probe.errors import InputError
from probe.images import Preprocessing, load_images
from probe.sources.origin import reopen

SIDE = 128  # pixels, of a square cut from the middle, which is what most backbones see of a picture
_QUALITY = 60
PREPROCESSING = Preprocessing(
    resize=SIDE,
    resample=int(Image.Resampling.BICUBIC),
    crop=(SIDE, SIDE),
    rescale_factor=1.0,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    decode="fast",
)


class Thumbnails:
    """Pictures of rows, and in words why some have none.

    uris: row to a data URI. missing: None where each row that was asked for has one.
    """

    def __init__(self, uris: Mapping[int, str], missing: str | None) -> None:
        self.uris, self.missing = uris, missing


def load_thumbnails(
    origin: dict[str, Any] | None, wanted: Mapping[int, tuple[bytes, bytes]], *, num_workers: int | None = None
) -> Thumbnails:
    """Reads the images of some rows.

    Args:
      origin: what `describe_origin` says of where the images are; None if nobody knows.
      wanted: row to its name and the SHA-256 of its bytes: an image that has changed since is not shown.
    """
    if origin is None:
        return Thumbnails({}, "it is not recorded where the images are: give them with --images")
    try:
        source = reopen(origin)
    except InputError as err:
        return Thumbnails({}, f"the images are not where they were: {err}")
    rows: dict[bytes, list[int]] = {}
    for row, (name, _) in wanted.items():
        rows.setdefault(name, []).append(row)
    examples = [example for example in source.examples if example.name in rows]

    def loaded() -> Iterator[tuple[int, np.ndarray]]:
        # A process to start costs as much as a hundred small pictures
        workers = 1 if len(examples) < 100 else num_workers
        for image in load_images(source.iter_bytes(examples), PREPROCESSING, num_workers=workers):
            for row in rows[image.example.name]:
                if image.pixels is not None and image.key == wanted[row][1]:
                    yield row, image.pixels

    uris = {row: encode(pixels) for row, pixels in loaded()}
    num_missing = len(wanted) - len(uris)
    missing = f"{num_missing:,} of {len(wanted):,} images are gone, changed or cannot be read" if num_missing else None
    return Thumbnails(uris, missing)


def encode(pixels: np.ndarray) -> str:
    """[H, W, 3] uint8 -> a data URI, about 4 kB."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=_QUALITY, method=2)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
