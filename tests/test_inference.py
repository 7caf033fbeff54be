"""The towers as embedding runs them: the same function as the linen modules, and each image for itself."""

import dataclasses

import jax
import numpy as np
import pytest

from probe.backbones import load_backbone, make_embed_fn
from probe.backbones.embedding import make_stages
from probe.backbones.precision import Precision, dense, make_kernel
from tests.golden.cases import CASES, TOWERS
from tests.parity import TOLERANCE, relative_error

VIT_CASES = [case for case in CASES if case.name.startswith("clip")]
PRECISIONS = [(case, name) for case in CASES for name in ("float32", "bfloat16")]
PRECISIONS += [(case, "int8") for case in VIT_CASES]


def pictures(num: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """[num, H, W, 3] uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (num, *size, 3), np.uint8)


def cosines(ours: object, theirs: object) -> np.ndarray:
    """[B], of the rows."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_equals_pytorch(case) -> None:
    backbone = load_backbone(TOWERS / case.name)
    with np.load(TOWERS / case.name / "golden.npz") as golden:
        preprocessing = backbone.preprocessing
        hidden = golden["pixels"].astype(np.float64) * preprocessing.std + preprocessing.mean
        hidden = (hidden / preprocessing.rescale_factor).astype(np.float32)  # as if pixels could be any number
        for stage in make_stages(backbone, backbone.views, Precision()):
            hidden = jax.jit(stage.apply)(stage.weights, hidden)
        assert relative_error(hidden["pooler"], golden["pooler_output"]) <= TOLERANCE
        assert ("projected" in hidden) == ("projected" in golden)
        if "projected" in hidden:
            assert relative_error(hidden["projected"], golden["projected"]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_equals_the_linen_module(case) -> None:
    backbone = load_backbone(TOWERS / case.name)
    images = pictures(5, case.input_size)
    with jax.default_matmul_precision("highest"):
        output = jax.jit(backbone.apply)(backbone.variables, images)
    ours = make_embed_fn(backbone, backbone.views)(images)
    theirs = {"pooler": output.pooler_output, "projected": output.projected}
    assert set(ours) == set(backbone.views)
    assert {view: relative_error(ours[view], theirs[view]) <= TOLERANCE for view in ours} == dict.fromkeys(ours, True)


@pytest.mark.parametrize(("case", "name"), PRECISIONS, ids=lambda value: getattr(value, "name", value))
def test_an_embedding_depends_on_its_image_alone_to_the_bit(case, name) -> None:
    """Not on its place in the batch, nor on what fills the rest: padding, or brighter or darker pictures."""
    backbone = load_backbone(TOWERS / case.name)
    embed_fn = make_embed_fn(backbone, backbone.views, Precision(name))
    images = pictures(4, case.input_size)
    whole = {view: np.asarray(rows) for view, rows in embed_fn(images).items()}
    fills = (np.zeros_like(images), np.full_like(images, 255), pictures(4, case.input_size, seed=1))
    for index, (place, fill) in enumerate(zip((0, 1, 3), fills, strict=True)):
        batch = fill.copy()
        batch[place] = images[index]
        for view, rows in embed_fn(batch).items():
            np.testing.assert_array_equal(np.asarray(rows)[place], whole[view][index])


@pytest.mark.parametrize(("case", "name"), PRECISIONS, ids=lambda value: getattr(value, "name", value))
def test_rounding_moves_embeddings_a_little(case, name) -> None:
    backbone = load_backbone(TOWERS / case.name)
    images = pictures(8, case.input_size)
    exact = make_embed_fn(backbone, ("pooler",))(images)["pooler"]
    rounded = make_embed_fn(backbone, ("pooler",), Precision(name))(images)["pooler"]
    # These towers are narrow, so that roundings average out less than in published ones.
    least = {"float32": 1 - 1e-9, "bfloat16": 0.9999, "int8": 0.999}[name]
    assert cosines(rounded, exact).min() >= least
    assert (np.asarray(rounded) == np.asarray(exact)).all() == (name == "float32")


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=lambda case: case.name)
def test_images_that_no_tower_takes_are_refused(case) -> None:
    backbone = load_backbone(TOWERS / case.name)
    embed_fn = make_embed_fn(backbone, ("pooler",))
    images = pictures(2, case.input_size)
    with pytest.raises(TypeError, match=r"images must be uint8 in 0\.\.255, got float32"):
        embed_fn(images.astype(np.float32))
    with pytest.raises(ValueError, match=r"this tower takes .*, got .*|channels, got"):
        embed_fn(images[:, :, :, :2])


def test_the_second_batch_compiles_nothing(tiny_clip) -> None:
    embed_fn = make_embed_fn(load_backbone(tiny_clip), ("pooler",))
    embed_fn(pictures(2, (16, 16)))
    with jax.log_compiles(), jax.transfer_guard_device_to_host("disallow"):
        import logging

        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("jax").addHandler(handler)
        try:
            embed_fn(pictures(2, (16, 16), seed=1))
        finally:
            logging.getLogger("jax").removeHandler(handler)
    assert not [record for record in records if "ompiling" in record]


def test_int8_products_are_those_of_the_rounded_numbers() -> None:
    """int32 sums are exact, so that nothing but the rounding to 8 bits and the last scaling can differ."""
    rng = np.random.default_rng(0)
    inputs, kernel, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 300), (300, 7), (7,)))
    prepared = make_kernel(kernel, bias, "int8")
    step = np.abs(inputs).max(axis=1, keepdims=True) / 127
    rounded = np.rint(inputs / step)
    scale = np.abs(kernel).max(axis=0) / 127
    expected = (rounded @ np.rint(kernel / scale)) * step * scale + bias
    np.testing.assert_allclose(jax.jit(dense)(inputs, prepared), expected, rtol=1e-5, atol=1e-5)


def test_a_token_of_zeros_is_no_division_by_zero() -> None:
    kernel = make_kernel(np.ones((4, 3), np.float32), np.arange(3), "int8")
    np.testing.assert_array_equal(jax.jit(dense)(np.zeros((2, 4), np.float32), kernel), [[0, 1, 2]] * 2)


def test_precisions_survive_being_recorded() -> None:
    precision = Precision("int8", ("layers_0/fc2",))
    assert Precision.from_json(precision.to_json()) == precision
    assert Precision.from_json(None) == Precision("float32")
    assert precision.operand("layers_0/fc2") == "bfloat16"
    assert dataclasses.replace(precision, in_bfloat16=()).operand("layers_0/fc2") == "int8"
