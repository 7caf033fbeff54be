"""Wrong labels and classes that cannot be told apart, from probabilities of heads that were not fitted on the rows.

Confident learning: a row counts as another class if that class's probability is at least what rows so labelled have
on average. Source: Northcutt, Jiang and Chuang 2021, arXiv:1911.00068; a test holds that cleanlab finds the same.
"""

import dataclasses

import numpy as np

_LEAST_CLOSE = 1e-6  # cleanlab's slack at the thresholds
_INSEPARABLE = 0.9  # area under the curve below which two classes are said to be hard to tell apart


@dataclasses.dataclass(frozen=True, eq=False)
class Suspects:
    """rows: the surest first; suggested: [n] classes; scores: [n] in 0..1, 1 - probability of the label."""

    rows: np.ndarray
    suggested: np.ndarray
    scores: np.ndarray


def label_errors(probabilities: np.ndarray, labels: np.ndarray) -> Suspects:
    """Rows whose label is likely wrong.

    Args:
      probabilities: [N, C] of heads that were not fitted on the row; labels: [N] integers below C.
    """
    num_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, own, minlength=num_classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)  # a class without rows suggests nothing
    above = probabilities >= np.maximum(thresholds, 2 * _LEAST_CLOSE) - _LEAST_CLOSE
    suggested = np.where(above, probabilities, -np.inf).argmax(axis=1)
    wrong = above.any(axis=1) & (suggested != labels) & (probabilities.argmax(axis=1) != labels)
    rows = np.flatnonzero(wrong)
    rows = rows[np.argsort(own[rows], kind="stable")]
    return Suspects(rows, suggested[rows], 1 - own[rows])


def inseparable(probabilities: np.ndarray, labels: np.ndarray, most: int) -> list[tuple[int, int, float, int]]:
    """Pairs of classes (a, b, area under the ROC curve, confusions), the hardest first.

    Of the `most` pairs that are confused most often, those with an area below 0.9: for a row of either class, the
    chance that their probabilities put it on the right side of one of the other.
    """
    num_classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    wrong = predicted != labels
    low, high = np.minimum(labels, predicted)[wrong], np.maximum(labels, predicted)[wrong]
    codes, counts = np.unique(low * num_classes + high, return_counts=True)
    found = []
    for i in np.argsort(-counts, kind="stable")[:most]:
        a, b = divmod(int(codes[i]), num_classes)
        area = _area(_odds(probabilities[labels == a], a, b), _odds(probabilities[labels == b], a, b))
        if area < _INSEPARABLE:
            found.append((a, b, area, int(counts[i])))
    return sorted(found, key=lambda pair: pair[2])


def _odds(probabilities: np.ndarray, a: int, b: int) -> np.ndarray:
    tiny = np.finfo(float).tiny
    return np.asarray(np.log(np.maximum(probabilities[:, a], tiny)) - np.log(np.maximum(probabilities[:, b], tiny)))


def _area(positive: np.ndarray, negative: np.ndarray) -> float:
    """Share of pairs in which the positive's score is higher, ties counting half."""
    if not len(positive) or not len(negative):
        return 1.0
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / 2 / len(negative))
