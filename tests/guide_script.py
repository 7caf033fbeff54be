"""Flax's transfer-learning guide, step by step, with this package. Run as: guide_script.py BACKBONE"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import probe

# Load a pretrained model and extract its vision sub-module.
backbone = probe.load_backbone(sys.argv[1])
vision_model, vision_variables = backbone.module, backbone.variables

# Create the classifier: the backbone, and a head on its pooler output.
num_classes = 3
model = probe.Classifier(num_classes, backbone=vision_model)
images = np.random.default_rng(0).integers(0, 256, (6, *backbone.preprocessing.image_size, 3), np.uint8)
pixels = probe.normalize_pixels(jnp.asarray(images), backbone.preprocessing)
variables = model.init(jax.random.key(1), pixels)

# Transfer the pretrained parameters to their place in the classifier, and a ResNet's batch statistics.
params = {**variables["params"], "backbone": vision_variables["params"]}
statistics = {name: {"backbone": tree} for name, tree in vision_variables.items() if name != "params"}

# Partition the parameters, and give each part its optimizer. Different rates: another optimizer for "frozen".
partitions = probe.partition(params, {"backbone": "frozen", "head": "trainable"})
tx = optax.multi_transform({"frozen": optax.set_to_zero(), "trainable": optax.adam(5e-3)}, partitions)

# The train state, and training.
state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
labels = jnp.arange(6) % num_classes


@jax.jit
def train_step(state):
    def loss_fn(params):
        logits = state.apply_fn({"params": params, **statistics}, pixels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


losses = []
for _ in range(20):
    state, loss = train_step(state)
    losses.append(float(loss))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
