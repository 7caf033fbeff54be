"""What every head of `fit-linear` is given and gives back, and how one of many candidates is chosen."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from probe.heads import TrainedHead
from probe.splits import Splits


@dataclasses.dataclass(frozen=True)
class Data:
    """embeddings: view name to [N, D] float32; labels: [N] integers or [N, C] bool; folds: [N] which fold leaves a
    training row out, -1 for one that is never left out; class_names: of the C classes."""

    embeddings: Mapping[str, np.ndarray]
    labels: np.ndarray
    splits: Splits
    folds: np.ndarray
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained head and how it came about.

    head: acts on raw embeddings of `view`. val_rows, val_logits: rows that may be judged, and what heads that neither
    were fitted on them nor chosen by them say of them, [n, C]; `val_of` says in words which heads.
    out_of_fold: [N train, C], what heads say of training rows that they were not fitted on; NaN where there is none.
    facts: what metrics.json says of the fit, JSON values. warnings: what a person should know.
    """

    head: TrainedHead
    view: str
    val_rows: np.ndarray
    val_logits: np.ndarray | None
    val_of: str
    facts: dict[str, Any]
    out_of_fold: np.ndarray | None = None
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Curve:
    """Scores of L candidates, the simplest first, on F parts of the rows: accuracy and nll [L, F], count [F]."""

    accuracy: np.ndarray
    nll: np.ndarray
    count: np.ndarray

    def best(self, criterion: str, *, without: int | None = None, one_standard_error: bool = False) -> int:
        """The candidate with the best mean over rows; of equals by the other score, then the simplest.

        Args:
          criterion: "accuracy" or "nll".
          without: a part of the rows that has no say.
          one_standard_error: take the simplest whose score is within a standard error of the best one's (Breiman et
            al. 1984); with one part alone there is no such error.
        """
        parts = np.arange(len(self.count)) != (-1 if without is None else without)
        accuracy, nll = (np.average(s[:, parts], axis=1, weights=self.count[parts]) for s in (self.accuracy, self.nll))
        # Parts weigh whole numbers of rows: equal counts of right answers must be equal shares, not nearly.
        first, second = (-accuracy.round(12), nll) if criterion == "accuracy" else (nll, -accuracy.round(12))
        best = min(range(len(nll)), key=lambda i: (first[i], second[i]))
        if one_standard_error and parts.sum() > 1:
            scores = (-self.accuracy if criterion == "accuracy" else self.nll)[:, parts]
            error = scores[best].std(ddof=1) / np.sqrt(parts.sum())
            best = int(np.argmax(first <= first[best] + error))
        return best

    def lines(self, penalties: np.ndarray) -> list[dict[str, float | None]]:
        """For metrics.json: mean over rows and standard error over parts, by λ."""
        several = len(self.count) > 1
        table = []
        for i, penalty in enumerate(penalties):
            line: dict[str, float | None] = {"penalty": float(penalty)}
            for name, scores in (("accuracy", self.accuracy[i]), ("nll", self.nll[i])):
                line[name] = float(np.average(scores, weights=self.count))
                line[f"{name}_se"] = float(scores.std(ddof=1) / np.sqrt(len(scores))) if several else None
            table.append(line)
        return table
