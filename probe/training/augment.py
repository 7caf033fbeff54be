"""Augmentation on the device: pictures of a batch as training wants them, different in every epoch.

    augment: (images [B, H, W, 3] uint8, labels [B]) -> (images [B, H', W', 3] uint8, targets [B, C] float32)

Pure and compiled with the train step. Chance comes from one key per example, of (seed, epoch, example): what
becomes of a picture depends on these three, to the bit, and not on the batch that it came in, so that a run
can be resumed, sharded or accumulated. The exceptions are mixup and CutMix: how much is mixed in, and where,
is the example's own, but its partner is the next real row of the batch.

Between the steps pixels are float32 in 0..255; they are rounded once, at the end, so that training and
prediction see pictures of the same kind. What is switched off costs nothing and leaves every bit as it is.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from probe.errors import ConfigError
from probe.training.pixels import (
    Size,
    autocontrast,
    brightness,
    contrast,
    equalize,
    posterize,
    resized_crop,
    rotate,
    saturation,
    sharpness,
    solarize,
    to_uint8,
    turn_hue,
    warp,
)

_CROP_TRIALS = 10  # crops drawn until one fits into the picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to a training picture, in this order; by default nothing.

    crop_scale, crop_ratio: a crop's share of the area, and its width : height, the latter uniform in its
      logarithm; it is resized to the full size. (1, 1) for the share means no crop.
    flip: probability of a mirror image.
    brightness, contrast, saturation: each is multiplied by a factor uniform in 1 ± this, never below 0.
    hue: colours turn by up to this share of the colour circle, either way.
    rand_ops, rand_magnitude: RandAugment: how many of its operations, each drawn anew, and how strong, 0..10.
    mixup, cutmix: α of the Beta(α, α) that says how much of a picture remains; with both, a coin decides.
    label_smoothing: share of the target that is spread evenly over all classes.
    Raises: ConfigError that lists every value out of range.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    rand_ops: int = 0
    rand_magnitude: float = 9.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        (least, most), (narrow, wide) = self.crop_scale, self.crop_ratio
        rules = {
            "crop_scale": (0 < least <= most <= 1, "two ascending shares above 0 and up to 1"),
            "crop_ratio": (0 < narrow <= wide < np.inf, "two ascending ratios above 0"),
            "flip": (0 <= self.flip <= 1, "a probability"),
            "brightness": (0 <= self.brightness < np.inf, "0 or more"),
            "contrast": (0 <= self.contrast < np.inf, "0 or more"),
            "saturation": (0 <= self.saturation < np.inf, "0 or more"),
            "hue": (0 <= self.hue <= 0.5, "between 0 and 0.5"),
            "rand_ops": (self.rand_ops >= 0, "0 or more"),
            "rand_magnitude": (0 <= self.rand_magnitude <= 10, "between 0 and 10"),
            "mixup": (0 <= self.mixup < np.inf, "0 or more"),
            "cutmix": (0 <= self.cutmix < np.inf, "0 or more"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "at least 0 and below 1"),
        }
        broken = [f"{name} must be {rule}, got {getattr(self, name)}" for name, (ok, rule) in rules.items() if not ok]
        if broken:
            raise ConfigError("; ".join(broken))

    @property
    def crops(self) -> bool:
        return self.crop_scale != (1.0, 1.0)

    @property
    def changes_images(self) -> bool:
        jitters = self.brightness or self.contrast or self.saturation or self.hue
        return bool(self.crops or self.flip or jitters or self.rand_ops)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


def augment(
    config: AugmentConfig,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    *,
    num_classes: int,
    size: Size | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Augments a batch; pure, to be called inside a jitted train step.

    Args:
      images: [B, H, W, 3] uint8; labels: [B] integers; mask: [B] bool, false for padding.
      keys: [B], see `example_keys`.
      num_classes: C.
      size: (H', W') of the result, by default that of the images.
    Returns: images [B, H', W', 3] uint8, and targets [B, C] float32 whose rows sum to 1.
    """
    image_keys, mix_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    images = augment_images(config, images, image_keys, size=size)
    targets = soft_targets(labels, num_classes, config.label_smoothing)
    return mix(config, images, targets, mask, mix_keys) if config.mixes else (images, targets)


def example_keys(key: jax.Array, epoch: ArrayLike, examples: jax.Array) -> jax.Array:
    """One key per example, [B], of the run's key, the epoch and the examples' numbers [B] in the training set."""
    epoch_key = jax.random.fold_in(key, epoch)
    return jax.vmap(lambda example: jax.random.fold_in(epoch_key, example))(examples)


