"""Classification heads: what stands between an embedding and its class, in Flax.

Owns how many logits a number of classes has, and how feature scaling disappears into saved weights.
Parameters are plain nested dicts: {"kernel", "bias"} for the linear head, {"hidden_0", "hidden_1", …, "out"}
for the MLP.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]


def num_logits(num_classes: int, *, multi_label: bool = False) -> int:
    """Outputs of a head: one per class, but a single one for two exclusive classes.

    A two-column softmax has the same predictions but twice the weights to penalise: its optimum at λ is that
    of one logit at λ/2, so that results would not compare with scikit-learn's.
    """
    return 1 if num_classes == 2 and not multi_label else num_classes


def class_logits(logits: jax.Array) -> jax.Array:
    """[B, K] outputs of a head -> [B, C] logits of a softmax; the one output z of two gives [0, z]."""
    return jnp.pad(logits, ((0, 0), (1, 0))) if logits.shape[-1] == 1 else logits


class MLPHead(nn.Module):
    """Dense layers with ReLU between them, as in the second seed: [B, D] -> [B, num_outputs]."""

    num_outputs: int
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, embeddings: jax.Array) -> jax.Array:
        activations = embeddings
        for index, width in enumerate(self.hidden):
            activations = nn.relu(nn.Dense(width, name=f"hidden_{index}")(activations))
        return nn.Dense(self.num_outputs, name="out")(activations)


def make_head(num_outputs: int, hidden: tuple[int, ...] = (), *, name: str | None = None) -> nn.Module:
    """The head with these hidden widths; none is the linear head. It starts at a uniform guess if linear.

    Args:
      num_outputs: `num_logits` of the classes.
      hidden: widths of the layers in between.
      name: its name within a parent module.
    """
    if hidden:
        return MLPHead(num_outputs, hidden, name=name)
    return nn.Dense(num_outputs, kernel_init=nn.initializers.zeros, name=name)


class Classifier(nn.Module):
    """Backbone and head in one module: normalised pixels [B, H, W, 3] -> logits [B, num_logits].

    Parameters are {"backbone": …, "head": …}, so that pretrained ones can be put in their place and
    partitions can be named by prefix.
    """

    num_classes: int
    backbone: nn.Module
    hidden: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool = False) -> jax.Array:
        embeddings = self.backbone(pixels, train=train).pooler_output
        logits: jax.Array = make_head(num_logits(self.num_classes), self.hidden, name="head")(embeddings)
        return logits


@dataclasses.dataclass(frozen=True)
class TrainedHead:
    """A head with its parameters, acting on raw embeddings.

    hidden: widths of the hidden layers, () for a linear head; params: nested dict of float32 NumPy arrays.
    """

    hidden: tuple[int, ...]
    params: Params

    def apply(self, embeddings: Any) -> jax.Array:
        """[B, D] raw embeddings -> [B, num_logits] float32, in full float32 precision on every device."""
        num_outputs = len((self.params["out"] if self.hidden else self.params)["bias"])
        with jax.default_matmul_precision("highest"):
            logits = make_head(num_outputs, self.hidden).apply(
                {"params": self.params}, jnp.asarray(embeddings, jnp.float32)
            )
        return jnp.asarray(logits)


def fold_scaling(params: Params, mean: np.ndarray, scale: np.ndarray) -> Params:
    """Parameters that do to raw embeddings x what `params` do to (x - mean) / scale.

    Args:
      params: of either head, in float32 or float64.
      mean, scale: [D]; where scale is 0 the feature was constant and its weights become 0.
    Returns: float32 parameters; the sums are made in float64, since a large mean cancels against the bias.
    """
    first = "hidden_0" if "hidden_0" in params else None
    layer = params[first] if first else params
    kernel = np.asarray(layer["kernel"], np.float64)
    kernel = np.divide(kernel, scale[:, None], out=np.zeros_like(kernel), where=scale[:, None] > 0)
    bias = np.asarray(layer["bias"], np.float64) - mean.astype(np.float64) @ kernel
    folded = {"kernel": kernel, "bias": bias}
    scaled = {**params, first: folded} if first else folded
    return dict(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), scaled))
