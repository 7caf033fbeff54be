"""Metrics are the same however rows are batched and padded; summaries say what these rows can say, with intervals."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from probe.evaluation.intervals import wilson_interval
from probe.evaluation.metrics import Metrics, summarize

NAMES = ("a", "b", "c")


def problem(num_examples, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_examples, 3)).astype(np.float32), rng.integers(0, 3, num_examples)


@settings(max_examples=15, deadline=None)
@given(num_examples=st.integers(1, 20), batch_size=st.sampled_from([4, 7]), seed=st.integers(0, 2**31))
def test_batches_add_up_to_the_whole(num_examples, batch_size, seed):
    logits, labels = problem(num_examples, seed)
    total = None
    for start in range(0, num_examples, batch_size):
        rows = np.arange(start, min(start + batch_size, num_examples))
        padding = batch_size - len(rows)
        sums = Metrics.from_logits(
            jnp.asarray(np.pad(logits[rows], ((0, padding), (0, 0)), constant_values=np.nan)),
            jnp.asarray(np.pad(labels[rows], (0, padding), constant_values=-1)),
            jnp.arange(batch_size) < len(rows),
        )
        total = sums if total is None else total.merge(sums)
    whole = summarize(logits, labels, NAMES, full=False)
    assert int(total.num_examples) == whole["n"] == num_examples
    assert float(total.accuracy) == pytest.approx(whole["accuracy"])
    assert float(total.nll) == pytest.approx(whole["nll"], rel=1e-5)  # float32 sums
    assert total.class_count.tolist() == [whole["per_class"][name]["n"] for name in NAMES]


def test_figures_equal_those_of_scikit_learn():
    logits, labels = problem(50, 0)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    summary = summarize(logits, labels, NAMES)
    assert summary["accuracy"] == pytest.approx(reference.accuracy_score(labels, logits.argmax(axis=1)))
    assert summary["nll"] == pytest.approx(reference.log_loss(labels, probabilities))
    recalls = reference.recall_score(labels, logits.argmax(axis=1), average=None)
    np.testing.assert_allclose([summary["per_class"][name]["accuracy"] for name in NAMES], recalls)


def test_a_class_without_examples_has_no_accuracy():
    summary = summarize(np.eye(3)[[0, 1]], np.array([0, 1]), NAMES)
    assert summary["per_class"]["c"] == {"n": 0, "accuracy": None, "precision": None, "recall": None, "f1": None}


def test_a_sure_and_wrong_answer_costs_a_finite_amount():
    assert summarize(np.array([[1e4, 0.0, 0.0]]), np.array([1]), NAMES)["nll"] == pytest.approx(1e4)


def test_every_figure_has_an_interval_that_contains_it():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 150)
    summary = summarize(rng.normal(size=(150, 7)) + np.eye(7)[labels], labels, [str(c) for c in range(7)])
    names = {name.removesuffix("_interval_95") for name in summary if name.endswith("_interval_95")}
    assert names == {
        *("accuracy", "balanced_accuracy", "macro_f1", "nll", "brier", "expected_calibration_error"),
        *("top_5_accuracy", "roc_auc", "average_precision"),
    }
    for name in names:
        low, high = summary[f"{name}_interval_95"]
        assert low < summary[name] < high or name == "expected_calibration_error"
        assert low <= summary[name] <= high
    assert summary == json.loads(json.dumps(summary, allow_nan=False))


def test_intervals_narrow_as_rows_are_added():
    logits, labels = problem(4000, 0)
    few, many = (summarize(logits[:n], labels[:n], NAMES) for n in (250, 4000))
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "nll", "brier", "roc_auc", "average_precision"):
        width = [np.diff(summary[f"{name}_interval_95"])[0] for summary in (few, many)]
        assert width[1] == pytest.approx(width[0] / 4, rel=0.3)


def test_all_right_is_not_certain():
    summary = summarize(9 * np.eye(3)[np.arange(30) % 3], np.arange(30) % 3, NAMES)
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "average_precision"):
        assert summary[name] == 1
        assert summary[f"{name}_interval_95"] == pytest.approx(wilson_interval(30, 30))
    assert summarize(np.eye(2), np.array([1, 0]), NAMES[:2])["accuracy_interval_95"] == wilson_interval(0, 2)


def test_one_row_says_little():
    summary = summarize(np.array([[1.0, 0.0]]), np.array([0]), NAMES[:2])
    assert summary["accuracy_interval_95"] == wilson_interval(1, 1)
    assert summary["nll_interval_95"] is None
    assert summary["roc_auc"] is None
    assert summary["roc_auc_interval_95"] is None


def test_confusions_and_hits_are_the_confusion_matrix():
    logits, labels = problem(60, 1)
    summary = summarize(logits, labels, NAMES)
    matrix = np.zeros((3, 3), int)
    for cell in summary["confusions"]:
        matrix[NAMES.index(cell["label"]), NAMES.index(cell["predicted"])] = cell["n"]
    for c, facts in enumerate(summary["per_class"].values()):
        matrix[c, c] = round(facts["accuracy"] * facts["n"])
    np.testing.assert_array_equal(matrix, reference.confusion_matrix(labels, logits.argmax(axis=1)))
    counts = [cell["n"] for cell in summary["confusions"]]
    assert counts == sorted(counts, reverse=True)


def test_per_class_figures_equal_those_of_scikit_learn():
    logits, labels = problem(60, 1)
    per_class = summarize(logits, labels, NAMES, full=False)["per_class"]
    theirs = reference.precision_recall_fscore_support(labels, logits.argmax(axis=1))
    for figure, values in zip(("precision", "recall", "f1", "n"), theirs, strict=True):
        np.testing.assert_allclose([per_class[name][figure] for name in NAMES], values)


def test_sets_of_labels():
    rng = np.random.default_rng(0)
    labels = rng.random((90, 3)) < 0.4
    logits = rng.normal(size=(90, 3)) + 2.0 * labels - 1
    summary = summarize(logits, labels, NAMES)
    assert summary["n"] == 90
    assert "confusions" not in summary
    for c, name in enumerate(NAMES):
        assert summary["per_class"][name]["n"] == labels[:, c].sum()
        right = (logits[:, c] >= 0) == labels[:, c]
        assert summary["per_class"][name]["accuracy"] == pytest.approx(right.mean())
    low, high = summary["average_precision_interval_95"]
    assert low < summary["average_precision"] < high


def test_a_brief_summary_has_the_same_figures_without_the_slow_ones():
    logits, labels = problem(60, 1)
    full, brief = summarize(logits, labels, NAMES), summarize(logits, labels, NAMES, full=False)
    assert set(full) - set(brief) == {"roc_auc", "average_precision"} | {
        name for name in full if name.endswith("interval_95") and name != "accuracy_interval_95"
    }
    assert brief == {name: full[name] for name in brief}


def test_the_same_seed_gives_the_same_intervals():
    logits, labels = problem(60, 1)
    assert summarize(logits, labels, NAMES, seed=1) == summarize(logits, labels, NAMES, seed=1)
    assert summarize(logits, labels, NAMES, seed=1) != summarize(logits, labels, NAMES, seed=2)


def test_many_classes_take_seconds():
    """A thousand samples of 4,000 rows and 400 classes; one at a time scikit-learn would need minutes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 400, 4000)
    start = time.perf_counter()
    summary = summarize(rng.normal(size=(4000, 400)) + 3 * np.eye(400)[labels], labels, range(400))
    assert time.perf_counter() - start < 60  # measured: 1 s; 4 s for 10,000 rows and 1,000 classes
    assert summary["roc_auc_interval_95"][0] < summary["roc_auc"] < summary["roc_auc_interval_95"][1]
