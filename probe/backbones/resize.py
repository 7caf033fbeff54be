"""A backbone at another image size: preprocessing scaled, and position embeddings interpolated where there are any."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probe.backbones.backbone import Backbone
from probe.backbones.vit import ViTConfig
from probe.errors import ConfigError


def resize_backbone(backbone: Backbone, image_size: int) -> Backbone:
    """The backbone for images of [image_size, image_size, 3].

    The share of the picture that the centre crop leaves stays as it was. A tower without learned positions keeps its
    weights; it is another backbone all the same, as its fingerprint says.
    Raises: ConfigError if the tower cannot take such images.
    """
    height, width = backbone.preprocessing.image_size
    if (height, width) == (image_size, image_size):
        return backbone
    resize, crop = backbone.preprocessing.resize, backbone.preprocessing.crop
    preprocessing = dataclasses.replace(
        backbone.preprocessing,
        resize=round(resize * image_size / height) if isinstance(resize, int) else resize and (image_size, image_size),
        crop=crop and (image_size, image_size),
    )
    config = backbone.config
    if not isinstance(config, ViTConfig):
        return dataclasses.replace(backbone, preprocessing=preprocessing)
    if image_size < config.patch_size:
        raise ConfigError(f"--image-size {image_size}: the patches of {backbone.name} are {config.patch_size} wide")
    params = backbone.variables["params"]
    embeddings = params["embeddings"]
    positions = interpolate_positions(
        embeddings["position_embedding"], config.image_size // config.patch_size, image_size // config.patch_size
    )
    embeddings = {**embeddings, "position_embedding": positions}
    return dataclasses.replace(
        backbone,
        config=dataclasses.replace(config, image_size=image_size),
        variables={**backbone.variables, "params": {**params, "embeddings": embeddings}},
        preprocessing=preprocessing,
    )


def interpolate_positions(positions: Any, old: int, new: int) -> np.ndarray:
    """[1 + old², D] embeddings of the class token and a square grid -> [1 + new², D].

    The class token's stays; the grid's are interpolated by a cubic (Keys, a = -0.5; PyTorch's bicubic has a = -0.75),
    without antialiasing, since they are no picture.
    """
    token, grid = positions[:1], jnp.asarray(positions[1:]).reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=False)
    return np.concatenate([np.asarray(token), np.asarray(grid).reshape(new * new, -1)])
