"""Operations on one picture against Pillow's, which round to 8 bits where ours do not."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from probe.training import pixels

HEIGHT, WIDTH = 24, 20


def noise(seed=0, height=HEIGHT, width=WIDTH):
    """Smooth shapes and noise together, in levels that do not reach 0 and 255 in every channel."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 120, height * width).reshape(height, width, 1) * np.array([1.0, 0.6, 0.2])
    return (ramp + rng.integers(10, 130, (height, width, 3))).astype(np.uint8)


def run(op, image, *args):
    return np.asarray(pixels.to_uint8(op(jnp.asarray(image, jnp.float32), *args)))


def assert_close_levels(found, reference, levels=1):
    """One level apart: we round the final value, and Pillow cuts off, or has rounded a value in between."""
    difference = np.abs(found.astype(int) - np.asarray(reference).astype(int))
    assert found.shape == difference.shape
    assert difference.max() <= levels


_crop = jax.jit(pixels.resized_crop, static_argnames="size")


@settings(deadline=None, max_examples=60)
@given(
    top=st.floats(0, 20), left=st.floats(0, 16), height=st.floats(1, 24), width=st.floats(1, 20),
    size=st.sampled_from([(16, 12), (40, 8)]),
)  # fmt: skip
@example(top=0, left=0, height=HEIGHT, width=WIDTH, size=(16, 12))
def test_resized_crop_is_pillows(top, left, height, width, size):
    height, width = min(height, HEIGHT - top), min(width, WIDTH - left)
    box = (left, top, left + width, top + height)
    reference = Image.fromarray(noise()).resize(size[::-1], Image.Resampling.BILINEAR, box=box)
    found = _crop(jnp.asarray(noise(), jnp.float32), jnp.array([top, left, height, width]), size=size)
    assert_close_levels(np.asarray(pixels.to_uint8(found)), reference)


@pytest.mark.parametrize("size", [(16, 12), (50, 60)])
def test_resizing_is_that_of_jax(size):
    image = jnp.asarray(noise(), jnp.float32)
    box = jnp.array([0, 0, HEIGHT, WIDTH], jnp.float32)
    reference = jax.image.resize(image, (*size, 3), "linear", antialias=True)
    # Float error of two sums of weighted levels, each below 256: some 1e-5 of them.
    np.testing.assert_allclose(_crop(image, box, size=size), reference, atol=1e-2)


def test_a_crop_of_everything_is_the_picture_to_the_bit():
    box = jnp.array([0, 0, HEIGHT, WIDTH], jnp.float32)
    image = jnp.asarray(noise(), jnp.float32)
    np.testing.assert_array_equal(_crop(image, box, size=(HEIGHT, WIDTH)), image)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.7, 1.0, 1.3, 1.9])
@pytest.mark.parametrize(
    ("op", "reference"),
    [
        (pixels.brightness, ImageEnhance.Brightness),
        (pixels.contrast, ImageEnhance.Contrast),
        (pixels.saturation, ImageEnhance.Color),
        (pixels.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_pillows(op, reference, factor):
    found = run(op, noise(), factor)
    assert_close_levels(found, reference(Image.fromarray(noise())).enhance(factor))
    if factor == 1:
        np.testing.assert_array_equal(found, noise())


def test_hue_is_that_of_hsv():
    image = np.concatenate([noise(), np.full((1, WIDTH, 3), 77, np.uint8), np.zeros((1, WIDTH, 3), np.uint8)])
    for turns in (-0.5, -0.1, 0.25, 1 / 3):
        hsv = [colorsys.rgb_to_hsv(*(level / 255 for level in rgb)) for rgb in image.reshape(-1, 3).tolist()]
        turned = [colorsys.hsv_to_rgb((hue + turns) % 1, *rest) for hue, *rest in hsv]
        found = pixels.turn_hue(jnp.asarray(image, jnp.float32), turns)
        # A float32 hue of up to 6 sixths is good to 5e-7, of which up to 255 levels are made.
        np.testing.assert_allclose(found, 255 * np.reshape(turned, image.shape), atol=1e-3)


@pytest.mark.parametrize("turns", [0.0, 1.0, -1.0])
def test_no_turn_of_hue_changes_nothing(turns):
    np.testing.assert_array_equal(run(pixels.turn_hue, noise(), turns), noise())


def test_turning_hue_there_and_back():
    there = pixels.turn_hue(jnp.asarray(noise(), jnp.float32), 0.2)
    np.testing.assert_array_equal(run(pixels.turn_hue, there, -0.2), noise())


LEVELS = st.sampled_from(["noise", "flat", "dark", "two", "full"])


def levels_image(kind):
    if kind == "flat":
        return np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    if kind == "dark":
        return noise() // 16
    if kind == "two":
        return np.where(noise() > 80, 200, 10).astype(np.uint8)
    if kind == "full":
        return np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return noise()


@settings(deadline=None, max_examples=30)
@given(kind=LEVELS, bits=st.integers(1, 8), threshold=st.integers(0, 256))
def test_operations_on_levels_are_pillows(kind, bits, threshold):
    image = levels_image(kind)
    picture = Image.fromarray(image)
    np.testing.assert_array_equal(run(pixels.posterize, image, bits), ImageOps.posterize(picture, bits))
    np.testing.assert_array_equal(run(pixels.solarize, image, threshold), ImageOps.solarize(picture, threshold))
    np.testing.assert_array_equal(run(pixels.equalize, image), ImageOps.equalize(picture))
    assert_close_levels(run(pixels.autocontrast, image), ImageOps.autocontrast(picture))


@settings(deadline=None, max_examples=40)
@given(matrix=st.lists(st.floats(-0.5, 0.5), min_size=4, max_size=4), x=st.floats(-9, 9), y=st.floats(-9, 9))
def test_warp_is_pillows_affine_transform(matrix, x, y):
    xx, xy, yx, yy = matrix
    coefficients = (1 + xx, xy, x, yx, 1 + yy, y)
    reference = Image.fromarray(noise()).transform(
        (WIDTH, HEIGHT), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    )
    found = run(_warp, noise(), jnp.array(coefficients).reshape(2, 3))
    difference = np.abs(found.astype(int) - np.asarray(reference).astype(int)).max(axis=-1)
    # A point that falls on the very edge is inside in float64 and outside in float32, or the other way round.
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    sources = np.stack([(1 + xx) * columns + xy * rows + x, yx * columns + (1 + yy) * rows + y], axis=-1)
    on_edge = np.minimum(np.abs(sources), np.abs(sources - [WIDTH, HEIGHT])).min(axis=-1) < 1e-4
    assert (difference[~on_edge] <= 1).all()


_warp = jax.jit(pixels.warp)


@pytest.mark.parametrize("degrees", [-30, -7.5, 0, 12, 30, 90])
def test_rotation_is_pillows(degrees):
    picture = Image.fromarray(noise(height=WIDTH))
    reference = picture.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
    found = run(pixels.rotate, noise(height=WIDTH), float(degrees))
    difference = np.abs(found.astype(int) - np.asarray(reference).astype(int))
    if degrees == 90:  # Pillow turns pixels about; in float32 the outermost fall on the very edge
        difference = difference[1:-1, 1:-1]
    assert difference.max() <= 1
