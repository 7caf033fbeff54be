"""Trains a tiny classifier on all devices there are: sharded_run.py BACKBONE [--fsdp] [--processes A:PORT N I].

For test_sharding.py and, with several processes, test_distributed.py. The first process prints the number of devices,
the bytes of the train state on the first of its own, and each epoch's losses.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax

from probe import distributed
from probe.backbones import load_backbone
from probe.config import FinetuneConfig
from probe.heads import Classifier, TrainedHead
from probe.training import steps, train
from probe.training.full import classifier_variables, make_apply_fn
from probe.training.sharding import Placement

NUM, BATCH = 44, 16

parser = argparse.ArgumentParser()
parser.add_argument("backbone")
parser.add_argument("--fsdp", action="store_true")
parser.add_argument("--processes", nargs=3, default=None)
arguments = parser.parse_args()


def main() -> None:
    backbone = load_backbone(arguments.backbone)
    head = TrainedHead((), {"kernel": np.zeros((backbone.width, 3), np.float32), "bias": np.zeros(3, np.float32)})
    params, model_state = classifier_variables(backbone, head)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM, *backbone.preprocessing.image_size, 3), np.uint8)
    labels = np.arange(NUM) % 3
    placement = Placement.over_all_devices(BATCH, fsdp=arguments.fsdp)

    def batches(order: np.ndarray) -> Iterator[steps.Batch]:
        for batch in steps.padded_batches(images, labels, BATCH, order):
            yield dataclasses.replace(batch, inputs=batch.inputs[placement.own_rows(BATCH)])

    tx = optax.adam(1e-3)
    result = train.fit(
        make_apply_fn(Classifier(3, backbone.module), backbone.preprocessing),
        tx,
        params,
        model_state=model_state,
        train_batches=lambda epoch: batches(steps.shuffled(NUM, seed=0, epoch=epoch)),
        val_batches=lambda: batches(np.arange(NUM)),
        num_epochs=3,
        seed=0,
        place=placement.place,
        place_batch=placement.place_batch,
    )
    state = placement.place(steps.TrainState.create(params, tx, seed=0))
    first = jax.local_devices()[0]
    leaves = jax.tree.leaves((state.params, state.opt_state))
    print(len(jax.devices()), "devices")
    print(sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device == first))
    for line in result.history:
        print(line.train_loss)
        print(line.val_loss)


place = {}
if arguments.processes is not None:
    coordinator, num, index = arguments.processes
    place = {"distributed": True, "coordinator": coordinator, "num_processes": int(num), "process_id": int(index)}
with distributed.joined(FinetuneConfig(images=Path(), backbone="", out=Path(), **place)):
    main()
