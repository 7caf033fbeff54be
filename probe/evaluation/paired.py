"""Two classifiers on the same rows: their difference, its interval, and whether chance would do as well."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from probe.evaluation.figures import LOSSES, Figures
from probe.evaluation.intervals import bootstrap_interval, paired_interval, resample_counts, wilson_interval


def compare_answers(
    logits_a: np.ndarray, logits_b: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """What is said of two classifiers, A and B, as JSON values.

    Args:
      logits_a, logits_b: [N, C], row by row of the same examples; labels: [N] integers, or [N, C] bool; class_names:
        of the C classes. All as `metrics.summarize` takes them.
      seed: of the bootstrap.
    Returns: n; figures: name to {"a", "b", "difference", "interval_95"}; mcnemar: {"only_a_correct",
      "only_b_correct", "p_value"}, the exact two-sided probability that chance divides these rows as unevenly;
      per_class: name to {"n", "accuracy_a", "accuracy_b", "difference", "interval_95", "p_value", "p_value_holm"}:
        exact McNemar on the class, as it is and corrected for there being C of them (Holm 1979); the intervals are of
        each class alone.
      A difference is B - A; its interval is of the paired bootstrap, both on the same resampled rows, and accuracy's
      is `paired_interval`, which says the same of a fine-tuning's verdict. None is what these rows cannot say.
    """
    a, b = (Figures.of(logits, np.asarray(labels)) for logits in (logits_a, logits_b))
    asked, right_a = a.answers_by_class()
    _, right_b = b.answers_by_class()
    figures, by_class = [], []
    for counts in resample_counts(a.num_rows, seed):
        sample_a, sample_b = a(counts), b(counts)
        figures.append({name: sample_b[name] - sample_a[name] for name in sample_a})
        num_asked = counts @ asked
        by_class.append(np.where(num_asked > 0, counts @ (right_b - right_a), np.nan) / np.maximum(num_asked, 1))

    value_a, value_b = a.point(), b.point()
    compared = {}
    for name in value_a:
        samples = np.concatenate([chunk[name] for chunk in figures])
        num_answers = 0 if name in LOSSES else a.num_answers(name)
        compared[name] = _difference(value_a[name], value_b[name], samples, num_answers)

    compared["accuracy"]["interval_95"] = paired_interval(a.correct, b.correct)

    per_class = {}
    num_asked, num_right_a, num_right_b = (np.asarray(which.sum(axis=0)).ravel() for which in (asked, right_a, right_b))
    class_samples = np.concatenate(by_class)
    for c, (name, n) in enumerate(zip(class_names, num_asked, strict=True)):
        share_a, share_b = (hits[c] / n if n else np.nan for hits in (num_right_a, num_right_b))
        facts = _difference(share_a, share_b, class_samples[:, c], int(n))
        per_class[name] = {"n": int(n), "accuracy_a": facts.pop("a"), "accuracy_b": facts.pop("b"), **facts}
    both = right_a.multiply(right_b)
    only_a, only_b = (np.asarray((right - both).sum(axis=0)).ravel() for right in (right_a, right_b))
    p_values = [_mcnemar_p(int(a), int(b)) if n else None for a, b, n in zip(only_a, only_b, num_asked, strict=True)]
    for name, p_value, corrected in zip(class_names, p_values, holm(p_values), strict=True):
        per_class[name] |= {"p_value": p_value, "p_value_holm": corrected}
    return {
        "n": a.num_rows,
        "figures": compared,
        "mcnemar": _mcnemar(a.correct, b.correct),
        "per_class": per_class,
    }


def _mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> dict[str, Any]:
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    return {"only_a_correct": only_a, "only_b_correct": only_b, "p_value": _mcnemar_p(only_a, only_b)}


def _mcnemar_p(only_a: int, only_b: int) -> float:
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Corrected for their number: to call those below 5 % true is wrong in 5 % of such families at most.

    Source: Holm 1979. None, what was not tested, stays.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[i] = largest
    return corrected


def _difference(a: float, b: float, samples: np.ndarray, num_answers: float) -> dict[str, Any]:
    """One line of the comparison; num_answers: whose share a and b are as sure as, 0 for what is no share."""
    if np.isnan(a) or np.isnan(b):
        known = {name: None if np.isnan(value) else float(value) for name, value in (("a", a), ("b", b))}
        return {**known, "difference": None, "interval_95": None}
    difference = float(b - a)
    interval = bootstrap_interval(samples, difference)
    if num_answers and not samples[~np.isnan(samples)].any():
        # They agree on all rows, and so on all resampled ones; elsewhere they may differ as often as 0 of n allows.
        _, most = wilson_interval(0, num_answers)
        interval = [-most, most]
    return {"a": float(a), "b": float(b), "difference": difference, "interval_95": interval}
