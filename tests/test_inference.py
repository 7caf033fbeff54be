"""The towers as embedding runs them: the same function as the linen modules, and each image for itself."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax

from probe.backbones import load_backbone, make_embed_fn
from probe.backbones.embedding import make_stages
from probe.backbones.precision import Precision, dense, make_kernel
from probe.machine import count_flops
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


def equations_of(jaxpr: Any) -> Iterator[Any]:
    """All of a program's, those of inner programs in their places."""
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr") or hasattr(value, "eqns")]
        for value in inner:
            yield from equations_of(getattr(value, "jaxpr", value))
        if not inner:
            yield equation


def program_of(case: Any, name: str, views: tuple[str, ...] = ("pooler",)) -> list[Any]:
    """The equations of the compiled program, on a batch of one."""
    embed_fn = make_embed_fn(load_backbone(TOWERS / case.name), views, Precision(name))
    return [*equations_of(jax.make_jaxpr(embed_fn)(pictures(1, case.input_size)).jaxpr)]


MOVING = {"transpose", "reshape", "broadcast_in_dim", "slice", "squeeze", "convert_element_type", "concatenate"}
PRODUCTS = {"dot_general", "conv_general_dilated"}


@pytest.mark.parametrize(("case", "name"), PRECISIONS, ids=lambda value: getattr(value, "name", value))
def test_products_alone_are_rounded_and_add_up_in_full(case, name) -> None:
    """Norms, softmax and the residual stream are float32, on every device; so are the sums of products."""
    equations = program_of(case, name)
    products = [equation for equation in equations if equation.primitive.name in PRODUCTS]
    operands = set()
    for product in products:
        left, right = (variable.aval.dtype.name for variable in product.invars)
        assert left == right
        operands.add(left)
        assert product.outvars[0].aval.dtype == ("int32" if left == "int8" else "float32")
        if left == "float32":  # also where the hardware would round its operands
            assert set(product.params["precision"]) == {lax.Precision.HIGHEST}
    assert name in operands
    if name == "float32":
        assert operands == {"float32"}
    for equation in equations:
        if equation.primitive.name not in PRODUCTS | MOVING:
            assert "bfloat16" not in {variable.aval.dtype.name for variable in equation.outvars}, equation


@pytest.mark.parametrize("case", VIT_CASES, ids=lambda case: case.name)
def test_what_nobody_reads_is_not_computed(case) -> None:
    """The operations are those counted by hand: of the last block the class token's, and of no other view."""
    backbone = load_backbone(TOWERS / case.name)
    config, image = backbone.config, jax.ShapeDtypeStruct((1, *case.input_size, 3), np.uint8)
    side = config.image_size // config.patch_size
    patches, width, mlp = side**2, config.hidden_size, config.intermediate_size
    tokens = patches + 1
    stem = patches * config.patch_size**2 * 3 * width
    block = tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width
    last = 2 * width**2 + 2 * width * mlp + 2 * tokens * width**2 + 2 * tokens * width
    expected = 2 * (stem + (config.num_hidden_layers - 1) * block + last)
    assert count_flops(make_embed_fn(backbone, ("pooler",)), image) == expected
    products = [equation.primitive.name for equation in program_of(case, "float32")].count("dot_general")
    assert products == 1 + 6 * (config.num_hidden_layers - 1) + 7  # queries, keys and values are one, the last's two
    if "projected" in backbone.views:
        both = count_flops(make_embed_fn(backbone, ("pooler", "projected")), image)
        assert both == expected + 2 * width * config.projection_dim


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