def soft_targets(labels: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """[B] integer labels -> [B, C] float32: 1 - smoothing on the label, and smoothing / C on every class."""
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def augment_images(config: AugmentConfig, images: jax.Array, keys: jax.Array, *, size: Size | None = None) -> jax.Array:
    """All that concerns one picture alone: [B, H, W, 3] uint8 and keys [B] -> [B, H', W', 3] uint8."""
    given: Size = (images.shape[1], images.shape[2])
    if not config.changes_images and size in (None, given):
        return images
    one = functools.partial(augment_image, config, size=size or given)
    # One by one, a picture pays only for the operations that it drew, and stays in the processor's cache. An
    # accelerator is quicker when it does all operations to all pictures at once, and picks.
    augmented: jax.Array = jax.lax.platform_dependent(
        images, keys, cpu=lambda *batch: jax.lax.map(lambda args: one(*args), batch), default=jax.vmap(one)
    )
    return augmented


def augment_image(config: AugmentConfig, image: jax.Array, key: jax.Array, *, size: Size) -> jax.Array:
    """One picture: [H, W, 3] uint8 -> [H', W', 3] uint8."""
    given: Size = (image.shape[0], image.shape[1])
    crop_key, flip_key, jitter_key, rand_key = jax.random.split(key, 4)
    pixels = image.astype(jnp.float32)
    if config.crops:
        pixels = resized_crop(pixels, random_box(crop_key, given, config.crop_scale, config.crop_ratio), size)
    elif size != given:
        pixels = resized_crop(pixels, jnp.array([0, 0, *given], jnp.float32), size)
    if config.flip:
        pixels = jnp.where(jax.random.bernoulli(flip_key, config.flip), pixels[:, ::-1], pixels)
    pixels = _jitter(config, jitter_key, pixels)
    if config.rand_ops:
        pixels = _rand_augment(rand_key, pixels, config.rand_ops, config.rand_magnitude / 10)
    return to_uint8(pixels)


# Crops.


def random_box(key: jax.Array, given: Size, scale: tuple[float, float], ratio: tuple[float, float]) -> jax.Array:
    """Draws (top, left, height, width) of a crop, [4] float32 in pixels, within a picture of the given size.

    Args:
      scale: least and most share of the area; ratio: least and most width : height, uniform in its logarithm.
    Where no crop drawn fits, it is the largest of the ratio nearest to the picture's own.
    Source: Szegedy et al. 2014, arXiv:1409.4842, in the form of torchvision's RandomResizedCrop.
    """
    height, width = given
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    area = height * width * jax.random.uniform(area_key, (_CROP_TRIALS,), minval=scale[0], maxval=scale[1])
    low, high = np.log(ratio)
    aspect = jnp.exp(jax.random.uniform(ratio_key, (_CROP_TRIALS,), minval=low, maxval=high))
    nearest = float(np.clip(width / height, *ratio))
    largest = jnp.array([min(height, width / nearest), min(width, height * nearest)])
    drawn = jnp.sqrt(area) * jnp.stack([jnp.sqrt(1 / aspect), jnp.sqrt(aspect)])  # [2, trials]
    room = jnp.array([height, width], jnp.float32)
    fits = jnp.all(drawn <= room[:, None], axis=0)
    extent = jnp.where(fits.any(), drawn[:, jnp.argmax(fits)], largest)
    return jnp.concatenate([jax.random.uniform(place_key, (2,)) * (room - extent), extent])


# Colour jitter.


def _jitter(config: AugmentConfig, key: jax.Array, pixels: jax.Array) -> jax.Array:
    keys = jax.random.split(key, 4)
    adjustments = [(brightness, config.brightness), (contrast, config.contrast), (saturation, config.saturation)]
    for (adjust, spread), factor_key in zip(adjustments, keys[:3], strict=True):
        if spread:
            least = max(1 - spread, 0)
            pixels = adjust(pixels, jax.random.uniform(factor_key, minval=least, maxval=1 + spread))
    if config.hue:
        pixels = turn_hue(pixels, jax.random.uniform(keys[3], minval=-config.hue, maxval=config.hue))
    return pixels


# RandAugment: operations (pixels [H, W, 3], strength) -> pixels; the strength is in -1..1, and its sign is chance.
# Source: Cubuk et al. 2019, arXiv:1909.13719, with the ranges of torchvision's RandAugment.


def _shear(pixels: jax.Array, x: ArrayLike, y: ArrayLike) -> jax.Array:
    return warp(pixels, jnp.array([[1.0, x, 0.0], [y, 1.0, 0.0]]))


def _translate(pixels: jax.Array, x: ArrayLike, y: ArrayLike) -> jax.Array:
    height, width, _ = pixels.shape
    return warp(pixels, jnp.array([[1.0, 0.0, x * width], [0.0, 1.0, y * height]]))


RAND_OPS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "identity": lambda pixels, _: pixels,
    "shear_x": lambda pixels, strength: _shear(pixels, 0.3 * strength, 0),
    "shear_y": lambda pixels, strength: _shear(pixels, 0, 0.3 * strength),
    "translate_x": lambda pixels, strength: _translate(pixels, 0.45 * strength, 0),
    "translate_y": lambda pixels, strength: _translate(pixels, 0, 0.45 * strength),
    "rotate": lambda pixels, strength: rotate(pixels, 30 * strength),
    "brightness": lambda pixels, strength: brightness(pixels, 1 + 0.9 * strength),
    "saturation": lambda pixels, strength: saturation(pixels, 1 + 0.9 * strength),
    "contrast": lambda pixels, strength: contrast(pixels, 1 + 0.9 * strength),
    "sharpness": lambda pixels, strength: sharpness(pixels, 1 + 0.9 * strength),
    "posterize": lambda pixels, strength: posterize(pixels, 8 - jnp.round(4 * abs(strength))),
    "solarize": lambda pixels, strength: solarize(pixels, 256 * (1 - abs(strength))),
    "autocontrast": lambda pixels, _: autocontrast(pixels),
    "equalize": lambda pixels, _: equalize(pixels),
}


