"""The towers' matrix products: what is rounded, what is not, and what the device is asked to multiply."""

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
SUBSCRIPTS = ["btk,kn->btn", "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"]


@settings(deadline=None, max_examples=10)
@given(
    subscripts=st.sampled_from(SUBSCRIPTS),
    sizes=st.fixed_dictionaries(dict.fromkeys("btknqhd", SIZES)),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_and_its_gradients_are_off_by_their_operands_rounding(dtype, subscripts, sizes, seed):
    rng = np.random.default_rng(seed)
    left_term, right_term, result_term = terms = subscripts.replace("->", ",").split(",")
    arrays = [rng.normal(size=[sizes[index] for index in term]).astype(np.float32) for term in terms]

    def product(left, right):
        if subscripts == "btk,kn->btn":
            return products.dense(left, right, dtype)
        return products.einsum(subscripts, left, right, dtype)

    @jax.jit
    def run(left, right, weights):
        result, pull = jax.vjp(product, left, right)
        return result, *pull(weights)

    def in_float64(left, right, weights):
        return (
            np.einsum(subscripts, left, right),
            np.einsum(f"{result_term},{right_term}->{left_term}", weights, right),
            np.einsum(f"{left_term},{result_term}->{right_term}", left, weights),
        )

    exact = in_float64(*(array.astype(np.float64) for array in arrays))
    scale = in_float64(*map(np.abs, arrays))  # of the terms that are summed
    for found, wanted, size in zip(run(*arrays), exact, scale, strict=True):
        assert found.dtype == jnp.float32
        share = 2.01 * ROUNDING if dtype == jnp.bfloat16 else 1e-6
        assert np.all(np.abs(found - wanted) <= share * size)
        assert dtype == jnp.float32 or found.size < 8 or np.any(np.abs(found - wanted) > 1e-5 * size)


@pytest.mark.parametrize(("dtype", "operand"), [(jnp.float32, "f32"), (jnp.bfloat16, "bf16")])
def test_the_device_multiplies_operands_of_one_type(dtype, operand):
    """Forwards and backwards: beside a float32 cotangent, a bfloat16 product is computed as a float32 one."""

    def loss(inputs, kernel, keys):
        queries = products.dense(inputs, kernel, dtype)
        return jnp.sum(products.einsum("bqd,bkd->bqk", queries, keys, dtype) ** 2)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 5, 8), (8, 8), (2, 5, 8))]
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).as_text()
    types = re.findall(
        r"dot_general.*: \(tensor<[0-9x]*(\w+)>, tensor<[0-9x]*(\w+)>\) -> tensor<[0-9x]*(\w+)>", program
    )
    assert types == [(operand, operand, "f32")] * 6  # two products, each with two of its own on the way back


def test_weights_of_float32_have_float32_gradients():
    """Sums of small updates need all digits: a bfloat16 gradient would have 8 bits of them."""
    inputs, kernel = jnp.full((1, 4, 1), 1 / 3), jnp.ones((1, 1))
    gradient = jax.grad(lambda kernel: products.dense(inputs, kernel, jnp.bfloat16).sum())(kernel)
    rounded = np.float32(jnp.bfloat16(1 / 3))
    assert gradient.dtype == jnp.float32
    assert gradient[0, 0] == 4 * rounded
