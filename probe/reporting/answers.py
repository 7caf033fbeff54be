"""What a run answered to the rows that judge it: who is right, how sure, and which rows one should look at."""

import dataclasses
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from probe.evaluation.calibration import NUM_BINS, fit_temperature
from probe.evaluation.choice import halves
from probe.evaluation.intervals import wilson_interval
from probe.evaluation.predictions import Predictions
from probe.sources import display_name

SPLITS = ("test", "val", "train")  # the first that there are answers to is what a report shows


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """Answers to the N rows of a split.

    texts: what a row can be said to be: the classes, or the sets of classes that occur. label, predicted: [N] indices
    into `texts`. confidence: [N], the probability of the answer; with several labels a row, that of its least sure
    part. wrongness: [N], of wrong rows the largest probability that was given to something wrong.
    correct: [N] bool. questions: (probabilities [M], whether each came true [M]): what calibration is about.
    """

    split: str
    of: Predictions
    texts: tuple[str, ...]
    label: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    wrongness: np.ndarray
    correct: np.ndarray
    questions: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of_run(cls, predictions: Predictions) -> "Answers | None":
        """Of test, else validation, else training rows answered out of fold; None if the run holds no answers."""
        there = set(predictions.splits.tolist())
        split = next((name for name in SPLITS if name in there), None)
        if split is None:
            return None
        of = predictions.take(predictions.splits == split)
        return _of_sets(split, of) if of.multi_label else _of_classes(split, of)

    def __len__(self) -> int:
        return len(self.label)

    def mistakes(self, most: int) -> np.ndarray:
        """Wrong rows, the surest first."""
        (rows,) = np.nonzero(~self.correct)
        return rows[np.argsort(-self.wrongness[rows], kind="stable")][:most]

    def doubtful_hits(self, most: int) -> np.ndarray:
        """Right rows, the least sure first."""
        (rows,) = np.nonzero(self.correct)
        return rows[np.argsort(self.confidence[rows], kind="stable")][:most]

    def times(self, factor: float | np.ndarray) -> "Answers":
        """The same with logits multiplied by one number, or by one a row, [N]: as another temperature gives them."""
        of = dataclasses.replace(self.of, logits=self.of.logits * np.reshape(factor, (-1, 1)).astype(np.float32))
        return _of_sets(self.split, of) if of.multi_label else _of_classes(self.split, of)


@dataclasses.dataclass(frozen=True)
class Bin:
    """Answers claimed with about the same confidence. interval: of the share that came true, 95 %, by Wilson."""

    n: int
    confidence: float
    share: float
    interval: list[float]


def reliability(answers: Answers) -> list[Bin]:
    """The bins that hold something, of the same edges as the expected calibration error."""
    claimed, true = answers.questions
    bins = np.minimum((claimed * NUM_BINS).astype(int), NUM_BINS - 1)
    found = []
    for number in np.unique(bins):
        inside = bins == number
        n, hits = int(inside.sum()), int(true[inside].sum())
        found.append(Bin(n, float(claimed[inside].mean()), hits / n, wilson_interval(hits, n)))
    return found


def scaled(answers: Answers, every: Predictions) -> tuple[float, Answers] | None:
    """What temperature scaling by validation rows would make of answers that are not scaled.

    Args:
      every: all answers of the run. Answers to validation rows themselves are scaled half by half, each by the other.
    Returns: the temperature of all validation rows, and the answers; None where there are too few to tell.
    """
    val = every.take(every.splits == "val")
    half = None if val.multi_label else halves(val.labels)
    if half is None:
        return None
    temperature = fit_temperature(val.logits, val.labels)
    if answers.split != "val":
        return temperature, answers.times(1 / temperature)
    factors = np.empty(len(val.labels))
    for told_by, judged in ((half, ~half), (~half, half)):
        factors[judged] = 1 / fit_temperature(val.logits[told_by], val.labels[told_by])
    return temperature, answers.times(factors)


def worst_classes(figures: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """Classes by recall, the lowest first: name, n, recall with its interval, precision, f1, and what it is taken for.

    Args:
      figures: of one split, as `summarize` gives them.
    """
    taken_for: dict[str, str] = {}
    for line in figures.get("confusions", []):  # the most frequent come first
        taken_for.setdefault(line["label"], f"{display_name(line['predicted'])} ({line['n']:,})")
    lines = []
    for name, facts in figures["per_class"].items():
        recall, n = facts["recall"], facts["n"]
        interval = None if recall is None else wilson_interval(recall * n, n)
        shown = {"name": display_name(name), "taken_for": taken_for.get(name, ""), "interval": interval}
        lines.append({**facts, **shown})
    lines.sort(key=lambda line: (line["recall"] is None, line["recall"] or 0.0, -line["n"]))
    return lines[:most]


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """Confusions between some classes: counts [K, K], rows are true; classes [K], indices; num_classes in all."""

    classes: list[int]
    counts: list[list[int]]
    errors: list[int]
    totals: list[int]
    num_classes: int


def confusion_matrix(answers: Answers, most: int) -> Matrix | None:
    """Of all classes, or of the `most` that take part in most mistakes; None where labels are sets."""
    if answers.of.multi_label:
        return None
    num_classes = len(answers.texts)
    wrong = ~answers.correct
    errors = np.bincount(answers.label[wrong], minlength=num_classes)
    errors = errors + np.bincount(answers.predicted[wrong], minlength=num_classes)
    classes = np.sort(np.argsort(-errors, kind="stable")[:most])
    place = np.full(num_classes, -1)
    place[classes] = np.arange(len(classes))
    inside = (place[answers.label] >= 0) & (place[answers.predicted] >= 0)
    cells = place[answers.label[inside]] * len(classes) + place[answers.predicted[inside]]
    counts = np.bincount(cells, minlength=len(classes) ** 2).reshape(len(classes), len(classes))
    totals = np.bincount(answers.label, minlength=num_classes)
    return Matrix(classes.tolist(), counts.tolist(), errors[classes].tolist(), totals[classes].tolist(), num_classes)


def _of_classes(split: str, of: Predictions) -> Answers:
    probabilities = softmax(of.logits.astype(np.float64), axis=1)
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    correct = predicted == of.labels
    texts = tuple(map(display_name, of.class_names))
    labels = of.labels.astype(np.int64)
    return Answers(split, of, texts, labels, predicted, confidence, confidence, correct, (confidence, correct))


def _of_sets(split: str, of: Predictions) -> Answers:
    probabilities = expit(of.logits.astype(np.float64))
    said = of.logits >= 0
    sure = np.maximum(probabilities, 1 - probabilities)
    wrong = said != of.labels
    both = np.concatenate([of.labels, said])
    sets, codes = np.unique(both, axis=0, return_inverse=True)
    names = np.array([display_name(name) for name in of.class_names], object)
    texts = tuple(", ".join(names[row]) or "none" for row in sets)
    label, predicted = codes.reshape(2, -1)
    return Answers(
        split,
        of,
        texts,
        label,
        predicted,
        sure.min(axis=1),
        np.where(wrong, sure, 0).max(axis=1),
        ~wrong.any(axis=1),
        (probabilities.ravel(), of.labels.ravel()),
    )
