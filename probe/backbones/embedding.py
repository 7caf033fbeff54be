"""The compiled program that turns images into embeddings: one for `embed`, `predict` and whoever compares with them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probe.backbones.backbone import Backbone
from probe.backbones.calibration import find_spoilt, product_inputs
from probe.backbones.folded import make_resnet_stages
from probe.backbones.inference import make_vit_stages
from probe.backbones.precision import Precision
from probe.backbones.tower import Stage
from probe.backbones.vit import ViTConfig
from probe.devices import by_rows, check_divides, data_mesh, whole

EmbedFn = Callable[[Any], dict[str, jax.Array]]


def make_embed_fn(backbone: Backbone, views: Sequence[str], precision: Precision | None = None) -> EmbedFn:
    """Compiles images [B, H, W, 3] uint8 -> {view: [B, D] float32} on all devices of this process.

    The weights are prepared and sent to the devices here, once. At one batch shape, precision, and kind and count of
    devices an image's embedding does not depend, to the bit, on where in the batch it stands or on what fills the rest.

    Args:
      views: which of `backbone.views` to return; what none of them needs is not computed.
      precision: float32 if not given, which is `backbone.apply` to float error (about 1e-6 of the largest value).
    Raises: ConfigError when called, if B cannot be divided evenly over the devices; TypeError if images are not uint8:
      floats may be scaled already.
    """
    stages = make_stages(backbone, views, precision or Precision())
    mesh = data_mesh(jax.local_devices())
    weights = jax.device_put([stage.weights for stage in stages], whole(mesh))
    functions = [stage.apply for stage in stages]

    @jax.jit
    def program(weights: list[Any], images: jax.Array) -> dict[str, jax.Array]:
        if images.dtype != jnp.uint8:
            raise TypeError(f"images must be uint8 in 0..255, got {images.dtype}, which may be scaled already")
        hidden: Any = images
        for apply, own in zip(functions, weights, strict=True):
            hidden = apply(own, hidden)
        return hidden  # type: ignore[no-any-return]  # the last stage's

    def embed_fn(images: Any) -> dict[str, jax.Array]:
        check_divides(len(images), mesh.size, "--batch-size")
        outputs: dict[str, jax.Array] = program(weights, jax.device_put(images, by_rows(mesh)))
        return outputs

    return embed_fn


def make_stages(backbone: Backbone, views: Sequence[str], precision: Precision) -> list[Stage]:
    """The tower in parts, the weights on the host: applied one after another they are the program of `make_embed_fn`.

    Raises: ValueError when applied to images of another size.
    """
    config, variables, preprocessing = backbone.config, backbone.variables, backbone.preprocessing
    if not isinstance(config, ViTConfig):
        return make_resnet_stages(config, variables, preprocessing, precision)
    peaks = None
    if precision.name == "int8":
        peaks = {name: np.abs(inputs).max(axis=0) for name, inputs in _calibrate(backbone)[0].items()}
    return make_vit_stages(config, variables["params"], preprocessing, views, precision, peaks)


def int8_precision(backbone: Backbone) -> Precision:
    """int8 for a ViT, with products left in bfloat16: those that it would spoil, and the class token's own.

    What it would spoil is measured on fixed pictures. The last block's products of the class token alone are a
    thousandth of the work, and no later block evens out what they lose.
    """
    assert isinstance(backbone.config, ViTConfig)
    inputs, kernels = _calibrate(backbone)
    last = f"layers_{backbone.config.num_hidden_layers - 1}"
    own = [f"{last}/{name}" for name in ("out", "fc1", "fc2")]
    spoilt = find_spoilt(inputs, {name: kernel for name, kernel in kernels.items() if name not in own})
    return Precision("int8", tuple(sorted((*spoilt, *own))))


@functools.lru_cache(maxsize=1)  # chosen for a new cache first, and then prepared
def _calibrate(backbone: Backbone) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and kernel of each product of a ViT, by name."""
    stages = make_stages(backbone, ("pooler",), Precision())
    inputs = product_inputs(stages, backbone.preprocessing.image_size)
    kernels: dict[str, np.ndarray] = {}
    for stage in stages[1:-1]:
        parts = dict(stage.weights)
        if "kv" in parts:
            both = np.concatenate([parts.pop("q").values, parts.pop("kv").values], axis=1)
            kernels[f"{stage.name}/qkv"] = both
        kernels |= {f"{stage.name}/{name}": kernel.values for name, kernel in parts.items()}
    return inputs, kernels
