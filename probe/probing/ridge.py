"""`--solver ridge`: least squares on one-hot labels, in closed form for every λ at once.

Minimises Σ_i r_i·‖x_i W + b - y_i‖² / R + λ‖W‖², bias free, with r_i the weight of row i and R their sum. One
eigendecomposition of the features' second moment serves all λ, and the exact leave-one-out answer of each row needs no
second fit: it is the fitted one with its residual divided by one minus the row's leverage (Allen's PRESS), and of a
group that is left out whole, by one minus its block of the hat matrix. Scores are no log-odds: a temperature makes them
such. With several labels a row, a label is given from a score of a half on.
"""

from collections.abc import Callable

import numpy as np

from probe.config import FitLinearConfig
from probe.evaluation.calibration import fit_temperature
from probe.heads import TrainedHead
from probe.probing.curve import Curve, RowScores, beyond, edge_warning
from probe.probing.protocol import Data, Fitted, row_weights, train_groups
from probe.probing.scaling import Scaling

Answer = Callable[[float], np.ndarray]  # λ -> [N, C] scores


class Ridge:
    """Ridge regression on [N, D] features and [N, C] targets, rows weighing [N] (default: 1), for any λ.

    Rows of one group, [N] integers, are left out together (default: each row alone).
    """

    def __init__(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        features = np.asarray(features, np.float64)
        weights = np.ones(len(features)) if weights is None else weights
        self._share = weights / weights.sum()
        self._centre, self._mean = self._share @ features, self._share @ targets
        self._residuals_at_zero = targets - self._mean
        centred = features - self._centre
        eigenvalues, self._basis = np.linalg.eigh((centred * self._share[:, None]).T @ centred)
        self._eigenvalues = np.maximum(eigenvalues, 0)
        self._rotated = centred @ self._basis
        self._moments = self._rotated.T @ (self._residuals_at_zero * self._share[:, None])
        numbers = np.arange(len(features)) if groups is None else groups
        order = np.argsort(numbers, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
        self._several = [rows for rows in parts if len(rows) > 1]

    def head(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Kernel [D, C] and bias [C]."""
        kernel = self._basis @ (self._moments * self._shrinkage(penalty))
        return kernel, self._mean - self._centre @ kernel

    def left_out(self, penalty: float) -> np.ndarray:
        """[N, C] the answer to each row by the fit of all others, or of all other groups, at the same λ·R."""
        shrinkage = self._shrinkage(penalty)
        leverage = self._share * (1 + self._rotated**2 @ shrinkage[:, 0])
        residuals = self._residuals_at_zero - self._rotated @ (self._moments * shrinkage)
        without = residuals / (1 - leverage)[:, None]
        for rows in self._several:
            without[rows] = self._without_group(rows, shrinkage, residuals[rows])
        answers: np.ndarray = self._mean + self._residuals_at_zero - without
        return answers

    def _without_group(self, rows: np.ndarray, shrinkage: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        """(I - H)⁻¹ times the residuals [m, C] of m rows, H their block of the hat matrix: what a leverage is for one.

        H is a product over the D features and the bias; where these are fewer than the rows, the smaller inverse does
        (Woodbury).
        """
        out = np.concatenate([np.ones((len(rows), 1)), self._rotated[rows]], axis=1)
        back = np.concatenate([np.ones((1, 1)), shrinkage]) * (out.T * self._share[rows])
        if len(rows) <= out.shape[1]:
            return np.asarray(np.linalg.solve(np.eye(len(rows)) - out @ back, residuals))
        return np.asarray(residuals + out @ np.linalg.solve(np.eye(len(back)) - back @ out, back @ residuals))

    def _shrinkage(self, penalty: float) -> np.ndarray:
        shrinkage: np.ndarray = 1 / (self._eigenvalues + penalty)[:, None]
        return shrinkage

    @property
    def mean_variance(self) -> float:
        return float(self._eigenvalues.mean())


def fit_ridge(config: FitLinearConfig, data: Data) -> Fitted:
    """λ by the error on train without each row and its group, or by a given validation split, and then a fit of all.

    Raises: InputError if all training rows are one group.
    """
    view, kind, splits = config.views[0], config.scalings[0], data.splits
    embeddings, labels, given = data.in_memory(view), data.labels, splits.val_is_given
    targets = labels.astype(np.float64) if data.multi_label else np.eye(data.num_classes)[labels]
    scaling, ridge = _fitted(config, data, splits.train, targets, train_groups(data))
    val_features = scaling.apply(embeddings[splits.val])

    def on_val(penalty: float) -> np.ndarray:
        kernel, bias = ridge.head(penalty)
        return np.asarray(val_features @ kernel + bias)

    def choose(curve: Curve) -> int:
        criterion = "nll" if data.multi_label else config.criterion
        return curve.best(criterion, one_standard_error=config.one_standard_error)

    judged_rows, answer = (splits.val, on_val) if given else (splits.train, ridge.left_out)
    penalties, scores = _scores(config, ridge.mean_variance, choose, answer, labels[judged_rows], targets[judged_rows])
    curve = scores.curve()
    best = choose(curve)
    penalty = float(penalties[best])
    out_of_fold = _log_odds(ridge.left_out(penalty), data)
    temperature = fit_temperature(out_of_fold, labels[splits.train])

    halves = scores.cross_fitted(labels[judged_rows], choose)
    val_logits = np.empty((len(judged_rows), data.num_classes), np.float32) if halves else None
    for pick, rows, others in halves:
        # What makes log-odds of the scores comes, as λ does, from rows that are not judged here.
        of_pick, told_by = ridge.left_out(penalties[pick]), slice(None) if given else others
        found = fit_temperature(_log_odds(of_pick[told_by], data), labels[splits.train][told_by])
        assert val_logits is not None
        val_logits[rows] = _log_odds((answer(penalties[pick]) if given else of_pick)[rows], data) / found

    fitted_on = splits.train
    if given and not config.no_refit:
        fitted_on = np.concatenate([splits.train, splits.val])
        scaling, ridge = _fitted(config, data, fitted_on, targets)
        penalty *= row_weights(config, data, splits.train).sum() / row_weights(config, data, fitted_on).sum()
    kernel, bias = ridge.head(penalty)
    kernel, bias = kernel / temperature, (bias - 0.5 if data.multi_label else bias) / temperature
    if data.num_classes == 2 and not data.multi_label:
        kernel, bias = kernel[:, 1:] - kernel[:, :1], bias[1:] - bias[:1]
    return Fitted(
        head=TrainedHead((), scaling.fold({"kernel": kernel, "bias": bias})),
        view=view,
        val_rows=judged_rows,
        val_logits=val_logits,
        val_of=("heads that train alone gave" if given else "heads that were fitted without the row")
        + ", each half of the rows judged by what the other half chose",
        val_is_calibrated=True,
        out_of_fold=out_of_fold.astype(np.float32),
        facts={
            "fitted_on": "train" if len(fitted_on) == len(splits.train) else "train + val",
            "view": view,
            "scaling": kind,
            "solver": "ridge",
            "penalty": penalty,
            "temperature": temperature,
            "chosen_by": ("accuracy" if config.criterion == "accuracy" and not data.multi_label else "squared error")
            + (", one standard error" if config.one_standard_error else ""),
            "curves": [
                {
                    "view": view,
                    "scaling": kind,
                    "points": curve.lines({"penalty": penalties}, accuracy=data.curve_accuracy, loss="squared_error"),
                }
            ],
        },
        warnings=edge_warning(penalties, best),
    )


def _fitted(
    config: FitLinearConfig, data: Data, rows: np.ndarray, targets: np.ndarray, groups: np.ndarray | None = None
) -> tuple[Scaling, Ridge]:
    embeddings = data.in_memory(config.views[0])[rows]
    scaling = Scaling.of(embeddings, config.scalings[0])
    return scaling, Ridge(scaling.apply(embeddings), targets[rows], row_weights(config, data, rows), groups)


def _scores(
    config: FitLinearConfig,
    mean_variance: float,
    choose: Callable[[Curve], int],
    answer: Answer,
    labels: np.ndarray,
    targets: np.ndarray,
) -> tuple[np.ndarray, RowScores]:
    """Values of λ, falling, and what each makes of each row: those asked for, or a grid about the mean variance,
    continued where its edge is best."""

    def of(penalties: np.ndarray) -> RowScores:
        hits, losses = np.empty((2, len(penalties), len(labels)))
        for i, penalty in enumerate(penalties):
            scores = answer(penalty)
            right = ((scores >= 0.5) == labels).mean(axis=1) if labels.ndim == 2 else scores.argmax(axis=1) == labels
            hits[i], losses[i] = right, ((scores - targets) ** 2).sum(axis=1)
        return RowScores(hits, losses)

    if config.penalties:
        penalties = np.array(sorted(config.penalties, reverse=True))
        return penalties, of(penalties)
    penalties = np.logspace(1, -7, 17) * mean_variance
    scores = of(penalties)
    best = choose(scores.curve())
    more = beyond(penalties, best)
    parts = [(more, of(more)), (penalties, scores)]
    (first, a), (second, b) = parts if best == 0 else parts[::-1]
    together = RowScores(np.concatenate([a.hits, b.hits]), np.concatenate([a.losses, b.losses]))
    return np.concatenate([first, second]), together


def _log_odds(scores: np.ndarray, data: Data) -> np.ndarray:
    """Scores so shifted that a label is given from 0 on; those of classes that exclude each other stay."""
    return scores - 0.5 if data.multi_label else scores
