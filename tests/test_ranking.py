"""ROC-AUC and average precision: scikit-learn's, for any counts, and their tangent is one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from probe.evaluation.intervals import bootstrap_interval, resample_counts
from probe.evaluation.ranking import NAMES, Ranking


def one_class(num_rows, seed, decimals):
    """Scores with ties where rounded, and at least one row of each kind."""
    rng = np.random.default_rng(seed)
    positive = rng.random(num_rows) < 0.3
    positive[:2] = True, False
    return (rng.normal(size=num_rows) + positive).round(decimals), positive


def samples_of(ranking, num_rows):
    chunks = [ranking(counts) for counts in resample_counts(num_rows, seed=0)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in NAMES}


@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(2, 40), seed=st.integers(0, 2**31), decimals=st.sampled_from([0, 1, 8]))
def test_equals_scikit_learn_for_any_counts(num_rows, seed, decimals):
    scores, positive = one_class(num_rows, seed, decimals)
    ranking = Ranking.of([(scores, positive)], num_rows, 1)
    counts = np.random.default_rng(seed).multinomial(num_rows, np.full(num_rows, 1 / num_rows), 5).astype(float)
    counts[0] = 1
    figures = ranking(counts)
    for i, weights in enumerate(counts):
        if not (weights @ positive and weights @ ~positive):
            assert np.isnan([figures[name][i] for name in NAMES]).all()
            continue
        assert figures["roc_auc"][i] == pytest.approx(roc_auc_score(positive, scores, sample_weight=weights))
        expected = average_precision_score(positive, scores, sample_weight=weights)
        assert figures["average_precision"][i] == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(num_rows=st.integers(2, 30), seed=st.integers(0, 2**31), decimals=st.sampled_from([0, 8]))
def test_the_tangent_touches(num_rows, seed, decimals):
    classes = [one_class(num_rows, seed + i, decimals) for i in range(2)]
    exact, tangent = (Ranking.of(classes, num_rows, 2, exact_elements=limit) for limit in (10**9, 0))
    assert not tangent.orders
    ones, step = np.ones((1, num_rows)), 1e-6
    for i, name in enumerate(NAMES):
        assert tangent(ones)[name] == pytest.approx(exact(ones)[name])
        moved = exact(ones + step * np.eye(num_rows))[name]
        np.testing.assert_allclose((moved - exact(ones)[name]) / step, tangent.slopes[i], atol=1e-4)


def test_both_ways_give_the_same_interval_on_many_rows():
    scores, positive = one_class(3000, 0, 8)
    for name in NAMES:
        exact, tangent = (
            bootstrap_interval(
                samples_of(Ranking.of([(scores, positive)], 3000, 1, exact_elements=limit), 3000)[name],
                Ranking.of([(scores, positive)], 3000, 1).values[NAMES.index(name)],
            )
            for limit in (3000, 0)
        )
        assert exact == pytest.approx(tangent, abs=0.002)


def test_a_class_with_rows_of_one_kind_is_left_out():
    scores, positive = one_class(20, 0, 8)
    both = Ranking.of([(scores, positive), (scores, np.zeros(20, bool)), (scores, np.ones(20, bool))], 20, 3)
    np.testing.assert_array_equal(both.values, Ranking.of([(scores, positive)], 20, 1).values)
    assert np.isnan(Ranking.of([(scores, np.ones(20, bool))], 20, 1).values).all()
