"""Was fine-tuning better than the probe it started from? Answered on rows that chose nothing.

Validation chooses the epoch, and how far to go from the start to it: weights between the two are often
better than either (Wortsman et al. 2021, arXiv:2109.01903, WiSE-FT). The same rows must judge, so choices
are cross-fitted: the rows are dealt into two halves, and each is judged with the epoch and the α that the
other half chose.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from probe import distributed
from probe.evaluation.choice import best_candidate, halves, score
from probe.evaluation.intervals import paired_interval

ALPHAS = tuple(step / 10 for step in range(11))

Curves = Callable[[int], np.ndarray]


def interpolate(start: Any, end: Any, alpha: float) -> Any:
    """(1 - α)·start + α·end, leaf by leaf; the ends themselves, to the bit, at α 0 and 1."""
    if alpha in (0.0, 1.0):
        return end if alpha else start
    return jax.tree.map(lambda a, b: np.float32(1 - alpha) * a + np.float32(alpha) * b, start, end)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What validation chose: the index of the epoch, and α."""

    epoch: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class Judged:
    """What all validation rows chose, and answers [N, C] that may be judged on them (None where too few rows).

    finetuned is at the end of training (α = 1) by the epoch chosen, interpolated by epoch and α.
    """

    choice: Choice
    finetuned: np.ndarray | None
    interpolated: np.ndarray | None


def epochs_wanted(val_logits: np.ndarray, labels: np.ndarray) -> set[int]:
    """The epochs that all rows, or one half, find best so far: whose weights `judge` may ask for."""
    half = halves(labels)
    groups = [np.ones(len(labels), bool)] + ([] if half is None else [half, ~half])
    return {best_candidate(val_logits[:, rows], labels[rows]) for rows in groups}


def judge(val_logits: np.ndarray, labels: np.ndarray, curves: Curves, alphas: tuple[float, ...]) -> Judged:
    """Chooses epoch and α, on all rows for the classifier, and across the halves for its figure.

    Args:
      val_logits: [E, N, C] after each epoch; labels: [N].
      curves: epoch -> [A, N, C], logits of the weights between start and that epoch at each of `alphas`.
    """

    def choose(rows: np.ndarray) -> tuple[int, int]:
        epoch = distributed.agreed(best_candidate(val_logits[:, rows], labels[rows]))
        return epoch, distributed.agreed(best_candidate(curves(epoch)[:, rows], labels[rows]))

    epoch, index = choose(np.ones(len(labels), bool))
    choice, half = Choice(epoch, alphas[index]), halves(labels)
    if half is None:
        return Judged(choice, None, None)
    finetuned, interpolated = np.empty_like(val_logits[0]), np.empty_like(val_logits[0])
    for choosing, judged in ((half, ~half), (~half, half)):
        epoch, index = choose(choosing)
        finetuned[judged] = val_logits[epoch][judged]
        interpolated[judged] = curves(epoch)[index][judged]
    return Judged(choice, finetuned, interpolated)


def compare(start: np.ndarray, candidate: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Whether a candidate beats the start, as JSON values; both [N, C] logits of the same rows.

    Winning means that the 95 % interval of the difference in accuracy lies above 0.
    """
    right_start, right_candidate = start.argmax(axis=1) == labels, candidate.argmax(axis=1) == labels
    low, high = paired_interval(right_start, right_candidate)
    (accuracy, nll), (accuracy_start, nll_start) = score(candidate, labels), score(start, labels)
    return {
        "n": len(labels),
        "accuracy": accuracy,
        "nll": nll,
        "accuracy_difference": accuracy - accuracy_start,
        "accuracy_difference_interval_95": [low, high],
        "nll_difference": nll - nll_start,
        "won": low > 0,
    }
