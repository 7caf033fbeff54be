"""`report.html`: one self-contained page, made of the files of a run folder and of what they point at.

Pictures are re-encoded, as many as fit; galleries have them first.
"""

import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from probe import bundle, provenance
from probe.cache import Cache
from probe.errors import CorruptError, InputError, MismatchError, ProbeError
from probe.evaluation import predictions
from probe.reporting import advice, components, plots
from probe.reporting.answers import Answers, confusion_matrix, reliability, scaled, worst_classes
from probe.reporting.audit_page import JSON_NAME, audit_context
from probe.reporting.charts import percent
from probe.reporting.embedding_map import Map, Method, make_map
from probe.reporting.rendering import render_page
from probe.reporting.shown import galleries, shown_rows
from probe.reporting.thumbnails import Thumbnails, load_thumbnails
from probe.sources import display_name
from probe.sources.origin import describe_origin
from probe.storage import atomic_write_bytes

FILE_NAME = "report.html"
MAX_BYTES = 5_000_000
_MAX_THUMBNAILS = 1_300  # of about 3.5 kB: more would not fit
_NUM_CLASSES, _MATRIX_CLASSES = 100, 24
_SPARE_BYTES = 50_000

FIGURES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "top_5_accuracy": "Top-5 accuracy",
    "roc_auc": "ROC-AUC",
    "average_precision": "Average precision",
    "nll": "Negative log-likelihood",
    "brier": "Brier score",
    "expected_calibration_error": "Calibration error",
}
_SHARES = ("accuracy", "balanced_accuracy", "macro_f1", "top_5_accuracy", "expected_calibration_error")
SPLIT_NAMES = {
    "train": "training images, none by a head that was fitted on it",
    "val": "validation images",
    "test": "test images that took no part in training or choosing",
}


