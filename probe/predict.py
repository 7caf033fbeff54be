"""`probe predict`: classifies images with what `fit-linear` or `finetune` saved."""

import csv
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from probe import bundle
from probe.config import PredictConfig
from probe.errors import InputError
from probe.images import load_images
from probe.notebook import ROWS_SHOWN, looks, table
from probe.predictor import Predictor
from probe.progress import Progress, heeds_quiet
from probe.sources import display_name, open_images
from probe.spreadsheet import inert
from probe.storage import atomic_write_bytes, require_file


def _look(result: dict[str, Any]) -> str:
    """The predictions in a notebook."""
    rows = []
    for line in result["predictions"][:ROWS_SHOWN]:
        said = line["predicted"] if isinstance(line["predicted"], str) else ", ".join(line["predicted"])
        rows.append((line["path"], said, f"{max(line['probabilities']):.4f}"))
    left_out = [f"{failure['path']}: {failure['detail']}" for failure in result["failures"][:ROWS_SHOWN]]
    note = f"not classified: {'; '.join(left_out)}" if left_out else ""
    of = f"{len(rows):,} of {len(result['predictions']):,} predictions"
    return table(of, ("image", "predicted", "highest probability"), rows, note=note)


@looks(_look)
@heeds_quiet
def predict(config: PredictConfig) -> dict[str, Any]:
    """Classifies every image of `config.images`.

    Returns: {"class_names": [C], "predictions": [{"path", "predicted", "probabilities": [C]}], "failures":
      [{"path", "reason", "detail"}], "out"}; an image that cannot be read has no prediction and shifts no
      other's. With several labels per image, "predicted" is the list of those with a probability of one half or more.
    Raises: InputError if there is nothing to classify, or at the first unreadable image with on_error="fail";
      MismatchError and CorruptError as `bundle.load` and `Bundle.load_backbone` do.
    """
    if config.out is not None:
        require_file(config.out, overwrite=config.overwrite)
    classifier = bundle.load(config.run)
    source = open_images(config.images)
    backbone = classifier.load_backbone(config.backbone)
    predictor = Predictor(classifier, backbone, batch_size=config.batch_size)
    failures: list[dict[str, str]] = []

    def readable() -> Iterator[tuple[str, np.ndarray]]:
        """(path, pixels) of one image after another; failures are put aside."""
        items = source.iter_bytes(source.examples)
        with Progress("classifying", total=len(source.examples), unit="images") as progress:
            for image in load_images(items, backbone.preprocessing, num_workers=config.num_workers):
                path = os.fsdecode(image.example.name)
                if image.pixels is not None:
                    yield path, image.pixels
                elif config.on_error == "fail":
                    name = display_name(image.example.name)
                    raise InputError(f"{name}: {image.failure}. Mend it, or pass --on-error skip.")
                elif image.failure is not None:
                    failures.append({"path": path, "reason": image.failure.reason, "detail": str(image.failure)})
                progress.advance(1)

    predictions: list[dict[str, Any]] = []
    for paths, pixels in _in_batches(readable(), config.batch_size):
        for path, row in zip(paths, predictor(pixels).probabilities, strict=True):
            predictions.append(
                {
                    "path": path,
                    "predicted": predictor.decide(row),
                    "probabilities": [float(p) for p in row],
                }
            )
    for failure in failures:
        name = display_name(os.fsencode(failure["path"]))
        print(f"{name}: not classified: {failure['detail']} ({failure['reason']})", file=sys.stderr)
    if not predictions:
        raise InputError(f"{source.root}: none of its {len(failures)} images can be read: {failures[0]['detail']}")
    result = {"class_names": list(classifier.class_names), "predictions": predictions, "failures": failures}
    if config.out is not None:
        atomic_write_bytes(config.out, _csv(result))
    return {**result, "out": None if config.out is None else str(config.out)}


def describe(result: dict[str, Any]) -> str:
    """The lines printed on stdout: the CSV itself, or where it was written."""
    if result["out"] is None:
        return _csv(result).decode(errors="backslashreplace").rstrip("\n")
    failed = f", {len(result['failures'])} could not be read" if result["failures"] else ""
    return f"{len(result['predictions'])} images classified{failed}: {result['out']}"


def _in_batches(images: Iterator[tuple[str, np.ndarray]], size: int) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    paths: list[str] = []
    pixels: list[np.ndarray] = []
    for path, image in images:
        paths.append(path)
        pixels.append(image)
        if len(paths) == size:
            yield paths, pixels
            paths, pixels = [], []
    if paths:
        yield paths, pixels


def _csv(result: dict[str, Any]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "predicted", *map(inert, result["class_names"])])
    for row in result["predictions"]:
        predicted = row["predicted"] if isinstance(row["predicted"], str) else "|".join(row["predicted"])
        writer.writerow([inert(row["path"]), inert(predicted), *(f"{p:.6f}" for p in row["probabilities"])])
    return text.getvalue().encode(errors="surrogateescape")  # a name that is no text keeps its bytes
