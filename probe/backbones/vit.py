"""CLIP's vision tower: a pre-norm Vision Transformer whose pooler is the layer norm of its class token.

The parameters, which are frozen and trained by these paths:

    embeddings/{class_embedding, position_embedding, patch_embedding/kernel}
    pre_layernorm/{scale, bias}
    encoder/layers_<i>/{layer_norm1, self_attn/{q,k,v,out}_proj, layer_norm2, mlp/{fc1, fc2}}/…
    post_layernorm/{scale, bias}
    visual_projection/kernel                    (where the checkpoint has a projection)

Sources: Radford et al. 2021 (arXiv:2103.00020); the arithmetic is that of transformers' CLIPVisionModel.
"""

import dataclasses
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from probe.backbones.norms import layer_norm
from probe.backbones.products import dense
from probe.backbones.remat import recomputed
from probe.backbones.tower import (
    ACTIVATIONS,
    TowerOutput,
    check_activation,
    check_fields,
    is_count,
    is_number,
)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The fields of transformers' CLIPVisionConfig under their names, with their defaults (of ViT-B/32).

    `projection_dim` is None where the checkpoint has no projection; the initializer fields matter only to a
    tower that starts from random weights.
    Raises: InputError naming the fields that no tower can be built from.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int | None = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, height and width
    patch_size: int = 32  # pixels; a border narrower than a patch is not seen
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0  # probability, in training only
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def __post_init__(self) -> None:
        counts = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        counts += ["num_channels", "image_size", "patch_size"]
        counts += ["projection_dim"] if self.projection_dim is not None else []
        check_fields(self, is_count, "a positive integer", *counts)
        divisor = f"a divisor of hidden_size {self.hidden_size}"
        check_fields(self, lambda heads: self.hidden_size % heads == 0, divisor, "num_attention_heads")
        not_above = f"at most image_size {self.image_size}"
        check_fields(self, lambda size: size <= self.image_size, not_above, "patch_size")
        check_activation(self)
        numbers = ["layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor"]
        check_fields(self, is_number, "a number", *numbers)
        check_fields(self, lambda eps: eps > 0, "above 0", "layer_norm_eps")
        check_fields(self, lambda rate: 0 <= rate < 1, "at least 0 and below 1", "attention_dropout")

    @property
    def width(self) -> int:
        """D, the length of the pooler's output."""
        return self.hidden_size


class Dense(nn.Module):
    """linen's Dense, with the product of `probe.backbones.products`."""

    features: int
    std: float  # of the kernel that it starts from
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., K] -> [..., features]."""
        kernel = self.param("kernel", initializers.normal(self.std), (inputs.shape[-1], self.features))
        projected = dense(inputs, kernel, self.dtype)
        if not self.use_bias:
            return projected
        bias: jax.Array = self.param("bias", initializers.zeros, (self.features,))
        return projected + bias


class LayerNorm(nn.Module):
    """linen's LayerNorm over the last axis, with the gradients of `probe.backbones.norms`."""

    epsilon: float

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        scale = self.param("scale", initializers.ones, (inputs.shape[-1],))
        bias = self.param("bias", initializers.zeros, (inputs.shape[-1],))
        return layer_norm(inputs, scale, bias, self.epsilon)


class PatchEmbedding(nn.Module):
    """Cuts images into squares and projects each: a convolution without overlap, as one matrix product.

    For ViT-B/32 that is twice as fast on a CPU as the convolution is.
    """

    config: ViTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, patches, D], row by row."""
        config, size = self.config, self.config.patch_size
        batch, height, width, channels = pixels.shape
        rows, columns = height // size, width // size
        std = config.initializer_range * config.initializer_factor
        shape = (size, size, channels, config.hidden_size)
        kernel = self.param("kernel", initializers.normal(std), shape)
        patches = pixels[:, : rows * size, : columns * size]
        patches = patches.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
        patches = patches.reshape(batch, rows * columns, size * size * channels)
        return dense(patches, kernel.reshape(-1, config.hidden_size), self.dtype)


class Embeddings(nn.Module):
    """The class token and the patches, each with its position's embedding."""

    config: ViTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, 1 + patches, D]."""
        config = self.config
        width = config.hidden_size
        patches = PatchEmbedding(config, self.dtype, name="patch_embedding")(pixels)
        class_std = width**-0.5 * config.initializer_factor
        class_embedding = self.param("class_embedding", initializers.normal(class_std), (width,))
        position_std = config.initializer_range * config.initializer_factor
        positions = self.param("position_embedding", initializers.normal(position_std), (1 + patches.shape[1], width))
        class_token = jnp.broadcast_to(class_embedding, (pixels.shape[0], 1, width))
        return jnp.concatenate([class_token, patches], axis=1) + positions


class EncoderConfig(Protocol):
    """What the encoder reads of a config, an image tower's or a text tower's."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def attention_dropout(self) -> float: ...
    @property
    def initializer_factor(self) -> float: ...


