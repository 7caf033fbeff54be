"""What is said of a classifier's answers, each figure as a function of how often every row counts.

Counts of one give the figures of the rows themselves; those of a bootstrap sample give the figures of that sample,
a thousand of them by a few matrix products. scikit-learn's functions take one sample at a time, in 20 ms to a second
each; its figures at counts of one, and for sample weights, are equal, which tests hold.
"""

import dataclasses

import numpy as np
import scipy.sparse
from scipy.special import expit, log_softmax, logsumexp

from probe.evaluation.calibration import bin_gaps
from probe.evaluation.ranking import NAMES as RANKING_NAMES
from probe.evaluation.ranking import Ranking

TOP_K = 5
CALIBRATION = "expected_calibration_error"
SHARES = ("accuracy", f"top_{TOP_K}_accuracy")  # shares of the rows
LOSSES = ("nll", "brier", CALIBRATION)  # the lower the better; every other figure is a score from 0 to 1
_BLOCK_ELEMENTS = 4_000_000  # logits turned into probabilities at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Figures:
    """A classifier's answers to N rows, condensed to what its figures need.

    predicted: [N] integers, or [N, C] bool with several labels a row. correct: [N] bool, all labels right.
    means: name to [N] values whose mean is the figure. gaps: [N, 15], see `calibration.bin_gaps`.
    is_class, said_class: sparse [N, C] of ones. ranking: None where it was not asked for.
    """

    predicted: np.ndarray
    correct: np.ndarray
    means: dict[str, np.ndarray]
    gaps: np.ndarray
    is_class: scipy.sparse.csr_array
    said_class: scipy.sparse.csr_array
    ranking: Ranking | None

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, *, ranking: bool = True) -> "Figures":
        """Judges answers.

        Args:
          logits: [N, C] of a softmax, N > 0 (log-probabilities will do as well), or of independent sigmoids.
          labels: [N] integers below C, or [N, C] bool: then every class is a question of its own.
          ranking: whether ROC-AUC and average precision are wanted; they sort the rows once per class.
        """
        multi_label = labels.ndim == 2
        num_rows, num_classes = logits.shape
        judge = _judge_sets if multi_label else _judge_classes
        step = max(1, _BLOCK_ELEMENTS // num_classes)
        blocks = [judge(logits[i : i + step], labels[i : i + step]) for i in range(0, num_rows, step)]
        judged = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        predicted, gaps, scores = (judged.pop(name) for name in ("predicted", "gaps", "scores"))
        ranked = range(1, 2) if num_classes == 2 and not multi_label else range(num_classes)
        classes = ((scores[:, c], labels[:, c] if multi_label else labels == c) for c in ranked)
        return cls(
            predicted=predicted,
            correct=judged["accuracy"] > 0,
            means=judged,
            gaps=gaps,
            is_class=_indicators(labels, num_classes),
            said_class=_indicators(predicted, num_classes),
            ranking=Ranking.of(classes, num_rows, len(ranked)) if ranking else None,
        )

    @property
    def multi_label(self) -> bool:
        return self.predicted.ndim == 2

    @property
    def num_rows(self) -> int:
        return len(self.correct)

    def __call__(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Every figure, [R], for counts [R, N] that sum to N; NaN where it does not exist.

        accuracy (all labels right), balanced_accuracy, macro_f1, nll in nats per row, brier,
        expected_calibration_error, top_5_accuracy with more than five classes, roc_auc and average_precision (over
        classes, each against the rest, or of the second class of two). Averages over classes leave out those that
        a sample lacks. With several labels a row each is a binary question: nll is their sum, brier,
        expected_calibration_error and balanced_accuracy their mean.
        """
        figures = {name: counts @ values / self.num_rows for name, values in self.means.items()}
        figures[CALIBRATION] = np.abs(counts @ self.gaps).sum(axis=1) / self.num_rows
        actual, hits, said = self.tally(counts)
        recall = _ratio(hits, actual)
        if self.multi_label:
            others = self.num_rows - actual
            recall = (recall + _ratio(others - said + hits, others)) / 2
        figures["balanced_accuracy"] = _mean_known(recall)
        figures["macro_f1"] = _mean_known(_ratio(2 * hits, actual + said))
        return figures | (self.ranking(counts) if self.ranking else {})

    def tally(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of each class, those of them recognised, and rows said to be of it: three of [R, C]."""
        hits = self.is_class.multiply(self.said_class)
        actual, recognised, said = (counts @ which for which in (self.is_class, hits, self.said_class))
        return actual, recognised, said

    def answers_by_class(self) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
        """[N, C] each: whether a class's accuracy is asked of a row, and whether its answer is right.

        A class is asked of its own rows; of every row where labels are sets.
        """
        if not self.multi_label:
            return self.is_class, self.is_class.multiply(self.said_class)
        right = self.is_class.toarray() == self.said_class.toarray()
        return scipy.sparse.csr_array(np.ones(right.shape)), scipy.sparse.csr_array(right, dtype=np.float64)

    def point(self) -> dict[str, float]:
        """Every figure of the rows themselves."""
        return {name: float(value[0]) for name, value in self(np.ones((1, self.num_rows))).items()}

    def num_answers(self, name: str) -> float:
        """Rows whose share the score `name` is as sure as.

        An average over classes is as sure as its rarest classes let it be: C² / Σ 1/nᵢ of independent rows, where
        each class is a share of nᵢ rows; labels that share their rows are not taken to be independent.
        """
        if name not in ("balanced_accuracy", "macro_f1", *RANKING_NAMES):
            return self.num_rows
        count = np.asarray(self.is_class.sum(axis=0)).ravel()
        if self.multi_label:
            count = np.minimum(count, self.num_rows - count)
        count = count[count > 0]
        if not len(count):
            return self.num_rows
        return float(len(count) * (1 if self.multi_label else len(count)) / np.sum(1 / count))


def _judge_classes(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Softmax answers of some rows: predicted, gaps, scores, and the terms of each mean."""
    num_rows, num_classes = logits.shape
    rows = np.arange(num_rows)
    log_probs = log_softmax(np.asarray(logits, np.float64), axis=1)
    predicted = log_probs.argmax(axis=1)
    # Rows are ranked by the odds: they order as the probabilities do, and do not run together next to 1.
    scores = log_probs - np.log1p(-np.exp(np.minimum(log_probs, np.log(0.5))))
    others = log_probs.copy()
    others[rows, predicted] = -np.inf
    scores[rows, predicted] = log_probs[rows, predicted] - logsumexp(others, axis=1)

    errors = np.exp(log_probs)
    confidences = errors[rows, predicted]
    errors[rows, labels] -= 1
    correct = predicted == labels
    judged = {
        "accuracy": correct.astype(np.float64),
        "nll": -log_probs[rows, labels],
        # Half of it for two classes, where both errors are the same one: as scikit-learn scales it
        "brier": (errors**2).sum(axis=1) / (2 if num_classes == 2 else 1),
        "predicted": predicted,
        "gaps": bin_gaps(confidences[:, None], correct[:, None]),
        "scores": scores,
    }
    if num_classes > TOP_K:
        true = log_probs[rows, labels][:, None]
        earlier = np.arange(num_classes) < labels[:, None]  # of equals the first is taken, as argmax does
        ahead = (log_probs > true) | ((log_probs == true) & earlier)
        judged[f"top_{TOP_K}_accuracy"] = (ahead.sum(axis=1) < TOP_K).astype(np.float64)
    return judged


def _judge_sets(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Independent sigmoid answers of some rows: as `_judge_classes`; a label is given from 50 % on."""
    logits = np.asarray(logits, np.float64)
    probabilities = expit(logits)
    predicted = logits >= 0
    return {
        "accuracy": (predicted == labels).all(axis=1).astype(np.float64),
        "nll": np.logaddexp(0, np.where(labels, -logits, logits)).sum(axis=1),
        "brier": ((probabilities - labels) ** 2).mean(axis=1),
        "predicted": predicted,
        "gaps": bin_gaps(probabilities, labels.astype(bool)),
        "scores": logits,
    }


def _indicators(which: np.ndarray, num_classes: int) -> scipy.sparse.csr_array:
    """[N] classes, or [N, C] bool, as sparse [N, C] of ones."""
    if which.ndim == 2:
        return scipy.sparse.csr_array(which, dtype=np.float64)
    num_rows = len(which)
    return scipy.sparse.csr_array((np.ones(num_rows), which, np.arange(num_rows + 1)), shape=(num_rows, num_classes))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    quotient: np.ndarray = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return quotient


def _mean_known(values: np.ndarray) -> np.ndarray:
    """[R, C] to [R], the mean of what is not NaN; NaN where all is."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(axis=1), known.sum(axis=1))
