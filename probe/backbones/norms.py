"""Layer norm, its backward pass written out: two passes over the tokens instead of eight.

Of what JAX derives, XLA for the CPU writes every broadcast vector out as a whole array, and it adds up the gradient of
the residual stream anew from the last block down for each reader of each block's, so that the work grows with the
square of the depth. A division, which it never does twice, ends that: the last one here is not a product with the
reciprocal on purpose.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(inputs: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Brings the last axis to mean 0 and variance 1, then scales and shifts it.

    Args:
      inputs: [..., D] float32; scale, bias: [D] float32.
      epsilon: added to the variance.
    Returns: [..., D] float32.
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    return _forward(inputs, scale, bias, epsilon)[0]


def _forward(inputs: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[jax.Array, Any]:
    # E[x²] - E[x]² would lose digits where means are large, and here it is no faster.
    mean = inputs.mean(axis=-1, keepdims=True)
    variance = jnp.square(inputs - mean).mean(axis=-1, keepdims=True)
    outputs = (inputs - mean) * (lax.rsqrt(variance + epsilon) * scale) + bias
    return outputs, (inputs, scale, mean, variance)


def _backward(epsilon: float, saved: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    inputs, scale, mean, variance = saved
    normed = (inputs - mean) * lax.rsqrt(variance + epsilon)
    along = cotangent * normed
    rows = tuple(range(inputs.ndim - 1))

    def mean_scaled(values: jax.Array) -> jax.Array:
        total = jnp.matmul(values, scale, precision=lax.Precision.HIGHEST)  # which reads the values once
        return jnp.expand_dims(total / scale.size, -1)

    centred = cotangent * scale - mean_scaled(cotangent) - normed * mean_scaled(along)
    return centred / jnp.sqrt(variance + epsilon), along.sum(axis=rows), cotangent.sum(axis=rows)


layer_norm.defvjp(_forward, _backward)
