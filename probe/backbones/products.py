"""The matrix products of the towers: float32 operands, or bfloat16 ones, and float32 sums and results either way.

Only operands are ever rounded: the residual stream, norms, softmax and the weights' gradients are float32. The
backward products are written out, since those that JAX derives would multiply bfloat16 by a float32 cotangent, which
no hardware has an instruction for: a CPU then computes all of it in float32, at half the rate. The cotangent is an
operand too, and is rounded as the others are.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def _operand(array: jax.Array, dtype: Any) -> jax.Array:
    return array.astype(dtype)


def _precision(dtype: Any) -> lax.Precision:
    """All of float32's digits where operands have them: by default a GPU or TPU rounds them."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(inputs: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """[..., K] @ [K, N] -> [..., N] float32.

    Args:
      inputs, kernel: float32; rounded to `dtype` here.
      dtype: jnp.float32 or jnp.bfloat16, of the operands.
    """
    return _dense_fwd(inputs, kernel, dtype)[0]


def _dense_fwd(inputs: jax.Array, kernel: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    inputs, kernel = _operand(inputs, dtype), _operand(kernel, dtype)
    return _contract(inputs, kernel, [inputs.ndim - 1], [0], dtype), (inputs, kernel)


def _dense_bwd(dtype: Any, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = saved
    cotangent = _operand(cotangent, dtype)
    last = inputs.ndim - 1
    to_inputs = _contract(cotangent, kernel, [last], [1], dtype)
    # XLA's fast products for the CPU want the rows that are summed over last in the left operand.
    columns = jnp.moveaxis(inputs, -1, 0)
    to_kernel = _contract(columns, cotangent, range(1, last + 1), range(last), dtype)
    return to_inputs, to_kernel


dense.defvjp(_dense_fwd, _dense_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(subscripts: str, left: jax.Array, right: jax.Array, dtype: Any) -> jax.Array:
    """`jnp.einsum` of two float32 arrays, rounded to `dtype` first -> float32.

    Args:
      subscripts: as in "bqhd,bkhd->bhqk"; each index stands in two of the three terms or in all.
    """
    return _einsum_fwd(subscripts, left, right, dtype)[0]


def _einsum_fwd(subscripts: str, left: jax.Array, right: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    left, right = _operand(left, dtype), _operand(right, dtype)
    return _einsum(subscripts, left, right, dtype), (left, right)


def _einsum_bwd(subscripts: str, dtype: Any, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> Any:
    left, right = saved
    (to_left, to_right), result = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    cotangent = _operand(cotangent, dtype)
    return (
        _einsum(f"{result},{to_right}->{to_left}", cotangent, right, dtype),
        _einsum(f"{to_left},{result}->{to_right}", left, cotangent, dtype),
    )


einsum.defvjp(_einsum_fwd, _einsum_bwd)


def _einsum(subscripts: str, left: jax.Array, right: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum(subscripts, left, right, precision=_precision(dtype), preferred_element_type=jnp.float32)


def _contract(left: jax.Array, right: jax.Array, left_axes: Any, right_axes: Any, dtype: Any) -> jax.Array:
    axes = ((tuple(left_axes), tuple(right_axes)), ((), ()))
    return lax.dot_general(left, right, axes, precision=_precision(dtype), preferred_element_type=jnp.float32)
