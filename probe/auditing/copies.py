"""Copies of an image that was made smaller or encoded again, by the pixels of both.

A picture is reduced to 16 × 16 blocks. Two are copies if the blocks differ little against how much either varies, and
no block differs much: a copy blurs edges everywhere, where another drawing of the same thing, or the next frame of a
film, moves something. Measured on 800 photos of cats and dogs, copies of a fifth of the size and JPEG quality 75
differ by at most 0.031 and 29 grey levels, the two likest different photos by 0.42 and 106. Cut-outs, mirrored and
recoloured copies are no copies in this sense: `neighbours` may find them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from probe.errors import InputError
from probe.images import Preprocessing, load_images
from probe.sources.origin import reopen

MAX_IMAGES = 50_000  # that are compared: two minutes on two cores, and the time of comparing grows with the square
_SIDE, _BLOCKS = 64, 16  # pixels that an image is read at, and blocks that these are averaged to
_MOST_DIFFERENCE = 0.1  # mean squared difference, as a share of the variance of both
_MOST_OF_A_BLOCK = 40.0  # grey levels, the mean of the three colours
_LEAST_VARIANCE = 16.0  # of blocks, in squared grey levels: blank pictures are like each other, and say nothing
_ROWS = 2048  # compared with all others at a time
_PREPROCESSING = Preprocessing(
    resize=(_SIDE, _SIDE),  # squeezed, so that a copy may have lost its proportions
    resample=int(Image.Resampling.BOX),
    crop=None,
    rescale_factor=1.0,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    decode="fast",
)


def read_blocks(origin: dict[str, Any] | None, names: Sequence[bytes], keys: np.ndarray) -> tuple[np.ndarray, str]:
    """Reads the images of a cache again.

    Args:
      origin: where they are, as `describe_origin` says it; None if nobody knows.
      names: of the rows; keys: [N, 32] the SHA-256 of their bytes: an image that has changed since does not count.
    Returns: [N, 16 * 16 * 3] float32 grey levels, NaN for rows without a picture; and why some or all have none, or "".
    """
    blocks = np.full((len(names), _BLOCKS * _BLOCKS * 3), np.nan, np.float32)
    if origin is None:
        return blocks, "it is not recorded where the images are: give them with --images"
    if len(names) > MAX_IMAGES:
        return blocks, f"there are {len(names):,} images, and at most {MAX_IMAGES:,} are"
    try:
        source = reopen(origin)
    except InputError as err:
        return blocks, str(err)
    row_of = {name: row for row, name in enumerate(names)}
    examples = [example for example in source.examples if example.name in row_of]
    workers = 1 if len(examples) < 100 else None  # a process to start costs as much as a hundred small pictures
    for image in load_images(source.iter_bytes(examples), _PREPROCESSING, num_workers=workers):
        row = row_of[image.example.name]
        if image.pixels is not None and image.key == bytes(keys[row]):
            blocks[row] = _averaged(image.pixels)
    num_missing = int(np.isnan(blocks[:, 0]).sum())
    missing = f"{num_missing:,} of {len(names):,} images are gone, changed or cannot be read" if num_missing else ""
    return blocks, missing


def copies(blocks: np.ndarray) -> list[tuple[int, int, float]]:
    """Pairs of copies: (row, later row, likeness from 0.5 to 1, where 1 is no difference at all), the likest first.

    Args:
      blocks: [N, 16 * 16 * 3] as `read_blocks` gives them; rows of NaN are no copies. In time N².
    """
    variances = blocks.var(axis=1)
    (rows,) = np.nonzero(variances >= _LEAST_VARIANCE)  # which NaN is not
    known, variances = blocks[rows], variances[rows]
    squares = (known**2).mean(axis=1)
    pairs = []
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        products = known[part] @ known.T / known.shape[1]
        differences = squares[part, None] + squares - 2 * products  # mean squares: rounding is some 0.01 of a level²
        relative = differences / ((variances[part, None] + variances) / 2)
        for i, j in zip(*np.nonzero(relative < _MOST_DIFFERENCE), strict=True):
            if j > start + i and _most_of_a_block(known[start + i], known[j]) < _MOST_OF_A_BLOCK:
                likeness = 1 - 0.5 * max(0.0, float(relative[i, j])) / _MOST_DIFFERENCE
                pairs.append((int(rows[start + i]), int(rows[j]), likeness))
    return sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))


def _averaged(pixels: np.ndarray) -> np.ndarray:
    """[64, 64, 3] -> [16 * 16 * 3]."""
    size = _SIDE // _BLOCKS
    blocks: np.ndarray = pixels.astype(np.float32).reshape(_BLOCKS, size, _BLOCKS, size, 3).mean(axis=(1, 3))
    return blocks.reshape(-1)


def _most_of_a_block(a: np.ndarray, b: np.ndarray) -> float:
    """Grey levels by which the block differs that differs most."""
    return float(np.abs(a - b).reshape(-1, 3).mean(axis=1).max())
