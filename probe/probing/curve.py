"""How one of many candidates is chosen, and how the choice is judged on rows that had no part in it."""

import dataclasses
from collections.abc import Callable

import numpy as np

from probe.evaluation.choice import halves

_BEYOND = 4  # values of λ by which a grid is continued where its edge is best: two decades of the default grid


@dataclasses.dataclass(frozen=True)
class Curve:
    """Scores of L candidates, the simplest first, on F parts of the rows: accuracy and loss [L, F], count [F].

    accuracy_error, loss_error: [L] standard errors of the means over rows, where there is one part alone.
    """

    accuracy: np.ndarray
    loss: np.ndarray
    count: np.ndarray
    accuracy_error: np.ndarray | None = None
    loss_error: np.ndarray | None = None

    def __getitem__(self, which: slice) -> "Curve":
        """That of some of the candidates."""
        errors = (None if e is None else e[which] for e in (self.accuracy_error, self.loss_error))
        return Curve(self.accuracy[which], self.loss[which], self.count, *errors)

    def best(self, criterion: str, *, without: int | None = None, one_standard_error: bool = False) -> int:
        """The candidate with the best mean over rows; of equals by the other score, then the simplest.

        Args:
          criterion: "accuracy" or "nll", which stands for the loss.
          without: a part of the rows that has no say.
          one_standard_error: take the simplest whose score is within a standard error of the best one's (Breiman et
            al. 1984): over parts, or over rows where there is one part.
        """
        scores = [self.score(i, criterion, without=without) for i in range(len(self.loss))]
        best = min(range(len(scores)), key=lambda i: scores[i])
        if one_standard_error:
            allowed = scores[best][0] + self._errors(criterion, without)[best]
            best = next(i for i, (first, _) in enumerate(scores) if first <= allowed)
        return best

    def score(self, i: int, criterion: str, *, without: int | None = None) -> tuple[float, float]:
        """Of one candidate, the lower the better; comparable with those of other curves over the same rows."""
        parts = self._parts(without)
        accuracy, loss = (float(np.average(s[i, parts], weights=self.count[parts])) for s in (self.accuracy, self.loss))
        accuracy = round(accuracy, 12)  # parts weigh whole numbers of rows: equal counts of hits must be equal shares
        return (-accuracy, loss) if criterion == "accuracy" else (loss, -accuracy)

    def _parts(self, without: int | None) -> np.ndarray:
        return np.asarray(np.arange(len(self.count)) != (-1 if without is None else without))

    def _errors(self, criterion: str, without: int | None = None) -> np.ndarray:
        """[L] standard errors; 0 where nothing tells them."""
        parts = self._parts(without)
        by_part, by_row = (
            (self.accuracy, self.accuracy_error) if criterion == "accuracy" else (self.loss, self.loss_error)
        )
        if parts.sum() > 1:
            error: np.ndarray = by_part[:, parts].std(axis=1, ddof=1) / np.sqrt(parts.sum())
            return error
        return np.zeros(len(by_part)) if by_row is None else by_row

    def lines(
        self, candidates: dict[str, np.ndarray], *, accuracy: str = "accuracy", loss: str = "nll"
    ) -> list[dict[str, float | None]]:
        """For metrics.json: of each candidate the mean over rows and its standard error.

        Args:
          candidates: what each is, as {name: [L] values}. accuracy, loss: what they are called; the accuracy of
            several labels a row is the share of labels, not that of rows whose labels are all right.
        """
        known = len(self.count) > 1 or self.loss_error is not None
        table: list[dict[str, float | None]] = []
        for i in range(len(self.loss)):
            line: dict[str, float | None] = {name: float(values[i]) for name, values in candidates.items()}
            for name, scores, of in ((accuracy, self.accuracy, "accuracy"), (loss, self.loss, "nll")):
                line[name] = float(np.average(scores[i], weights=self.count))
                line[f"{name}_se"] = float(self._errors(of)[i]) if known else None
            table.append(line)
        return table


@dataclasses.dataclass(frozen=True)
class RowScores:
    """What each of L candidates makes of each of N rows: hits [L, N], the share of right answers; losses [L, N]."""

    hits: np.ndarray
    losses: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray) -> "RowScores":
        """Args:
        logits: [L, N, C] of a softmax, or of sigmoids. labels: [N] integers, or [N, C] bool: nll sums over labels then,
          and a row's hits are the share of its labels.
        """
        if labels.ndim == 2:
            return cls(((logits > 0) == labels).mean(axis=2), np.logaddexp(0, np.where(labels, -logits, logits)).sum(2))
        losses = np.logaddexp.reduce(logits, axis=2) - logits[:, np.arange(len(labels)), labels]
        return cls((logits.argmax(axis=2) == labels).astype(np.float64), losses)

    def curve(self, rows: np.ndarray | None = None) -> Curve:
        """Means over the rows (all if None), and their standard errors."""
        hits, losses = (s if rows is None else s[:, rows] for s in (self.hits, self.losses))
        num = hits.shape[1]
        errors = (s.std(axis=1, ddof=1) / np.sqrt(num) if num > 1 else None for s in (hits, losses))
        return Curve(hits.mean(axis=1)[:, None], losses.mean(axis=1)[:, None], np.array([num]), *errors)

    def cross_fitted(
        self, labels: np.ndarray, choose: Callable[[Curve], int]
    ) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Who may be judged on which rows: each half of them (dealt class by class) gets the other half's choice.

        Returns: for both halves the candidate, the rows [n] that it is judged on, and the rows that chose it; [] where
          a half would be empty: then no honest figure exists.
        """
        half = halves(labels if labels.ndim == 1 else np.zeros(len(labels)))
        if half is None:
            return []
        parts = [np.flatnonzero(half), np.flatnonzero(~half)]
        return [(choose(self.curve(others)), rows, others) for rows, others in (parts, parts[::-1])]


def beyond(penalties: np.ndarray, best: int) -> np.ndarray:
    """The next values of λ past the edge of a grid, [L] falling in equal ratios, if the best is there; else none.

    `best` is the choice of all rows, those of a part that is judged later by a choice without it among them: they have
    a say in how far the grid reaches, and none in which of its λ is taken for them.
    """
    if best not in (0, len(penalties) - 1) or len(penalties) < 2:
        return np.zeros(0)
    ratio = penalties[1] / penalties[0]
    if best == 0:
        return np.asarray(penalties[0] / ratio ** np.arange(_BEYOND, 0, -1))
    return np.asarray(penalties[-1] * ratio ** np.arange(1, _BEYOND + 1))


def edge_warning(penalties: np.ndarray, best: int) -> tuple[str, ...]:
    """What a person should know if the λ chosen is the first or last of the grid."""
    if len(penalties) < 2 or best not in (0, len(penalties) - 1):
        return ()
    side, more = ("largest", "above") if best == 0 else ("smallest", "below")
    return (f"the λ chosen, {penalties[best]:.3g}, is the {side} of the grid: give values {more} it with --penalties",)
