"""`probe fit-linear`: trains a head on cached embeddings, and says how good it is on rows that it never saw.

Who chose what on which rows: train fits, validation (or folds of train) chooses, test is opened once at the end.
A linear head is then fitted again on all that may be used, so that nothing but the test split is left to judge it;
what stands under "val" is the figure of other heads, on rows that neither fitted nor chose them.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from probe import bundle, distributed, provenance
from probe.backbones import load_text_encoder
from probe.cache import Cache
from probe.config import FitLinearConfig, to_json
from probe.errors import ConfigError, InputError
from probe.evaluation import predictions
from probe.evaluation.metrics import describe_splits, summarize
from probe.heads import class_logits
from probe.machine import memory_bytes
from probe.notebook import looks, metrics_look
from probe.probing.beside import scikit_learn, zero_shot
from probe.probing.convex import fit_convex
from probe.probing.features import Features, Stream, gathered, pieces
from probe.probing.fewer import curve_warnings, few_shot, head_warnings, learning_curve
from probe.probing.knn import fit_knn
from probe.probing.mlp import fit_mlp
from probe.probing.prompts import class_directions, zero_shot_head
from probe.probing.protocol import Data, Fitted, Report, silent
from probe.probing.ridge import fit_ridge
from probe.progress import Stages, heeds_quiet
from probe.reporting.page import FILE_NAME as PAGE
from probe.reporting.page import report_saved_run
from probe.splits import Splits, assign_folds, resolve_splits
from probe.training.logs import Logs

_ANSWERED = 2048  # rows whose logits are made at once
_COPIES = 6  # times the embeddings that a fit takes at its peak, the baseline included (measured: 5.2)
_ROUNDING = 1e-6  # of a float32 embedding, as a share of it
_LARGEST, _LEAST = 1e15, 1e-15  # of an embedding's values: squares and their sums stay within float32
_NAMED = 5  # how many of many rows a message names


@looks(metrics_look)
@heeds_quiet
def fit_linear(config: FitLinearConfig) -> dict[str, Any]:
    """Trains the head that the config asks for and writes the run folder; of several processes, the first one writes.

    Returns: what metrics.json holds.
    Raises: InputError for labels or embeddings that cannot be learned from, and what reading a cache raises;
      EngineError if another process is lost.
    """
    with distributed.joined(config), Logs(config) as logs:
        return _fit_linear(config, logs)


def _fit_linear(config: FitLinearConfig, logs: Logs) -> dict[str, Any]:
    made = provenance.Made()
    distributed.on_first(lambda: bundle.require_free(config.out, overwrite=config.overwrite))
    cache = Cache.open(config.cache)
    table, backbone = cache.table, cache.provenance
    reference = bundle.BackboneReference(
        name=backbone["backbone"],
        revision=backbone["backbone_revision"],
        fingerprint=backbone["backbone_fingerprint"],
        decode=backbone["preprocessor_config"].get("decode", "exact"),
        precision=backbone.get("precision"),
    )
    backbone_copy = reference.load() if config.bundle_backbone else None  # before the work: it may not be there
    embeddings, notes = open_embeddings(config, cache)
    for values in embeddings.values():
        check_finite(values, table.names)
    data, more = make_data(config, embeddings, table.labels, table.splits, table.groups, cache.class_names)
    notes += more + _leaks(table.keys, data.splits)
    if config.prior == "text":
        weights = distributed.on_first(lambda: _text_weights(config, reference, data))
        data = dataclasses.replace(data, text_weights=weights)
    distributed.on_first(logs.start)
    with Stages() as report:
        fitted, metrics = fit_data(config, data, notes, report)
    answers = predictions.collect(
        _answers(data, fitted),
        class_names=cache.class_names,
        names=table.names,
        keys=table.keys,
        labels=table.labels,
    )

    def write() -> None:
        bundle.save(
            config.out,
            head=fitted.head,
            class_names=cache.class_names,
            view=fitted.view,
            backbone=reference,
            preprocessor_config=backbone["preprocessor_config"],
            backbone_copy=backbone_copy,
            multi_label=data.multi_label,
            config=to_json(config),
            metrics=metrics,
            seen=_seen(table.keys, data.splits),
            files={
                predictions.FILE_NAME: predictions.to_bytes(answers),
                provenance.FILE_NAME: made.to_bytes(cache=cache.reference, source=cache.origin),
            },
            overwrite=config.overwrite,
        )
        logs.curves(metrics)
        logs.end(metrics)
        if not config.no_report:
            report_saved_run(config.out)
            logs.attach(config.out / PAGE)

    distributed.on_first(write)
    return metrics


def _text_weights(config: FitLinearConfig, reference: bundle.BackboneReference, data: Data) -> np.ndarray:
    """[P, M] of the zero-shot head. Raises: ConfigError for several labels a row; MismatchError if the backbone is not
    the cache's any more; what `load_text_encoder` raises."""
    if data.multi_label:
        raise ConfigError("--prior text tells classes apart, and these rows have several labels")
    backbone = reference.load()
    encoder = load_text_encoder(backbone.name, revision=backbone.revision)
    directions = class_directions(encoder, data.class_names, config.prompts)
    return np.asarray(zero_shot_head(directions, encoder.logit_scale).params["kernel"], np.float64)


