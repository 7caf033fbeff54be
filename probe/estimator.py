"""`probe.LinearProbe`: the linear head as a scikit-learn estimator, on features that one has at hand.

The same problem and solver as `fit-linear`: mean cross-entropy + ‖W‖² / (2·C·N), bias free, two classes with one logit,
so that it can stand in a pipeline or a grid search where LogisticRegression stood.
"""

import numbers
import warnings
from typing import Any, Literal

import numpy as np
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from probe.probing.curve import Curve
from probe.probing.solver import Problem
from probe.splits import assign_folds

_NUM_PENALTIES = 17  # over eight decades about the features' mean variance, as in `fit-linear`


class LinearProbe(ClassifierMixin, BaseEstimator):
    """Logistic regression solved to its optimum on standardised features.

    C: inverse strength of the regularisation, as LogisticRegression has it; or "cv", to choose it by stratified folds
    of the training rows. folds: how many. criterion: what chooses, "accuracy" or "nll". random_state: of the folds.

    After fit: classes_, coef_ [1 or n_classes, n_features] and intercept_, on features as they were given; C_, the
    value used; n_iter_; n_features_in_.
    """

    def __init__(
        self,
        C: float | Literal["cv"] = 1.0,
        *,
        folds: int = 5,
        criterion: Literal["accuracy", "nll"] = "accuracy",
        random_state: int | None = None,
    ) -> None:
        self.C = C
        self.folds = folds
        self.criterion = criterion
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "LinearProbe":
        """Fits [N, D] features to N labels of any kind. Raises: ValueError as scikit-learn's estimators do."""
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(y)
        self._check_parameters()
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"LinearProbe needs two classes or more to tell apart; y has 1 class: {self.classes_[0]}")
        mean, deviation = X.mean(axis=0, dtype=np.float64), X.std(axis=0, dtype=np.float64)
        # A constant feature has a deviation of rounding alone
        deviation = np.where(deviation > 1e-6 * np.maximum(np.abs(mean), 1e-30), deviation, 1.0)
        features = ((X - mean) / deviation).astype(np.float32)
        folds = self._folds(labels) if self.C == "cv" else None
        problem = Problem(features, labels, len(self.classes_), folds=folds, standardise_folds=folds is not None)
        penalty = 1 / (float(self.C) * len(X)) if folds is None else self._choose(problem, folds)
        solution = problem.fit(penalty)
        if not solution.converged:
            warnings.warn(
                f"the optimum was not reached: the objective is some {solution.gap:.1e} above it; lower C",
                ConvergenceWarning,
                stacklevel=2,
            )
        kernel = np.asarray(solution.params["kernel"], np.float64) / deviation[:, None]
        self.coef_ = kernel.T
        self.intercept_ = np.asarray(solution.params["bias"], np.float64) - mean @ kernel
        self.C_ = 1 / (penalty * len(X))
        self.n_iter_ = solution.num_iterations
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """[N] log-odds of the second class of two, or [N, n_classes] logits."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        logits = np.asarray(X @ self.coef_.T + self.intercept_)
        return logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """[N, n_classes] probabilities."""
        logits = self.decision_function(X)
        if logits.ndim == 1:
            return np.stack([expit(-logits), expit(logits)], axis=1)
        return np.asarray(softmax(logits, axis=1))

    def predict(self, X: Any) -> np.ndarray:
        """[N] labels, of `classes_`."""
        logits = self.decision_function(X)
        chosen = (logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(axis=1)
        return np.asarray(self.classes_[chosen])

    def _check_parameters(self) -> None:
        if self.C != "cv" and not (isinstance(self.C, numbers.Real) and 0 < float(self.C) < np.inf):
            raise ValueError(f'C must be positive and finite, or "cv", got {self.C!r}')
        if self.criterion not in ("accuracy", "nll"):
            raise ValueError(f'criterion must be "accuracy" or "nll", got {self.criterion!r}')
        if not (isinstance(self.folds, numbers.Integral) and self.folds >= 2):
            raise ValueError(f"folds must be at least 2, got {self.folds!r}")

    def _folds(self, labels: np.ndarray) -> np.ndarray:
        """[N] the fold of each row, -1 for one that is never left out."""
        folds, _ = assign_folds(labels, None, int(self.folds), seed=self.random_state or 0)
        if (folds == -1).all():
            raise ValueError("no row can be left out to choose C by: each class has one row alone. Give C a number.")
        return folds

    def _choose(self, problem: Problem, folds: np.ndarray) -> float:
        """The penalty with the best score on rows left out."""
        penalties = problem.mean_variance * np.logspace(1, -7, _NUM_PENALTIES)
        path = problem.path(penalties.tolist(), sorted(set(folds.tolist()) - {-1}))
        return float(penalties[Curve(path.accuracy, path.nll, path.count).best(self.criterion)])
