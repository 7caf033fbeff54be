"""Run folders made without training: answers with known mistakes, saved as the verbs save them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from probe import bundle, provenance
from probe.evaluation import predictions
from probe.evaluation.metrics import summarize
from probe.evaluation.predictions import Predictions
from probe.heads import TrainedHead


def make_answers(
    num_rows: int,
    class_names: tuple[str, ...],
    *,
    names: list[bytes] | None = None,
    keys: np.ndarray | None = None,
    skill: float = 2.0,
    seed: int = 0,
    multi_label: bool = False,
) -> Predictions:
    """Answers to test rows whose logits lean towards the label by `skill` deviations."""
    rng = np.random.default_rng(seed)
    num_classes = len(class_names)
    labels = np.arange(num_rows) % num_classes
    wanted = rng.random((num_rows, num_classes)) < 0.4 if multi_label else labels[:, None] == np.arange(num_classes)
    logits = rng.normal(size=(num_rows, num_classes)) + skill * (wanted - (0.5 if multi_label else 0))
    return Predictions(
        class_names=class_names,
        names=names or [b"test/%05d.png" % i for i in range(num_rows)],
        keys=rng.integers(0, 256, (num_rows, 32)).astype(np.uint8) if keys is None else keys,
        splits=np.repeat("test", num_rows),
        labels=wanted if multi_label else labels.astype(np.int32),
        logits=logits.astype(np.float32),
    )


def save_run(
    out: Path,
    answers: Predictions | None,
    *,
    metrics: dict[str, Any] | None = None,
    cache: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    class_names: tuple[str, ...] = ("cat", "dog"),
) -> Path:
    """A whole run folder of a linear head on embeddings of width 4."""
    class_names = class_names if answers is None else answers.class_names
    figures = {} if answers is None else {"test": summarize(answers.logits, answers.labels, class_names)}
    files = {provenance.FILE_NAME: provenance.Made().to_bytes(cache=cache, source=source)}
    if answers is not None:
        files[predictions.FILE_NAME] = predictions.to_bytes(answers)
    width = 1 if len(class_names) == 2 else len(class_names)
    bundle.save(
        out,
        head=TrainedHead((), {"kernel": np.zeros((4, width), np.float32), "bias": np.zeros(width, np.float32)}),
        class_names=class_names,
        view="pooler",
        backbone=bundle.BackboneReference(name="some/backbone", revision="abc", fingerprint="0" * 64),
        preprocessor_config={},
        multi_label=answers is not None and answers.multi_label,
        config={"cache": "cache", "folds": 5},
        metrics={"splits": figures, "warnings": [], **(metrics or {})},
        files=files,
    )
    return out


def renamed(answers: Predictions, **changes: Any) -> Predictions:
    """The same answers with some columns replaced."""
    return dataclasses.replace(answers, **changes)