def write_report(
    run: Path,
    *,
    images: Path | None = None,
    cache: Path | None = None,
    method: Method = "pca",
    out: Path | None = None,
    audit: Path | None = None,
    fallback: Path | None = None,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Writes the page.

    Args:
      run: the run folder.
      images, cache: where they are now, if not where they were; what is not found is left out, and the page says so.
      method: of the map.
      out: file to write; None: report.html in the run folder.
      audit: audit.json to show; None: the run folder's, if there is one.
      fallback: a cache for the map where neither the run nor the cache that it was made from has the embeddings.
    Returns: report, the path; bytes; num_rows that the page knows, num_points on its map, num_thumbnails; notes, on
      what is missing.
    Raises: InputError, CorruptError as `bundle.load` does; MismatchError for a cache that was asked for and lacks
      images of the run; StorageError.
    """
    classifier = bundle.load(run)
    if images is not None and not images.exists():
        raise InputError(f"{images} does not exist: give the folder that the images are in, or leave --images out")
    metrics, config = (json.loads((run / name).read_bytes()) for name in ("metrics.json", "config.json"))
    made = provenance.load(run)
    notes: list[str] = []
    answers, every = _answers(run, notes)
    data: dict[str, Any] = {"texts": [], "rows": None}
    pictures = Thumbnails({}, None)
    origin = describe_origin(images) if images is not None else made.get("source")
    shown = np.zeros(0, np.int64)
    plane: Map | None = None
    mistakes = hits = np.zeros(0, np.int64)
    if answers is not None:
        mistakes, hits = galleries(answers)
        shown = shown_rows(answers)
        keys = [answers.of.keys[row].tobytes() for row in shown]
        plane = _map(run, classifier.view, keys, made, cache, fallback, method, notes)
        data = _data(answers, shown, plane)
        wanted = _by_priority(answers, shown, (mistakes, hits))[:_MAX_THUMBNAILS]
        named = {row: (answers.of.names[row], answers.of.keys[row].tobytes()) for row in wanted}
        pictures = load_thumbnails(origin, named, num_workers=num_workers)
        if pictures.missing:
            notes.append(f"Not every image has a picture: {pictures.missing}.")
    context = _context(run, classifier, metrics, config, made, answers, every, mistakes, hits)
    context |= {"notes": notes, "plane": plane, "num_shown": len(shown)}
    findings = audit or run / JSON_NAME
    context["audit"] = audit_context(findings, origin) if findings.is_file() else None

    def render(uris: dict[int, str]) -> bytes:
        place = {int(row): i for i, row in enumerate(shown)}
        in_galleries = {*mistakes.tolist(), *hits.tolist()}
        others = {place[row]: uri for row, uri in uris.items() if row not in in_galleries}
        page = {**context, "uris": uris, "place": place, "data": {**data, "thumbs": others}, "num_uris": len(uris)}
        return render_page("report.html", page)

    budget = MAX_BYTES - _SPARE_BYTES - len(render({}))
    kept: dict[int, str] = {}
    for row in (row for row in wanted if row in pictures.uris) if answers is not None else ():
        budget -= len(pictures.uris[row]) + 16
        if budget < 0:
            break
        kept[row] = pictures.uris[row]
    page = render(kept)
    path = run / FILE_NAME if out is None else out
    atomic_write_bytes(path, page)
    return {
        "report": str(path),
        "bytes": len(page),
        "num_rows": len(shown),
        "num_points": 0 if plane is None else len(shown),
        "num_thumbnails": len(kept),
        "notes": notes,
    }


def report_saved_run(run: Path) -> None:
    """Writes the page of a run that was just saved. What stands in its way is said on stderr."""
    try:
        write_report(run)
    except ProbeError as err:
        print(f"note: the run is saved, but not its {FILE_NAME}: {err}", file=sys.stderr)


def _answers(run: Path, notes: list[str]) -> tuple[Answers | None, predictions.Predictions | None]:
    """The answers that judge the run, and all of them."""
    every: predictions.Predictions | None = None
    with contextlib.suppress(InputError):
        every = predictions.load(run)
    answers = None if every is None else Answers.of_run(every)
    if answers is None:
        notes.append("The run holds no answers to rows that it was not fitted on: there is nothing to look at but how "
                     "it was trained.")  # fmt: skip
    return answers, every


def _by_priority(answers: Answers, shown: np.ndarray, galleries: Iterable[np.ndarray]) -> list[int]:
    """Rows in the order in which they should have pictures: galleries, mistakes, then others at random."""
    rest = np.random.default_rng(0).permutation(shown)
    groups = [*galleries, rest[~answers.correct[rest]], rest]
    return list(dict.fromkeys(int(row) for group in groups for row in group))


def _map(
    run: Path,
    view: str,
    keys: list[bytes],
    made: dict[str, Any],
    cache: Path | None,
    fallback: Path | None,
    method: Method,
    notes: list[str],
) -> Map | None:
    """Rows that the page knows, by content key, in the plane; None where their embeddings are not to be had.

    They come from the cache that was asked for; else from the run itself, whose own backbone made them; else from the
    cache that it was made from, or the one to fall back on.
    """
    if len(keys) < 3:
        return None
    if cache is not None:
        return make_map(_cached(cache, view, keys), method)
    if (kept := components.load(run)) is not None and (rows := kept.rows(keys)) is not None:
        return make_map(kept.values[rows], method, kept.variance)
    recorded = made.get("cache") or {}
    found = [(Path(recorded["path"]), recorded["fingerprint"])] if recorded else []
    found += [(fallback, None)] if fallback is not None else []
    why = "no cache was used. Give one with --cache"
    for root, fingerprint in found:
        try:
            return make_map(_cached(root, view, keys, fingerprint), method)
        except (InputError, MismatchError, CorruptError) as err:
            why = str(err)
    notes.append(f"There is no map of the embeddings: {why}.".replace("..", "."))
    return None


def _cached(root: Path, view: str, keys: list[bytes], fingerprint: str | None = None) -> np.ndarray:
    """[n, D] embeddings of images by their content keys; fingerprint: that the cache must have, if any."""
    opened = Cache.open(root)
    if fingerprint not in (None, opened.fingerprint):
        raise MismatchError(f"{root}: another cache stands there now")
    if view not in opened.views:
        raise InputError(f"{root}: it has no view {view!r}")
    row_of = {bytes(key): row for row, key in enumerate(opened.table.keys)}
    rows = [row_of.get(key, -1) for key in keys]
    if -1 in rows:
        raise MismatchError(f"{root}: it lacks {rows.count(-1):,} of the {len(rows):,} images")
    return opened.embeddings(view, np.array(rows))


def _data(answers: Answers, shown: np.ndarray, plane: Map | None) -> dict[str, Any]:
    """What the page's script is given: columns, one item per row that it knows."""
    texts, label, predicted = answers.texts, answers.label[shown], answers.predicted[shown]
    if answers.of.multi_label:  # there are as many sets as rows, if it comes to that: those of these rows
        used, codes = np.unique(np.stack([label, predicted]), return_inverse=True)
        texts = tuple(texts[code] for code in used)
        label, predicted = codes.reshape(2, -1)
    return {
        "texts": texts,
        "rows": {
            "name": [display_name(answers.of.names[row]) for row in shown],
            "label": label.tolist(),
            "predicted": predicted.tolist(),
            "wrong": (~answers.correct[shown]).astype(int).tolist(),
            "confidence": np.round(1000 * answers.confidence[shown]).astype(int).tolist(),
            "x": None if plane is None else plane.positions[:, 0].tolist(),
            "y": None if plane is None else plane.positions[:, 1].tolist(),
        },
    }


def _context(
    run: Path,
    classifier: bundle.Bundle,
    metrics: dict[str, Any],
    config: dict[str, Any],
    made: dict[str, Any],
    answers: Answers | None,
    every: predictions.Predictions | None,
    mistakes: np.ndarray,
    hits: np.ndarray,
) -> dict[str, Any]:
    """All that the template shows but pictures and points."""
    split = None if answers is None else _judged_split(metrics, answers.split)
    figures = {} if split is None else metrics["splits"][split]
    temperature = metrics.get("temperature")
    saved = [] if answers is None else reliability(answers)
    other, name_of_other, could_be = None, "before temperature scaling", None
    if answers is not None and temperature and not _is_of_other_temperatures(metrics, answers.split):
        other = reliability(answers.times(temperature))
    elif answers is not None and every is not None and not temperature and (found := scaled(answers, every)):
        could_be, other, name_of_other = found[0], reliability(found[1]), "after temperature scaling"
    versions = config.pop("versions", {})
    return {
        "title": display_name(run.resolve().name),
        "classifier": classifier,
        "metrics": metrics,
        "split": split,
        "split_name": None if answers is None else SPLIT_NAMES[answers.split],
        "answered_by": figures.get("of"),
        "figures": figures,
        "figure_rows": _figure_rows(metrics),
        "comparisons": None if split is None else plots.comparisons(metrics, split),
        "verdict": plots.verdict(metrics),
        "advice": advice.next_steps(metrics, split, answers, saved),
        "warnings": [display_name(warning) for warning in metrics.get("warnings", [])],
        "answers": answers,
        "mistakes": mistakes.tolist(),
        "hits": hits.tolist(),
        "num_wrong": 0 if answers is None else int((~answers.correct).sum()),
        "matrix": None if answers is None else confusion_matrix(answers, _MATRIX_CLASSES),
        "classes": worst_classes(figures, _NUM_CLASSES) if figures.get("per_class") else [],
        "num_classes": len(classifier.class_names),
        "reliability": plots.reliability_chart(saved, other, name_of_other) if saved else None,
        "temperature": temperature if other and not could_be else None,
        "could_be_temperature": could_be,
        "choices": plots.choice_charts(metrics),
        "learning": plots.learning_charts(metrics),
        "history": plots.history_charts(metrics),
        "made": made,
        "config": {name: _written(value) for name, value in config.items()},
        "versions": versions,
    }


def _judged_split(metrics: dict[str, Any], answered: str) -> str | None:
    """The split whose figures go with the answers: those of training rows out of fold stand under "val"."""
    split = "val" if answered == "train" else answered
    return split if metrics["splits"].get(split, {}).get("accuracy") is not None else None


def _is_of_other_temperatures(metrics: dict[str, Any], answered: str) -> bool:
    """Whether the answers were divided by others than the run's own: each half of validation rows by that which the
    other half's choice of λ gives, which the closed form alone has."""
    return answered == "val" and metrics.get("solver") == "ridge"


def _figure_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of figures: name, and for each of validation and test (text, interval) or None."""
    splits = [metrics["splits"].get(name, {}) for name in ("val", "test")]
    rows = []
    for key, name in FIGURES.items():
        cells = [_cell(figures, key) for figures in splits]
        if any(cells):
            rows.append({"name": name, "cells": cells})
    return rows


def _cell(figures: dict[str, Any], key: str) -> tuple[str, str] | None:
    value, interval = figures.get(key), figures.get(f"{key}_interval_95")
    if value is None:
        return None
    if key in _SHARES:
        return percent(value, 1), "" if interval is None else f"{100 * interval[0]:.1f} to {percent(interval[1], 1)}"
    return f"{value:.3f}", "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _written(value: Any) -> str:
    """A value of a configuration as one would type it."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "–"
    if value is None or isinstance(value, bool):  # 0 is no False here
        return {None: "–", True: "yes", False: "no"}[value]
    return str(value)
