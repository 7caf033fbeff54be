"""Intervals: samples are samples of the rows, and 95 % means 95 %."""

import numpy as np
import pytest
from scipy import stats

from probe.evaluation.intervals import (
    bootstrap_interval,
    paired_interval,
    resample_counts,
    share_interval,
    wilson_interval,
)


def test_wilson_interval():
    # Published values: 0 of 10 and 81 of 263, Newcombe 1998, table I (method 3)
    assert wilson_interval(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)
    assert wilson_interval(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx([0.7225, 1], abs=1e-4)


@pytest.mark.parametrize("num_rows", [1, 7, 3000])
def test_samples_are_draws_with_replacement(num_rows):
    counts = np.concatenate(list(resample_counts(num_rows, seed=3)))
    assert counts.shape == (1000, num_rows)
    np.testing.assert_array_equal(counts.sum(axis=1), num_rows)
    # A count is binomial(N, 1/N): mean 1, variance 1 - 1/N; 1,000 N of them are known to a few percent
    assert counts.var() == pytest.approx(1 - 1 / num_rows, abs=0.05)
    np.testing.assert_array_equal(counts, np.concatenate(list(resample_counts(num_rows, seed=3))))
    if num_rows > 1:
        assert (counts != np.concatenate(list(resample_counts(num_rows, seed=4)))).any()


def test_many_rows_get_fewer_samples():
    assert sum(len(counts) for counts in resample_counts(400_000, seed=0)) == 250


def test_share_interval_is_the_bootstraps_in_the_middle():
    correct = np.arange(200) < 130
    samples = np.concatenate([counts @ correct / 200 for counts in resample_counts(200, seed=0)])
    assert share_interval(130, 200) == pytest.approx(np.percentile(samples, [2.5, 97.5]), abs=0.011)  # 2 rows


@pytest.mark.parametrize("hits", [0, 3, 197, 200])
def test_share_interval_is_wilsons_where_the_bootstrap_degenerates(hits):
    assert share_interval(hits, 200) == wilson_interval(hits, 200)


@pytest.mark.parametrize(("share", "num_rows"), [(0.99, 200), (0.9, 100), (0.5, 50)])
def test_share_interval_covers(share, num_rows):
    hits = np.random.default_rng(0).binomial(num_rows, share, 2000)
    intervals = np.array([share_interval(hit, num_rows) for hit in hits])
    assert np.mean((intervals[:, 0] <= share) & (share <= intervals[:, 1])) > 0.92


def test_bootstrap_interval_undoes_the_bias_of_resampling():
    rng = np.random.default_rng(0)
    unbiased = bootstrap_interval(rng.normal(5, 1, 20_000), 5.0)
    assert unbiased == pytest.approx([5 - 1.96, 5 + 1.96], abs=0.1)
    # The figure is 1 too high and its samples 1 higher still, so what it estimates is 1 below it
    assert bootstrap_interval(rng.normal(5, 1, 100_000), 4.0) == pytest.approx([3 - 1.96, 3 + 1.96], abs=0.3)


def test_bootstrap_interval_leaves_out_samples_without_the_figure():
    assert bootstrap_interval(np.array([np.nan, 0.5, np.nan, 0.5]), 0.5) == [0.5, 0.5]
    assert bootstrap_interval(np.array([np.nan]), 0.5) is None


def test_bootstrap_interval_contains_the_figure():
    low, high = bootstrap_interval(np.array([2.0, 3.0, 4.0]), 1.0)
    assert low <= 1 <= high


@pytest.mark.parametrize(("gained", "lost", "won"), [(4, 0, False), (10, 0, True), (20, 12, False), (0, 10, False)])
def test_the_paired_interval(gained, lost, won):
    right_a, right_b = np.zeros(100, bool), np.zeros(100, bool)
    right_a[:lost] = True
    right_b[lost : lost + gained] = True
    low, high = paired_interval(right_a, right_b)
    assert low < (gained - lost) / 100 < high
    assert (low > 0) == won
    # Where it excludes 0, the exact McNemar test agrees.
    assert not won or stats.binomtest(gained, gained + lost).pvalue < 0.05


def test_the_paired_interval_keeps_its_level():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        kinds = rng.choice(4, size=60, p=[0.7, 0.15, 0.1, 0.05])
        low, high = paired_interval((kinds == 0) | (kinds == 1), (kinds == 0) | (kinds == 2))
        covered += low <= -0.05 <= high
    assert covered >= 930
