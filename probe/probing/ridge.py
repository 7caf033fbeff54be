"""`--solver ridge`: least squares on one-hot labels, in closed form for every λ at once.

Minimises Σ_i ‖x_i W + b - y_i‖² / N + λ‖W‖², bias free. One eigendecomposition of the features' second moment serves
all λ, and the exact leave-one-out answer of each row needs no second fit: it is the fitted one with its residual
divided by one minus the row's leverage (Allen's PRESS). Scores are no log-odds: a temperature makes them such.
"""

import numpy as np

from probe.config import FitLinearConfig
from probe.evaluation.calibration import fit_temperature
from probe.evaluation.choice import cross_fitted
from probe.heads import TrainedHead
from probe.probing.protocol import Curve, Data, Fitted
from probe.probing.scaling import Scaling


class Ridge:
    """Ridge regression on [N, D] centred features and [N, C] targets, for any λ."""

    def __init__(self, features: np.ndarray, targets: np.ndarray) -> None:
        features = np.asarray(features, np.float64)
        self._mean = targets.mean(axis=0)
        self._residuals_at_zero = targets - self._mean
        second_moment = features.T @ features / len(features)
        eigenvalues, self._basis = np.linalg.eigh(second_moment)
        self._eigenvalues = np.maximum(eigenvalues, 0)
        self._rotated = features @ self._basis
        self._moments = self._rotated.T @ self._residuals_at_zero / len(features)

    def head(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Kernel [D, C] and bias [C]."""
        return self._basis @ (self._moments * self._shrinkage(penalty)), self._mean

    def left_out(self, penalty: float) -> np.ndarray:
        """[N, C] the answer to each row by the fit of all others at the same λ·N."""
        shrinkage = self._shrinkage(penalty)
        leverage = (1 + self._rotated**2 @ shrinkage[:, 0]) / len(self._rotated)
        residuals = self._residuals_at_zero - self._rotated @ (self._moments * shrinkage)
        answers: np.ndarray = self._mean + self._residuals_at_zero - residuals / (1 - leverage)[:, None]
        return answers

    def _shrinkage(self, penalty: float) -> np.ndarray:
        shrinkage: np.ndarray = 1 / (self._eigenvalues + penalty)[:, None]
        return shrinkage

    @property
    def mean_variance(self) -> float:
        return float(self._eigenvalues.mean())


def fit_ridge(config: FitLinearConfig, data: Data) -> Fitted:
    """λ by the leave-one-out error of train, or by a given validation split, and then a fit of all of it."""
    view, kind, splits = config.views[0], config.scalings[0], data.splits
    embeddings = data.embeddings[view]
    one_hot = np.eye(data.num_classes)[data.labels]
    scaling = Scaling.of(embeddings[splits.train], kind)
    ridge = Ridge(scaling.apply(embeddings[splits.train]), one_hot[splits.train])
    grid = np.array(sorted(config.penalties, reverse=True)) if config.penalties else np.logspace(1, -7, 17)
    penalties = grid if config.penalties else grid * ridge.mean_variance
    judged_rows = splits.val if splits.val_is_given else splits.train
    if splits.val_is_given:
        heads = [ridge.head(penalty) for penalty in penalties]
        features = scaling.apply(embeddings[splits.val])
        scores = np.stack([features @ kernel + bias for kernel, bias in heads])
    else:
        scores = np.stack([ridge.left_out(penalty) for penalty in penalties])
    labels = data.labels[judged_rows]
    accuracy = (scores.argmax(axis=2) == labels).mean(axis=1)
    error = ((scores - one_hot[judged_rows]) ** 2).sum(axis=2).mean(axis=1)
    curve = Curve(accuracy[:, None], error[:, None], np.array([len(labels)]))
    best = curve.best(config.criterion)
    penalty = float(penalties[best])
    out_of_fold = ridge.left_out(penalty)
    temperature = fit_temperature(out_of_fold, data.labels[splits.train])
    fitted_on = splits.train
    if splits.val_is_given and not config.no_refit:
        fitted_on = np.concatenate([splits.train, splits.val])
        scaling = Scaling.of(embeddings[fitted_on], kind)
        ridge = Ridge(scaling.apply(embeddings[fitted_on]), one_hot[fitted_on])
        penalty *= len(splits.train) / len(fitted_on)
    kernel, bias = (part / temperature for part in ridge.head(penalty))
    if data.num_classes == 2:
        kernel, bias = kernel[:, 1:] - kernel[:, :1], bias[1:] - bias[:1]
    val_logits = cross_fitted(scores / temperature, labels)
    return Fitted(
        head=TrainedHead((), scaling.fold({"kernel": kernel, "bias": bias})),
        view=view,
        val_rows=judged_rows,
        val_logits=val_logits,
        val_of=("heads that train alone gave" if splits.val_is_given else "heads that were fitted without the row")
        + ", each half of the rows judged by what the other half chose",
        out_of_fold=(out_of_fold / temperature).astype(np.float32),
        facts={
            "fitted_on": "train" if len(fitted_on) == len(splits.train) else "train + val",
            "view": view,
            "scaling": kind,
            "solver": "ridge",
            "penalty": penalty,
            "temperature": temperature,
            "curves": [
                {
                    "view": view,
                    "scaling": kind,
                    "points": [
                        {"penalty": float(p), "accuracy": float(a), "squared_error": float(e)}
                        for p, a, e in zip(penalties, accuracy, error, strict=True)
                    ],
                }
            ],
        },
    )