class SelfAttention(nn.Module):
    """Every token reads from every token, or, where it is causal, from itself and those before it.

    The two products between tokens are float32 whatever the dtype: they are 1 % of the work, and XLA for the CPU moves
    transposes into batched products, for which it then has no bfloat16 kernel.
    """

    config: EncoderConfig
    is_causal: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, train: bool) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        config = self.config
        batch, tokens, width = hidden.shape
        heads = config.num_attention_heads
        out_std = width**-0.5 * config.initializer_factor
        in_std = out_std * (2 * config.num_hidden_layers) ** -0.5

        def project(name: str) -> jax.Array:
            projected = Dense(width, in_std, self.dtype, name=name)(hidden)
            return projected.reshape(batch, tokens, heads, width // heads)

        query, key, value = project("q_proj"), project("k_proj"), project("v_proj")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * (width // heads) ** -0.5, key)
        if self.is_causal:
            scores = jnp.where(jnp.tri(tokens, dtype=bool), scores, -jnp.inf)
        weights = nn.Dropout(config.attention_dropout, deterministic=not train)(jax.nn.softmax(scores))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, tokens, width)
        return Dense(width, out_std, self.dtype, name="out_proj")(mixed)


class Mlp(nn.Module):
    """Two dense layers, applied to each token by itself."""

    config: EncoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        config = self.config
        width = config.hidden_size
        std1 = (2 * width) ** -0.5 * config.initializer_factor
        std2 = (width * 2 * config.num_hidden_layers) ** -0.5 * config.initializer_factor
        hidden = Dense(config.intermediate_size, std1, self.dtype, name="fc1")(hidden)
        hidden = ACTIVATIONS[config.hidden_act](hidden)
        return Dense(width, std2, self.dtype, name="fc2")(hidden)


class EncoderLayer(nn.Module):
    """Attention, then the MLP, each on the normed tokens and added to them."""

    config: EncoderConfig
    is_causal: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, train: bool) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        normed = LayerNorm(self.config.layer_norm_eps, name="layer_norm1")(hidden)
        hidden = hidden + SelfAttention(self.config, self.is_causal, self.dtype, name="self_attn")(normed, train)
        normed = LayerNorm(self.config.layer_norm_eps, name="layer_norm2")(hidden)
        return hidden + Mlp(self.config, self.dtype, name="mlp")(normed)


class Encoder(nn.Module):
    """The layers, in order, from `first_block` on; `remat` computes each again in the backward pass."""

    config: EncoderConfig
    first_block: int = 0
    is_causal: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, hidden: jax.Array, train: bool) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        for index in range(self.first_block, self.config.num_hidden_layers):
            name = f"layers_{index}"
            if not self.remat or self.is_initializing():
                hidden = EncoderLayer(self.config, self.is_causal, self.dtype, name=name)(hidden, train)
                continue
            layer = EncoderLayer(self.config, self.is_causal, self.dtype, parent=None)
            dropped = train and self.config.attention_dropout > 0
            rngs = {"dropout": self.make_rng("dropout")} if dropped else {}

            def run(params: Any, hidden: jax.Array, rngs: Any, layer: EncoderLayer = layer) -> jax.Array:
                output: Any = layer.apply({"params": params}, hidden, train, rngs=rngs)
                return jnp.asarray(output)

            hidden = recomputed(run)(self.variables["params"][name], hidden, rngs)
        return hidden


class VisionTower(nn.Module):
    """CLIP's vision tower of any `ViTConfig`, or the part of it from `first_block` on (see `probe.backbones.split`).

    dtype: jnp.float32 or jnp.bfloat16, of the operands of the dense layers' products; all else is float32.
    remat: keep only what enters each block for the backward pass, and compute the rest again.
    """

    config: ViTConfig
    first_block: int = 0
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool = False) -> TowerOutput:
        """Embeds images.

        Args:
          pixels: [B, image_size, image_size, num_channels] float32, normalised as the checkpoint wants them; with a
            `first_block` above 0, what enters that block instead, [B, T, D].
          train: apply attention dropout (which needs the random stream "dropout" where it is not 0).
        Returns: TowerOutput; last_hidden_state is not layer-normed, the pooler's output is.
        Raises: ValueError if the images have another size: the positions are learned for one size.
        """
        config = self.config
        hidden = pixels
        if self.first_block == 0:
            expected = (config.image_size, config.image_size, config.num_channels)
            if pixels.shape[1:] != expected:
                raise ValueError(f"this tower takes images of {expected} (H, W, C), got {pixels.shape[1:]}")
            hidden = Embeddings(config, self.dtype, name="embeddings")(pixels)
            hidden = LayerNorm(config.layer_norm_eps, name="pre_layernorm")(hidden)
        hidden = Encoder(config, self.first_block, dtype=self.dtype, remat=self.remat, name="encoder")(hidden, train)
        pooled = LayerNorm(config.layer_norm_eps, name="post_layernorm")(hidden[:, 0])
        if config.projection_dim is None:
            return TowerOutput(last_hidden_state=hidden, pooler_output=pooled)
        std = config.hidden_size**-0.5 * config.initializer_factor
        projection = Dense(config.projection_dim, std, self.dtype, use_bias=False, name="visual_projection")
        return TowerOutput(last_hidden_state=hidden, pooler_output=pooled, projected=projection(pooled))
