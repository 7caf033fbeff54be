"""`probe finetune`: trains backbone and head end to end, parts at their own rates, and says what it was worth.

Train fits, validation chooses the epoch and how far to go towards it, test is opened once at the end. What
is said of validation rows is cross-fitted: no row is judged by a choice that it took part in. The start is
the linear probe, solved on the training rows alone; unless fine-tuning beats it there beyond chance, the
probe is what is saved.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.table import Column, Table

from probe import bundle
from probe.backbones import Backbone, load_backbone
from probe.backbones.resize import resize_backbone
from probe.config import FinetuneConfig, to_json
from probe.errors import ConfigError, InputError, MismatchError
from probe.evaluation import predictions
from probe.evaluation.metrics import describe_splits, summarize
from probe.heads import Classifier, TrainedHead
from probe.progress import Progress
from probe.sources import check_labels, display_name, open_source
from probe.splits import Splits, resolve_splits
from probe.training import optim, sharding, steps, train, verdict
from probe.training.augment import AugmentConfig
from probe.training.decoded import ImageRows
from probe.training.full import backbone_variables, classifier_variables, make_apply_fn, make_prepare
from probe.training.rates import RateOptions, make_rules
from probe.training.start import VIEW, embed_rows, solve_head, zero_head

T = TypeVar("T")

_FAILURES_SHOWN = 20


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Trains a classifier end to end and writes its run folder.

    Returns: what metrics.json holds: the figures of each split, the verdict, the history, the parts and their
      rates, and the images left out.
    Raises: ConfigError, InputError, MismatchError, NumericalError or Interrupted; no run folder is written
    then,
      but the checkpoints stay.
    """
    bundle.require_free(config.out, overwrite=config.overwrite)
    _require_no_checkpoints(config)
    _options(config, AugmentConfig)
    source = open_source(config.images)
    check_labels(source)
    loaded = load_backbone(config.backbone)
    given = _given_head(config, source.class_names, loaded)
    backbone = loaded if config.image_size is None else resize_backbone(loaded, config.image_size)
    rules = _rules(config, backbone, given)  # before the images are read: a clash should cost no time
    images = ImageRows.decode(source, backbone.preprocessing, num_workers=config.num_workers, on_error=config.on_error)
    rows = resolve_splits(
        images.labels,
        images.splits,
        images.groups,
        class_names=source.class_names,
        val_fraction=config.val_fraction,
        seed=config.seed,
    )
    start, facts = (given, None) if given is not None else _probe(config, backbone, images, rows)
    tuning = _Tuning(config, backbone, start, rules, images, rows)
    result = tuning.fit()

    probe_logits = None if facts is None else tuning.logits(0.0, 0, rows.val)
    alphas = _alphas(config, start)
    curve = functools.cache(lambda epoch: np.stack([tuning.logits(alpha, epoch, rows.val) for alpha in alphas]))
    judged = verdict.judge(result.val_logits, result.val_labels, curve, alphas)
    found = _verdict(config, judged, probe_logits, result.val_labels)
    alpha, epoch = (0.0, 0) if found["kept"] == "probe" else (judged.choice.alpha, judged.choice.epoch)

    val_logits = probe_logits if found["kept"] == "probe" else judged.interpolated
    unjudged = "too few rows to choose and to judge" if val_logits is None else None
    if _start_has_seen(config, images.keys[rows.val]):
        unjudged = f"{config.init} was fitted or chosen on some of these rows: start from --init probe for a figure"
    answers = {"val": (rows.val, val_logits)} if unjudged is None and val_logits is not None else {}
    if len(rows.test):
        answers["test"] = (rows.test, tuning.logits(alpha, epoch, rows.test))
    names, true = source.class_names, images.labels
    train_logits = tuning.logits(alpha, epoch, rows.train)
    metrics = {
        "splits": {
            "train": summarize(train_logits, true[rows.train], names, full=False),
            "val": {"n": len(rows.val), "accuracy": None, "nll": None, "why": unjudged},
            **{split: summarize(logits, true[of], names) for split, (of, logits) in answers.items()},
        },
        "val_is_given": rows.val_is_given,
        "val_figure": "cross-fitted: each half of validation judged with the epoch and α that the other half chose; "
        "whether the probe or the fine-tuned classifier is kept was decided on all of it",
        "verdict": found,
        "probe": facts,
        "chosen_epoch": 0 if found["kept"] == "probe" else result.history[epoch].epoch,  # 0 is the start
        "chosen_alpha": alpha,
        "wise_curve": [
            # these rows chose: the curve is for the eye, the verdict is for quoting
            {"alpha": alpha, **_pick(summarize(logits, result.val_labels, names, full=False), "accuracy", "nll")}
            for alpha, logits in zip(alphas, curve(judged.choice.epoch), strict=True)
        ],
        "history": [dataclasses.asdict(line) for line in result.history],
        "parts": [dataclasses.asdict(part) for part in tuning.parts],
        "failures": images.failures,
    }
    kept = predictions.collect(
        answers,
        class_names=names,
        names=[example.name for example in images.examples],
        keys=images.keys,
        labels=true,
    )
    fitted_or_chose = np.concatenate([rows.train, rows.val])
    _save(
        config,
        loaded,
        backbone,
        start,
        names,
        tuning.variables(alpha, epoch),
        metrics,
        kept,
        images.keys[fitted_or_chose],
    )
    shutil.rmtree(_checkpoint_folder(config), ignore_errors=True)
    return metrics


