"""scikit-learn beside our solver: on the same objective, and as people get it."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from probe.probing.solver import Problem, Solution


def solve_with_sklearn(
    problem: Problem,
    features: np.ndarray,
    labels: np.ndarray,
    penalty: float,
    *,
    weights: np.ndarray | None = None,
    tolerance: float = 1e-9,
) -> Solution:
    """The same objective by scikit-learn's LogisticRegression, with our certificate.

    Args:
      problem: made of these features, labels and weights; it judges the result.
      features: [N, D]; labels: [N] integers, or [N, C] bool, a problem of its own for each label.
      penalty: λ; scikit-learn's C is 1 / (λ · sum of weights).
      tolerance: of newton-cholesky on the gradient.
    """
    features = features.astype(np.float64)
    weights = np.ones(len(features)) if weights is None else weights
    model = LogisticRegression(C=1 / (penalty * weights.sum()), solver="newton-cholesky", tol=tolerance, max_iter=1000)
    kernels, biases, num_iterations = [], [], 0
    for targets in labels.T if labels.ndim == 2 else [labels]:
        quietly(model.fit, features, targets, sample_weight=weights)  # the certificate says if it converged
        kernels.append(model.coef_)
        biases.append(model.intercept_)
        num_iterations = max(num_iterations, int(model.n_iter_.max()))
    return problem.certify(np.concatenate(kernels).T, np.concatenate(biases), penalty, num_iterations)


def default_decisions(features: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Decisions [n, M] on `others` [n, D] of a LogisticRegression that is left as it comes: C = 1, lbfgs."""
    model = LogisticRegression(max_iter=1000)
    quietly(model.fit, features, labels)
    decisions: np.ndarray = model.decision_function(others).reshape(len(others), -1)
    return decisions


def quietly(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls without scikit-learn's warnings about convergence, where ours says it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return call(*arguments, **options)
