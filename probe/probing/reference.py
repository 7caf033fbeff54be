"""scikit-learn beside our solver: on the same objective, and as people get it."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from probe.heads import num_logits
from probe.probing.solver import Problem, Solution

_MOST_COEFFICIENTS = 8_000  # their Hessian takes 0.5 GB, and its factor as much


def solve_with_sklearn(
    problem: Problem,
    features: np.ndarray,
    labels: np.ndarray,
    penalty: float,
    *,
    weights: np.ndarray | None = None,
    tolerance: float = 1e-9,
    most_coefficients: int = _MOST_COEFFICIENTS,
) -> Solution:
    """The same objective by scikit-learn's LogisticRegression, with our certificate.

    By its newton-cholesky, which gets nearest to the optimum. Its Hessian of (C·(D + 1))² float64 grows beyond any
    memory, 47 GB for 100 classes of 768 features, so that larger heads are left to its lbfgs, which stops up to 1e-3
    above the optimum of near-singular problems: the certificate says so.

    Args:
      problem: made of these features, labels and weights; it judges the result.
      features: [N, D]; labels: [N] integers, or [N, C] bool, a problem of its own for each label.
      penalty: λ; scikit-learn's C is 1 / (λ · sum of weights).
      tolerance: on the gradient.
      most_coefficients: of a head whose Hessian may be made.
    """
    features = features.astype(np.float64)
    weights = np.ones(len(features)) if weights is None else weights
    outputs = 1 if labels.ndim == 2 else num_logits(int(labels.max()) + 1)
    newton = outputs * (features.shape[1] + 1) <= most_coefficients
    model = LogisticRegression(
        C=1 / (penalty * weights.sum()),
        solver="newton-cholesky" if newton else "lbfgs",
        tol=tolerance,
        max_iter=1000 if newton else 10_000,
    )
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
