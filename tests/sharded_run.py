"""Trains a tiny classifier on all devices there are, for test_sharding.py: sharded_run.py BACKBONE [--fsdp].

Prints the number of devices, the bytes of the train state on the first of them, and each epoch's losses.
"""

import sys

import jax
import numpy as np
import optax

from probe.backbones import load_backbone
from probe.heads import Classifier, TrainedHead
from probe.training import steps, train
from probe.training.full import classifier_variables, make_apply_fn
from probe.training.sharding import Placement

backbone = load_backbone(sys.argv[1])
head = TrainedHead((), {"kernel": np.zeros((backbone.width, 3), np.float32), "bias": np.zeros(3, np.float32)})
params, model_state = classifier_variables(backbone, head)
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (44, *backbone.preprocessing.image_size, 3), np.uint8)
labels = np.arange(44) % 3
placement = Placement.over_all_devices(16, fsdp="--fsdp" in sys.argv)
tx = optax.adam(1e-3)
result = train.fit(
    make_apply_fn(Classifier(3, backbone.module), backbone.preprocessing),
    tx,
    params,
    model_state=model_state,
    train_batches=lambda epoch: steps.padded_batches(images, labels, 16, steps.shuffled(44, seed=0, epoch=epoch)),
    val_batches=lambda: steps.padded_batches(images, labels, 16),
    num_epochs=3,
    seed=0,
    place=placement.place,
    place_batch=placement.place_batch,
)
state = placement.place(steps.TrainState.create(params, tx, seed=0))
first = jax.devices()[0]
leaves = jax.tree.leaves((state.params, state.opt_state))
print(len(jax.devices()), "devices")
print(sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == first))
for line in result.history:
    print(line.train_loss)
    print(line.val_loss)