def open_embeddings(config: FitLinearConfig, cache: Cache) -> tuple[dict[str, Features], list[str]]:
    """The embeddings of each view asked for, streamed where a fit would take too much memory, and a note of that.

    Raises: ConfigError if --max-memory says that they must be streamed, and what was asked for cannot.
    """
    limit = memory_bytes() / 2 if config.max_memory is None else config.max_memory * 1e9
    needed = _COPIES * 4 * len(cache.table) * sum(cache.width(view) for view in config.views)
    streamable = config.head == "linear" and config.solver == "lbfgs" and not (config.shots or config.learning_curve)
    every = np.arange(len(cache.table))
    if config.distributed:
        num = distributed.count()
        note = f"{num} processes divide the rows between them: scikit-learn's baseline is left out"
        fits = needed / num <= limit
        return {
            view: Stream(functools.partial(cache.blocks, view), every, cache.width(view), divided=True, fits=fits)
            for view in config.views
        }, [note if fits else f"{note}, and each reads its part anew for each pass"]
    if needed <= limit or (not streamable and config.max_memory is None):
        return {view: cache.embeddings(view) for view in config.views}, []
    limited_by = "half of this machine's memory" if config.max_memory is None else "--max-memory"
    too_large = (
        f"a fit of all embeddings takes some {needed / 1e9:.2g} GB of memory, and {limited_by} is {limit / 1e9:.2g}"
    )
    if not streamable:
        raise ConfigError(
            f"{too_large}: read in parts, they can be fitted with --head linear and --solver lbfgs, without --shots "
            "and --learning-curve. Ask for that, or give more memory."
        )
    streams: dict[str, Features] = {
        view: Stream(functools.partial(cache.blocks, view), every, cache.width(view)) for view in config.views
    }
    return streams, [f"{too_large}: they are read anew for each pass, and scikit-learn's baseline is left out"]


def make_data(
    config: FitLinearConfig,
    embeddings: Mapping[str, Features],
    labels: np.ndarray,
    splits: np.ndarray,
    groups: np.ndarray | None,
    class_names: Sequence[str],
) -> tuple[Data, list[str]]:
    """Decides which rows fit, choose, and test, and in which fold each training row is; and what is to be noted.

    Args:
      embeddings: view name to [N, D] float32, finite; labels: [N] integers, -1 for none, or [N, C] bool.
      splits, groups: [N] of text, as `splits.resolve_splits` takes them.
    Raises: InputError where nothing can be learned or nothing can be left out.
    """
    if labels.ndim == 2 and (config.head != "linear" or config.class_weights or config.shots or config.learning_curve):
        raise ConfigError(
            "rows with several labels need --head linear, and none of --class-weights (a row has one weight, and its "
            "labels would ask for several), --shots and --learning-curve"
        )
    resolved = resolve_splits(
        labels,
        splits,
        groups,
        class_names=class_names,
        val_fraction=config.val_fraction if config.head == "mlp" else 0,
        seed=config.seed,
    )
    folds = np.full(len(labels), -1, np.int32)
    notes: list[str] = []
    if labels.ndim == 1 and (labels < 0).any():
        notes.append(f"{(labels < 0).sum():,} rows without a label are left out")
    by_folds = config.head == "linear" and config.solver != "ridge"  # others leave out row by row
    if config.head != "mlp":
        train = resolved.train
        of_train = None if groups is None else groups[train]
        folds[train], few = assign_folds(labels[train], of_train, config.folds, seed=config.seed)
        if (folds[train] == -1).all() and not resolved.val_is_given:
            raise InputError(
                f"none of the {len(train)} training rows can be left out to choose on: each class has one row or one "
                "group alone. Add examples, or a val split."
            )
        if len(few):
            named = ", ".join(repr(class_names[label]) for label in few[:_NAMED])
            rest = f" and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
            notes.append(f"classes with fewer rows than the {config.folds} folds: {named}{rest}")
        if by_folds and (folds[train] == -1).any():
            notes.append(_never_left_out(labels[train[folds[train] == -1]], class_names))
    return Data(embeddings, labels, resolved, folds, tuple(class_names), groups=groups), notes


