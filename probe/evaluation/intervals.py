"""How sure a figure is: 95 % intervals, by resampling the rows or by Wilson's formula.

A bootstrap sample of N rows is a vector of counts [N] that says how often each row was drawn. Whoever can evaluate
a figure for given counts can evaluate a thousand samples as one matrix product, and two classifiers on the same
counts are compared row by row.
"""

import math
from collections.abc import Iterator

import numpy as np
from scipy import stats

NUM_RESAMPLES = 1000
_FEWEST_RESAMPLES = 200
_MOST_DRAWS = 100_000_000  # of rows in all, one or two seconds; only beyond 100,000 rows are there fewer samples
_CHUNK_ELEMENTS = 2_000_000  # counts in memory at a time, 16 MB
Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
_FEW = 10  # hits or misses below which a resampled share says more of its lattice than of its uncertainty


def wilson_interval(num_correct: float, num_examples: float) -> list[float]:
    """95 % score interval [low, high] of a share; it keeps its level near 0 and 1. Source: Wilson 1927."""
    share, spread = num_correct / num_examples, Z95**2 / num_examples
    centre = share + spread / 2
    half_width = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (centre - half_width) / (1 + spread), (centre + half_width) / (1 + spread)
    return [max(0.0, low), min(1.0, high)]


def share_interval(num_correct: int, num_examples: int) -> list[float]:
    """95 % interval of a share of rows: the bootstrap's, and Wilson's near 0 and 1, where the bootstrap fails.

    The resampled share of n rows is binomial, so that its percentiles are known without drawing. With fewer than
    ten hits or misses they no longer cover: at 99 % of 200 rows 87 times in 100, at 100 % never.
    """
    if min(num_correct, num_examples - num_correct) < _FEW:
        return wilson_interval(num_correct, num_examples)
    share = num_correct / num_examples
    return [float(stats.binom.ppf(q, num_examples, share)) / num_examples for q in (0.025, 0.975)]


def paired_interval(right_a: np.ndarray, right_b: np.ndarray) -> list[float]:
    """95 % interval of the accuracy of B minus that of A on the same N rows, [N] bool each.

    A bootstrap takes 4 rows that only B gets right, of 100, for certain; the exact McNemar test gives them p
    0.125.
    Source: Bonett & Price 2012, J. Educ. Behav. Stat. 37(4): a row is added to each kind of disagreement.
    """
    total = len(right_a) + 2
    gained = float(np.sum(right_b & ~right_a) + 1) / total
    lost = float(np.sum(right_a & ~right_b) + 1) / total
    half_width = Z95 * math.sqrt((gained + lost - (gained - lost) ** 2) / total)
    return [max(-1.0, gained - lost - half_width), min(1.0, gained - lost + half_width)]


def bootstrap_interval(samples: np.ndarray, value: float) -> list[float] | None:
    """95 % interval of a figure from its bootstrap samples: bias-corrected percentiles.

    Percentiles alone take twice the bias of a figure that few rows distort (measured: macro F1 of 30 classes with 10
    rows each, 86 % coverage against 89; average precision 48 against 84). Where there is no bias they are the same.
    Source: Efron 1981, section 7.

    Args:
      samples: [R]; NaN, where the figure did not exist, are left out.
      value: the figure itself; the interval contains it.
    """
    known = samples[~np.isnan(samples)]
    if not len(known):
        return None
    below = (np.sum(known < value) + np.sum(known == value) / 2) / len(known)
    bias = stats.norm.ppf(np.clip(below, 1 / len(known), 1 - 1 / len(known)))
    low, high = np.quantile(known, stats.norm.cdf(2 * bias + np.array([-Z95, Z95])))
    return [min(float(low), value), max(float(high), value)]


def resample_counts(num_rows: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap samples of `num_rows` rows, in chunks: float64 [R, N] counts that sum to N along each row.

    The same number of rows and seed give the same samples. There are 1,000 in all, and fewer (at least 200) beyond
    100,000 rows, where 1,000 would take seconds and say nothing more.
    """
    rng = np.random.default_rng(seed)
    remaining = min(NUM_RESAMPLES, max(_FEWEST_RESAMPLES, _MOST_DRAWS // num_rows))
    per_chunk = max(1, _CHUNK_ELEMENTS // num_rows)
    while remaining > 0:
        num = min(per_chunk, remaining)
        drawn = rng.integers(0, num_rows, (num, num_rows))
        drawn += np.arange(num)[:, None] * num_rows
        yield np.bincount(drawn.ravel(), minlength=num * num_rows).reshape(num, num_rows).astype(np.float64)
        remaining -= num
