"""Operations on one picture, as Pillow does them, in JAX: [H, W, 3] float32 pixels in 0..255, in and out.

Nothing here is left to chance and nothing is rounded, but where an operation is about levels (`equalize`,
`posterize`, `solarize`). `to_uint8` is the one way back.
"""

import jax
import jax.numpy as jnp

_FILL = 128.0  # what `warp` uncovers

Size = tuple[int, int]  # height, width


def to_uint8(pixels: jax.Array) -> jax.Array:
    """Rounds pixels of any shape to levels; beyond 0..255 they are cut off."""
    return jnp.round(jnp.clip(pixels, 0, 255)).astype(jnp.uint8)


def resized_crop(pixels: jax.Array, box: jax.Array, size: Size) -> jax.Array:
    """Cuts a box out of [H, W, 3] and resizes it to [H', W', 3], bilinear and antialiased as Pillow's resize(box=).

    Two small matrix products, since gathering pixels is slow on a CPU. Pixels just outside of the box count where
    the filter reaches over its edge; the picture's own edge is where it is cut off.
    """
    top, left, height, width = box
    rows = _resize_weights(top, height, pixels.shape[0], size[0])
    columns = _resize_weights(left, width, pixels.shape[1], size[1])
    exact = jax.lax.Precision.HIGHEST
    pixels = jnp.einsum("yh,hwc->ywc", rows, pixels, precision=exact)
    return jnp.einsum("xw,ywc->yxc", columns, pixels, precision=exact)


def _resize_weights(start: jax.Array, extent: jax.Array, num_in: int, num_out: int) -> jax.Array:
    """[num_out, num_in]: how much each pixel of a row counts in each pixel of the resized row."""
    scale = extent / num_out
    centres = start + (jnp.arange(num_out) + 0.5) * scale - 0.5
    distances = jnp.abs(jnp.arange(num_in) - centres[:, None]) / jnp.maximum(scale, 1)
    weights = jnp.maximum(1 - distances, 0)
    return weights / weights.sum(axis=1, keepdims=True)


# Colours. A factor of 1 changes nothing, one of 0 leaves what the pixels are blended with.


def _blend(base: jax.Array | float, pixels: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(base + factor * (pixels - base), 0, 255)


def _grey(pixels: jax.Array) -> jax.Array:
    """[H, W, 1] luma of RGB by ITU-R 601, as Pillow's mode L."""
    return 0.299 * pixels[..., :1] + 0.587 * pixels[..., 1:2] + 0.114 * pixels[..., 2:]


def brightness(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from black, or towards it."""
    return _blend(0.0, pixels, factor)


def contrast(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from the mean grey of the picture, or towards it."""
    return _blend(_grey(pixels).mean(), pixels, factor)


def saturation(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from each pixel's grey, or towards it."""
    return _blend(_grey(pixels), pixels, factor)


def sharpness(pixels: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from the blurred picture, or towards it; the outermost pixels stay."""
    height, width, _ = pixels.shape
    around = sum(pixels[y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3))
    blurred = (around + 4 * pixels[1:-1, 1:-1]) / 13
    return _blend(pixels.at[1:-1, 1:-1].set(blurred), pixels, factor)


def turn_hue(pixels: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns every colour around the colour circle; value and saturation (HSV) stay. Whole turns change nothing."""
    red, green, blue = jnp.moveaxis(pixels, -1, 0)
    value = pixels.max(axis=-1)
    chroma = value - pixels.min(axis=-1)
    divisor = jnp.where(chroma > 0, chroma, 1)
    sixths = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    phase = jnp.mod(sixths[..., None] + 6 * turns + jnp.array([5.0, 3.0, 1.0]), 6)
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(phase, 4 - phase), 0, 1)


# Geometry and levels.


def warp(pixels: jax.Array, matrix: jax.Array) -> jax.Array:
    """Looks every pixel up elsewhere, bilinear, grey where that is outside: Pillow's transform(AFFINE).

    Args:
      matrix: [2, 3], (x, y, 1) in the result -> (x, y) in the source, in pixels from the top left corner.
    """
    height, width, _ = pixels.shape
    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    (xx, xy, x0), (yx, yy, y0) = matrix
    x, y = xx * x + xy * y + x0, yx * x + yy * y + y0
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
    right_share, low_share = (x - 0.5 - left)[..., None], (y - 0.5 - top)[..., None]

    def at(row: jax.Array, column: jax.Array) -> jax.Array:
        row = jnp.clip(row.astype(jnp.int32), 0, height - 1)
        return pixels[row, jnp.clip(column.astype(jnp.int32), 0, width - 1)]

    upper = at(top, left) * (1 - right_share) + at(top, left + 1) * right_share
    lower = at(top + 1, left) * (1 - right_share) + at(top + 1, left + 1) * right_share
    return jnp.where(inside[..., None], upper * (1 - low_share) + lower * low_share, _FILL)


def rotate(pixels: jax.Array, degrees: jax.Array) -> jax.Array:
    """Counter-clockwise around the centre."""
    height, width, _ = pixels.shape
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    x, y = width / 2, height / 2
    return warp(pixels, jnp.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]]))


def autocontrast(pixels: jax.Array) -> jax.Array:
    """Stretches each channel to 0..255."""
    least, most = pixels.min(axis=(0, 1)), pixels.max(axis=(0, 1))
    return jnp.where(most > least, (pixels - least) * 255 / jnp.maximum(most - least, 1), pixels)


def equalize(pixels: jax.Array) -> jax.Array:
    """Makes each channel's histogram as flat as a change of levels can, with the rounding of Pillow's equalize."""

    def one(levels: jax.Array) -> jax.Array:
        counts = jnp.bincount(levels.ravel(), length=256)
        brightest = counts[levels.max()]
        step = (levels.size - brightest) // 255
        table = jnp.minimum((step // 2 + jnp.cumsum(counts) - counts) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table, jnp.arange(256))[levels]

    return jax.vmap(one, 2, 2)(jnp.round(pixels).astype(jnp.int32)).astype(jnp.float32)


def posterize(pixels: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps the highest bits of each level, 0..8 of them."""
    coarse = 2.0 ** (8 - bits)
    return jnp.floor(jnp.round(pixels) / coarse) * coarse


def solarize(pixels: jax.Array, threshold: jax.Array) -> jax.Array:
    """Inverts the levels from the threshold on."""
    return jnp.where(jnp.round(pixels) >= threshold, 255 - pixels, pixels)
