"""CLIP's vision tower as embedding runs it: the linen module's function, arranged for speed.

What is the same in real numbers, and equal to the linen module to float error:
    - pixels go in as uint8: rescaling, mean and deviation are folded into the patch kernel and the positions;
    - queries, keys and values are one product, and the scale of the scores is folded into it;
    - a norm's gain and bias are folded into the kernel that reads it;
    - the class token enters the blocks with the same value for every image, which is computed once;
    - the last block computes keys and values of all tokens, and all else of the class token alone, since no other
      token is read after it.
Tokens are rows of one matrix [B·T, D] wherever they are multiplied: a CPU is slow at batched products.

The tower is a list of stages (see `probe.backbones.tower.Stage`), and all blocks but the last share one function.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from probe.backbones.precision import Kernel, Operand, Precision, dense, lax_precision, make_kernel, operand_dtype
from probe.backbones.tower import ACTIVATIONS, Stage
from probe.backbones.vit import ViTConfig
from probe.images import Preprocessing

_CENTRE = 128  # pixels less this are exact in bfloat16, too, and lie around 0, where sums keep their digits

Product = Callable[[str, jax.Array, Kernel], jax.Array]


def make_vit_stages(
    config: ViTConfig,
    params: dict[str, Any],
    preprocessing: Preprocessing,
    views: Sequence[str],
    precision: Precision,
    peaks: dict[str, np.ndarray] | None = None,
) -> list[Stage]:
    """The tower as stages, uint8 images [B, H, W, 3] -> {view: [B, D] float32}; all weights on the host.

    Args:
      params: the linen module's.
      views: which features the last stage gives.
      precision: of the products, whose names are layers_<i>/{qkv, out, fc1, fc2}.
      peaks: by product, the largest magnitude of each input channel [K]; equalises int8 (see `make_kernel`).
    """
    params = jax.tree.map(np.asarray, params)

    def make(name: str, kernel: np.ndarray, bias: np.ndarray) -> Kernel:
        return make_kernel(kernel, bias, precision.operand(name), (peaks or {}).get(name))

    embed = functools.partial(_embed_patches, config)
    block, last_block = (functools.partial(each, config, precision.name) for each in (_block, _class_token_block))
    layers = [f"layers_{index}" for index in range(config.num_hidden_layers)]
    stages = [Stage("embeddings", embed, _patch_weights(config, params, preprocessing, precision))]
    for name in layers:
        weights = _block_weights(config, params["encoder"][name], functools.partial(_within, make, name))
        if name != layers[-1]:
            stages.append(Stage(name, block, weights))
    stages.append(Stage(layers[-1], last_block, _split_query(config, weights)))
    pooler = {"norm": params["post_layernorm"]}
    if "projected" in views:
        projection = params["visual_projection"]["kernel"]
        bias = np.zeros(projection.shape[1])
        pooler["projection"] = make_kernel(projection, bias, "tf32" if precision.name == "tf32" else "float32")
    return [*stages, Stage("pooler", functools.partial(_pool, config, tuple(views)), pooler)]


def _within(make: Callable[..., Kernel], layer: str, name: str, kernel: np.ndarray, bias: np.ndarray) -> Kernel:
    return make(f"{layer}/{name}", kernel, bias)


def _patch_weights(
    config: ViTConfig, params: dict[str, Any], preprocessing: Preprocessing, precision: Precision
) -> dict[str, Any]:
    """(pixel · rescale - mean) / std, times the kernel, is (pixel - 128) times another kernel, plus a bias."""
    embeddings = params["embeddings"]
    mean, std = (np.asarray(values, np.float64) for values in (preprocessing.mean, preprocessing.std))
    kernel = embeddings["patch_embedding"]["kernel"] * (preprocessing.rescale_factor / std)[:, None]
    offset = _CENTRE - mean / preprocessing.rescale_factor
    # Of the patches, int8 would save little, and pixels are exact in bfloat16. The offset is multiplied by the kernel
    # as it was rounded, so that only the image's differences from the mean meet rounded weights.
    operand: Operand = "bfloat16" if precision.name == "int8" else precision.name
    zero = np.zeros(config.hidden_size)
    patch = make_kernel(kernel.reshape(-1, config.hidden_size), zero, operand)
    rounded = np.asarray(patch.values, np.float64).reshape(kernel.shape)
    bias = (rounded * offset[:, None]).sum(axis=(0, 1, 2))
    norm, positions = params["pre_layernorm"], embeddings["position_embedding"]
    class_token = np.asarray(embeddings["class_embedding"] + positions[0], np.float64)
    class_token = (class_token - class_token.mean()) / np.sqrt(class_token.var() + config.layer_norm_eps)
    return {
        "patch": patch,
        "positions": np.asarray(positions[1:] + bias, np.float32),
        "class_token": np.asarray(class_token * norm["scale"] + norm["bias"], np.float32),
        "norm": norm,
    }


def _block_weights(config: ViTConfig, layer: dict[str, Any], make: Callable[..., Kernel]) -> dict[str, Kernel]:
    attention, mlp = layer["self_attn"], layer["mlp"]
    scale = (config.hidden_size // config.num_attention_heads) ** -0.5
    projections = [(attention["q_proj"], scale), (attention["k_proj"], 1), (attention["v_proj"], 1)]
    qkv = {
        name: np.concatenate([part[name] * np.float32(factor) for part, factor in projections], axis=-1)
        for name in ("kernel", "bias")
    }
    return {
        "qkv": make("qkv", *_fold_norm(layer["layer_norm1"], qkv)),
        "out": make("out", attention["out_proj"]["kernel"], attention["out_proj"]["bias"]),
        "fc1": make("fc1", *_fold_norm(layer["layer_norm2"], mlp["fc1"])),
        "fc2": make("fc2", mlp["fc2"]["kernel"], mlp["fc2"]["bias"]),
    }


def _fold_norm(norm: dict[str, np.ndarray], following: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias that do to standardised tokens what `following` does to tokens with the norm's gain and bias."""
    kernel = np.asarray(following["kernel"])
    bias = norm["bias"].astype(np.float64) @ kernel + following["bias"]
    return kernel * norm["scale"][:, None], bias


