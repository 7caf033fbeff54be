"""Figures equal scikit-learn's, on the rows themselves and on samples of them."""

import warnings

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn import metrics as reference
from sklearn.preprocessing import label_binarize

from probe.evaluation.figures import Figures


def problem(num_rows, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    logits = rng.normal(size=(num_rows, num_classes))
    logits[np.arange(num_rows), labels] += 1
    logits[: num_rows // 5] = logits[-(num_rows // 5) :]  # the same image twice, perhaps under another label
    return logits, labels


def sets(num_rows, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random((num_rows, num_classes)) < 0.3
    return rng.normal(size=labels.shape) + 2.0 * labels - 1, labels


def by_scikit_learn(logits, labels):
    probabilities = softmax(logits, axis=1)
    predicted = logits.argmax(axis=1)
    num_classes = logits.shape[1]
    one_hot = label_binarize(labels, classes=range(num_classes))
    scores = probabilities[:, 1] if num_classes == 2 else probabilities
    return {
        "accuracy": reference.accuracy_score(labels, predicted),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, predicted),
        "macro_f1": reference.f1_score(labels, predicted, average="macro"),
        "nll": reference.log_loss(labels, probabilities, labels=range(num_classes)),
        "brier": reference.brier_score_loss(labels, scores, labels=range(num_classes)),
        "roc_auc": reference.roc_auc_score(one_hot, scores, average="macro"),
        "average_precision": reference.average_precision_score(one_hot, scores, average="macro"),
    }


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_equal_scikit_learns(num_classes):
    logits, labels = problem(120, num_classes)
    point = Figures.of(logits, labels).point()
    for name, value in by_scikit_learn(logits, labels).items():
        assert point[name] == pytest.approx(value), name


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_samples_figures_are_those_of_the_rows_drawn(num_classes):
    logits, labels = problem(60, num_classes)
    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, 60, 60) for _ in range(5)]
    counts = np.stack([np.bincount(rows, minlength=60) for rows in drawn]).astype(float)
    figures = Figures.of(logits, labels)(counts)
    for i, rows in enumerate(drawn):
        alone = Figures.of(logits[rows], labels[rows]).point()
        assert {name: float(samples[i]) for name, samples in figures.items()} == pytest.approx(alone)
        for name, value in by_scikit_learn(logits[rows], labels[rows]).items():
            assert figures[name][i] == pytest.approx(value), name


def test_sets_of_labels_equal_scikit_learns():
    logits, labels = sets(80, 5)
    probabilities, predicted = expit(logits), logits >= 0
    point = Figures.of(logits, labels).point()
    of_label = range(5)
    expected = {
        "accuracy": reference.accuracy_score(labels, predicted),
        "balanced_accuracy": np.mean(
            [reference.balanced_accuracy_score(labels[:, c], predicted[:, c]) for c in of_label]
        ),
        "macro_f1": reference.f1_score(labels, predicted, average="macro"),
        "nll": sum(reference.log_loss(labels[:, c], probabilities[:, c]) for c in of_label),
        "brier": np.mean([reference.brier_score_loss(labels[:, c], probabilities[:, c]) for c in of_label]),
        "roc_auc": reference.roc_auc_score(labels, probabilities, average="macro"),
        "average_precision": reference.average_precision_score(labels, probabilities, average="macro"),
    }
    assert {name: point[name] for name in expected} == pytest.approx(expected)
    assert 0 < point["expected_calibration_error"] < 1
    rows = np.random.default_rng(1).integers(0, 80, 80)
    sample = Figures.of(logits, labels)(np.bincount(rows, minlength=80)[None].astype(float))
    alone = Figures.of(logits[rows], labels[rows]).point()
    assert {name: float(value[0]) for name, value in sample.items()} == pytest.approx(alone)


def test_top_5_of_more_than_five_classes():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(100, 8)), rng.integers(0, 8, 100)
    point = Figures.of(logits, labels).point()
    expected = reference.top_k_accuracy_score(labels, logits, k=5, labels=range(8))
    assert point["top_5_accuracy"] == pytest.approx(expected)
    assert "top_5_accuracy" not in Figures.of(logits[:, :5], labels % 5).point()


def test_answers_that_say_nothing_are_not_all_in_the_top_5():
    labels = np.arange(100) % 10
    assert Figures.of(np.zeros((100, 10)), labels).point()["top_5_accuracy"] == 0.5
    assert Figures.of(np.zeros((100, 10)), labels).point()["roc_auc"] == 0.5


def test_classes_without_rows_are_left_out_of_averages():
    logits, labels = problem(60, 3)
    wide = np.concatenate([logits, np.full((60, 2), -50.0)], axis=1)
    narrow, same = Figures.of(logits, labels).point(), Figures.of(wide, labels).point()
    assert same == pytest.approx(narrow)


def test_one_class_alone_has_no_ranking():
    logits, _ = problem(10, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        point = Figures.of(logits, np.zeros(10, int)).point()
    assert np.isnan([point["roc_auc"], point["average_precision"]]).all()
    assert point["balanced_accuracy"] == point["accuracy"]


def test_ranking_tells_apart_what_rounds_to_one():
    # Both probabilities are 1.0 in float64; the surer one is the positive
    logits = np.array([[0.0, 50.0], [0.0, 60.0]])
    assert Figures.of(logits, np.array([0, 1])).point()["roc_auc"] == 1


def test_blocks_do_not_matter(monkeypatch):
    logits, labels = problem(50, 6)
    whole = Figures.of(logits, labels).point()
    monkeypatch.setattr("probe.evaluation.figures._BLOCK_ELEMENTS", 40)
    assert Figures.of(logits, labels).point() == whole


def test_an_average_over_classes_is_as_sure_as_its_rarest():
    labels = np.repeat([0, 1], [99, 1])
    figures = Figures.of(np.zeros((100, 2)), labels)
    assert figures.num_answers("accuracy") == 100
    assert figures.num_answers("balanced_accuracy") == pytest.approx(4 / (1 / 99 + 1))
    even = Figures.of(np.zeros((100, 2)), np.arange(100) % 2)
    assert even.num_answers("balanced_accuracy") == pytest.approx(100)
