"""Rematerialisation that a compiler cannot undo."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Block = Callable[[Any, jax.Array, Any], jax.Array]


def recomputed(block: Block) -> Block:
    """(params, inputs, rngs) -> outputs of the inputs' shape, computed again for the backward pass.

    Only params and inputs are kept meanwhile. That is what `jax.checkpoint` is for; but XLA for the CPU drops the
    barrier that it puts between the two computations, finds that they are one, and keeps everything after all. Here
    the second one reads the cotangent, so it is another and cannot begin early. It reads of it only whether it is NaN,
    which spoils the gradient in any case.
    """

    @jax.custom_vjp
    def call(params: Any, inputs: jax.Array, rngs: Any) -> jax.Array:
        return block(params, inputs, rngs)

    def forward(params: Any, inputs: jax.Array, rngs: Any) -> tuple[jax.Array, Any]:
        return block(params, inputs, rngs), (params, inputs, rngs)

    def backward(saved: Any, cotangent: jax.Array) -> tuple[Any, jax.Array, None]:
        params, inputs, rngs = saved
        inputs = jnp.where(jnp.isnan(cotangent), jnp.nan, inputs)
        _, pull = jax.vjp(lambda params, inputs: block(params, inputs, rngs), params, inputs)
        return *pull(cotangent), None

    call.defvjp(forward, backward)
    return call
