"""Decoding and preprocessing: parity with transformers to the bit, golden outcomes of odd and bad files, and
worker processes that hang, die or are lied to."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from probe.errors import InputError
from probe.images import ImageError, Preprocessing, load_image
from probe.images.decoder import decode_image
from tests.bad_images import PICTURE, Case, cases, encode

CASES = {case.name: case for case in cases()}
SMALL = Preprocessing.from_config(
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 20}, "crop_size": 16}
)


@pytest.fixture(scope="module")
def processors() -> dict[str, Any]:
    """transformers' own processors, which need no torch."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return {
        "CLIP": CLIPImageProcessorPil,
        "Bit": BitImageProcessorPil,
        "ConvNext": ConvNextImageProcessorPil,
        "DeiT": DeiTImageProcessorPil,
        "ViT": ViTImageProcessorPil,
    }


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def reference(processor: Any, image: Image.Image) -> np.ndarray:
    """[H, W, 3] uint8 after transformers' resize and crop."""
    pixels = processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert pixels.dtype == np.uint8
    return np.moveaxis(pixels, 0, -1)


# preprocessing

SIZES = st.one_of(
    st.integers(1, 60),
    st.fixed_dictionaries({"shortest_edge": st.integers(1, 60)}),
    st.fixed_dictionaries({"height": st.integers(1, 60), "width": st.integers(1, 60)}),
)


@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    size=SIZES,
    crop=st.one_of(st.integers(1, 80), st.tuples(st.integers(1, 80), st.integers(1, 80))),
    resample=st.integers(0, 5),
    do_resize=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=300, deadline=None)
def test_clip_preprocessing_equals_transformers(
    processors: dict[str, Any], width: int, height: int, size: Any, crop: Any, resample: int, do_resize: bool, seed: int
) -> None:
    if isinstance(crop, tuple):
        crop = {"height": crop[0], "width": crop[1]}
    config = {"size": size, "crop_size": crop, "resample": resample, "do_resize": do_resize}
    ours = Preprocessing.from_config({"image_processor_type": "CLIPImageProcessor", **config})
    image = noise(width, height, seed)
    np.testing.assert_array_equal(ours.apply(image), reference(processors["CLIP"](**config), image))


@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(1, 90), crop_pct=st.floats(0.3, 1.0))
@settings(max_examples=150, deadline=None)
def test_convnext_preprocessing_equals_transformers(
    processors: dict[str, Any], width: int, height: int, size: int, crop_pct: float
) -> None:
    config: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_pct": crop_pct}
    ours = Preprocessing.from_config({"image_processor_type": "ConvNextImageProcessor", **config})
    image = noise(width, height)
    np.testing.assert_array_equal(ours.apply(image), reference(processors["ConvNext"](**config), image))


@pytest.mark.parametrize("size", [383, 384, 385])
def test_convnext_warps_from_384_on(processors: dict[str, Any], size: int) -> None:
    ours = Preprocessing.from_config({"feature_extractor_type": "ConvNextFeatureExtractor", "size": size})
    image = noise(123, 77)
    expected = reference(processors["ConvNext"](size={"shortest_edge": size}), image)
    np.testing.assert_array_equal(ours.apply(image), expected)
    assert (ours.resize == (size, size)) == (size >= 384)


def assert_equal_on_photos(processors: dict[str, Any], photos: list[Path]) -> None:
    assert photos
    for photo in photos:
        data = photo.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            for family in processors:
                ours = Preprocessing.from_config({"image_processor_type": f"{family}ImageProcessor"})
                theirs = reference(processors[family](), image)
                np.testing.assert_array_equal(load_image(data, ours), theirs, err_msg=f"{photo} {family}")


def test_photos_equal_transformers(processors: dict[str, Any]) -> None:
    """The two photos that scikit-learn brings."""
    folder = Path(importlib.util.find_spec("sklearn.datasets").origin or "").parent / "images"  # type: ignore[union-attr]
    assert_equal_on_photos(processors, sorted(folder.glob("*.jpg")))


@pytest.mark.photos
def test_many_photos_equal_transformers(processors: dict[str, Any], shared: Path) -> None:
    assert_equal_on_photos(processors, sorted(shared.glob("data/dogs_cats/test/*/*.jpg")))


