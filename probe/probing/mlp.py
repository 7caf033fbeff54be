"""`--head mlp`: several Dense layers with activations between them, as in the second seed."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probe.config import FitLinearConfig
from probe.evaluation.calibration import fit_temperature
from probe.evaluation.choice import cross_fitted
from probe.heads import Params, TrainedHead, make_head, num_logits
from probe.probing.protocol import Data, Fitted, Report, silent
from probe.probing.scaling import Scaling
from probe.training.steps import Batch, padded_batches, shuffled
from probe.training.train import fit


def fit_mlp(config: FitLinearConfig, data: Data, report: Report = silent) -> Fitted:
    """Adam on shuffled batches of train, the epoch chosen on validation.

    There is no second fit: the number of epochs that suits train would not be the one that suits more rows. What
    validation says calibrates the saved head: its last layer is divided by a temperature.
    """
    view, splits = config.views[0], data.splits
    embeddings = data.in_memory(view)
    scaling = Scaling.of(embeddings[splits.train], config.scalings[0])
    features, labels = scaling.apply(embeddings[splits.train]), data.labels[splits.train]
    module = make_head(num_logits(data.num_classes), config.hidden)
    params = module.init(jax.random.key(config.seed), jnp.zeros((1, embeddings.shape[1])))["params"]

    def apply_fn(params: Params, model_state: Any, inputs: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
        return jnp.asarray(module.apply({"params": params["head"]}, inputs)), model_state

    def train_batches(epoch: int) -> Iterator[Batch]:
        order = shuffled(len(labels), seed=config.seed, epoch=epoch)
        return padded_batches(features, labels, config.batch_size, order)

    result = fit(
        apply_fn,
        optax.adam(config.learning_rate),
        {"head": params},
        train_batches=train_batches,
        val_batches=functools.partial(
            padded_batches, scaling.apply(embeddings[splits.val]), data.labels[splits.val], config.batch_size
        ),
        num_epochs=config.epochs,
        seed=config.seed,
        on_epoch=lambda epoch: report("training", epoch.epoch, config.epochs, "epochs"),
    )
    temperature = fit_temperature(result.val_logits[result.best], result.val_labels)
    head = {**result.params["head"]}
    head["out"] = {name: np.asarray(value) / np.float32(temperature) for name, value in head["out"].items()}
    return Fitted(
        head=TrainedHead(config.hidden, scaling.fold(head)),
        view=view,
        val_rows=splits.val,
        val_logits=cross_fitted(result.val_logits, result.val_labels),
        val_of="the epochs of one training, each half of the rows judged by the epoch that the other half chose, "
        "not calibrated",
        facts={
            "fitted_on": "train",
            "view": view,
            "scaling": config.scalings[0],
            "hidden": list(config.hidden),
            "epoch": result.best + 1,
            "temperature": temperature,
            "num_epochs": config.epochs,
            "history": [dataclasses.asdict(epoch) for epoch in result.history],
        },
    )