def _never_left_out(labels: np.ndarray, class_names: Sequence[str]) -> str:
    """A note of training rows that are in no fold, by the labels of these rows."""
    if labels.ndim == 2:
        which = f"{len(labels):,} in all"
    else:
        found, counts = np.unique(labels, return_counts=True)
        named = [f"{n:,} of {class_names[label]!r}" for label, n in zip(found, counts, strict=True)]
        which = ", ".join(named[:_NAMED]) + (f" and of {len(named) - _NAMED} more" if len(named) > _NAMED else "")
    return f"training rows that are never left out, so that no fold is without their class: {which}"


def fit_data(
    config: FitLinearConfig, data: Data, notes: Sequence[str] = (), report: Report = silent
) -> tuple[Fitted, dict[str, Any]]:
    """Chooses, fits and judges a head: all of `fit_linear` but the files. report: told how far the work is.

    Returns: the head, and what metrics.json holds.
    Raises: InputError if a view has the same embedding for all training rows; what the fit of the head raises.
    """
    for embeddings in data.embeddings.values():
        check_varied(embeddings[data.splits.train])
    if config.head == "linear":
        fitted = fit_ridge(config, data) if config.solver == "ridge" else fit_convex(config, data, report)
    else:
        fitted = fit_mlp(config, data, report) if config.head == "mlp" else fit_knn(config, data)
    figures = {}
    for name, rows in (("train", data.splits.train), ("test", data.splits.test)):
        if len(rows):
            logits = apply_head(fitted, data, rows)
            figures[name] = summarize(logits, data.labels[rows], data.class_names, full=name != "train")
            if name == "test":
                fitted = dataclasses.replace(fitted, test_logits=logits)
    if fitted.val_logits is not None:
        figures["val"] = summarize(fitted.val_logits, data.labels[fitted.val_rows], data.class_names)
        figures["val"]["of"] = fitted.val_of
    extra: dict[str, Any] = {}
    if config.shots:
        extra["few_shot"] = few_shot(config, data, report)
        notes = [*notes, *head_warnings("few shots", extra["few_shot"])]
    if config.learning_curve:
        extra["learning_curve"] = learning_curve(config, data, report)
        curve = extra["learning_curve"]
        notes = [*notes, *curve_warnings(curve), *head_warnings("the learning curve", curve["points"])]
    warnings = [*notes, *fitted.warnings]
    return fitted, {
        "splits": figures,
        "head": config.head,
        "val_is_given": data.splits.val_is_given,
        **fitted.facts,
        **scikit_learn(data, fitted.view),
        **zero_shot(data),
        **extra,
        "warnings": warnings,
    }


def apply_head(fitted: Fitted, data: Data, rows: np.ndarray) -> np.ndarray:
    """[n, C] logits of the head as it is saved."""
    embeddings = data.embeddings[fitted.view][rows]
    own = [(at, np.asarray(fitted.head.apply(part))) for at, part in pieces(embeddings, _ANSWERED)]
    at, parts = zip(*(piece for of_one in gathered(embeddings, own) for piece in of_one), strict=True)
    logits = jnp.concatenate(parts)[np.argsort(np.concatenate(at))]
    return np.asarray(logits if data.multi_label else class_logits(logits))


def describe(metrics: dict[str, Any]) -> str:
    """The metrics as a few lines for people."""
    lines = describe_splits(metrics["splits"])
    if baseline := metrics.get("baseline"):
        lines.append(
            f"for comparison, scikit-learn's LogisticRegression(C=1) on {baseline['n']:,} rows of {baseline['split']}: "
            f"accuracy {baseline['accuracy']:.4f}, negative log-likelihood {baseline['nll']:.4f}"
        )
    if words := metrics.get("zero_shot"):
        lines.append(
            f"for comparison, zero-shot on {words['split']}: accuracy {words['accuracy']:.4f}, "
            f"negative log-likelihood {words['nll']:.4f}"
        )
    if "solution" in metrics:
        solution = metrics["solution"]
        state = "converged" if solution["converged"] else "NOT CONVERGED"
        lines.append(
            f"λ {metrics['penalty']:.3g}{_c(metrics)}, objective {solution['objective']:.8f}, "
            f"gradient norm {solution['gradient_norm']:.2e} from {solution['initial_gradient_norm']:.2e}, "
            f"{state} after {solution['num_iterations']} iterations; "
            f"its logits are then divided by the temperature {metrics['temperature']:.3g}"
        )
    elif "epoch" in metrics:
        lines.append(f"epoch {metrics['epoch']} of {metrics['num_epochs']} was best on validation, and is kept")
    elif "num_neighbours" in metrics:
        lines.append(f"{metrics['num_neighbours']} neighbours")
    else:
        lines.append(f"λ {metrics['penalty']:.3g}, least squares in closed form")
    for line in metrics.get("few_shot", []):
        lines.append(f"{line['shots']} shots: accuracy {line['accuracy']:.4f}{_deviation(line)}")
    if curve := metrics.get("learning_curve"):
        for line in curve["points"]:
            lines.append(f"{line['n']:,} labels: accuracy {line['accuracy']:.4f}{_deviation(line)}")
        for line in curve["extrapolation"]:
            lines.append(f"{line['n']:,} labels, expected: {line['accuracy']:.4f}{_interval(line)}")
    return "\n".join(lines + [f"warning: {warning}" for warning in metrics["warnings"]])


