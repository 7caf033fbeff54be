"""What this machine has and can do: its memory, matrix products a second as measured, and what a program asks of it."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PRECISIONS = ("float32", "bfloat16", "int8")
_MEASURING_SECONDS = 0.4  # for one precision
_LONG_ENOUGH = 0.02  # seconds of one product, beside which what calling it costs is nothing
_ROWS, _INNER, _COLUMNS = 1600, 768, 3072  # of ViT-B/32's first MLP product, 32 images: wide enough for any CPU


def memory_bytes() -> int:
    """Of the machine, or what a container may take of it."""
    every = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return every
    return min(every, int(limit)) if limit.isdigit() else every


def matmul_rate(precision: str, device: jax.Device | None = None) -> float:
    """Operations a second, two for each multiplication, of the fastest of many products on one device.

    Args:
      precision: float32 (in full), tf32 (float32 as a GPU rounds it), bfloat16 (added up in float32) or int8 (added
        up in int32).
      device: the first one if None.
    """
    dtype = jnp.dtype("float32" if precision == "tf32" else precision)
    total = jnp.int32 if precision == "int8" else jnp.float32
    highest = jax.lax.Precision.HIGHEST if precision == "float32" else None

    @jax.jit
    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            left, right, (((1,), (0,)), ((), ())), precision=highest, preferred_element_type=total
        )

    def once(left: jax.Array, right: jax.Array) -> float:
        started = time.perf_counter()
        product(left, right).block_until_ready()
        return time.perf_counter() - started

    rng = np.random.default_rng(0)
    scale, best = 1, 0.0
    while True:
        shapes = ((_ROWS * scale, _INNER * scale), (_INNER * scale, _COLUMNS * scale))
        left, right = (jax.device_put(rng.integers(-8, 8, shape).astype(dtype), device) for shape in shapes)
        flops = 2.0 * shapes[0][0] * shapes[0][1] * shapes[1][1]
        once(left, right)  # which compiles it
        ending = time.perf_counter() + _MEASURING_SECONDS
        seconds = [once(left, right) for _ in range(3)]
        while time.perf_counter() < ending:
            seconds.append(once(left, right))
        best = max(best, flops / min(seconds))
        if min(seconds) > _LONG_ENOUGH or scale == 8:
            return best
        scale *= 2


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Operations of the matrix products and convolutions of one call, two for each multiplication.

    Args: as to call it; shapes (`jax.ShapeDtypeStruct`) will do.
    """
    return float(_count(jax.make_jaxpr(function)(*args).jaxpr))


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod([left[axis] for axis in contracted])
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod(kernel) / outputs
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr"):
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    total += repeats * _count(inner)
    return total
