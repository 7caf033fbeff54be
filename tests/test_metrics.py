"""Metrics: they are the same however rows are batched and padded, and equal to scikit-learn's."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from probe.metrics import Metrics, summarize, wilson_interval

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
    whole = summarize(logits, labels, NAMES)
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
    assert summarize(np.eye(3)[[0, 1]], np.array([0, 1]), NAMES)["per_class"]["c"] == {
        "n": 0,
        "accuracy": None,
    }


def test_a_sure_and_wrong_answer_costs_a_finite_amount():
    assert summarize(np.array([[1e4, 0.0, 0.0]]), np.array([1]), NAMES)["nll"] == pytest.approx(1e4)


def test_wilson_interval():
    # Published values: 0 of 10 and 81 of 263, Newcombe 1998, table I (method 3)
    assert wilson_interval(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)
    assert wilson_interval(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx([0.7225, 1], abs=1e-4)