def _deviation(line: dict[str, Any]) -> str:
    return "" if line["deviation"] is None else f" ± {line['deviation']:.4f} over seeds"


def _interval(line: dict[str, Any]) -> str:
    if line["interval_95"] is None:
        return ""
    low, high = line["interval_95"]
    return f" (95 %: {low:.4f} to {high:.4f})"


def _c(metrics: dict[str, Any]) -> str:
    return "" if metrics["C"] is None else f" (C {metrics['C']:.3g})"


def check_finite(embeddings: Features, names: Sequence[bytes]) -> None:
    """Raises InputError, naming the rows, if an embedding has a NaN, an infinity, or what is all but one."""
    found = [at[~(np.abs(part) <= _LARGEST).all(axis=1)] for at, part in pieces(embeddings)]
    rows = np.sort(np.concatenate([np.concatenate(rows) for rows in gathered(embeddings, found) if rows]))
    if len(rows):
        named = ", ".join(os.fsdecode(names[row]) for row in rows[:_NAMED])
        rest = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        raise InputError(
            f"{len(rows)} embeddings are not finite, or beyond {_LARGEST:.0e}: {named}{rest}. Look at these images and "
            "at the backbone's weights, and embed them again."
        )


def check_varied(embeddings: Features) -> None:
    """Raises InputError if all [N, D] embeddings are the same, up to float32's rounding or 1e-15."""

    def differ(rows: np.ndarray, first: np.ndarray) -> bool:
        return bool((np.abs(rows - first) > np.maximum(_ROUNDING * np.abs(first), _LEAST)).any())

    first, is_varied = None, False
    for _, part in pieces(embeddings):
        first = part[0].copy() if first is None else first
        is_varied = differ(part, first)
        if is_varied:
            break
    found = gathered(embeddings, (first, is_varied))
    firsts = [row for row, _ in found if row is not None]
    if any(varied for _, varied in found) or any(differ(row, firsts[0]) for row in firsts):
        return
    raise InputError(
        f"all {len(embeddings)} training images have the same embedding, so nothing tells them apart. Look at the "
        "images, which may be copies of one, and at the backbone's weights."
    )


def _seen(keys: np.ndarray, splits: Splits) -> frozenset[bytes]:
    """The content keys of the rows that fit or choose, out of those of all rows, [N, 32] uint8."""
    return frozenset(map(bytes, keys[np.concatenate([splits.train, splits.val])]))


def _leaks(keys: np.ndarray, splits: Splits) -> list[str]:
    """A note where test images stand, byte for byte, among those that fit or choose: [N, 32] content keys."""
    seen = _seen(keys, splits)
    leaked = sum(bytes(key) in seen for key in keys[splits.test])
    if not leaked:
        return []
    return [
        f"{leaked:,} of the {len(splits.test):,} test images are also among those trained or chosen on, byte for byte: "
        "the test figure is too good. Take them out of one of the splits."
    ]


def _answers(data: Data, fitted: Fitted) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split to rows and what heads say of them that were not fitted on them: train out of fold, given validation
    rows, and test; all divided by the saved temperature, as `evaluation.predictions` has it."""
    answers, temperature = {}, np.float32(fitted.facts["temperature"])
    if fitted.out_of_fold is not None:
        judged = ~np.isnan(fitted.out_of_fold).any(axis=1)
        answers["train"] = data.splits.train[judged], fitted.out_of_fold[judged] / temperature
    if fitted.val_logits is not None and np.isin(fitted.val_rows, data.splits.val).all():
        yet_raw = np.float32(1) if fitted.val_is_calibrated else temperature
        answers["val"] = fitted.val_rows, fitted.val_logits / yet_raw
    if fitted.test_logits is not None:
        answers["test"] = data.splits.test, fitted.test_logits
    return answers
