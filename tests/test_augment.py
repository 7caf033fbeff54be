"""Augmentation: what chance decides, what it may depend on, and that targets say what the pixels are."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from probe.errors import ConfigError
from probe.training import augment
from probe.training.augment import AugmentConfig

EVERYTHING = AugmentConfig(
    crop_scale=(0.3, 1.0), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, rand_ops=2
)
MIXED = AugmentConfig(mixup=0.4, cutmix=1.0, label_smoothing=0.1)


def pictures(num, *, seed=0, height=12, width=10):
    return np.random.default_rng(seed).integers(0, 256, (num, height, width, 3), np.uint8)


def keys(num, *, seed=0, epoch=0):
    return augment.example_keys(jax.random.key(seed), epoch, jnp.arange(num))


@functools.partial(jax.jit, static_argnames=("config", "num_classes", "size"))
def augmented(config, images, labels, mask, seed, epoch, examples, *, num_classes=3, size=None):
    example_keys = augment.example_keys(jax.random.key(seed), epoch, examples)
    return augment.augment(config, images, labels, mask, example_keys, num_classes=num_classes, size=size)


def run(config, images, *, seed=0, epoch=0, examples=None, labels=None, mask=None, **options):
    num = len(images)
    examples = np.arange(num, dtype=np.int32) if examples is None else np.asarray(examples, np.int32)
    labels = np.arange(num, dtype=np.int32) % 3 if labels is None else labels
    mask = np.ones(num, bool) if mask is None else mask
    images, targets = augmented(config, images, labels, mask, seed, epoch, examples, **options)
    return np.asarray(images), np.asarray(targets)


def test_nothing_is_done_by_default():
    images, targets = run(AugmentConfig(), pictures(4))
    np.testing.assert_array_equal(images, pictures(4))
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(targets, np.eye(3)[[0, 1, 2, 0]])


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(0.1, 10)),
        AugmentConfig(flip=0.0),
        AugmentConfig(crop_scale=(0.9999999, 1.0), crop_ratio=(1.0, 1.0)),
        AugmentConfig(brightness=1e-9, contrast=1e-9, saturation=1e-9, hue=1e-12),
    ],
)
def test_what_changes_nothing_changes_no_bit(config):
    images, _ = run(config, pictures(4, height=10))
    np.testing.assert_array_equal(images, pictures(4, height=10))


def test_a_mirror_image_of_the_mirror_image_is_the_picture():
    mirrored, _ = run(AugmentConfig(flip=1.0), pictures(4))
    np.testing.assert_array_equal(mirrored, pictures(4)[:, :, ::-1])
    np.testing.assert_array_equal(run(AugmentConfig(flip=1.0), mirrored)[0], pictures(4))


def test_about_as_many_are_mirrored_as_asked_for():
    images, _ = run(AugmentConfig(flip=0.3), np.repeat(pictures(1), 600, axis=0))
    share = np.mean([np.array_equal(image, pictures(1)[0, :, ::-1]) for image in images])
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 600)  # four standard deviations


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(4)), epoch=st.integers(0, 2**31 - 1), seed=st.integers(0, 2**31 - 1))
def test_a_picture_depends_on_seed_epoch_and_example_alone(order, epoch, seed):
    images, _ = run(EVERYTHING, pictures(4), seed=seed, epoch=epoch)
    moved, _ = run(EVERYTHING, pictures(4)[order], seed=seed, epoch=epoch, examples=order)
    np.testing.assert_array_equal(moved, images[order])
    alone, _ = run(EVERYTHING, pictures(4)[order[:1]], seed=seed, epoch=epoch, examples=order[:1])
    np.testing.assert_array_equal(alone, images[order[:1]])
    strangers = pictures(4, seed=1)
    strangers[2] = pictures(4)[2]
    np.testing.assert_array_equal(run(EVERYTHING, strangers, seed=seed, epoch=epoch)[0][2], images[2])


def test_seed_epoch_and_example_all_count():
    same = np.repeat(pictures(1), 4, axis=0)
    seen = [
        image.tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
        for image in run(EVERYTHING, same, seed=seed, epoch=epoch)[0]
    ]
    assert len(set(seen)) == 16


def test_the_second_epoch_compiles_nothing():
    run(EVERYTHING, pictures(4))
    size = augmented._cache_size()
    run(EVERYTHING, pictures(4, seed=5), seed=3, epoch=7, examples=[9, 8, 7, 6])
    assert augmented._cache_size() == size


def test_an_accelerators_way_gives_the_same_pictures():
    """All operations to all pictures at once, which a CPU does not do of itself."""
    one = functools.partial(augment.augment_image, EVERYTHING, size=(12, 10))
    found = np.asarray(jax.jit(jax.vmap(one))(pictures(8), keys(8))).astype(int)
    expected = np.asarray(jax.jit(functools.partial(augment.augment_images, EVERYTHING))(pictures(8), keys(8)))
    # Float error moves a value over a rounding edge here and there.
    assert np.mean(found != expected) < 0.01


def test_a_batch_spread_over_devices_gives_the_same_bits():
    code = """
