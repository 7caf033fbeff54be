"""The step of L-BFGS where the Hessian is known but for a factor: (α·S + λI), corrected by what moves have shown.

S is the second moment of the features and α the mean of p(1 - p) (why: `probe.probing.lanes`). Gradient differences
are stored without the penalty, whose part λ·s is exact, so that what was learned at one λ serves the next.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from probe.probing.passes import Lanes

MEMORY = 10  # pairs; 5 take 1.2 times the passes at 1e-6, 20 take 0.85 times


@struct.dataclass
class Pairs:
    """The last moves of each lane, and what they changed the gradient by: both [K, m, M, D + 1]; num: [K] ever made."""

    steps: Any
    changes: Any
    num: Any


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner products per lane: [K, M, D + 1] -> [K]."""
    return jnp.asarray(jnp.sum(a * b, axis=(1, 2)))


def per_lane(values: jax.Array) -> jax.Array:
    return values[:, None, None]


def penalised(weights: jax.Array, penalty: jax.Array) -> jax.Array:
    """What the penalty adds to the change of the gradient over a step: λ times it, with zero for the bias."""
    return jnp.asarray((weights * per_lane(penalty)).at[..., -1].set(0))


def _precondition(lanes: Lanes, curvature: jax.Array, penalty: jax.Array, vectors: jax.Array) -> jax.Array:
    """(α·S + λI)⁻¹ applied to [K, M, D + 1]."""
    limits = np.finfo(vectors.dtype)
    tiny = float(limits.tiny) ** 0.5
    # Directions that hold nothing but rounding errors must not be blown up.
    least = float(limits.eps) * lanes.eigenvalues[-1]
    diagonal = curvature[:, None] * jnp.maximum(lanes.eigenvalues, least) + penalty[:, None] + tiny
    rotated = jnp.matmul(vectors[..., :-1], lanes.eigenvectors, precision="highest") / diagonal[:, None]
    kernel = jnp.matmul(rotated, lanes.eigenvectors.T, precision="highest")
    bias = vectors[..., -1:] / (per_lane(curvature) + tiny)
    return jnp.concatenate([kernel, bias], axis=-1)


def direction(grad: jax.Array, penalty: jax.Array, curvature: jax.Array, pairs: Pairs, lanes: Lanes) -> jax.Array:
    """The step of each lane, [K, M, D + 1], by the two-loop recursion.

    Args:
      grad: [K, M, D + 1], penalty and all. penalty: [K] λ. curvature: [K] α.
    """
    lane = jnp.arange(len(penalty))

    def pair(age: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        slot = (pairs.num - 1 - age) % MEMORY
        step = pairs.steps[lane, slot]
        change = pairs.changes[lane, slot] + penalised(step, penalty)
        product = dot(step, change)
        usable = (age < pairs.num) & (product > 0)
        return step, change, jnp.where(usable, 1 / jnp.where(usable, product, 1), 0)

    def newest_first(age: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        vector, factors = carry
        step, change, inverse = pair(age)
        factor = inverse * dot(step, vector)
        return vector - per_lane(factor) * change, factors.at[age].set(factor)

    def oldest_first(i: jax.Array, vector: jax.Array) -> jax.Array:
        step, change, inverse = pair(MEMORY - 1 - i)
        factor = inverse * dot(change, vector)
        return vector + per_lane(factors[MEMORY - 1 - i] * (inverse > 0) - factor) * step

    factors = jnp.zeros((MEMORY, len(penalty)), grad.dtype)
    vector, factors = jax.lax.fori_loop(0, MEMORY, newest_first, (grad, factors))
    _, change, inverse = pair(jnp.int32(0))
    preconditioned = _precondition(lanes, curvature, penalty, change)
    product = inverse * dot(change, preconditioned)  # yᵀ H y / yᵀ s: how far H is from this pair's curvature
    scale = jnp.where(product > 0, 1 / jnp.where(product > 0, product, 1), 1)
    vector = per_lane(scale) * _precondition(lanes, curvature, penalty, vector)
    return jnp.negative(jax.lax.fori_loop(0, MEMORY, oldest_first, vector))
