"""Picking one of several classifiers on rows, and figures of the pick that the picking cannot flatter."""

import numpy as np


def best_candidate(logits: np.ndarray, labels: np.ndarray) -> int:
    """Which of K classifiers is best on these rows: highest accuracy, then lowest loss, then the earliest.

    Args:
      logits: [K, N, C], of epochs or of other candidates; labels: [N].
    """
    scores = [score(candidate, labels) for candidate in logits]
    return min(range(len(scores)), key=lambda k: (-scores[k][0], scores[k][1]))


def cross_fitted(logits: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """Logits [N, C] that may be judged on the rows that chose: each half is answered as the other half picks.

    The figure of the best of K candidates on the rows that picked it is too good. Here the rows are dealt,
    class by class, into two halves, and each gets the logits of the candidate that the other finds best.

    Args:
      logits: [K, N, C]; labels: [N].
    Returns: None where a half would be empty: then no honest figure exists.
    """
    half = halves(labels)
    if half is None:
        return None
    judged: np.ndarray = np.empty_like(logits[0])
    judged[half] = logits[best_candidate(logits[:, ~half], labels[~half])][half]
    judged[~half] = logits[best_candidate(logits[:, half], labels[half])][~half]
    return judged


def halves(labels: np.ndarray) -> np.ndarray | None:
    """[N] bool: one of two halves into which the rows are dealt, class by class; None where one would be empty."""
    half = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        (rows,) = np.nonzero(labels == label)
        half[rows[1::2]] = True
    return half if half.any() and not half.all() else None


def score(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy and mean negative log-likelihood in nats of [N, C] logits."""
    logits = logits.astype(np.float64)
    log_normalizer = np.logaddexp.reduce(logits, axis=1)
    nll = log_normalizer - np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return float(np.mean(logits.argmax(axis=1) == labels)), float(np.mean(nll))
