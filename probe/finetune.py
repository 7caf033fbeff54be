"""`probe finetune`: trains backbone and head end to end, parts at their own rates.

Train fits, validation chooses the epoch, test is opened once at the end. The validation figure is
cross-fitted: no row is judged by a choice it took part in.
"""

import csv
import dataclasses
import io
import math
import sys
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from probe import bundle, optim, predictions, steps, train
from probe.backbones import Backbone, load_backbone, normalize_pixels
from probe.choice import cross_fitted
from probe.config import FinetuneConfig, to_json
from probe.decoded import ImageRows
from probe.errors import ConfigError, MismatchError
from probe.heads import Classifier, TrainedHead, num_logits
from probe.images import Preprocessing
from probe.metrics import summarize
from probe.progress import Progress
from probe.rates import RateOptions, make_rules
from probe.sources import check_labels, open_source
from probe.splits import resolve_splits
from probe.storage import require_free

_VIEW = "pooler"


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Trains a classifier end to end and writes its run folder.

    Returns: what metrics.json holds: the figures of each split, the history, the parts and their rates, and
      the images left out.
    Raises: ConfigError, InputError, MismatchError or NumericalError; nothing is written then.
    """
    require_free(config.out, overwrite=config.overwrite)
    source = open_source(config.images)
    check_labels(source)
    backbone = load_backbone(config.backbone)
    start = _starting_head(config, source.class_names, backbone)
    classifier = Classifier(len(source.class_names), backbone.module, start.hidden)
    params, batch_stats = _classifier_variables(backbone, start)
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(RateOptions)}
    rules = make_rules(RateOptions(**options), params)
    labels, parts = optim.partition(params, rules), optim.parts(params, rules)
    trainable, frozen = optim.split(params, labels)
    if not trainable:
        raise ConfigError("everything is frozen, so there is nothing to train: take something out of --freeze")

    images = ImageRows.decode(source, backbone.preprocessing, num_workers=config.num_workers, on_error=config.on_error)
    rows = resolve_splits(
        images.labels,
        images.splits,
        images.groups,
        class_names=source.class_names,
        val_fraction=config.val_fraction,
        seed=config.seed,
    )
    num_steps = config.epochs * math.ceil(len(rows.train) / config.batch_size)
    tx = optim.make_optimizer(
        optim.split(labels, labels)[0],
        num_steps=num_steps,
        warmup_steps=int(config.warmup_fraction * num_steps),
        weight_decay=config.weight_decay,
    )
    apply_fn = make_apply_fn(classifier, backbone.preprocessing)
    _print_parts(parts)

    with Progress("training", total=config.epochs * len(rows.train), unit="images") as progress:

        def train_batches(epoch: int) -> Any:
            order = rows.train[steps.shuffled(len(rows.train), seed=config.seed, epoch=epoch)]
            for batch in images.batches(order, config.batch_size):
                yield batch
                progress.advance(int(batch.mask.sum()))

        result = train.fit(
            apply_fn,
            tx,
            trainable,
            frozen=frozen,
            model_state=batch_stats,
            train_batches=train_batches,
            val_batches=lambda: images.batches(rows.val, config.batch_size),
            num_epochs=config.epochs,
            seed=config.seed,
            on_epoch=_print_epoch,
        )

    eval_step = steps.make_eval_step(apply_fn)

    def logits_of(of: np.ndarray) -> np.ndarray:
        batches = images.batches(of, config.batch_size)
        return steps.predict_logits(eval_step, result.params, frozen, result.model_state, batches)[0]

    judged = cross_fitted(result.val_logits, result.val_labels)
    answers = {} if judged is None else {"val": (rows.val, judged)}
    if len(rows.test):
        answers["test"] = (rows.test, logits_of(rows.test))
    names, true = source.class_names, images.labels
    figures = {
        "train": summarize(logits_of(rows.train), true[rows.train], names, full=False),
        "val": {"n": len(rows.val), "accuracy": None, "nll": None},
        **{split: summarize(logits, true[of], names) for split, (of, logits) in answers.items()},
    }
    metrics = {
        "splits": figures,
        "val_is_given": rows.val_is_given,
        "val_figure": "cross-fitted: each half of validation judged at the epoch that the other half chose",
        "best_epoch": result.history[result.best].epoch,
        "history": [dataclasses.asdict(line) for line in result.history],
        "parts": [dataclasses.asdict(part) for part in parts],
        "failures": images.failures,
    }
    _save(
        config,
        source.class_names,
        backbone,
        start.hidden,
        steps.merge(result.params, frozen),
        result,
        metrics,
        predictions.collect(
            answers,
            class_names=names,
            names=[example.name for example in images.examples],
            keys=images.keys,
            labels=true,
        ),
    )
    return metrics


def describe(metrics: dict[str, Any]) -> str:
    """The lines printed on stdout."""
    lines = [f"{len(metrics['failures'])} images could not be read"] if metrics["failures"] else []
    lines.append(f"best epoch {metrics['best_epoch']} of {len(metrics['history'])}")
    for split, figures in metrics["splits"].items():
        if figures["accuracy"] is None:
            lines.append(f"{split:<5}  n {figures['n']}: too few to choose the epoch and to judge it")
        else:
            low, high = figures["accuracy_interval_95"]
            lines.append(
                f"{split:<5}  n {figures['n']:,}  accuracy {figures['accuracy']:.4f} "
                f"[{low:.4f}, {high:.4f}]  nll {figures['nll']:.4f}"
            )
    return "\n".join(lines)


def make_apply_fn(classifier: Classifier, preprocessing: Preprocessing) -> steps.ApplyFn:
    """The full mode of the hinge (see `probe.train`): uint8 images [B, H, W, 3] -> logits [B, num_logits].

    Batch statistics stay those of the pretrained tower: a fine-tuning batch is too small to replace them.
    Dropout is on in training, where the tower has it. Products are in full float32, as in `probe embed`.
    """

    def apply_fn(params: Any, model_state: Any, inputs: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
        pixels = normalize_pixels(inputs, preprocessing)
        variables = {"params": params, **model_state}
        with jax.default_matmul_precision("highest"):
            if key is None or model_state:
                logits = classifier.apply(variables, pixels)
            else:
                logits = classifier.apply(variables, pixels, train=True, rngs={"dropout": key})
        assert isinstance(logits, jax.Array)
        return logits, model_state

    return apply_fn


def _starting_head(config: FinetuneConfig, class_names: tuple[str, ...], backbone: Backbone) -> TrainedHead:
    """The head of the run given by --init, or a linear one of zeros, which guesses uniformly."""
    if config.init is None:
        outputs = num_logits(len(class_names))
        kernel = np.zeros((backbone.width, outputs), np.float32)
        return TrainedHead(hidden=(), params={"kernel": kernel, "bias": np.zeros(outputs, np.float32)})
    run = bundle.load(config.init)
    faults = []
    if run.class_names != class_names:
        ours, theirs = sorted(class_names), sorted(run.class_names)
        faults.append(f"its classes are {theirs}, those of {config.images} are {ours}")
    if run.view != _VIEW:
        faults.append(f"its head reads the view {run.view!r}, fine-tuning uses {_VIEW!r}")
    if run.backbone.fingerprint != backbone.fingerprint:
        faults.append(
            f"it stands on {run.backbone.name!r} ({run.backbone.fingerprint[:12]}), "
            f"not on {backbone.name!r} ({backbone.fingerprint[:12]})"
        )
    if faults:
        raise MismatchError(
            f"--init {config.init}: {'; '.join(faults)}. "
            "Give a run that `probe fit-linear` made on these classes and this backbone."
        )
    return run.head


def _classifier_variables(backbone: Backbone, head: TrainedHead) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and batch statistics of the classifier, the pretrained ones in their place."""
    params = {"backbone": backbone.variables["params"], "head": head.params}
    if "batch_stats" not in backbone.variables:
        return params, {}
    return params, {"batch_stats": {"backbone": backbone.variables["batch_stats"]}}


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


