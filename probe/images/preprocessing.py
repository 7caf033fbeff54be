"""Preprocessing: a decoded RGB picture -> uint8 [H, W, 3], as a checkpoint's `preprocessor_config.json` says.

Resizing and cropping equal transformers' Pillow processors to the bit, for the published layouts of CLIP,
ConvNext (which ResNets use), ViT, DeiT and BiT. Pixels stay uint8 here; they are normalised on the device.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image

from probe.errors import InputError
from probe.images.decoder import DECODING_RULES, MAX_PIXELS, decode_image

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_SUFFIXES = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")
_FIELDS = {
    "do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size", "crop_pct",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "decode",
}  # fmt: skip
_IGNORED_FIELDS = {  # they name classes and tensor formats, and change no pixel
    "image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format",
    "input_data_format", "return_tensors", "device", "disable_grouping", "_valid_processor_keys", "auto_map",
    "model_input_names",
}  # fmt: skip

# The defaults of transformers' processors, for fields that a config leaves out.
_CLIP: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "default_to_square": False,  # an integer size is the shortest edge, not a square
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": 224,
    "rescale_factor": 1 / 255,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
_REDUCING_GAP = 2  # how much larger than its target a JPEG of decode="fast" is still decoded, as Pillow's thumbnails
_PLAIN = _CLIP | {"do_center_crop": False, "image_mean": _HALF, "image_std": _HALF}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": _CLIP,
    "Bit": _CLIP,
    "ConvNext": _PLAIN | {"size": 384, "crop_pct": 224 / 256},
    "DeiT": _PLAIN | {"size": 256, "default_to_square": True, "do_center_crop": True},
    "ViT": _PLAIN | {"size": 224, "default_to_square": True, "resample": 2},
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens between a decoded RGB picture and the numbers that a tower reads.

    Two configs that do the same compare equal, whichever of the published layouts they were written in.
    """

    resize: int | tuple[int, int] | None  # shortest edge in pixels, or (height, width); None: as it is
    resample: int  # filter of the resize, as Pillow numbers them: 3 is bicubic
    crop: tuple[int, int] | None  # (height, width) cut from the centre, zeros where the picture is smaller
    rescale_factor: float  # on the device: pixel * rescale_factor, then (x - mean) / std
    mean: tuple[float, ...]  # [3]
    std: tuple[float, ...]  # [3], positive
    decode: Literal["exact", "fast"] = "exact"  # fast: large JPEGs at 1/2, 1/4 or 1/8, which changes pixels

    def __post_init__(self) -> None:
        sizes = [self.resize] if isinstance(self.resize, int) else [*(self.resize or ())]
        if any(size < 1 for size in (*sizes, *(self.crop or ()))):
            raise InputError(f"preprocessor: sizes must be positive, got {self.resize} and crop {self.crop}")
        if self.crop is None and not isinstance(self.resize, tuple):
            raise InputError(
                "preprocessor: images would come out in different sizes, neither cropped nor resized to an "
                'exact size. Set do_center_crop and crop_size, or size {"height": ..., "width": ...}.'
            )
        if self.resample not in set(Image.Resampling):
            raise InputError(f"preprocessor: resample must be 0 to 5, Pillow's filters, got {self.resample}")
        if self.decode not in ("exact", "fast"):
            raise InputError(f"preprocessor: decode must be exact or fast, got {self.decode!r}")
        numbers = (self.rescale_factor, *self.mean, *self.std)
        lengths = (len(self.mean), len(self.std))
        if lengths != (3, 3) or not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise InputError(
                "preprocessor: image_mean and image_std need 3 finite numbers each, std positive, "
                f"got {list(self.mean)} and {list(self.std)}"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every preprocessed image."""
        size = self.crop or self.resize
        assert isinstance(size, tuple)
        return size

    @property
    def reduce_to(self) -> int | None:
        """The shorter side, in pixels, down to which a JPEG may be decoded; None: not below its own."""
        if self.decode == "exact" or self.resize is None:
            return None
        return _REDUCING_GAP * (self.resize if isinstance(self.resize, int) else max(self.resize))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """Reads a Hugging Face `preprocessor_config.json`, of image processors and older feature extractors.

        Raises: InputError for a processor whose rules are not known here, and for fields not understood.
        """
        given = {name: value for name, value in config.items() if value is not None}
        kind = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")
        family = next((kind.removesuffix(suffix) for suffix in _SUFFIXES if kind.endswith(suffix)), kind)
        if family not in _PROCESSORS:
            known = ", ".join(f"{name}ImageProcessor" for name in sorted(_PROCESSORS))
            raise InputError(
                f"preprocessor_config.json: image_processor_type {kind!r} is none of {known}. If the "
                "checkpoint resizes, crops and normalises as CLIP does, write CLIPImageProcessor and all fields."
            )
        understood = _FIELDS - {"do_center_crop" if family == "ConvNext" else "crop_pct"} | _IGNORED_FIELDS
        if unknown := sorted(name for name in given if name not in understood and given[name] is not False):
            raise InputError(f"preprocessor_config.json: {kind} with {unknown} is not understood")
        fields = _PROCESSORS[family] | given
        resize: int | tuple[int, int] | None = None
        crop = None
        try:
            if fields.get("do_resize", True):
                resize = _read_size("size", fields["size"], square=fields["default_to_square"])
            if family == "ConvNext":
                resize, crop = _convnext_sizes(resize, float(fields["crop_pct"]))
            elif fields["do_center_crop"]:
                size = _read_size("crop_size", fields["crop_size"], square=True)
                if isinstance(size, int):
                    raise InputError("preprocessor_config.json: crop_size needs height and width")
                crop = size
            normalise = fields.get("do_normalize", True)
            return cls(
                resize=resize,
                resample=int(fields["resample"]),
                crop=crop,
                rescale_factor=float(fields["rescale_factor"]) if fields.get("do_rescale", True) else 1.0,
                mean=_three(fields["image_mean"]) if normalise else (0.0, 0.0, 0.0),
                std=_three(fields["image_std"]) if normalise else (1.0, 1.0, 1.0),
                decode=fields.get("decode", "exact"),
            )
        except (TypeError, ValueError, ZeroDivisionError) as err:
            raise InputError(f"preprocessor_config.json: a field that is no number: {err}") from err

    def to_config(self) -> dict[str, Any]:
        """The same as a `preprocessor_config.json` that `from_config` and transformers read."""
        config: dict[str, Any] = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": self.resize is not None,
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "do_rescale": True,
            "rescale_factor": self.rescale_factor,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if isinstance(self.resize, int):
            config["size"] = {"shortest_edge": self.resize}
        elif self.resize is not None:
            config["size"] = {"height": self.resize[0], "width": self.resize[1]}
        if self.crop is not None:
            config["crop_size"] = {"height": self.crop[0], "width": self.crop[1]}
        if self.decode != "exact":
            config["decode"] = self.decode
        return config

    def rules(self) -> dict[str, Any]:
        """All that decides which numbers bytes become, as JSON values: part of a cache's fingerprint."""
        return {
            **DECODING_RULES,
            "resize": list(self.resize) if isinstance(self.resize, tuple) else self.resize,
            "resample": Image.Resampling(self.resample).name.lower(),
            "crop": list(self.crop) if self.crop else None,
            "rescale_factor": self.rescale_factor,
            "mean": list(self.mean),
            "std": list(self.std),
            # Named only where it is not exact: what was made before there was a choice is still the same.
            **({"decode": f"JPEG reduced to {self.reduce_to}"} if self.decode == "fast" else {}),
        }

    def apply(self, image: Image.Image) -> np.ndarray:
        """Resizes and crops an RGB picture. Returns: [H, W, 3] uint8, H and W as `image_size`.

        Source: `PilBackend` of transformers 5, whose rounding is followed to the bit.
        """
        width, height = image.size
        if isinstance(self.resize, tuple):
            image = image.resize(self.resize[::-1], self.resample)
        elif self.resize is not None:
            longest = int(self.resize * max(width, height) / min(width, height))
            size = (self.resize, longest) if width <= height else (longest, self.resize)
            image = image.resize(size, self.resample)
        if self.crop is not None:
            # also for a picture smaller than the crop: Pillow fills with zeros what lies outside
            left, top = (image.width - self.crop[1]) // 2, (image.height - self.crop[0]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return np.array(image)


def load_image(data: bytes, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes one image and preprocesses it: see `decode_image` for what it takes and which rules hold.

    Returns: [H, W, 3] uint8, H and W as `preprocessing.image_size`.
    Raises: ImageError, whatever is wrong with the image.
    """
    return preprocessing.apply(decode_image(data, max_pixels=max_pixels, reduce_to=preprocessing.reduce_to))


def _read_size(field: str, size: Any, *, square: bool) -> int | tuple[int, int]:
    """The shortest edge, or (height, width)."""
    match size:
        case int():
            return (size, size) if square else size
        case {"shortest_edge": int(edge), **rest} if not any(rest.values()):
            return edge
        case {"height": int(height), "width": int(width), **rest} if not any(rest.values()):
            return height, width
        case [int(height), int(width)]:
            return height, width
    raise InputError(
        f'preprocessor_config.json: {field} must be an integer, {{"shortest_edge": n}} or '
        f'{{"height": n, "width": n}}, got {size!r}'
    )


def _convnext_sizes(
    size: int | tuple[int, int] | None, crop_pct: float
) -> tuple[int | tuple[int, int] | None, tuple[int, int] | None]:
    """Below 384 pixels: shortest edge to size / crop_pct, then crop; from 384 on, warp to a square."""
    if not isinstance(size, int):
        raise InputError("preprocessor_config.json: ConvNextImageProcessor needs an integer size or shortest_edge")
    return (int(size / crop_pct), (size, size)) if size < 384 else ((size, size), None)


def _three(values: Any) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(map(float, values))
