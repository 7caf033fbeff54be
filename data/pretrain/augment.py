"""One training image from one stored picture: where it lies, on what, in which colours, how sharp."""

import math

import numpy as np
from PIL import Image, ImageFilter

SIZE = 64  # pixels of an image's side
_BILINEAR = Image.Resampling.BILINEAR
_CELLS = 3  # a shape is bent in a grid of 3 × 3 cells


def training_image(picture: np.ndarray, is_monochrome: bool, may_flip: bool, rng: np.random.Generator) -> np.ndarray:
    """Draws a picture as it might be met.

    Args:
      picture: [72, 72, 4] uint8 RGBA.
      is_monochrome: it is a shape whose colour says nothing.
      may_flip: its mirror image has the same name.
    Returns: [64, 64, 3] uint8.
    """
    background = _background(rng)
    if is_monochrome:
        alpha = _reshaped(Image.fromarray(np.ascontiguousarray(picture[..., 3])), rng)
        image = Image.new("RGBA", alpha.size, _contrasting(background, rng))
        image.putalpha(alpha)
    else:
        image = Image.fromarray(picture, "RGBA")
        if rng.random() < 0.3:
            image = image.point(_colour_table(rng))
    if may_flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    placed = image.transform((SIZE, SIZE), Image.Transform.AFFINE, _placing(rng, image.width), _BILINEAR)
    background.paste(placed, mask=placed)
    return _degrade(background, rng)


def plain_image(picture: np.ndarray) -> np.ndarray:
    """[72, 72, 4] uint8 -> [64, 64, 3] uint8: the whole picture on white, for evaluation."""
    white = Image.new("RGBA", (picture.shape[1], picture.shape[0]), "white")
    flat = Image.alpha_composite(white, Image.fromarray(np.asarray(picture), "RGBA")).convert("RGB")
    return np.asarray(flat.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _placing(rng: np.random.Generator, width: int) -> tuple[float, ...]:
    """The inverse affine map of a random scale, aspect, turn, shear and shift: image's pixel -> picture's."""
    scale = math.exp(rng.uniform(math.log(0.65), math.log(1.1)))
    aspect = math.exp(rng.normal(0, 0.08))
    angle, shear = (rng.normal(0, 0.15), rng.normal(0, 0.1)) if rng.random() < 0.6 else (0.0, 0.0)
    cos, sin, size = math.cos(angle), math.sin(angle), width / (scale * SIZE)
    # the inverse of turn @ [[1, shear], [0, 1]] @ diag(aspect, 1 / aspect) / size
    a, b = size / aspect * (cos + shear * sin), size / aspect * (sin - shear * cos)
    c, d = -size * aspect * sin, size * aspect * cos
    room = max(0.12, 1 - scale) * SIZE / 2
    x, y = SIZE / 2 + rng.uniform(-room, room, 2)
    return (a, b, width / 2 - a * x - b * y, c, d, width / 2 - c * x - d * y)


def _reshaped(shape: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A shape as another hand would draw it: with a thicker pen, and its parts a little moved."""
    if rng.random() < 0.3:
        shape = shape.filter(ImageFilter.MaxFilter(int(rng.choice([3, 5, 7]))))
    if rng.random() < 0.5:
        return shape
    ends = np.linspace(0, shape.width, _CELLS + 1)
    corners = np.stack(np.meshgrid(ends, ends), axis=-1)  # [row, column, (x, y)]
    corners = corners + rng.normal(0, rng.uniform(0, 0.06) * shape.width, corners.shape)
    mesh = []
    for row, column in np.ndindex(_CELLS, _CELLS):
        box = tuple(round(end) for end in (ends[column], ends[row], ends[column + 1], ends[row + 1]))
        around = [corners[row + down, column + right] for down, right in ((0, 0), (1, 0), (1, 1), (0, 1))]
        mesh.append((box, tuple(np.concatenate(around).tolist())))
    return shape.transform(shape.size, Image.Transform.MESH, mesh, _BILINEAR)


def _colour_table(rng: np.random.Generator) -> list[int]:
    """For `Image.point` on RGBA: each colour brightened or darkened, shifted, and clipped; opacity as it is."""
    gains, offsets = rng.uniform(0.7, 1.3, 3) * rng.uniform(0.8, 1.2), rng.uniform(-25, 25, 3)
    colours = np.clip(gains[:, None] * np.arange(256) + offsets[:, None], 0, 255).astype(int)
    return [*colours.ravel().tolist(), *range(256)]


def _background(rng: np.random.Generator) -> Image.Image:
    """64 × 64 RGB: white, near black, one colour, a gradient, or a soft texture."""
    kind = rng.random()
    first = tuple(int(value) for value in rng.integers(0, 256, 3))
    if kind < 0.45:
        first = (255, 255, 255)
    elif kind < 0.53:
        first = (int(rng.integers(0, 40)),) * 3
    if kind < 0.78:
        return Image.new("RGB", (SIZE, SIZE), first)
    if kind < 0.88:
        corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
        return Image.fromarray(corners).resize((SIZE, SIZE), _BILINEAR)
    cells = int(rng.integers(3, 17))
    noise = np.array(first) + rng.normal(0, rng.uniform(10, 70), (cells, cells, 3))
    texture = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    return texture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _contrasting(background: Image.Image, rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour that can be told from the background: black or white where they can, else any."""
    mean = np.mean(background.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
    while True:
        grey = int(rng.choice([0, 255]))
        red, green, blue = (grey,) * 3 if rng.random() < 0.7 else (int(value) for value in rng.integers(0, 256, 3))
        if abs((red + green + blue) / 3 - mean) > 70:
            return red, green, blue


def _degrade(pixels: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Fewer pixels, blur, noise, no colour: what a scan or a poor photo does. Two thirds stay as they are."""
    kind = rng.random()
    if kind < 0.2:
        side = round(math.exp(rng.uniform(math.log(8), math.log(SIZE * 0.7))))
        filters = (Image.Resampling.BICUBIC, _BILINEAR)
        pixels = pixels.resize((side, side), Image.Resampling.BOX).resize((SIZE, SIZE), filters[rng.integers(2)])
    elif kind < 0.26:
        pixels = pixels.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    if rng.random() < 0.1:
        pixels = pixels.convert("L").convert("RGB")
    result = np.asarray(pixels)
    if 0.26 < kind < 0.33:
        noise = rng.integers(-20, 21, (SIZE, SIZE, 3), np.int16)
        result = np.clip(result.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    return result
