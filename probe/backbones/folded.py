"""ResNet as embedding runs it: batch norm in evaluation is a scale and a shift, and both are folded into the kernels.

The scale of the pixels is in the first kernel, too. Their mean is subtracted, since the border that a convolution
pads stands for the mean. Equal to the linen module to float error; a list of stages, one per residual layer.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from probe.backbones.precision import Operand, Precision, lax_precision, operand_dtype
from probe.backbones.resnet import ResNetConfig, layer_shapes
from probe.backbones.tower import ACTIVATIONS, Stage
from probe.images import Preprocessing

_EPSILON = 1e-5  # of the linen module's batch norms


def make_resnet_stages(
    config: ResNetConfig, variables: dict[str, Any], preprocessing: Preprocessing, precision: Precision
) -> list[Stage]:
    """The tower as stages, uint8 images [B, H, W, 3] -> {"pooler": [B, D] float32}; all weights on the host.

    Raises: ValueError for int8, which has no convolutions here.
    """
    operand = precision.name
    if operand == "int8":
        raise ValueError("convolutions have no int8")
    # Rounding what the first two stages of eighteen read costs more than all others together: on photos through a
    # ResNet-50 they take the cosine from 0.99996 to 0.9998.
    first: Operand = "float32" if operand == "bfloat16" else operand
    params, statistics = (jax.tree.map(np.asarray, variables[name]) for name in ("params", "batch_stats"))
    stem = _fold(params["embedder"], statistics["embedder"], first, _pixel_scale(preprocessing))
    mean = np.asarray(np.asarray(preprocessing.mean) / preprocessing.rescale_factor, np.float32)
    stages = [Stage("embedder", functools.partial(_stem, config, first), {"mean": mean, "convolution": stem})]
    for index, depth in enumerate(config.depths):
        for layer in range(depth):
            name = f"stages_{index}/layers_{layer}"
            tree, stats = (t["encoder"][f"stages_{index}"][f"layers_{layer}"] for t in (params, statistics))
            rounded = first if index == layer == 0 else operand
            weights = {part: _fold(tree[part], stats[part], rounded) for part in tree}
            halves = layer == 0 and (index > 0 or config.downsample_in_first_stage)
            apply = _layer_function(config, rounded, config.hidden_sizes[index], 2 if halves else 1)
            stages.append(Stage(name, apply, weights))
    return [*stages, Stage("pooler", _pool, {})]


@functools.cache
def _layer_function(config: ResNetConfig, operand: Operand, features: int, stride: int) -> Callable[[Any, Any], Any]:
    """One function for all layers of a form: what is compiled for one serves the others."""
    return functools.partial(_residual_layer, config, operand, features, stride)


def _pixel_scale(preprocessing: Preprocessing) -> np.ndarray:
    return preprocessing.rescale_factor / np.asarray(preprocessing.std, np.float64)


def _fold(
    params: dict[str, Any], statistics: dict[str, Any], operand: Operand, input_scale: np.ndarray | float = 1.0
) -> dict[str, np.ndarray]:
    """Kernel [k, k, in, out] and bias [out] of a convolution and the batch norm after it."""
    norm, stats = params["normalization"], statistics["normalization"]
    gain = norm["scale"] / np.sqrt(stats["var"].astype(np.float64) + _EPSILON)
    kernel = params["convolution"]["kernel"]
    kernel = kernel * np.broadcast_to(input_scale, kernel.shape[2])[:, None]
    dtype: Any = ml_dtypes.bfloat16 if operand == "bfloat16" else np.float32
    bias = norm["bias"] - stats["mean"] * gain
    return {"kernel": (kernel * gain).astype(dtype), "bias": bias.astype(np.float32)}


def _convolve(operand: Operand, weights: dict[str, jax.Array], hidden: jax.Array, stride: int = 1) -> jax.Array:
    """[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), out], float32."""
    padding = weights["kernel"].shape[0] // 2
    sums = lax.conv_general_dilated(
        hidden.astype(operand_dtype(operand)),
        weights["kernel"],
        window_strides=(stride, stride),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax_precision(operand),
        preferred_element_type=jnp.float32,
    )
    return jnp.add(sums, weights["bias"])


def _stem(config: ResNetConfig, operand: Operand, weights: dict[str, Any], images: jax.Array) -> jax.Array:
    """[B, H, W, C] uint8 -> [B, ceil(H / 4), ceil(W / 4), embedding_size] float32."""
    if images.shape[-1] != config.num_channels:
        raise ValueError(f"this tower takes {config.num_channels} channels, got images of {images.shape[1:]}")
    hidden = _convolve(operand, weights["convolution"], images.astype(jnp.float32) - weights["mean"], stride=2)
    hidden = ACTIVATIONS[config.hidden_act](hidden)
    pooled: jax.Array = nn.max_pool(hidden, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    return pooled


def _residual_layer(
    config: ResNetConfig, operand: Operand, features: int, stride: int, weights: dict[str, Any], hidden: jax.Array
) -> jax.Array:
    """[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), features] float32."""
    residual = _convolve(operand, weights["shortcut"], hidden, stride) if "shortcut" in weights else hidden
    shapes = layer_shapes(config, features, stride)
    for index, (_, _, step) in enumerate(shapes):
        hidden = _convolve(operand, weights[f"layer_{index}"], hidden, step)
        if index < len(shapes) - 1:
            hidden = jax.nn.relu(hidden)
    return ACTIVATIONS[config.hidden_act](hidden + residual)


def _pool(weights: dict[str, Any], hidden: jax.Array) -> dict[str, jax.Array]:
    """[B, h, w, D] -> {"pooler": [B, D]}."""
    return {"pooler": hidden.mean(axis=(1, 2))}