def _rand_augment(key: jax.Array, pixels: jax.Array, num_ops: int, strength: float) -> jax.Array:
    def apply_one(pixels: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        op_key, sign_key = jax.random.split(key)
        op = jax.random.randint(op_key, (), 0, len(RAND_OPS))
        signed = strength * jax.random.rademacher(sign_key, (), jnp.float32)
        return jax.lax.switch(op, list(RAND_OPS.values()), pixels, signed), None

    return jax.lax.scan(apply_one, pixels, jax.random.split(key, num_ops))[0]


# Mixtures of two pictures.


def mix(
    config: AugmentConfig, images: jax.Array, targets: jax.Array, mask: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixup and CutMix: every picture gets a part of the next real row's, and the same part of its target.

    Args:
      images: [B, H, W, 3] uint8; targets: [B, C] float32; mask: [B] bool, false for padding, which stays.
      keys: [B].
    Returns: images and targets as they came in; a target's weights are the shares of the pixels, exactly.
    Sources: Zhang et al. 2017, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899.
    """
    _, height, width, _ = images.shape

    def kept_share(key: jax.Array) -> jax.Array:
        """[H, W]: how much of each pixel stays."""
        coin_key, share_key, place_key = jax.random.split(key, 3)
        cuts = jax.random.bernoulli(coin_key, 0.5 if config.mixup and config.cutmix else float(config.cutmix > 0))
        alpha = jnp.where(cuts, config.cutmix, config.mixup)
        share = jax.random.beta(share_key, alpha, alpha)
        centre_y, centre_x = jax.random.uniform(place_key, (2,))
        half = jnp.sqrt(1 - share) / 2  # of the box's sides, where those of the picture are 1
        rows = jnp.abs((jnp.arange(height) + 0.5) / height - centre_y) < half
        columns = jnp.abs((jnp.arange(width) + 0.5) / width - centre_x) < half
        return jnp.where(cuts, ~(rows[:, None] & columns), share)

    partner = _next_real_row(mask)
    kept = jnp.where(mask[:, None, None], jax.vmap(kept_share)(keys), 1.0)
    share, kept = kept.mean(axis=(1, 2))[:, None], kept[..., None]
    mixed = kept * images + (1 - kept) * images[partner]
    return to_uint8(mixed), share * targets + (1 - share) * targets[partner]


def _next_real_row(mask: jax.Array) -> jax.Array:
    """[B] bool -> [B] int32: for every real row the next one, the last followed by the first."""
    real_first = jnp.argsort(~mask, stable=True)
    following = real_first[(jnp.arange(len(mask)) + 1) % jnp.maximum(mask.sum(), 1)]
    return jnp.zeros_like(real_first).at[real_first].set(following)
