"""A tower cut in two between its blocks: the part next to the pixels, and the rest, over one tree of variables.

    prefix:  normalised pixels [B, H, W, 3] -> activations, what enters block k
    suffix:  activations                    -> TowerOutput

Blocks are CLIP's encoder layers, and a ResNet's residual layers counted through all stages. The prefix is a shorter
tower of the same kind, and the suffix the tower without its first blocks: both read the variables of the whole tower
by the paths that they have there.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from probe.backbones.backbone import Config, build_tower
from probe.backbones.resnet import ResNet
from probe.backbones.vit import VisionTower, ViTConfig


def count_blocks(config: Config) -> int:
    """How many blocks a tower has."""
    return config.num_hidden_layers if isinstance(config, ViTConfig) else sum(config.depths)


def make_prefix(
    config: Config, num_blocks: int, *, dtype: Any = jnp.float32
) -> Callable[[dict[str, Any], jax.Array], jax.Array]:
    """(variables, normalised pixels [B, H, W, 3]) -> activations [B, T, D] (CLIP) or [B, h, w, C] (ResNet).

    After the last block they are no more than what the pooler reads: [B, 1, D], or the picture's mean [B, 1, 1, D].

    Args:
      num_blocks: k, from 1 to all of them.
      dtype: of the operands of products, as the towers have it; the activations are float32.
    """
    tower = build_tower(_first_blocks(config, num_blocks)).clone(dtype=dtype)

    def prefix(variables: dict[str, Any], pixels: jax.Array) -> jax.Array:
        output: Any = tower.apply(variables, pixels)
        hidden: jax.Array = output.last_hidden_state
        if num_blocks < count_blocks(config):
            return hidden
        return hidden[:, :1] if isinstance(config, ViTConfig) else hidden.mean(axis=(1, 2), keepdims=True)

    return prefix


def make_suffix(config: Config, num_blocks: int) -> nn.Module:
    """The rest of the tower: `module.apply(variables, activations, train=False) -> TowerOutput`."""
    return VisionTower(config, num_blocks) if isinstance(config, ViTConfig) else ResNet(config, num_blocks)


def _first_blocks(config: Config, num_blocks: int) -> Config:
    """The config of the tower that ends after so many blocks."""
    assert 1 <= num_blocks <= count_blocks(config)
    if isinstance(config, ViTConfig):
        return dataclasses.replace(config, num_hidden_layers=num_blocks)
    before = [0, *itertools.accumulate(config.depths)]
    depths = tuple(min(depth, num_blocks - done) for depth, done in zip(config.depths, before, strict=False))
    depths = tuple(depth for depth in depths if depth > 0)
    return dataclasses.replace(config, depths=depths, hidden_sizes=config.hidden_sizes[: len(depths)])