def _save(
    config: FinetuneConfig,
    class_names: tuple[str, ...],
    backbone: Backbone,
    hidden: tuple[int, ...],
    params: dict[str, Any],
    result: train.FitResult,
    metrics: dict[str, Any],
    answers: predictions.Predictions,
) -> None:
    tuned = dataclasses.replace(
        backbone,
        variables=jax.tree.map(
            np.asarray,
            {
                "params": params["backbone"],
                **{name: state["backbone"] for name, state in result.model_state.items()},
            },
        ),
    )
    changed = "backbone" in result.params
    bundle.save(
        config.out,
        head=TrainedHead(hidden=hidden, params=jax.tree.map(np.asarray, params["head"])),
        class_names=class_names,
        view=_VIEW,
        backbone=bundle.BackboneReference(
            name=backbone.name,
            revision=None if changed else backbone.revision,
            fingerprint=tuned.fingerprint if changed else backbone.fingerprint,
        ),
        preprocessor_config=backbone.preprocessing.to_config(),
        backbone_copy=tuned if changed else None,
        finetuned=changed,
        config=to_json(config),
        metrics=metrics,
        files={"history.csv": _history_csv(result.history), predictions.FILE_NAME: predictions.to_bytes(answers)},
        overwrite=config.overwrite,
    )


def _history_csv(history: list[train.Epoch]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(train.Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(line) for line in history)
    return text.getvalue().encode()