def _split_query(config: ViTConfig, weights: dict[str, Kernel]) -> dict[str, Kernel]:
    """The last block's, whose query is one token's and keys and values are of all."""
    width = config.hidden_size
    return {name: kernel for name, kernel in weights.items() if name != "qkv"} | {
        "q": weights["qkv"].columns(slice(None, width)),
        "kv": weights["qkv"].columns(slice(width, None)),
    }


def _embed_patches(config: ViTConfig, weights: dict[str, Any], images: jax.Array) -> jax.Array:
    """[B, H, W, 3] uint8 -> [B, T, D] float32, what enters the first block."""
    expected = (config.image_size, config.image_size, config.num_channels)
    if images.shape[1:] != expected:
        raise ValueError(f"this tower takes images of {expected} (H, W, C), got {images.shape[1:]}")
    size, batch = config.patch_size, images.shape[0]
    side = config.image_size // size
    patches = images[:, : side * size, : side * size].reshape(batch, side, size, side, size, -1).swapaxes(2, 3)
    pixels = patches.reshape(batch * side * side, -1).astype(jnp.float32) - _CENTRE
    hidden = dense(pixels, weights["patch"]).reshape(batch, side * side, -1) + weights["positions"]
    hidden = _standardise(config, hidden) * weights["norm"]["scale"] + weights["norm"]["bias"]
    class_token = jnp.broadcast_to(weights["class_token"], (batch, 1, config.hidden_size))
    return jnp.concatenate([class_token, hidden], axis=1)


def _plain_product(name: str, inputs: jax.Array, kernel: Kernel) -> jax.Array:
    return dense(inputs, kernel)


def _block(
    config: ViTConfig,
    operand: Operand,
    weights: dict[str, Kernel],
    hidden: jax.Array,
    product: Product = _plain_product,
) -> jax.Array:
    """[B, T, D] -> [B, T, D].

    Args:
      product: (name, [M, K], kernel) -> [M, N], by which calibration watches what goes into the kernels.
    """
    batch, tokens, width = hidden.shape
    residual = hidden.reshape(-1, width)
    qkv = product("qkv", _standardise(config, residual), weights["qkv"])
    query, key, value = jnp.moveaxis(qkv.reshape(batch, tokens, 3, config.num_attention_heads, -1), 2, 0)
    mixed = _attend(operand, query, key, value).reshape(-1, width)
    residual = residual + product("out", mixed, weights["out"])
    return (residual + _mlp(config, weights, residual, product)).reshape(hidden.shape)


def _class_token_block(
    config: ViTConfig,
    operand: Operand,
    weights: dict[str, Kernel],
    hidden: jax.Array,
    product: Product = _plain_product,
) -> jax.Array:
    """[B, T, D] -> [B, D], the last block's class token."""
    batch, tokens, width = hidden.shape
    heads = config.num_attention_heads
    normed = _standardise(config, hidden)
    key_value = product("kv", normed.reshape(-1, width), weights["kv"])
    key, value = jnp.moveaxis(key_value.reshape(batch, tokens, 2, heads, -1), 2, 0)
    query = product("q", normed[:, 0], weights["q"]).reshape(batch, 1, heads, -1)
    residual = hidden[:, 0]
    residual = residual + product("out", _attend(operand, query, key, value).reshape(batch, width), weights["out"])
    return residual + _mlp(config, weights, residual, product)


def _attend(operand: Operand, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """[B, Q, heads, d], [B, T, heads, d] twice -> [B, Q, heads, d] float32; the scores' scale is in the queries.

    The softmax is divided by its sum after the values are mixed, which takes T divisions less a number, and the second
    product leaves its axes as the first one did: for 16 images of 197 tokens in float32 that is 12 ms a block on two
    cores where softmax and a product into the final order take 80, and jax.nn.dot_product_attention takes 60.
    """
    dtype, precision = operand_dtype(operand), lax_precision(operand)
    multiply = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = multiply("bqhd,bkhd->bhqk", query.astype(dtype), key.astype(dtype))
    exps = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = multiply("bhqk,bkhd->bhqd", exps.astype(dtype), value.astype(dtype))
    return (mixed / exps.sum(axis=-1, keepdims=True)).swapaxes(1, 2)


def _mlp(config: ViTConfig, weights: dict[str, Kernel], tokens: jax.Array, product: Product) -> jax.Array:
    """[M, D] -> [M, D]."""
    hidden = product("fc1", _standardise(config, tokens), weights["fc1"])
    return product("fc2", ACTIVATIONS[config.hidden_act](hidden), weights["fc2"])


def _pool(config: ViTConfig, views: tuple[str, ...], weights: dict[str, Any], token: jax.Array) -> dict[str, jax.Array]:
    """[B, D] -> {view: [B, D] float32}."""
    pooled = _standardise(config, token) * weights["norm"]["scale"] + weights["norm"]["bias"]
    features = {"pooler": pooled}
    if "projection" in weights:
        features["projected"] = dense(pooled, weights["projection"])
    return {view: features[view] for view in views}


def _standardise(config: ViTConfig, tokens: jax.Array) -> jax.Array:
    """Layer norm without gain and bias. E[x²] - E[x]² would lose digits where means are large."""
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred * lax.rsqrt(variance + config.layer_norm_eps)