@pytest.mark.parametrize("family", ["CLIP", "Bit", "ConvNext", "DeiT", "ViT"])
def test_defaults_equal_transformers(processors: dict[str, Any], family: str) -> None:
    """A config that says nothing but its type means what transformers' class means."""
    theirs = processors[family]()
    ours = Preprocessing.from_config({"image_processor_type": f"{family}ImageProcessor"})
    assert ours == Preprocessing.from_config(theirs.to_dict())
    assert (ours.mean, ours.std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
    assert ours.rescale_factor == theirs.rescale_factor
    image = noise(301, 257)
    np.testing.assert_array_equal(ours.apply(image), reference(theirs, image))


def test_old_feature_extractor_layouts() -> None:
    """openai/clip-vit-base-patch32 and microsoft/resnet-50 as published: integer sizes, and crop_pct."""
    clip = {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    assert Preprocessing.from_config(clip) == Preprocessing.from_config({"image_processor_type": "CLIPImageProcessor"})
    resnet = Preprocessing.from_config({
        "crop_pct": 0.875, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
        "feature_extractor_type": "ConvNextFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    })  # fmt: skip
    assert (resnet.resize, resnet.crop, resnet.image_size) == (256, (224, 224), (224, 224))


@given(
    size=SIZES,
    crop=st.one_of(st.none(), st.integers(1, 80)),
    rescale=st.sampled_from([1 / 255, 1.0, 0.5]),
    do_rescale=st.booleans(),
    do_normalize=st.booleans(),
)
def test_config_round_trip(size: Any, crop: int | None, rescale: float, do_rescale: bool, do_normalize: bool) -> None:
    config = {
        "image_processor_type": "ViTImageProcessor", "size": size, "do_center_crop": crop is not None,
        "crop_size": crop, "do_rescale": do_rescale, "rescale_factor": rescale, "do_normalize": do_normalize,
    }  # fmt: skip
    if isinstance(size, dict) and "shortest_edge" in size and crop is None:
        with pytest.raises(InputError, match="different sizes"):
            Preprocessing.from_config(config)
        return
    ours = Preprocessing.from_config(config)
    assert Preprocessing.from_config(json.loads(json.dumps(ours.to_config()))) == ours
    assert json.loads(json.dumps(ours.rules())) == ours.rules()
    assert ours.rescale_factor == (rescale if do_rescale else 1.0)
    assert (ours.mean == (0.0, 0.0, 0.0)) == (not do_normalize)
    assert ours.apply(noise(50, 40)).shape == (*ours.image_size, 3)


def test_written_configs_mean_the_same_to_transformers(processors: dict[str, Any]) -> None:
    resnet = Preprocessing.from_config({"image_processor_type": "ConvNextImageProcessor", "size": 64, "crop_pct": 0.9})
    image = noise(211, 97)
    config = {k: v for k, v in resnet.to_config().items() if k != "image_processor_type"}
    np.testing.assert_array_equal(resnet.apply(image), reference(processors["CLIP"](**config), image))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "image_processor_type '' is none of BitImageProcessor, CLIPImageProcessor"),
        ({"image_processor_type": "LevitImageProcessor", "size": 224}, "'LevitImageProcessor' is none of"),
        ({"image_processor_type": "CLIPImageProcessor", "do_pad": True}, r"\['do_pad'\] is not understood"),
        ({"image_processor_type": "CLIPImageProcessor", "crop_pct": 0.9}, r"\['crop_pct'\] is not understood"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 5}}, "size must be an integer"),
        ({"image_processor_type": "CLIPImageProcessor", "size": "big"}, "size must be an integer"),
        ({"image_processor_type": "CLIPImageProcessor", "crop_size": 0}, "sizes must be positive"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "different sizes"),
        ({"image_processor_type": "CLIPImageProcessor", "resample": 9}, "resample must be 0 to 5"),
        ({"image_processor_type": "CLIPImageProcessor", "image_std": [1, 1, 0]}, "std positive"),
        ({"image_processor_type": "CLIPImageProcessor", "image_mean": ["a"]}, "no number"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"height": 5, "width": 5}}, "shortest_edge"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessing.from_config(config)


# one image


