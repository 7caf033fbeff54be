"""The full mode of training: backbone and head in one `apply_fn` (see `probe.training.steps`), on uint8 images.

Parameters are {"backbone": …, "head": …}; the model state holds the batch statistics of a backbone that has
them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probe.backbones import Backbone, VisionTower, normalize_pixels
from probe.heads import Classifier, TrainedHead
from probe.images import Preprocessing
from probe.training.augment import AugmentConfig, augment, example_keys
from probe.training.steps import EMBEDDINGS, ApplyFn, Batch, Prepare


def classifier_variables(backbone: Backbone, head: TrainedHead) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and model state of the classifier, the pretrained ones in their place."""
    params = {"backbone": backbone.variables["params"], "head": head.params}
    if "batch_stats" not in backbone.variables:
        return params, {}
    return params, {"batch_stats": {"backbone": backbone.variables["batch_stats"]}}


def backbone_variables(params: dict[str, Any], model_state: dict[str, Any]) -> dict[str, Any]:
    """The variables of the backbone within those of the classifier, as NumPy arrays."""
    collections = {name: collection["backbone"] for name, collection in model_state.items()}
    variables: dict[str, Any] = jax.tree.map(np.asarray, {"params": params["backbone"], **collections})
    return variables


def make_apply_fn(
    classifier: Classifier,
    preprocessing: Preprocessing | None,
    *,
    train_batchnorm: bool = False,
    bfloat16: bool = False,
    remat: bool = False,
) -> ApplyFn:
    """(params, model_state, images [B, H, W, 3] uint8, key) -> (logits [B, num_logits] float32, model_state).

    In training, which is where there is a key, dropout is on where the tower has it. In evaluation the embeddings come
    with the state, see `steps`. Products are in full float32, as in `probe embed`.

    Args:
      preprocessing: of the images; None where the classifier's backbone is the rest of a tower (see
        `probe.backbones.split`), which takes activations for images.
      train_batchnorm: normalise by the statistics of the batch in training and update the running ones. Else those
        of the pretrained tower stay: a fine-tuning batch is too small to replace them.
      bfloat16: multiply bfloat16 operands in training; sums, weights, gradients, norms, softmax and all evaluation
        are float32.
      remat: keep less for the backward pass and compute the rest again: of a CLIP tower what enters each block, of a
        ResNet what convolutions give (which XLA for the CPU undoes).
    """

    by_block = remat and isinstance(classifier.backbone, VisionTower)
    arithmetic = {"dtype": jnp.bfloat16} if bfloat16 else {}
    arithmetic |= {"remat": True} if by_block else {}
    trained = classifier.clone(backbone=classifier.backbone.clone(**arithmetic))

    def train_fn(variables: Any, pixels: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        state = {name: leaf for name, leaf in variables.items() if name != "params"}
        if state and not train_batchnorm:
            return jnp.asarray(trained.apply(variables, pixels)), state
        return trained.apply(variables, pixels, train=True, mutable=list(state), rngs={"dropout": key})

    if remat and not by_block:
        train_fn = jax.checkpoint(train_fn, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)

    def apply_fn(params: Any, model_state: Any, inputs: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
        pixels = inputs if preprocessing is None else normalize_pixels(inputs, preprocessing)
        variables = {"params": params, **model_state}
        with jax.default_matmul_precision("highest"):
            if key is None:
                logits, seen = classifier.apply(
                    variables,
                    pixels,
                    capture_intermediates=lambda module, _: module.name == "backbone",
                    mutable=["intermediates"],
                )
                (tower_output,) = seen["intermediates"]["backbone"]["__call__"]
                return jnp.asarray(logits), {**model_state, EMBEDDINGS: tower_output.pooler_output}
            logits, state = train_fn(variables, pixels, key)
        return logits, state

    return apply_fn


def make_prepare(config: AugmentConfig, num_classes: int, *, num_views: int | None = None) -> Prepare | None:
    """What the train step does to a batch first; None where the config asks for nothing.

    Args:
      num_views: how many pictures are made of each: epoch e has those of epoch e % num_views (None: new ones always).
    """
    if config == AugmentConfig():
        return None

    def prepare(key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        view = batch.epoch if num_views is None else batch.epoch % num_views
        keys = example_keys(key, view, batch.examples)
        return augment(config, batch.inputs, batch.labels, batch.mask, keys, num_classes=num_classes)

    return prepare
