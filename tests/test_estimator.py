"""`probe.LinearProbe` keeps scikit-learn's rules, and finds LogisticRegression's optimum."""

import numpy as np
import pytest
from sklearn.datasets import load_iris, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from probe import LinearProbe
from probe.splits import assign_folds


@parametrize_with_checks([LinearProbe()])
def test_it_keeps_the_rules_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize(("num_classes", "C"), [(2, 30.0), (4, 0.01)])
def test_it_finds_the_optimum_of_logistic_regression(num_classes, C):
    X, y = make_classification(200, 8, n_informative=6, n_classes=num_classes, random_state=0)
    X = X * np.arange(1, 9) + 5
    y = np.array(["ant", "bee", "cat", "dog"])[y]
    ours = LinearProbe(C=C).fit(X, y)
    scaler = StandardScaler().fit(X)
    theirs = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(scaler.transform(X), y)
    assert ours.classes_.tolist() == theirs.classes_.tolist()
    assert ours.coef_.shape == theirs.coef_.shape
    # Features are stored in float32, in which a coefficient of 10 is known to 1e-6 of it
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(scaler.transform(X)), atol=2e-5)
    np.testing.assert_allclose(ours.coef_ * scaler.scale_, theirs.coef_, atol=2e-4)


def test_c_is_chosen_by_folds():
    X, y = make_classification(120, 30, n_informative=3, random_state=1)
    chosen = LinearProbe(C="cv", criterion="nll").fit(X, y)
    assert chosen.C_ < 1, "with 30 features, 27 of them noise, little may be fitted"
    again = LinearProbe(C="cv", criterion="nll").fit(X, y)
    np.testing.assert_array_equal(chosen.coef_, again.coef_)
    np.testing.assert_allclose(LinearProbe(C=chosen.C_).fit(X, y).coef_, chosen.coef_, atol=1e-5)


def test_folds_are_scaled_by_their_own_rows():
    """As a pipeline with StandardScaler scales them, whose best C is chosen: a row far off is in one fold alone."""
    X, y = make_classification(60, 8, n_informative=3, flip_y=0.2, random_state=0)
    X[7] *= 40
    ours = LinearProbe(C="cv", criterion="nll").fit(X, y)
    folds, _ = assign_folds(y, None, 5, seed=0)
    losses = {}
    for C in 1 / (60 * np.logspace(1, -7, 17)):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-6, max_iter=10_000))
        parts = [
            log_loss(y[folds == fold], model.fit(X[folds != fold], y[folds != fold]).predict_proba(X[folds == fold]))
            for fold in range(5)
        ]
        losses[C] = np.average(parts, weights=np.bincount(folds))
    expected = min(losses, key=losses.__getitem__)
    np.testing.assert_allclose(ours.C_, expected, rtol=1e-5)


def test_it_stands_where_logistic_regression_stood():
    X, y = load_iris(return_X_y=True)
    search = GridSearchCV(make_pipeline(Normalizer(), LinearProbe()), {"linearprobe__C": [1.0, 100.0]}, cv=3)
    assert search.fit(X, y).best_score_ > 0.9


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"C": 0}, "C must be positive and finite"),
        ({"C": "much"}, "or \"cv\", got 'much'"),
        ({"criterion": "loss"}, "criterion must be"),
        ({"folds": 1}, "folds must be at least 2"),
    ],
)
def test_parameters_that_make_no_sense(parameters, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(**parameters).fit(np.eye(4), [0, 0, 1, 1])


def test_one_row_of_each_class_leaves_nothing_to_choose_by():
    with pytest.raises(ValueError, match="Give C a number"):
        LinearProbe(C="cv").fit(np.eye(2), [0, 1])