@pytest.mark.parametrize(("width", "height", "scale"), [(2400, 79, 1), (80, 2400, 2), (500, 160, 4), (330, 320, 8)])
@pytest.mark.parametrize("turned", [False, True])
def test_fast_decoding_reduces_large_jpegs_and_nothing_else(width: int, height: int, scale: int, turned: bool) -> None:
    """Down to twice the size that the backbone reads, which here is 20, and never below."""
    fast = dataclasses.replace(SMALL, decode="fast")
    picture = PICTURE.resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1  # a camera held upright
    jpeg = encode(picture, "JPEG", exif=exif, quality=95)
    decoded = decode_image(jpeg, reduce_to=fast.reduce_to)
    assert sorted(decoded.size) == sorted(-(-side // scale) for side in (width, height))
    exact, quick = load_image(jpeg, SMALL), load_image(jpeg, fast)
    assert np.array_equal(exact, quick) == (scale == 1)
    assert np.abs(exact.astype(int) - quick).mean() < 2
    for kind in ("PNG", "WEBP"):
        data = encode(picture, kind)
        np.testing.assert_array_equal(load_image(data, fast), load_image(data, SMALL))


def test_fast_decoding_is_part_of_the_rules() -> None:
    fast = dataclasses.replace(SMALL, decode="fast")
    assert fast != SMALL
    assert fast.rules() != SMALL.rules()
    assert Preprocessing.from_config(json.loads(json.dumps(fast.to_config()))) == fast
    assert "decode" not in SMALL.rules()  # or caches made before there was a choice would be refused
    with pytest.raises(InputError, match="decode must be exact or fast, got 'rough'"):
        Preprocessing.from_config(SMALL.to_config() | {"decode": "rough"})
    as_it_is = Preprocessing(resize=None, resample=3, crop=(9, 9), rescale_factor=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert dataclasses.replace(as_it_is, decode="fast").reduce_to is None


@pytest.mark.parametrize("name", CASES)
def test_golden_outcome(name: str) -> None:
    case = CASES[name]
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        check_outcome(case, *attempt(case))
    assert not leaked
    assert limit == Image.MAX_IMAGE_PIXELS


def attempt(case: Case) -> tuple[np.ndarray | None, ImageError | None]:
    try:
        return np.asarray(decode_image(case.data)), None
    except ImageError as err:
        return None, err


def check_outcome(case: Case, pixels: np.ndarray | None, failure: ImageError | None) -> None:
    if isinstance(case.expected, str):
        assert failure is not None
        assert failure.reason == case.expected
        assert str(failure).isprintable()
    else:
        assert failure is None
        assert pixels is not None
        assert pixels.shape == case.expected.shape
        assert pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - case.expected).mean() <= case.tolerance


def test_colour_conversion_equals_transformers(processors: dict[str, Any]) -> None:
    """Where transformers has a rule of its own we follow it: palettes, grey, CMYK and transparency."""
    same = [name for name in CASES if not isinstance(CASES[name].expected, str)]
    same = [name for name in same if "exif" not in name and "grey16" not in name]
    processor = processors["CLIP"](size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in same:
            ours = load_image(CASES[name].data, SMALL)
            theirs = reference(processor, Image.open(io.BytesIO(CASES[name].data)))
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert len(same) > 35


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_files_fail_cleanly(data: st.DataObject) -> None:
    """Whatever is done to a file, it loads in the right shape or raises ImageError."""
    case = CASES[data.draw(st.sampled_from(sorted(set(CASES) - {"text-bomb.png", "bomb-900-million.png"})))]
    content = bytearray(case.data)
    for _ in range(data.draw(st.integers(1, 5))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    with contextlib.suppress(ImageError):
        assert load_image(bytes(content), SMALL, max_pixels=1_000_000).shape == (16, 16, 3)


@pytest.mark.parametrize(("num_pixels", "fits"), [(1199, False), (1200, True)])
def test_max_pixels_is_exact(num_pixels: int, fits: bool) -> None:
    data = encode(PICTURE, "PNG")  # 40 x 30
    if fits:
        load_image(data, SMALL, max_pixels=num_pixels)
    else:
        with pytest.raises(ImageError, match="1,199 pixels") as caught:
            load_image(data, SMALL, max_pixels=num_pixels)
        assert caught.value.reason == "too-big"


def test_heic_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="HEIC needs") as caught:
        decode_image(CASES["heic.jpg"].data)
    assert caught.value.reason == "format"


def test_heic() -> None:
    pytest.importorskip("pillow_heif", reason="needs the extra `heic`").register_heif_opener()
    data = encode(PICTURE.resize((400, 300)), "HEIF", quality=95)
    assert np.abs(np.asarray(decode_image(data)).astype(int) - np.asarray(PICTURE.resize((400, 300)))).mean() < 4
    with pytest.raises(ImageError) as caught:
        decode_image(data[: len(data) // 3])
    assert caught.value.reason == "corrupt"
