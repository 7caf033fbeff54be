"""`probe finetune`: trains backbone and head end to end, parts at their own rates, and says what it was worth.

Train fits, validation chooses the epoch and how far to go towards it, test is opened once at the end. What
is said of validation rows is cross-fitted: no row is judged by a choice that it took part in. The start is
the linear probe, solved on the training rows alone; unless fine-tuning beats it there beyond chance, the
probe is what is saved.
"""

import csv
import dataclasses
import functools
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np

from probe import bundle, distributed, provenance
from probe.backbones import Backbone, load_backbone, load_text_encoder
from probe.backbones.resize import resize_backbone
from probe.cache import Cache
from probe.config import FinetuneConfig, to_json
from probe.errors import ConfigError, InputError, MismatchError
from probe.evaluation import predictions
from probe.evaluation.metrics import describe_splits, summarize
from probe.heads import TrainedHead
from probe.notebook import looks, metrics_look
from probe.probing.prompts import class_directions, zero_shot_head
from probe.progress import heeds_quiet, say
from probe.reporting import components
from probe.reporting.page import FILE_NAME as PAGE
from probe.reporting.page import report_saved_run
from probe.sources import Columns, check_labels, display_name, open_source
from probe.sources.origin import describe_origin
from probe.splits import Splits, resolve_splits
from probe.training import optim, train, verdict
from probe.training.augment import AugmentConfig
from probe.training.decoded import ImageRows
from probe.training.full import backbone_variables, classifier_variables
from probe.training.logs import Logs
from probe.training.prefix import blocks_to_cache
from probe.training.rates import RateOptions, make_rules
from probe.training.start import VIEW, embed_rows, solve_head, text_head, zero_head
from probe.training.tuning import Tuning, options_of, remove_leftovers, require_no_checkpoints

_FAILURES_SHOWN = 20
_MANNER = frozenset((
    "resume", "overwrite", "json", "quiet", "num_workers", "checkpoint_every", "no_report", "fsdp", "distributed",
    "coordinator", "num_processes", "process_id",
))  # fmt: skip  # options that say how a run goes, and nothing of what it comes to


