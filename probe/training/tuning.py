"""One fine-tuning: what is trained on which rows, its checkpoints, and the weights between its start and its end."""

import dataclasses
import functools
import hashlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from probe import distributed, interrupt
from probe.backbones import Backbone
from probe.backbones.split import make_suffix
from probe.config import FinetuneConfig, to_json
from probe.devices import fetch
from probe.errors import InputError, StorageError
from probe.heads import Classifier, TrainedHead
from probe.images import Preprocessing
from probe.progress import Progress, is_quiet, say
from probe.splits import Splits
from probe.training import optim, sharding, steps, train, verdict
from probe.training.augment import AugmentConfig
from probe.training.decoded import ImageRows
from probe.training.full import classifier_variables, make_apply_fn, make_prepare
from probe.training.logs import Logs
from probe.training.prefix import FrozenPrefix, num_views, remove_activations
from probe.training.steps import ApplyFn

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Network:
    """A classifier as training runs it, whole or above cached blocks; frozen: the leaves that it only reads."""

    apply_fn: ApplyFn
    frozen: steps.Params

    @functools.cached_property
    def answer_step(self) -> steps.AnswerStep:
        return steps.make_answer_step(self.apply_fn)


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
        *,
        num_cached_blocks: int = 0,
    ) -> None:
        """
        Args:
          num_cached_blocks: of the backbone, frozen, whose activations are computed once (see `prefix`).
        """
        self._config, self._images, self._rows = config, images, rows
        self._num_classes = len(images.source.class_names)
        params, self._start_state = classifier_variables(backbone, start)
        self._labels, self.parts = optim.partition(params, rules), optim.parts(params, rules)
        self._placement = sharding.Placement.over_all_devices(config.batch_size // config.accumulate, fsdp=config.fsdp)
        self._start, frozen = optim.split(params, self._labels)
        self._frozen = self._placement.place(frozen)
        self._fingerprint = backbone.fingerprint
        self._augmentation = options_of(config, AugmentConfig)
        self._whole = self._trained = _Network(
            self._make_apply_fn(backbone.module, backbone.preprocessing, start), self._frozen
        )
        self._prefix = self._make_prefix(backbone, num_cached_blocks) if num_cached_blocks else None
        if self._prefix is not None:
            suffix = make_suffix(backbone.config, num_cached_blocks)
            above = self._prefix.frozen_above(self._frozen)
            self._trained = _Network(self._make_apply_fn(suffix, None, start), above)

    @property
    def cached_prefix(self) -> dict[str, Any] | None:
        """What was cached, as JSON values."""
        if self._prefix is None:
            return None
        return {"num_blocks": self._prefix.num_blocks, "num_views": self._prefix.views}

    def fit(self, logs: Logs) -> train.FitResult:
        """Trains, and tells `logs` of it. Raises: what `train.fit`, `FrozenPrefix.build` and `Logs` raise."""
        config, rows, prefix = self._config, self._rows, self._prefix
        _print_parts(self.parts)
        if prefix is not None:
            say(prefix.describe())
            prefix.build()
        # what the prefix holds is augmented already
        augmentation = AugmentConfig(label_smoothing=config.label_smoothing) if prefix else self._augmentation
        num_steps = config.epochs * math.ceil(len(rows.train) / config.batch_size)
        tx = optim.make_optimizer(
            optim.split(self._labels, self._labels)[0],
            num_steps=num_steps,
            warmup_steps=int(config.warmup_fraction * num_steps),
            weight_decay=config.weight_decay,
            momentum=config.momentum if config.optimizer == "sgd" else None,
            clip_norm=config.clip_norm,
        )
        distributed.on_first(logs.start)
        with Progress("training", total=config.epochs * len(rows.train), unit="images") as progress:

            def on_epoch(line: train.Epoch) -> None:
                _print_epoch(line)
                logs.write(line)

            def train_batches(epoch: int) -> Iterator[steps.Batch]:
                order = rows.train[steps.shuffled(len(rows.train), seed=config.seed, epoch=epoch)]
                own = self._placement.own_rows(config.batch_size)
                cached = prefix and prefix.train_batches(order, config.batch_size, epoch, own)
                for batch in cached or self._batches(order):
                    yield batch
                    progress.advance(int(batch.mask.sum()))

            self._result = train.fit(
                self._trained.apply_fn,
                tx,
                self._start,
                frozen=self._trained.frozen,
                model_state=self._start_state,
                train_batches=train_batches,
                val_batches=lambda: self._evaluation(rows.val)[1],
                num_epochs=config.epochs,
                seed=config.seed,
                prepare=make_prepare(augmentation, self._num_classes, num_views=config.views),
                num_microbatches=config.accumulate,
                average_decay=config.average,
                patience=config.patience,
                wanted=verdict.epochs_wanted,
                place=self._placement.place,
                place_batch=self._placement.place_batch,
                checkpointing=self._checkpointing(),
                on_epoch=on_epoch,
            )
        return self._result

    def logits(self, alpha: float, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Logits [n, C] of the given rows, by the weights at α between the start and an epoch's end."""
        return self.answers(alpha, epoch, rows)[0]

    def answers(self, alpha: float, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same, and the embeddings [n, D] that the head was given."""
        trained, state = self._placement.place(self._between(alpha, epoch))
        network, batches = self._evaluation(rows)

        def heeding() -> Iterator[steps.Batch]:
            for batch in batches:
                interrupt.check()  # training has ended, and its checkpoint stands
                yield batch

        variables = trained, network.frozen, state
        logits, embeddings, _ = steps.predict(network.answer_step, *variables, heeding(), self._placement.place_batch)
        assert embeddings is not None, "the full mode shows them"
        return logits, embeddings

    def variables(self, alpha: float, epoch: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """All parameters and the model state, by the same, as NumPy arrays."""
        trained, state = self._between(alpha, epoch)
        return steps.merge(trained, fetch(self._frozen)), state

    def end(self) -> None:
        """Removes what only a run under way needs."""
        if self._prefix is not None:
            self._prefix.close()
        remove_leftovers(self._config)

    def _evaluation(self, rows: np.ndarray) -> tuple["_Network", Iterator[steps.Batch]]:
        """What answers to these rows, and the rows as it takes them."""
        if self._prefix is not None and self._prefix.holds(rows):
            own = self._placement.own_rows(self._config.batch_size)
            return self._trained, self._prefix.plain_batches(rows, self._config.batch_size, own)
        return self._whole, self._batches(rows)

    def _batches(self, rows: np.ndarray) -> Iterator[steps.Batch]:
        return self._images.batches(rows, self._config.batch_size, self._placement.own_rows(self._config.batch_size))

    def _make_apply_fn(self, tower: nn.Module, preprocessing: Preprocessing | None, start: TrainedHead) -> ApplyFn:
        return make_apply_fn(
            Classifier(self._num_classes, tower, start.hidden),
            preprocessing,
            train_batchnorm=self._config.train_batchnorm,
            bfloat16=self._config.precision == "bfloat16",
            remat=self._config.remat,
        )

    def _make_prefix(self, backbone: Backbone, num_blocks: int) -> FrozenPrefix | None:
        """The cache of frozen blocks; None where it was nobody's wish and the disk has no room for it."""
        config = self._config
        asked = config.cache_prefix != "auto"
        prefix = FrozenPrefix(
            backbone,
            num_blocks,
            self._images,
            self._rows,
            self._augmentation,
            views=num_views(self._augmentation, config.views, config.epochs),
            seed=config.seed,
            bfloat16=config.precision == "bfloat16",
            batch_size=config.batch_size,
            fsdp=config.fsdp,
            folder=Path(config.cache_prefix) if asked else _prefix_folder(config),
        )
        prefix.claim(rebuild=not asked)
        try:
            distributed.on_first(prefix.require_room)
        except StorageError as err:
            if asked:
                raise
            say(f"the {num_blocks} frozen blocks are computed in every epoch: {err}")
            return None
        return prefix

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
            "image_root",
            "cache",
            "cache_prefix",
            "tensorboard",
            "mlflow",
            "wandb",
            "keep",
            "quiet",
            "bundle_backbone",
            "no_report",
            "fsdp",
            "distributed",
            "coordinator",
            "num_processes",
            "process_id",
        )
        options = {
            name: value for name, value in to_json(config).items() if name not in (*changeable, "backbone", "wise")
        }
        return train.Checkpointing(
            folder=checkpoint_folder(config),
            every_steps=config.checkpoint_every,
            record={
                **options,
                "backbone": self._fingerprint,
                "rows": rows.hexdigest(),
                "cached_blocks": 0 if self._prefix is None else self._prefix.num_blocks,  # another program: other bits
            },
            resume=config.resume,
        )


def checkpoint_folder(config: FinetuneConfig) -> Path:
    """Where the checkpoints stand until the run folder is written."""
    return config.out.with_name(f"{config.out.name}.checkpoints")


def _prefix_folder(config: FinetuneConfig) -> Path:
    """Where the activations stand until the run ends, if no folder was named for them."""
    return config.out.with_name(f"{config.out.name}.prefix")


def remove_leftovers(config: FinetuneConfig) -> None:
    """Removes the checkpoints of a run that has ended, and activations that no folder was named for."""
    shutil.rmtree(checkpoint_folder(config), ignore_errors=True)
    if Path(config.cache_prefix) != _prefix_folder(config):
        remove_activations(_prefix_folder(config))


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
    if not is_quiet():
        Console(stderr=True).print(table)


def _print_epoch(line: train.Epoch) -> None:
    say(
        f"epoch {line.epoch}: loss {line.train_loss:.4f}, accuracy {line.train_accuracy:.4f}; "
        f"validation loss {line.val_loss:.4f}, accuracy {line.val_accuracy:.4f}; {line.seconds:.1f} s"
    )