import jax, numpy as np
from probe.training import augment
config = augment.AugmentConfig(crop_scale=(0.3, 1.0), flip=0.5, mixup=0.4, cutmix=1.0)
images = np.random.default_rng(0).integers(0, 256, (16, 12, 10, 3), np.uint8)
batch = (images, np.arange(16) % 3, np.arange(16) < 13, np.arange(16))
@jax.jit
def run(images, labels, mask, examples):
    keys = augment.example_keys(jax.random.key(0), 1, examples)
    return augment.augment(config, images, labels, mask, keys, num_classes=3)
split = jax.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), ("data",)), jax.P("data"))
expected, found = run(*batch), run(*jax.device_put(batch, split))
assert len(found[0].devices()) == 8
jax.tree.map(np.testing.assert_array_equal, found, expected)
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=os.environ | flags, check=True)


def test_pictures_change_size():
    for config in (AugmentConfig(), AugmentConfig(crop_scale=(0.5, 1.0))):
        assert run(config, pictures(4), size=(6, 8))[0].shape == (4, 6, 8, 3)
    whole, _ = run(AugmentConfig(), pictures(4), size=(6, 8))
    reference = Image.fromarray(pictures(4)[1]).resize((8, 6), Image.Resampling.BILINEAR)
    assert np.abs(whole[1].astype(int) - np.asarray(reference)).max() <= 1  # Pillow rounds between its two passes


_box = jax.jit(augment.random_box, static_argnums=(1, 2, 3))
SQUARE, WIDE, TALL, USUAL_RATIO = (224, 224), (30, 90), (90, 30), (3 / 4, 4 / 3)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31 - 1),
    rules=st.sampled_from(
        [
            (SQUARE, (0.08, 1.0), USUAL_RATIO),
            (SQUARE, (0.5, 0.5), (1.0, 1.0)),
            (WIDE, (0.3, 1.0), USUAL_RATIO),
            (TALL, (1.0, 1.0), USUAL_RATIO),  # no such crop fits: the largest that does is taken
        ]
    ),
)
def test_boxes_lie_within_the_picture_and_keep_the_rules(seed, rules):
    (rows, columns), (least, most), (narrow, wide) = rules
    top, left, height, width = np.asarray(_box(jax.random.key(seed), *rules), np.float64)
    error = 1e-3  # of float32 numbers up to 224
    assert min(top, left) >= 0
    assert top + height <= rows + error
    assert left + width <= columns + error
    assert narrow - error <= width / height <= wide + error
    largest = 1.0 if rows == columns else 4 / 9  # 30 × 40 of 30 × 90
    assert min(least, largest) - error <= height * width / (rows * columns) <= most + error


OPS = {
    "identity": lambda picture, _: picture,
    "shear_x": lambda picture, strength: move(picture, 1, 0.3 * strength, 0, 0, 1, 0),
    "shear_y": lambda picture, strength: move(picture, 1, 0, 0, 0.3 * strength, 1, 0),
    "translate_x": lambda picture, strength: move(picture, 1, 0, 0.45 * strength * picture.width, 0, 1, 0),
    "translate_y": lambda picture, strength: move(picture, 1, 0, 0, 0, 1, 0.45 * strength * picture.height),
    "rotate": lambda picture, strength: picture.rotate(
        30 * strength, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    ),
    "brightness": lambda picture, strength: ImageEnhance.Brightness(picture).enhance(1 + 0.9 * strength),
    "saturation": lambda picture, strength: ImageEnhance.Color(picture).enhance(1 + 0.9 * strength),
    "contrast": lambda picture, strength: ImageEnhance.Contrast(picture).enhance(1 + 0.9 * strength),
    "sharpness": lambda picture, strength: ImageEnhance.Sharpness(picture).enhance(1 + 0.9 * strength),
    "posterize": lambda picture, strength: ImageOps.posterize(picture, 8 - round(4 * abs(strength))),
    "solarize": lambda picture, strength: ImageOps.solarize(picture, 256 * (1 - abs(strength))),
    "autocontrast": lambda picture, _: ImageOps.autocontrast(picture),
    "equalize": lambda picture, _: ImageOps.equalize(picture),
}


def move(picture, *coefficients):
    affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return picture.transform(picture.size, affine, coefficients, bilinear, fillcolor=(128, 128, 128))