@looks(metrics_look)
@heeds_quiet
def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Trains a classifier end to end and writes its run folder.

    Of several processes all do this, and the first one writes. Asked to go on with a run that has ended, it says so.
    Returns: what metrics.json holds: the figures of each split, the verdict, the history, the parts and their
      rates, and the images left out.
    Raises: ConfigError, InputError, MismatchError, NumericalError or Interrupted; no run folder is written then,
      but the checkpoints stay. EngineError if another process is lost.
    """
    with distributed.joined(config):
        if (ended := distributed.on_first(lambda: _ended(config))) is not None:
            return ended
        distributed.on_first(lambda: bundle.require_free(config.out, overwrite=config.overwrite))
        distributed.on_first(lambda: require_no_checkpoints(config))
        with Logs(config) as logs:
            metrics = _finetune(config, logs)
            if not config.no_report:
                distributed.on_first(lambda: report_saved_run(config.out))
                distributed.on_first(lambda: logs.attach(config.out / PAGE))
    return metrics


def _ended(config: FinetuneConfig) -> dict[str, Any] | None:
    """What metrics.json holds, if the run to go on with is in --out already; else None.

    It is if a process died between the saving and its exit, and a parent or scheduler started all of them again.
    """
    if not config.resume or config.overwrite:
        return None
    metrics = bundle.find_ended(config.out, to_json(config), _MANNER)
    if metrics is not None:
        say(f"{config.out}: this run has ended; there is nothing to go on with")
        remove_leftovers(config)
        if not config.no_report:
            report_saved_run(config.out)
    return metrics


def _finetune(config: FinetuneConfig, logs: Logs) -> dict[str, Any]:
    made = provenance.Made()
    options_of(config, AugmentConfig)
    columns = Columns(
        path=config.path_column, labels=config.label_column, split=config.split_column, group=config.group_column
    )
    source = open_source(config.images, columns=columns, image_root=config.image_root)
    if source.multi_label:
        raise InputError(
            f"{config.images}: images with several labels: fine-tuning takes one label each. `probe embed` and "
            "`probe fit-linear` take several."
        )
    check_labels(source)
    loaded = load_backbone(config.backbone)
    given, seen_by_start = _given_head(config, source.class_names, loaded)
    zero_shot = distributed.on_first(lambda: _zero_shot(config, source.class_names, loaded))
    backbone = loaded if config.image_size is None else resize_backbone(loaded, config.image_size)
    # before the images are read: a clash should cost no time
    rules = _rules(config, backbone, given)
    num_cached_blocks = _cached_blocks(config, backbone, given, rules)
    images = ImageRows.decode(source, backbone.preprocessing, num_workers=config.num_workers, on_error=config.on_error)
    rows = resolve_splits(
        images.labels,
        images.splits,
        images.groups,
        class_names=source.class_names,
        val_fraction=config.val_fraction,
        seed=config.seed,
    )
    start, facts = (given, None) if given is not None else _start(config, backbone, zero_shot, images, rows)
    tuning = Tuning(config, backbone, start, rules, images, rows, num_cached_blocks=num_cached_blocks)
    result = tuning.fit(logs)

    probe_logits = None if facts is None else tuning.logits(0.0, 0, rows.val)
    alphas = _alphas(config, start)

    @functools.cache
    def val_logits_at(alpha: float, epoch: int) -> np.ndarray:
        """[N, C]; the ends have answered already."""
        known = {0.0: probe_logits, 1.0: result.val_logits[epoch]}.get(alpha)
        return tuning.logits(alpha, epoch, rows.val) if known is None else known

    def curve(epoch: int) -> np.ndarray:
        return np.stack([val_logits_at(alpha, epoch) for alpha in alphas])

    judged = verdict.judge(result.val_logits, result.val_labels, curve, alphas)
    found = distributed.agreed(_verdict(config, judged, probe_logits, result.val_labels))
    alpha, epoch = (0.0, 0) if found["kept"] == "probe" else (judged.choice.alpha, judged.choice.epoch)

    val_logits = probe_logits if found["kept"] == "probe" else judged.interpolated
    unjudged = "too few rows to choose and to judge" if val_logits is None else None
    if not seen_by_start.isdisjoint(map(bytes, images.keys[rows.val])):
        unjudged = f"{config.init} was fitted or chosen on some of these rows: start from --init probe for a figure"
    answers = {"val": (rows.val, val_logits)} if unjudged is None and val_logits is not None else {}
    embeddings: dict[str, np.ndarray] = {}
    if len(rows.test):
        logits, embeddings["test"] = tuning.answers(alpha, epoch, rows.test)
        answers["test"] = (rows.test, logits)
    elif "val" in answers:  # cross-fitted answers are of several classifiers: these are the embeddings of the one kept
        _, embeddings["val"] = tuning.answers(alpha, epoch, rows.val)
    names, true = source.class_names, images.labels
    train_logits = tuning.logits(alpha, epoch, rows.train)
    metrics: dict[str, Any] = {
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
            for alpha in (alphas if alphas == (1.0,) else sorted({*verdict.ALPHAS, *alphas}))
            for logits in [val_logits_at(alpha, judged.choice.epoch)]
        ],
        "history": [dataclasses.asdict(line) for line in result.history],
        "parts": [dataclasses.asdict(part) for part in tuning.parts],
        "cached_prefix": tuning.cached_prefix,
        "failures": images.failures,
    }
    kept = predictions.collect(
        answers,
        class_names=names,
        names=[example.name for example in images.examples],
        keys=images.keys,
        labels=true,
    )
    seen = seen_by_start.union(map(bytes, images.keys[np.concatenate([rows.train, rows.val])]))
    cache = None if config.cache is None else Cache.open(config.cache).reference
    record = made.to_bytes(cache=cache, source=describe_origin(config.images))
    variables = tuning.variables(alpha, epoch)

    def write() -> None:
        files = {
            "history.csv": _history_csv(metrics["history"]),
            predictions.FILE_NAME: predictions.to_bytes(kept),
            provenance.FILE_NAME: record,
            **components.of_answers(kept, embeddings.__getitem__),
        }
        _save(config, loaded, backbone, start, names, variables, metrics, seen, files)
        tuning.end()
        logs.end(metrics)

    distributed.on_first(write)
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


def _rules(config: FinetuneConfig, backbone: Backbone, head: TrainedHead | None) -> dict[str, float | str]:
    form = zero_head(backbone.width, 2) if head is None else head  # a linear head has the same paths for any classes
    params, state = classifier_variables(backbone, form)
    rules = make_rules(options_of(config, RateOptions), params)
    if not optim.split(params, optim.partition(params, rules))[0]:
        raise ConfigError("everything is frozen, so there is nothing to train: take something out of --freeze")
    if config.train_batchnorm and not state:
        raise ConfigError(f"--train-batchnorm: {backbone.name} has no batch norm")
    return rules


def _cached_blocks(
    config: FinetuneConfig, backbone: Backbone, head: TrainedHead | None, rules: dict[str, float | str]
) -> int:
    augmentation = options_of(config, AugmentConfig)
    if config.views is not None and not (augmentation.changes_images or augmentation.mixes):
        raise ConfigError(f"--views {config.views} cannot act: there is no augmentation that draws any")
    params, _ = classifier_variables(backbone, zero_head(backbone.width, 2) if head is None else head)
    num_blocks, note = blocks_to_cache(
        config.cache_prefix,
        backbone,
        optim.partition(params, rules),
        augmentation,
        epochs=config.epochs,
        views=config.views,
        train_batchnorm=config.train_batchnorm,
    )
    if note is not None:
        say(note)
    return num_blocks


def _given_head(
    config: FinetuneConfig, class_names: tuple[str, ...], backbone: Backbone
) -> tuple[TrainedHead | None, frozenset[bytes]]:
    """The head to start from, or None where it is still to be solved; and the content keys of the images that it was
    fitted or chosen on."""
    if config.init in ("probe", "text"):
        return None, frozenset()
    if config.init == "zeros":
        return zero_head(backbone.width, len(class_names)), frozenset()
    run = bundle.load(Path(config.init))
    faults = []
    if run.class_names != class_names:
        ours, theirs = sorted(class_names), sorted(run.class_names)
        faults.append(f"its classes are {theirs}, those of {config.images} are {ours}")
    if run.multi_label:
        faults.append("it gives an image several labels")
    if run.head.params.keys() & {"bank", "unit_norm"}:
        faults.append("its head is a vote of neighbours, or divides embeddings by their norm, and cannot be trained on")
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
    return run.head, run.seen


def _zero_shot(config: FinetuneConfig, class_names: tuple[str, ...], loaded: Backbone) -> TrainedHead | None:
    if config.init != "text":
        return None
    encoder = load_text_encoder(loaded.name, revision=loaded.revision)
    return zero_shot_head(class_directions(encoder, class_names, config.prompts), encoder.logit_scale)


def _start(
    config: FinetuneConfig, backbone: Backbone, zero_shot: TrainedHead | None, images: ImageRows, rows: Splits
) -> tuple[TrainedHead, dict[str, Any] | None]:
    """The head of the texts, or the probe of the training rows with the facts about it."""
    embeddings = embed_rows(backbone, images, rows.train, batch_size=config.batch_size, cache=config.cache)
    if zero_shot is not None:
        return distributed.on_first(lambda: text_head(backbone, zero_shot, embeddings)), None
    labels, groups, num_classes = images.labels[rows.train], images.groups[rows.train], len(images.source.class_names)
    return distributed.on_first(lambda: solve_head(embeddings, labels, groups, num_classes, seed=config.seed))


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
    no_way_gone = judged.choice.alpha == 0  # to keep that is to keep the probe, and is called so
    if judged.interpolated is None or judged.finetuned is None:
        kept = "finetuned" if config.keep == "finetuned" and not no_way_gone else "probe"
        return {"kept": kept, "why": "there are too few validation rows to choose and to judge"}
    found = verdict.compare(probe_logits, judged.interpolated, labels)
    table = {
        "n": len(labels),
        "probe": _pick(verdict.compare(probe_logits, probe_logits, labels), "accuracy", "nll"),
        "finetuned": verdict.compare(probe_logits, judged.finetuned, labels),
        "interpolated": found,
        "won": found["won"],
    }
    if no_way_gone and (found["won"] or config.keep == "finetuned"):
        why = "which is α 0, as asked" if config.wise != "best" else "since validation chose α 0 (--wise off overrides)"
        return {**table, "kept": "probe", "why": why}
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


def _save(
    config: FinetuneConfig,
    loaded: Backbone,
    backbone: Backbone,
    start: TrainedHead,
    class_names: tuple[str, ...],
    variables: tuple[dict[str, Any], dict[str, Any]],
    metrics: dict[str, Any],
    seen: frozenset[bytes],
    files: dict[str, bytes],
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
        files=files,
        overwrite=config.overwrite,
    )


def _history_csv(history: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(train.Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()