def describe(metrics: dict[str, Any]) -> str:
    """The lines printed on stdout."""
    lines = [
        f"left out: {display_name(failure['path'])}: {failure['detail']} ({failure['reason']})"
        for failure in metrics["failures"][:_FAILURES_SHOWN]
    ]
    if metrics["failures"]:
        lines.append(f"{len(metrics['failures'])} images could not be read; metrics.json lists them all")
    if metrics["chosen_epoch"]:
        lines.append(
            f"epoch {metrics['chosen_epoch']} of {len(metrics['history'])}, "
            f"α {metrics['chosen_alpha']:g} of the way from the start"
        )
    lines += describe_splits(metrics["splits"])
    found = metrics["verdict"]
    if "probe" in found:
        lines.append(f"verdict on {found['n']} validation rows, epoch and α cross-fitted:")
        lines.append(f"  probe         accuracy {found['probe']['accuracy']:.4f}  nll {found['probe']['nll']:.4f}")
        for name in ("finetuned", "interpolated"):
            low, high = found[name]["accuracy_difference_interval_95"]
            lines.append(
                f"  {name:<12}  accuracy {found[name]['accuracy']:.4f}  nll {found[name]['nll']:.4f}  "
                f"against the probe {found[name]['accuracy_difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
            )
    lines.append(f"saved: {found['kept']}, {found['why']}")
    return "\n".join(lines)


class _Tuning:
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
                prepare=make_prepare(_options(config, AugmentConfig), self._num_classes),
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
        )
        options = {
            name: value for name, value in to_json(config).items() if name not in (*changeable, "backbone", "wise")
        }
        return train.Checkpointing(
            folder=_checkpoint_folder(config),
            every_steps=config.checkpoint_every,
            record={**options, "backbone": self._fingerprint, "rows": rows.hexdigest()},
            resume=config.resume,
        )


def _checkpoint_folder(config: FinetuneConfig) -> Path:
    return config.out.with_name(f"{config.out.name}.checkpoints")


def _require_no_checkpoints(config: FinetuneConfig) -> None:
    folder = _checkpoint_folder(config)
    if config.resume or not folder.is_dir():
        return
    if not config.overwrite:
        raise InputError(
            f"{folder} holds the checkpoints of a run that did not end: go on with it by --resume, or give them up "
            "by --overwrite"
        )
    shutil.rmtree(folder)