@pytest.mark.parametrize("name", sorted(augment.RAND_OPS))
def test_operations_of_randaugment_are_pillows(name):
    """To a level, which is what Pillow's cutting off, or rounding of values in between, amounts to."""
    image = pictures(1, height=24, width=20)[0]
    op = jax.jit(lambda pixels, strength: augment.to_uint8(augment.RAND_OPS[name](pixels, strength)))
    for strength in (-1.0, -0.63, 0.0, 0.37, 1.0):
        found = np.asarray(op(image.astype(np.float32), strength)).astype(int)
        reference = np.asarray(OPS[name](Image.fromarray(image), strength)).astype(int)
        assert np.abs(found - reference).max() <= 1


def test_every_operation_has_its_reference_and_is_drawn():
    assert sorted(OPS) == sorted(augment.RAND_OPS)
    dull = pictures(1, height=24, width=20) // 2 + 20  # so that autocontrast does something, too
    images, _ = run(AugmentConfig(rand_ops=1), np.repeat(dull, 400, axis=0))
    assert len({image.tobytes() for image in images}) == 23  # 9 operations with either sign, and 5 without


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 100))
def test_mixtures_and_their_targets_agree(seed, epoch):
    """Pictures of one colour each tell how much of which went into a mixture."""
    levels = np.array([10, 240, 60, 180, 120])
    images = np.broadcast_to(levels[:, None, None, None], (5, 12, 10, 3)).astype(np.uint8)
    mixed, targets = run(
        AugmentConfig(mixup=0.4, cutmix=1.0), images, labels=np.arange(5), seed=seed, epoch=epoch, num_classes=5
    )
    for row, (image, target) in enumerate(zip(mixed, targets, strict=True)):
        partner = (row + 1) % 5
        share, other_share = target[row], target[partner]
        np.testing.assert_allclose(share + other_share, 1, atol=1e-6)
        assert 0 <= share <= 1 + 1e-6
        expected = share * levels[row] + other_share * levels[partner]
        if len(np.unique(image)) == 2:  # CutMix: shares of the area
            assert set(np.unique(image)) == {levels[row], levels[partner]}
            np.testing.assert_allclose(image.mean(), expected, atol=1e-3)
        else:  # mixup, or a box of nothing or all: one colour, rounded
            assert len(np.unique(image)) == 1
            assert abs(image[0, 0, 0] - expected) <= 0.5 + 1e-3


def test_both_kinds_of_mixture_occur_and_shares_are_spread():
    images = np.zeros((400, 8, 8, 3), np.uint8)
    images[::2] = 255
    mixed, targets = run(AugmentConfig(mixup=1.0, cutmix=1.0), images, labels=np.arange(400) % 2, num_classes=2)
    cut = np.array([len(np.unique(image)) == 2 for image in mixed])
    assert 0.3 < cut.mean() < 0.7
    share = targets[np.arange(400), np.arange(400) % 2][~cut]
    assert abs(share.mean() - 0.5) < 0.1  # Beta(1, 1) has the mean ½ and the deviation 0.29
    assert 0.2 < share.std() < 0.4


@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
def test_padding_is_neither_mixed_nor_mixed_in(mask):
    mask = np.array(mask, bool)
    images = np.where(mask[:, None, None, None], 200, 0).astype(np.uint8) * np.ones((5, 8, 8, 3), np.uint8)
    labels = np.where(mask, 1, 0)
    mixed, targets = run(AugmentConfig(mixup=0.4, cutmix=1.0), images, labels=labels, mask=mask, num_classes=2)
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_allclose(targets, np.eye(2)[labels], atol=1e-6)


def test_partners_go_round_the_real_rows():
    mask = np.array([0, 1, 0, 1, 1], bool)
    np.testing.assert_array_equal(augment._next_real_row(mask)[mask], [3, 4, 1])


@settings(deadline=None, max_examples=20)
@given(smoothing=st.floats(0, 0.99), num_classes=st.integers(2, 7))
def test_soft_targets_are_those_of_optax(smoothing, num_classes):
    labels = np.arange(9) % num_classes
    targets = augment.soft_targets(labels, num_classes, smoothing)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        targets, optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing), rtol=1e-6, atol=1e-7
    )


def test_smoothed_targets_are_mixed_as_others():
    _, targets = run(MIXED, pictures(6))
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    assert targets.min() >= 0.1 / 3 - 1e-6


def test_settings_out_of_range_are_all_named():
    with pytest.raises(ConfigError) as err:
        AugmentConfig(crop_scale=(0.5, 0.2), flip=1.5, hue=0.6, mixup=-1, label_smoothing=1.0, brightness=float("nan"))
    assert str(err.value) == (
        "crop_scale must be two ascending shares above 0 and up to 1, got (0.5, 0.2); "
        "flip must be a probability, got 1.5; brightness must be 0 or more, got nan; "
        "hue must be between 0 and 0.5, got 0.6; mixup must be 0 or more, got -1; "
        "label_smoothing must be at least 0 and below 1, got 1.0"
    )
