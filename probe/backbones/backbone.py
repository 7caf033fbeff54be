"""A backbone: a tower, its weights, and the preprocessing that they were trained with, as one value."""

import dataclasses
import functools
import hashlib
import json
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from probe.backbones.resnet import ResNet, ResNetConfig
from probe.backbones.vit import VisionTower, ViTConfig
from probe.images import Preprocessing
from probe.notebook import facts

Config = ViTConfig | ResNetConfig


def build_tower(config: Config) -> nn.Module:
    """The linen module of a config: `module.apply(variables, pixels, train=False) -> TowerOutput`."""
    return VisionTower(config) if isinstance(config, ViTConfig) else ResNet(config)


def config_fields(config: Config) -> dict[str, Any]:
    """The config as JSON values, of one type a field, so that equal configs give equal text (0.0 for 0)."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind: Any = list if isinstance(value, tuple) else type(field.default)
        fields[field.name] = None if value is None else kind(value)
    return fields


def normalize_pixels(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
    """Scales 8-bit RGB to the statistics that a backbone was trained with; meant to run on the device.

    Args:
      images: [B, H, W, 3] uint8 in 0..255.
      preprocessing: gives (images * rescale_factor - mean) / std.
    Returns: [B, H, W, 3] float32, dimensionless.
    Raises: TypeError if images are not uint8: floats may be scaled already.
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f"images must be uint8 in 0..255, got {images.dtype}, which may be scaled already")
    mean = np.asarray(preprocessing.mean, np.float32)
    std = np.asarray(preprocessing.std, np.float32)
    return (jnp.asarray(images, jnp.float32) * np.float32(preprocessing.rescale_factor) - mean) / std


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A pretrained tower without its head.

    name: hub id, absolute path of the folder or name of a bundled model, as it was loaded; it does not count in the
      fingerprint.
    revision: commit hash of a hub id, else None.
    config: what the tower is built from.
    variables: nested dicts of float32 arrays: {"params": …} and, for a ResNet, {"batch_stats": …}.
    preprocessing: how a picture becomes the tower's input.
    """

    name: str
    revision: str | None
    config: Config
    variables: dict[str, Any]
    preprocessing: Preprocessing

    def _repr_html_(self) -> str:
        height, width = self.preprocessing.image_size
        about = {
            "name": self.name,
            "revision": self.revision or "none",
            "tower": f"{type(self.config).__name__.removesuffix('Config')}, images of {height} x {width}",
            "views": ", ".join(f"{view} [{self.view_width(view)}]" for view in self.views),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"])),
            "fingerprint": self.fingerprint[:12],
        }
        return facts("backbone", about)

    @functools.cached_property
    def module(self) -> nn.Module:
        """The linen module: `module.apply(variables, normalised pixels, train=False) -> TowerOutput`."""
        return build_tower(self.config)

    @property
    def width(self) -> int:
        """D, the length of an embedding (the pooler's output)."""
        return self.config.width

    @property
    def views(self) -> tuple[str, ...]:
        """The features there are: "pooler" and, where the checkpoint has a projection, "projected"."""
        return ("pooler", "projected") if "visual_projection" in self.variables["params"] else ("pooler",)

    def view_width(self, view: str) -> int:
        """The length of a view's feature. Raises: KeyError for a view that this backbone does not have."""
        if view not in self.views:
            raise KeyError(f"{self.name} has no view {view!r}, only {', '.join(self.views)}")
        if view == "pooler":
            return self.width
        return int(self.variables["params"]["visual_projection"]["kernel"].shape[1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of config, all weights and preprocessing: equal where embeddings must be equal.

        Neither the name nor the format that the weights were stored in counts. All weights are hashed once.
        """
        tensors = {}
        for path, leaf in flatten_dict(self.variables, sep="/").items():
            array = np.ascontiguousarray(leaf)
            tensors[path] = [str(array.dtype), list(array.shape), hashlib.sha256(array.data).hexdigest()]
        facts = {
            "tower": type(self.config).__name__,
            "config": config_fields(self.config),
            "tensors": tensors,
            "preprocessing": self.preprocessing.rules(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def with_decode(self, decode: Literal["exact", "fast"]) -> "Backbone":
        """The same backbone reading images that are decoded in this way; its fingerprint says so."""
        if decode == self.preprocessing.decode:
            return self
        return dataclasses.replace(self, preprocessing=dataclasses.replace(self.preprocessing, decode=decode))

    def apply(
        self,
        variables: dict[str, Any],
        images: jax.Array,
        *,
        train: bool = False,
        mutable: bool | list[str] = False,
        rngs: dict[str, jax.Array] | None = None,
    ) -> Any:
        """Embeds images with the given variables; pure, to be jitted.

        Args:
          variables: as `self.variables`; an argument, so that weights are no constants of the program, and
            others than the loaded ones can be given.
          images: [B, H, W, 3] uint8, as `preprocessing` makes them.
          train: dropout on, batch statistics from this batch (then a ResNet needs mutable=["batch_stats"]).
          mutable, rngs: as in linen's `apply`; dropout reads the stream "dropout".
        Returns: TowerOutput, or (TowerOutput, updated collections) where `mutable` is given.
        """
        pixels = normalize_pixels(images, self.preprocessing)
        return self.module.apply(variables, pixels, train=train, mutable=mutable, rngs=rngs)
