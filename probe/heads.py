"""Classification heads: what stands between an embedding and its class, in Flax.

Owns how many logits a number of classes has, and how feature scaling disappears into saved weights.
Parameters are plain nested dicts: {"kernel", "bias"} for the linear head, {"hidden_0", "hidden_1", …, "out"}
for the MLP.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]

_QUERIES = 1024  # rows looked up at a time: beside a million rows their cosines take 4 GB


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
    """Backbone and head in one module: normalised pixels [B, H, W, 3] -> logits [B, num_classes] of the softmax.

    Parameters are {"backbone": …, "head": …}, so that pretrained ones can be put in their place and
    partitions can be named by prefix.
    """

    num_classes: int
    backbone: nn.Module
    hidden: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool = False) -> jax.Array:
        embeddings = self.backbone(pixels, train=train).pooler_output
        return class_logits(make_head(num_logits(self.num_classes), self.hidden, name="head")(embeddings))


@dataclasses.dataclass(frozen=True)
class TrainedHead:
    """A head with its parameters, acting on raw embeddings.

    hidden: widths of the hidden layers, () for a linear head; params: nested dict of float32 NumPy arrays. A leaf
    "unit_norm" beside the layers says that embeddings are divided by their norm first; a leaf "bank" makes it a
    k-NN head, whose other leaves are the arguments of `neighbour_logits`, and "calibration", which divides its logits.
    """

    hidden: tuple[int, ...]
    params: Params

    def apply(self, embeddings: Any) -> jax.Array:
        """[B, D] raw embeddings -> [B, num_logits] float32, in full float32 precision on every device."""
        embeddings, params = jnp.asarray(embeddings, jnp.float32), dict(self.params)
        if "bank" in params or params.pop("unit_norm", None) is not None:
            norms = jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
            embeddings = embeddings / jnp.where(norms > 0, norms, 1)
        if "bank" in params:
            num_classes, num_neighbours = int(params["num_classes"]), int(params["num_neighbours"])
            bank, labels = params["bank"], params["bank_labels"].astype(np.int32)
            temperature = float(params["temperature"])
            votes = neighbour_logits(embeddings, bank, labels, num_classes, num_neighbours, temperature)
            return votes / float(params.get("calibration", 1))  # runs of before have none
        num_outputs = len((params["out"] if self.hidden else params)["bias"])
        with jax.default_matmul_precision("highest"):
            logits = make_head(num_outputs, self.hidden).apply({"params": params}, embeddings)
        return jnp.asarray(logits)


def neighbour_logits(
    queries: Any,
    bank: Any,
    labels: Any,
    num_classes: int,
    num_neighbours: int,
    temperature: float,
    *,
    groups: Any = None,
) -> jax.Array:
    """Log of the share of votes that each class has among the nearest rows; a vote weighs exp(cosine / temperature).

    One vote is spread evenly over all classes, so that no class is ruled out.

    Args:
      queries: [B, D] of norm 1; bank: [N, D] of norm 1; labels: [N] integers below num_classes.
      groups: [N] integers; row i of the queries is then row i of the bank, and no row of its group has a vote on it.
    Returns: [B, num_logits].
    """
    queries, bank, labels = jnp.asarray(queries), jnp.asarray(bank), jnp.asarray(labels)
    parts = [
        _neighbour_votes(
            queries[i : i + _QUERIES],
            bank,
            labels,
            num_classes,
            num_neighbours,
            temperature,
            None if groups is None else (groups[i : i + _QUERIES], groups),
        )
        for i in range(0, len(queries), _QUERIES)
    ]
    shares = (num_neighbours * jnp.concatenate(parts) + 1 / num_classes) / (num_neighbours + 1)
    logits = jnp.log(shares)
    return logits[:, 1:] - logits[:, :1] if num_classes == 2 else logits


@functools.partial(jax.jit, static_argnames=("num_classes", "num_neighbours"))
def _neighbour_votes(
    queries: jax.Array,
    bank: jax.Array,
    labels: jax.Array,
    num_classes: int,
    num_neighbours: int,
    temperature: float,
    groups: tuple[Any, Any] | None,
) -> jax.Array:
    """[B, C] shares of the votes; groups: [B] of the queries and [N] of the bank, whose members have no vote on each
    other."""
    cosines = jnp.matmul(queries, bank.T, precision="highest")
    if groups is not None:
        cosines = jnp.where(groups[0][:, None] == groups[1], -jnp.inf, cosines)
    nearest, rows = jax.lax.top_k(cosines, num_neighbours)
    weights = jax.nn.softmax(nearest / temperature, axis=-1)
    return jnp.einsum("bk,bkc->bc", weights, jax.nn.one_hot(labels[rows], num_classes))


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