def _options(config: FinetuneConfig, kind: type[T]) -> T:
    """The part of the config that a dataclass of the same field names holds. Raises: ConfigError, as that does."""
    return kind(**{field.name: getattr(config, field.name) for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def _rules(config: FinetuneConfig, backbone: Backbone, head: TrainedHead | None) -> dict[str, float | str]:
    form = zero_head(backbone.width, 2) if head is None else head  # a linear head has the same paths for any classes
    params, state = classifier_variables(backbone, form)
    rules = make_rules(_options(config, RateOptions), params)
    if not optim.split(params, optim.partition(params, rules))[0]:
        raise ConfigError("everything is frozen, so there is nothing to train: take something out of --freeze")
    if config.train_batchnorm and not state:
        raise ConfigError(f"--train-batchnorm: {backbone.name} has no batch norm")
    return rules


def _given_head(config: FinetuneConfig, class_names: tuple[str, ...], backbone: Backbone) -> TrainedHead | None:
    """The head to start from, or None where it is still to be solved."""
    if config.init == "probe":
        return None
    if config.init == "zeros":
        return zero_head(backbone.width, len(class_names))
    run = bundle.load(Path(config.init))
    faults = []
    if run.class_names != class_names:
        ours, theirs = sorted(class_names), sorted(run.class_names)
        faults.append(f"its classes are {theirs}, those of {config.images} are {ours}")
    if run.view != VIEW:
        faults.append(f"its head reads the view {run.view!r}, fine-tuning uses {VIEW!r}")
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


def _start_has_seen(config: FinetuneConfig, keys: np.ndarray) -> bool:
    """Whether the run that training starts from was fitted or chosen on images of these content keys, [n, 32]."""
    if config.init in ("probe", "zeros"):
        return False
    return not bundle.load(Path(config.init)).seen.isdisjoint(map(bytes, keys))


def _probe(
    config: FinetuneConfig, backbone: Backbone, images: ImageRows, rows: Splits
) -> tuple[TrainedHead, dict[str, Any]]:
    embeddings = embed_rows(backbone, images, rows.train, batch_size=config.batch_size, cache=config.cache)
    labels, groups = images.labels[rows.train], images.groups[rows.train]
    return solve_head(embeddings, labels, groups, len(images.source.class_names), seed=config.seed)


def _alphas(config: FinetuneConfig, start: TrainedHead) -> tuple[float, ...]:
    if config.wise == "off" or config.init == "zeros":  # from a head that knows nothing there is no way to shorten
        return (1.0,)
    return verdict.ALPHAS if config.wise == "best" else (float(config.wise),)


def _verdict(
    config: FinetuneConfig, judged: verdict.Judged, probe_logits: np.ndarray | None, labels: np.ndarray
) -> dict[str, Any]:
    """Which classifier is saved, and why, as JSON values."""
    if probe_logits is None:
        return {"kept": "finetuned", "why": "there is no probe of the training rows alone to compare with"}
    if judged.interpolated is None or judged.finetuned is None:
        kept = "finetuned" if config.keep == "finetuned" else "probe"
        return {"kept": kept, "why": "there are too few validation rows to choose and to judge"}
    found = verdict.compare(probe_logits, judged.interpolated, labels)
    table = {
        "n": len(labels),
        "probe": _pick(verdict.compare(probe_logits, probe_logits, labels), "accuracy", "nll"),
        "finetuned": verdict.compare(probe_logits, judged.finetuned, labels),
        "interpolated": found,
        "won": found["won"],
    }
    if found["won"]:
        return {**table, "kept": "finetuned", "why": "which beats the probe beyond chance"}
    if config.keep == "finetuned":
        return {**table, "kept": "finetuned", "why": "as asked, though it does not beat the probe beyond chance"}
    return {
        **table,
        "kept": "probe",
        "why": "which fine-tuning does not beat beyond chance (--keep finetuned overrides)",
    }


def _pick(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


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
    loaded: Backbone,
    backbone: Backbone,
    start: TrainedHead,
    class_names: tuple[str, ...],
    variables: tuple[dict[str, Any], dict[str, Any]],
    metrics: dict[str, Any],
    answers: predictions.Predictions,
    seen: np.ndarray,
) -> None:
    params, model_state = variables
    tuned = dataclasses.replace(backbone, variables=backbone_variables(params, model_state))
    changed = tuned.fingerprint != loaded.fingerprint
    bundle.save(
        config.out,
        seen=seen,
        head=TrainedHead(hidden=start.hidden, params=jax.tree.map(np.asarray, params["head"])),
        class_names=class_names,
        view=VIEW,
        backbone=bundle.BackboneReference(
            name=backbone.name,
            revision=None if changed else backbone.revision,
            fingerprint=tuned.fingerprint,
        ),
        preprocessor_config=backbone.preprocessing.to_config(),
        backbone_copy=tuned if changed or config.bundle_backbone else None,
        finetuned=changed,
        config=to_json(config),
        metrics=metrics,
        files={"history.csv": _history_csv(metrics["history"]), predictions.FILE_NAME: predictions.to_bytes(answers)},
        overwrite=config.overwrite,
    )


def _history_csv(history: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(train.Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()
