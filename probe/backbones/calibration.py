"""What int8 has to know of a tower: how large each product's inputs become, and which products it would spoil.

A few channels of a trained tower carry values many times those of all others; in steps of the largest the others would
vanish. Peaks seen on fixed synthetic pictures spread the load between inputs and kernel (`precision.make_kernel`), and
a product that still loses too much stays in bfloat16. The pictures are always the same, so that the answer is one of
the weights alone.
"""

import functools
from typing import Any

import jax
import numpy as np

from probe.backbones.precision import Kernel, dense, make_kernel
from probe.backbones.tower import Stage

_NUM_PICTURES = 4
# Of the output's norm. Rounding both operands of normally distributed ones to 8 bits costs 0.012 to 0.015; beyond twice
# that, outliers eat the steps.
_MOST_LOSS = 0.03


def sample_pictures(num: int, image_size: tuple[int, int]) -> np.ndarray:
    """[num, H, W, 3] uint8, always the same: coloured shapes of several scales with some noise."""
    rng, (height, width) = np.random.default_rng(0), image_size
    pictures = rng.normal(0, 8, (num, height, width, 3))
    for scale in (2, 5, 11, 23):
        coarse = rng.normal(0, 40, (num, scale, scale, 3))
        pictures += coarse[:, np.arange(height) * scale // height][:, :, np.arange(width) * scale // width]
    return np.clip(pictures + 118, 0, 255).astype(np.uint8)


def product_inputs(stages: list[Stage], image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """What goes into each product [M, K] on the sample pictures, by its name, in the stages of a float32 ViT."""

    @functools.cache
    def watched(apply: Any) -> Any:
        def run(weights: Any, hidden: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            seen: dict[str, jax.Array] = {}

            def product(name: str, inputs: jax.Array, kernel: Kernel) -> jax.Array:
                seen[name] = inputs
                return dense(inputs, kernel)

            return apply(weights, hidden, product=product), seen

        return jax.jit(run)

    hidden: Any = jax.jit(stages[0].apply)(stages[0].weights, sample_pictures(_NUM_PICTURES, image_size))
    found: dict[str, np.ndarray] = {}
    for stage in stages[1:-1]:
        hidden, seen = watched(stage.apply)(stage.weights, hidden)
        for name, inputs in seen.items():
            if name != "q":  # of the last block; its inputs are among those of keys and values
                found[f"{stage.name}/{'qkv' if name == 'kv' else name}"] = np.asarray(inputs)
    return found


def int8_loss(inputs: np.ndarray, kernel: np.ndarray) -> float:
    """Norm of what int8 makes wrong of inputs [M, K] @ kernel [K, N], as a share of the norm of the product."""
    exact = inputs @ kernel
    rounded = make_kernel(kernel, np.zeros(kernel.shape[1]), "int8", np.abs(inputs).max(axis=0))
    difference = np.asarray(jax.jit(dense)(inputs, rounded)) - exact
    return float(np.linalg.norm(difference) / max(np.linalg.norm(exact), np.finfo(np.float32).tiny))


def find_spoilt(inputs: dict[str, np.ndarray], kernels: dict[str, np.ndarray]) -> tuple[str, ...]:
    """The names of the products that int8 would spoil, by their inputs [M, K] and kernels [K, N]."""
    return tuple(name for name, kernel in sorted(kernels.items()) if int8_loss(inputs[name], kernel) > _MOST_LOSS)
