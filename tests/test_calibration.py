"""Calibration: the error's interval covers it, and the temperature is the optimum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, softmax
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from probe.evaluation.calibration import NUM_BINS, bin_gaps, calibration_error_interval, fit_temperature
from probe.evaluation.intervals import resample_counts


def drawn(num_rows, sharpness, seed):
    """Confidences [N, 1] of a classifier that is `sharpness` times too sure, and whether it was right."""
    rng = np.random.default_rng(seed)
    logits = np.abs(rng.normal(1, 2, num_rows))
    return expit(logits)[:, None], (rng.random(num_rows) < expit(logits / sharpness))[:, None]


def test_gaps_are_those_of_scikit_learns_curve():
    confidences, hits = drawn(500, 2, 0)
    gaps = bin_gaps(confidences, hits)
    true, claimed = calibration_curve(hits[:, 0], confidences[:, 0], n_bins=NUM_BINS)
    count = np.histogram(confidences, NUM_BINS, (0, 1))[0]
    np.testing.assert_allclose(gaps.sum(axis=0)[count > 0], (true - claimed) * count[count > 0])


def test_a_certain_answer_has_a_bin_and_answers_share_a_row():
    gaps = bin_gaps(np.array([[1.0, 0.0]]), np.array([[False, False]]))
    assert gaps.shape == (1, NUM_BINS)
    assert gaps[0, -1] == -0.5
    assert gaps[0, :-1].tolist() == [0] * (NUM_BINS - 1)


@pytest.mark.parametrize(("num_rows", "sharpness"), [(100, 1.0), (1000, 1.0), (1000, 2.0)])
def test_the_interval_covers_where_percentiles_do_not(num_rows, sharpness):
    true = np.abs(bin_gaps(*drawn(500_000, sharpness, 0)).mean(axis=0)).sum()
    covered = plain = 0
    counts = next(iter(resample_counts(num_rows, seed=0)))[:400]
    for seed in range(100):
        gaps = bin_gaps(*drawn(num_rows, sharpness, seed))
        resampled = counts @ gaps / num_rows
        low, high = calibration_error_interval(gaps.mean(axis=0), resampled)
        covered += low <= true <= high
        assert low <= np.abs(gaps.mean(axis=0)).sum() <= high
        percentiles = np.percentile(np.abs(resampled).sum(axis=1), [2.5, 97.5])
        plain += percentiles[0] <= true <= percentiles[1]
    assert covered >= 90
    if sharpness == 1:
        assert plain == 0


def test_no_gaps_no_error():
    assert calibration_error_interval(np.zeros(NUM_BINS), np.zeros((10, NUM_BINS))) == [0, 0]


def problem(num_rows, num_classes, scale, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_rows, num_classes))
    labels = np.array([rng.choice(num_classes, p=p) for p in softmax(logits, axis=1)])
    return logits * scale, labels


def nll(logits, labels, temperature):
    return -log_softmax(logits / temperature, axis=1)[np.arange(len(labels)), labels].mean()


@settings(max_examples=20, deadline=None)
@given(num_classes=st.integers(2, 6), scale=st.sampled_from([0.05, 1.0, 30.0]), seed=st.integers(0, 2**31))
def test_no_other_temperature_is_better(num_classes, scale, seed):
    logits, labels = problem(60, num_classes, scale, seed)
    temperature = fit_temperature(logits, labels)
    if temperature in (1.0, 1000.0):
        return
    for other in (0.5, 0.99, 1.01, 2):
        assert nll(logits, labels, temperature) < nll(logits, labels, temperature * other)


def test_equals_scikit_learns():
    logits, labels = problem(300, 4, 3.0, 0)
    model = LogisticRegression().fit(logits, labels)
    decisions = model.decision_function(logits)
    theirs = CalibratedClassifierCV(FrozenEstimator(model), method="temperature").fit(logits, labels)
    ours = softmax(decisions / fit_temperature(decisions, labels), axis=1)
    np.testing.assert_allclose(ours, theirs.predict_proba(logits), atol=1e-6)


def test_finds_how_much_too_sure_the_logits_are():
    logits, labels = problem(20_000, 3, 2.5, 0)
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.05)
    rng = np.random.default_rng(0)
    sets = rng.random((20_000, 2)) < expit(logits[:, :2] / 5)
    assert fit_temperature(logits[:, :2], sets) == pytest.approx(5, rel=0.05)


def test_where_there_is_no_optimum():
    right = np.eye(3)
    assert fit_temperature(right, np.arange(3)) == 1
    assert fit_temperature(np.where(np.eye(3, dtype=bool), 2.0, -2.0), np.eye(3, dtype=bool)) == 1
    assert fit_temperature(np.zeros((3, 3)), np.arange(3)) == 1
    assert fit_temperature(right, np.array([1, 2, 0])) == 1000
