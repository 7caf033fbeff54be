"""ROC-AUC and average precision as functions of how often every row counts.

Both are averages over classes, each class against the rest. A bootstrap sample needs its own cumulative sums along
every class's ranking, in all samples · rows · classes of them. Where that is too much, the figure is replaced by its
tangent at counts of one (the infinitesimal jackknife; for ROC-AUC these are DeLong's components): one pass over the
data, then a sample is a dot product. The more rows there are, the less the two differ.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

NAMES = ("roc_auc", "average_precision")
_EXACT_ELEMENTS = 20_000  # rows · classes up to which samples are ranked exactly: half a second for 1,000


@dataclasses.dataclass(frozen=True, eq=False)
class _Order:
    """One class's rows, best score first. rows: [N] indices; positive: [N] bool, in this order; ends: where each run
    of equal scores ends."""

    rows: np.ndarray
    positive: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, positive: np.ndarray) -> "_Order":
        rows = np.argsort(-scores, kind="stable")
        ranked = scores[rows]
        ends = np.append(np.nonzero(ranked[1:] != ranked[:-1])[0], len(rows) - 1)
        return cls(rows, positive[rows], ends)


@dataclasses.dataclass(frozen=True, eq=False)
class Ranking:
    """Either exact or a tangent.

    orders: of every class that has positive and negative rows, where samples are ranked exactly, else empty.
    values: [2] at counts of one, NaN where no class has both; slopes: [2, N] by the counts.
    """

    orders: list[_Order]
    values: np.ndarray
    slopes: np.ndarray

    @classmethod
    def of(
        cls,
        classes: Iterable[tuple[np.ndarray, np.ndarray]],
        num_rows: int,
        num_classes: int,
        *,
        exact_elements: int = _EXACT_ELEMENTS,
    ) -> "Ranking":
        """Prepares the figures.

        Args:
          classes: (scores [N], positive [N] bool) of each class.
          num_rows, num_classes: how many there are, which decides between exact and tangent.
        """
        orders: list[_Order] = []
        values: list[np.ndarray] = []
        slopes = np.zeros((2, num_rows))
        exact = num_rows * num_classes <= exact_elements
        for scores, positive in classes:
            if not 0 < positive.sum() < num_rows:
                continue
            order = _Order.of(scores, positive)
            if exact:
                orders.append(order)
                values.append(np.concatenate(_rank(order, np.ones((1, num_rows)))))
            else:
                value, slope = _tangent(order)
                values.append(value)
                slopes += slope
        if not values:
            return cls([], np.full(2, np.nan), slopes)
        return cls(orders, np.mean(values, axis=0), slopes / len(values))

    def __call__(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Both figures [R] for counts [R, N]; a class that a sample lacks, or fills, is left out of its average."""
        if not self.orders:
            figures = self.values[:, None] + self.slopes @ (counts - 1).T
            return dict(zip(NAMES, np.clip(figures, 0, 1), strict=True))
        per_class = np.array([_rank(order, counts) for order in self.orders])
        known = ~np.isnan(per_class)
        num_known = known.sum(axis=0)
        totals = np.where(known, per_class, 0).sum(axis=0)
        figures = np.divide(totals, num_known, out=np.full(totals.shape, np.nan), where=num_known > 0)
        return dict(zip(NAMES, figures, strict=True))


def _rank(order: _Order, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ROC-AUC and average precision [R] of one class for counts [R, N], NaN where positives or negatives lack."""
    ranked = counts[:, order.rows]
    above = np.cumsum(ranked, axis=1)[:, order.ends]
    positive_above = np.cumsum(ranked * order.positive, axis=1)[:, order.ends]
    negative_above = above - positive_above
    positives = np.diff(positive_above, prepend=0)  # by run of equal scores
    negatives = np.diff(negative_above, prepend=0)
    num_positive, num_negative = positive_above[:, -1], negative_above[:, -1]
    # A positive beats the negatives below it, and half of those that score the same
    lost = (positives * (negative_above - negatives / 2)).sum(axis=1)
    gained = (positives * positive_above / np.maximum(above, 1)).sum(axis=1)
    pairs = num_positive * num_negative
    exists = pairs > 0
    nothing = np.full(len(counts), np.nan)
    roc_auc = 1 - np.divide(lost, pairs, out=nothing.copy(), where=exists)
    return roc_auc, np.divide(gained, num_positive, out=nothing, where=exists)


def _tangent(order: _Order) -> tuple[np.ndarray, np.ndarray]:
    """Both figures [2] of one class at counts of one, and their derivatives [2, N] by each row's count."""
    run = np.repeat(np.arange(len(order.ends)), np.diff(order.ends, prepend=-1))
    above = (order.ends + 1).astype(np.float64)
    positive_above = np.cumsum(order.positive)[order.ends].astype(np.float64)
    negative_above = above - positive_above
    positives, negatives = np.diff(positive_above, prepend=0), np.diff(negative_above, prepend=0)
    num_positive, num_negative = positive_above[-1], negative_above[-1]

    beaten = num_negative - negative_above + negatives / 2  # negatives, by a positive of this run
    beaten_by = positive_above - positives / 2  # positives that beat a negative of this run
    roc_auc = (positives @ beaten) / (num_positive * num_negative)
    by_positive = (beaten / num_negative - roc_auc) / num_positive
    by_negative = (beaten_by / num_positive - roc_auc) / num_negative
    roc_slope = np.where(order.positive, by_positive[run], by_negative[run])

    precision = positive_above / above
    average_precision = (positives @ precision) / num_positive
    # A row counts in the precision of its own run and of all below it
    from_here = np.cumsum((positives * negative_above / above**2)[::-1])[::-1]
    against = np.cumsum((positives * positive_above / above**2)[::-1])[::-1]
    gain = precision + from_here - average_precision
    precision_slope = np.where(order.positive, gain[run], -against[run]) / num_positive

    slopes = np.empty((2, len(order.rows)))
    slopes[:, order.rows] = roc_slope, precision_slope
    return np.array([roc_auc, average_precision]), slopes
