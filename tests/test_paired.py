"""Paired differences: resampled together, exact where chance can be counted, and honest where nothing differs."""

import numpy as np
import pytest
from scipy import stats

from probe.evaluation.figures import Figures
from probe.evaluation.intervals import bootstrap_interval, wilson_interval
from probe.evaluation.paired import compare_answers, holm
from probe.training import verdict

CLASSES = ("cat", "dog", "owl")


def pair(num_rows, skills=(1.0, 1.0), seed=0, num_classes=3):
    """Logits of two classifiers whose errors have nothing to do with each other, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    one_hot = np.eye(num_classes)[labels]
    return *(rng.normal(size=one_hot.shape) + skill * one_hot for skill in skills), labels


def test_differences_are_those_of_the_same_resampled_rows():
    a, b, labels = pair(80, skills=(1, 2))
    compared = compare_answers(a, b, labels, CLASSES)["figures"]
    rng = np.random.default_rng(1)
    samples = []
    for _ in range(1000):
        rows = rng.integers(0, 80, 80)
        point_a, point_b = (Figures.of(logits[rows], labels[rows]).point() for logits in (a, b))
        samples.append({name: point_b[name] - point_a[name] for name in point_a})
    for name, line in compared.items():
        by_hand = bootstrap_interval(np.array([sample[name] for sample in samples]), line["difference"])
        assert line["interval_95"] == pytest.approx(by_hand, abs=0.2 * (by_hand[1] - by_hand[0])), name


def test_mcnemar_is_the_exact_one():
    # 8 against 2: 2 (C(10, 0) + C(10, 1) + C(10, 2)) / 2^10
    labels = np.zeros(30, int)
    right, wrong = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    a = np.array([right] * 20 + [wrong] * 8 + [right] * 2)
    b = np.array([right] * 20 + [right] * 8 + [wrong] * 2)
    test = compare_answers(a, b, labels, CLASSES[:2])["mcnemar"]
    assert test == {"only_a_correct": 2, "only_b_correct": 8, "p_value": pytest.approx(2 * (1 + 10 + 45) / 1024)}


def test_useless_differences_are_seldom_called_differences():
    """Equal skill: at 95 %, about one comparison in twenty says otherwise. Of accuracy, `test_intervals` has it."""
    verdicts = {"nll": 0, "macro_f1": 0}
    p_values = []
    for seed in range(60):
        compared = compare_answers(*pair(80, seed=seed), CLASSES)
        p_values.append(compared["mcnemar"]["p_value"])
        for name in verdicts:
            low, high = compared["figures"][name]["interval_95"]
            verdicts[name] += not low <= 0 <= high
    # 60 draws at 5 %: more than 8 come up in 2 of 1,000 such sets
    assert stats.binom.sf(8, 60, 0.05) < 0.01
    assert max(verdicts.values()) <= 8
    assert np.mean(np.array(p_values) < 0.05) <= 8 / 60


@pytest.mark.parametrize("skill", [1.0, 1.3, 2.0])
def test_the_verdict_on_a_fine_tuning_is_that_of_the_comparison(skill):
    a, b, labels = pair(120, skills=(1, skill))
    found = verdict.compare(a, b, labels)
    line = compare_answers(a, b, labels, CLASSES)["figures"]["accuracy"]
    assert found["accuracy_difference_interval_95"] == line["interval_95"]
    assert found["accuracy_difference"] == pytest.approx(line["difference"])


def test_true_differences_are_seen():
    compared = compare_answers(*pair(300, skills=(1, 3)), CLASSES)
    assert compared["figures"]["accuracy"]["interval_95"][0] > 0
    assert compared["figures"]["nll"]["interval_95"][1] < 0
    assert compared["mcnemar"]["p_value"] < 1e-3


def test_two_that_agree_everywhere_may_still_differ_elsewhere():
    a, _, labels = pair(50)
    compared = compare_answers(a, 2 * a, labels, CLASSES)
    low, most = compared["figures"]["accuracy"]["interval_95"]
    assert -low == most == pytest.approx(wilson_interval(0, 50)[1], rel=0.3)  # two ways to say of 0 in 50 how few
    assert compared["figures"]["macro_f1"]["interval_95"][1] > most  # the rarest class is rarer than a third
    assert compared["figures"]["nll"]["difference"] != 0
    of_class = compared["per_class"]["cat"]
    most = wilson_interval(0, of_class["n"])[1]
    assert of_class["interval_95"] == [-most, most]


def test_what_the_rows_cannot_say_is_none():
    a, b, labels = pair(40)
    compared = compare_answers(a, b, np.where(labels == 2, 0, labels), CLASSES)
    unknown = ("accuracy_a", "accuracy_b", "difference", "interval_95", "p_value", "p_value_holm")
    assert compared["per_class"]["owl"] == {"n": 0} | dict.fromkeys(unknown)
    alone = compare_answers(a[:, :2], b[:, :2], np.zeros(40, int), CLASSES[:2])
    assert alone["figures"]["roc_auc"] == {"a": None, "b": None, "difference": None, "interval_95": None}


def test_sets_of_labels_are_asked_class_by_class():
    rng = np.random.default_rng(0)
    labels = rng.random((60, 3)) < 0.5
    a, b = (rng.normal(size=(60, 3)) + skill * (2.0 * labels - 1) for skill in (0, 2))
    compared = compare_answers(a, b, labels, CLASSES)
    for c, name in enumerate(CLASSES):
        line = compared["per_class"][name]
        assert line["n"] == 60
        assert line["accuracy_a"] == pytest.approx(((a[:, c] >= 0) == labels[:, c]).mean())
        low, high = line["interval_95"]
        assert 0 < low <= line["difference"] <= high


def test_classes_are_tested_as_the_family_that_they_are():
    """Equal skill in 30 classes: by itself some class differs in most comparisons, corrected in one of twenty."""
    names = tuple(map(str, range(30)))
    alone = corrected = 0
    for seed in range(20):
        per_class = compare_answers(*pair(1500, seed=seed, num_classes=30), names)["per_class"].values()
        alone += any(facts["p_value"] < 0.05 for facts in per_class)
        corrected += any(facts["p_value_holm"] < 0.05 for facts in per_class)
        assert all(facts["p_value"] <= facts["p_value_holm"] <= 1 for facts in per_class)
    assert alone >= 8
    assert corrected <= 4  # 5 of 20 come up in 3 of 1,000 such sets


def test_holms_correction_is_the_published_one():
    assert holm([0.01, 0.04, 0.03, None, 0.005]) == pytest.approx([0.03, 0.06, 0.06, None, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_a_class_is_tested_by_its_own_rows():
    a, b, labels = pair(90, skills=(1, 2))
    compared = compare_answers(a, b, labels, CLASSES)["per_class"]
    for c, name in enumerate(CLASSES):
        right_a, right_b = (logits[labels == c].argmax(axis=1) == c for logits in (a, b))
        only = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
        assert compared[name]["p_value"] == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)


def test_identical_runs_differ_by_no_more_than_unseen_rows_allow():
    """Of ROC-AUC and average precision too: about as wide as 0 of n misses, n set by the rarest class."""
    a, _, labels = pair(200)
    labels = np.where(np.arange(200) < 10, 2, np.minimum(labels, 1))
    figures = compare_answers(a, a, labels, CLASSES)["figures"]
    for name in ("roc_auc", "average_precision"):
        line = figures[name]
        low, high = line["interval_95"]
        assert line["difference"] == 0
        assert low == -high
        assert wilson_interval(0, 200)[1] < high < wilson_interval(0, 30)[1]
