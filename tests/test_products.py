"""The towers' matrix product: what is rounded, what is not, and what the device is asked to multiply."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.backbones import products

ROUNDING = 2.0**-8  # largest relative error of a number rounded to bfloat16
SIZES = st.sampled_from([1, 3, 8])  # each new shape is compiled


@settings(deadline=None, max_examples=10)
@given(rows=st.lists(SIZES, min_size=1, max_size=2), width=SIZES, features=SIZES, seed=st.integers(0, 99))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_and_its_gradients_are_off_by_their_operands_rounding(dtype, rows, width, features, seed):
    rng = np.random.default_rng(seed)
    shapes = [(*rows, width), (width, features), (*rows, features)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    @jax.jit
    def run(inputs, kernel, cotangent):
        result, pull = jax.vjp(lambda x, w: products.dense(x, w, dtype), inputs, kernel)
        return result, *pull(cotangent)

    def in_float64(inputs, kernel, cotangent):
        to_kernel = inputs.reshape(-1, width).T @ cotangent.reshape(-1, features)
        return inputs @ kernel, cotangent @ kernel.T, to_kernel

    exact = in_float64(*(array.astype(np.float64) for array in arrays))
    scale = in_float64(*map(np.abs, arrays))  # of the terms that are summed
    for found, wanted, size in zip(run(*arrays), exact, scale, strict=True):
        error = np.abs(found - wanted) / size
        assert found.dtype == jnp.float32
        assert np.all(error <= (1e-6 if dtype == jnp.float32 else 2.01 * ROUNDING))
        assert dtype == jnp.float32 or found.size < 8 or np.any(error > 1e-5)


@pytest.mark.parametrize(("dtype", "operand"), [(jnp.float32, "f32"), (jnp.bfloat16, "bf16")])
@pytest.mark.parametrize("features", [4, 16])
def test_the_device_multiplies_operands_of_one_type(dtype, operand, features):
    """Forwards and backwards: beside a float32 cotangent, a bfloat16 product is computed as a float32 one."""

    def loss(inputs, kernel):
        return jnp.sum(products.dense(inputs, kernel, dtype) ** 2)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 5, 8), (8, features))]
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).as_text()
    tensor = r"tensor<[0-9x]*(\w+)>"
    types = re.findall(rf"dot_general.*: \({tensor}, {tensor}\) -> {tensor}", program)
    assert types == [(operand, operand, "f32")] * 3


def test_weights_of_float32_have_float32_gradients():
    """Sums of small updates need all digits: a bfloat16 gradient would have 8 bits of them."""
    inputs, kernel = jnp.full((1, 4, 1), 1 / 3), jnp.ones((1, 1))
    gradient = jax.grad(lambda kernel: products.dense(inputs, kernel, jnp.bfloat16).sum())(kernel)
    rounded = np.float32(jnp.bfloat16(1 / 3))
    assert gradient.dtype == jnp.float32
    assert gradient[0, 0] == 4 * rounded
