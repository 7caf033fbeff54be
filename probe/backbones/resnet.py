"""ResNet: a stem, stages of residual layers, and a global average as the pooler.

The parameters, which are frozen and trained by these paths, under "params" and (mean, var) "batch_stats":

    embedder/{convolution/kernel, normalization/{scale, bias, mean, var}}
    encoder/stages_<i>/layers_<j>/{layer_0, layer_1, layer_2, shortcut}/{convolution, normalization}/…

Sources: He et al. 2015 (arXiv:1512.03385); the arithmetic is that of transformers' ResNetModel.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from probe.backbones.tower import ACTIVATIONS, TowerOutput, check_activation, check_fields, is_count

_REDUCTION = 4  # a bottleneck's inner convolutions have a quarter of its channels


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The fields of transformers' ResNetConfig under their names, with their defaults (those of ResNet-50).

    Raises: InputError naming the fields that no tower can be built from.
    """

    num_channels: int = 3
    embedding_size: int = 64  # channels of the stem
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)  # channels of each stage
    depths: tuple[int, ...] = (3, 4, 6, 3)  # layers of each stage
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"  # after the stem and after each layer; within a layer it is always ReLU
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False  # by the layer's first convolution (original) or its second (V1.5)

    def __post_init__(self) -> None:
        check_fields(self, is_count, "a positive integer", "num_channels", "embedding_size")
        check_fields(self, _are_counts, "positive integers", "hidden_sizes", "depths")
        one_each = f"one integer for each stage of hidden_sizes {self.hidden_sizes}"
        check_fields(self, lambda depths: len(depths) == len(self.hidden_sizes), one_each, "depths")
        check_fields(self, ("basic", "bottleneck").__contains__, "basic or bottleneck", "layer_type")
        if self.layer_type == "bottleneck":
            wide = f"at least {_REDUCTION} each"
            check_fields(self, lambda sizes: min(sizes) >= _REDUCTION, wide, "hidden_sizes")
        check_activation(self)
        switches = ("downsample_in_first_stage", "downsample_in_bottleneck")
        check_fields(self, lambda value: isinstance(value, bool), "true or false", *switches)

    @property
    def width(self) -> int:
        """D, the length of the pooler's output."""
        return self.hidden_sizes[-1]


def _are_counts(values: object) -> bool:
    return isinstance(values, tuple) and len(values) > 0 and all(is_count(value) for value in values)


def layer_shapes(config: ResNetConfig, features: int, stride: int) -> list[tuple[int, int, int]]:
    """(features, kernel size, stride) of a residual layer's convolutions, in order."""
    if config.layer_type == "basic":
        return [(features, 3, stride), (features, 3, 1)]
    inner = features // _REDUCTION
    first, second = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
    return [(inner, 1, first), (inner, 3, second), (features, 1, 1)]


class ConvLayer(nn.Module):
    """Convolution, batch norm, activation (or none)."""

    features: int
    kernel_size: int
    stride: int = 1
    activation: str | None = "relu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), features]."""
        hidden = nn.Conv(
            self.features,
            kernel_size=(self.kernel_size, self.kernel_size),
            strides=(self.stride, self.stride),
            # As PyTorch pads: the same on both sides. "SAME" would pad even sizes by less on the left.
            padding=[(self.kernel_size // 2, self.kernel_size // 2)] * 2,
            use_bias=False,
            kernel_init=initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=self.dtype,
            name="convolution",
        )(hidden)
        hidden = hidden.astype(jnp.float32)
        # PyTorch's momentum 0.1 is the share of the new value, linen's 0.9 that of the old one.
        hidden = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            use_fast_variance=False,
            name="normalization",
        )(hidden)
        return hidden if self.activation is None else ACTIVATIONS[self.activation](hidden)


class ResidualLayer(nn.Module):
    """Two 3 × 3 convolutions (basic), or 1 × 1, 3 × 3, 1 × 1 (bottleneck), added to what came in."""

    config: ResNetConfig
    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), features]."""
        config, features, stride = self.config, self.features, self.stride
        shapes = layer_shapes(config, features, stride)
        residual = hidden
        if residual.shape[-1] != features or stride != 1:
            residual = ConvLayer(features, 1, stride, None, self.dtype, name="shortcut")(residual, train)
        for index, shape in enumerate(shapes):
            activation = "relu" if index < len(shapes) - 1 else None
            hidden = ConvLayer(*shape, activation, self.dtype, name=f"layer_{index}")(hidden, train)
        return ACTIVATIONS[config.hidden_act](hidden + residual)


class Stage(nn.Module):
    """Layers of one width, from `first_layer` on; layer 0 may halve the picture."""

    config: ResNetConfig
    features: int
    depth: int
    stride: int
    first_layer: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), features]."""
        for index in range(self.first_layer, self.depth):
            stride = self.stride if index == 0 else 1
            hidden = ResidualLayer(self.config, self.features, stride, self.dtype, name=f"layers_{index}")(
                hidden, train
            )
        return hidden


class Encoder(nn.Module):
    """The stages, in order; of their layers, counted through, those from `first_block` on."""

    config: ResNetConfig
    first_block: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, embedding_size] -> [B, h, w, D]."""
        config, to_skip = self.config, self.first_block
        for index, (features, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            stride = 2 if index > 0 or config.downsample_in_first_stage else 1
            if to_skip < depth:
                stage = Stage(config, features, depth, stride, to_skip, self.dtype, name=f"stages_{index}")
                hidden = stage(hidden, train)
            to_skip = max(to_skip - depth, 0)
        return hidden


class ResNet(nn.Module):
    """A ResNet of any `ResNetConfig`, without its classifier, or the part of it from `first_block` on (see
    `probe.backbones.split`).

    dtype: jnp.float32 or jnp.bfloat16, of convolutions; all else is float32. A CPU has no bfloat16 convolution and is
      as fast in either.
    """

    config: ResNetConfig
    first_block: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool = False) -> TowerOutput:
        """Embeds images.

        Args:
          pixels: [B, H, W, num_channels] float32 of any size, normalised as the checkpoint wants them; with a
            `first_block` above 0, what enters that block instead, [B, h, w, C].
          train: normalise by the statistics of this batch and update the running ones ("batch_stats" must be
            mutable); padded rows would count in them, so a training batch must be full. The running variance
            is the biased one, as linen keeps it (PyTorch's is larger by n / (n - 1)).
        Returns: TowerOutput; pooler_output is the mean over the picture, projected is None.
        Raises: ValueError if the images have another number of channels.
        """
        config = self.config
        hidden = pixels
        if self.first_block == 0:
            if pixels.shape[-1] != config.num_channels:
                raise ValueError(f"this tower takes {config.num_channels} channels, got images of {pixels.shape[1:]}")
            hidden = ConvLayer(config.embedding_size, 7, 2, config.hidden_act, self.dtype, name="embedder")(
                pixels, train
            )
            hidden = nn.max_pool(hidden, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        hidden = Encoder(config, self.first_block, self.dtype, name="encoder")(hidden, train)
        return TowerOutput(last_hidden_state=hidden, pooler_output=hidden.mean(axis=(1, 2)))
