"""One fine-tuning: what is trained on which rows, its checkpoints, and the weights between its start and its end."""

import dataclasses
import hashlib
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from probe.backbones import Backbone
from probe.config import FinetuneConfig, to_json
from probe.errors import InputError
from probe.heads import Classifier, TrainedHead
from probe.progress import Progress
from probe.splits import Splits
from probe.training import optim, sharding, steps, train, verdict
from probe.training.augment import AugmentConfig
from probe.training.decoded import ImageRows
from probe.training.full import classifier_variables, make_apply_fn, make_prepare

T = TypeVar("T")


class Tuning:
    """One classifier, what is trained of it and on which rows; after `fit`, its weights between start and end."""

    def __init__(
        self,
        config: FinetuneConfig,
        backbone: Backbone,
        start: TrainedHead,
        rules: dict[str, float | str],
        images: ImageRows,
        rows: Splits,
    ) -> None:
        self._config, self._images, self._rows = config, images, rows
        self._num_classes = len(images.source.class_names)
        params, self._start_state = classifier_variables(backbone, start)
        self._labels, self.parts = optim.partition(params, rules), optim.parts(params, rules)
        self._start, self._frozen = optim.split(params, self._labels)
        self._apply_fn = make_apply_fn(
            Classifier(self._num_classes, backbone.module, start.hidden),
            backbone.preprocessing,
            train_batchnorm=config.train_batchnorm,
            bfloat16=config.precision == "bfloat16",
            remat=config.remat,
        )
        self._eval_step = steps.make_eval_step(self._apply_fn)
        self._fingerprint = backbone.fingerprint

    def fit(self) -> train.FitResult:
        config, rows = self._config, self._rows
        num_steps = config.epochs * math.ceil(len(rows.train) / config.batch_size)
        tx = optim.make_optimizer(
            optim.split(self._labels, self._labels)[0],
            num_steps=num_steps,
            warmup_steps=int(config.warmup_fraction * num_steps),
            weight_decay=config.weight_decay,
            momentum=config.momentum if config.optimizer == "sgd" else None,
            clip_norm=config.clip_norm,
        )
        placement = sharding.Placement.over_all_devices(config.batch_size // config.accumulate, fsdp=config.fsdp)
        _print_parts(self.parts)
        with Progress("training", total=config.epochs * len(rows.train), unit="images") as progress:

            def train_batches(epoch: int) -> Iterator[steps.Batch]:
                order = rows.train[steps.shuffled(len(rows.train), seed=config.seed, epoch=epoch)]
                for batch in self._images.batches(order, config.batch_size):
                    yield batch
                    progress.advance(int(batch.mask.sum()))

            self._result = train.fit(
                self._apply_fn,
                tx,
                self._start,
                frozen=self._frozen,
                model_state=self._start_state,
                train_batches=train_batches,
                val_batches=lambda: self._images.batches(rows.val, config.batch_size),
                num_epochs=config.epochs,
                seed=config.seed,
                prepare=make_prepare(options_of(config, AugmentConfig), self._num_classes),
                num_microbatches=config.accumulate,
                average_decay=config.average,
                patience=config.patience,
                wanted=verdict.epochs_wanted,
                place=placement.place,
                place_batch=placement.place_batch,
                checkpointing=self._checkpointing(),
                on_epoch=_print_epoch,
            )
        return self._result

    def logits(self, alpha: float, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Logits [n, C] of the given rows, by the weights at α between the start and an epoch's end."""
        trained, state = self._between(alpha, epoch)
        batches = self._images.batches(rows, self._config.batch_size)
        return steps.predict_logits(self._eval_step, trained, self._frozen, state, batches)[0]

    def variables(self, alpha: float, epoch: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """All parameters and the model state, by the same."""
        trained, state = self._between(alpha, epoch)
        return steps.merge(trained, self._frozen), state

    def _between(self, alpha: float, epoch: int) -> tuple[Any, Any]:
        start = (self._start, self._start_state)
        if alpha == 0:  # then the epoch does not matter, and its weights may be gone
            return start
        snapshot = self._result.snapshots[epoch]
        return verdict.interpolate(start, (snapshot.params, snapshot.model_state), alpha)  # type: ignore[no-any-return]

    def _checkpointing(self) -> train.Checkpointing | None:
        config = self._config
        if not config.checkpoint_every:
            return None
        rows = hashlib.sha256()
        for array in (self._images.keys, self._images.labels, self._rows.train, self._rows.val):
            rows.update(np.ascontiguousarray(array).tobytes())
        changeable = (
            "out",
            "overwrite",
            "resume",
            "json",
            "num_workers",
            "checkpoint_every",
            "images",
            "cache",
            "keep",
            "bundle_backbone",
        )
        options = {
            name: value for name, value in to_json(config).items() if name not in (*changeable, "backbone", "wise")
        }
        return train.Checkpointing(
            folder=checkpoint_folder(config),
            every_steps=config.checkpoint_every,
            record={**options, "backbone": self._fingerprint, "rows": rows.hexdigest()},
            resume=config.resume,
        )


def checkpoint_folder(config: FinetuneConfig) -> Path:
    """Where the checkpoints stand until the run folder is written."""
    return config.out.with_name(f"{config.out.name}.checkpoints")


def require_no_checkpoints(config: FinetuneConfig) -> None:
    """Raises: InputError if a run that did not end left checkpoints, and nobody said what is to become of them."""
    folder = checkpoint_folder(config)
    if config.resume or not folder.is_dir():
        return
    if not config.overwrite:
        raise InputError(
            f"{folder} holds the checkpoints of a run that did not end: go on with it by --resume, or give them up "
            "by --overwrite"
        )
    shutil.rmtree(folder)


def options_of(config: FinetuneConfig, kind: type[T]) -> T:
    """The part of the config that a dataclass of the same field names holds. Raises: ConfigError, as that does."""
    return kind(**{field.name: getattr(config, field.name) for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def _print_parts(parts: list[optim.Part]) -> None:
    table = Table("part", Column("parameters", justify="right"), Column("peak rate", justify="right"))
    for part in parts:
        rate = part.label if part.label == optim.FROZEN else f"{part.label:.3g}"
        table.add_row(part.pattern, f"{part.num_parameters:,}", rate)
    Console(stderr=True).print(table)


def _print_epoch(line: train.Epoch) -> None:
    print(
        f"epoch {line.epoch}: loss {line.train_loss:.4f}, accuracy {line.train_accuracy:.4f}; "
        f"validation loss {line.val_loss:.4f}, accuracy {line.val_accuracy:.4f}; {line.seconds:.1f} s",
        file=sys.stderr,
    )
