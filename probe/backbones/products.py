"""The matrix product of the towers' dense layers: float32 or bfloat16 operands, float32 sums and results either way.

Only operands are ever rounded: the residual stream, norms, attention weights and the gradients of weights are float32.
The backward products are written out, since those that JAX derives would multiply bfloat16 by a float32 cotangent,
which no hardware has an instruction for: a CPU then computes all of it in float32, at half the rate. The cotangent is
an operand too, and is rounded as the others are.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(inputs: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """[..., K] @ [K, N] -> [..., N] float32.

    Args:
      inputs, kernel: float32; rounded to `dtype` here.
      dtype: jnp.float32 or jnp.bfloat16, of the operands.
    """
    return _forward(inputs, kernel, dtype)[0]


def _forward(inputs: jax.Array, kernel: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    inputs, kernel = inputs.astype(dtype), kernel.astype(dtype)
    return _contract(inputs, kernel, [inputs.ndim - 1], [0]), (inputs, kernel)


def _backward(dtype: Any, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, kernel = saved
    cotangent = cotangent.astype(dtype)
    rows = range(inputs.ndim - 1)
    to_inputs = _contract(cotangent, kernel, [inputs.ndim - 1], [1])
    if dtype == jnp.float32 and kernel.shape[0] > kernel.shape[1]:
        return to_inputs, _contract(inputs, cotangent, rows, rows)  # to transpose so much costs more than it gains
    # XLA's fast products for the CPU, in bfloat16 the only fast ones, sum over the last axis of the left operand.
    columns = jnp.moveaxis(inputs, -1, 0)
    return to_inputs, _contract(columns, cotangent, [1 + axis for axis in rows], rows)


dense.defvjp(_forward, _backward)


def _contract(left: jax.Array, right: jax.Array, left_axes: Iterable[int], right_axes: Iterable[int]) -> jax.Array:
    # float32 with all its digits: by default a GPU or TPU drops some. Products of bfloat16 are exact in float32.
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = ((tuple(left_axes), tuple(right_axes)), ((), ()))
    return lax.dot_general(left, right, axes, precision=precision, preferred_element_type=jnp.float32)
