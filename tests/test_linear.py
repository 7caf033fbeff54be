"""fit-linear: test rows choose nothing, figures come from rows that chose nothing."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from probe.config import FitLinearConfig
from probe.errors import ConfigError, InputError
from probe.linear import PENALTIES, apply_scaling, check_finite, describe, feature_scaling, fit_arrays
from probe.splits import resolve_splits

NAMES = ("ant", "bee", "cat")


def config(**options):
    return FitLinearConfig(cache="cache", out="run", **options)


def problem(num_classes=3, seed=0, num_examples=120, width=6, num_test=30, num_val=0):
    """Overlapping classes far from the origin, one feature constant; the last rows are the test split."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_examples) % num_classes
    embeddings = rng.normal(size=(num_examples, width)) + 5
    embeddings[:, 1] += 1.5 * labels
    embeddings[:, 2] *= 100
    embeddings[:, 3] = 7
    parts = np.array(["train"] * num_examples, dtype=object)
    parts[num_examples - num_test :] = "test"
    parts[:num_val] = "val"
    splits = resolve_splits(
        labels, parts.astype(str), class_names=NAMES[:num_classes], val_fraction=0.2, seed=0
    )
    return embeddings.astype(np.float32), labels, splits


@pytest.mark.parametrize("num_classes", [2, 3])
def test_metrics_are_those_of_the_saved_head(num_classes):
    embeddings, labels, splits = problem(num_classes)
    fitted, metrics = fit_arrays(config(), embeddings, labels, splits, NAMES[:num_classes])
    outputs = np.asarray(fitted.head.apply(embeddings[splits.test]))
    predicted = outputs.argmax(axis=1) if num_classes > 2 else (outputs[:, 0] > 0).astype(int)
    assert metrics["splits"]["test"]["accuracy"] == pytest.approx(np.mean(predicted == labels[splits.test]))
    assert {name: figures["n"] for name, figures in metrics["splits"].items()} == {
        "train": len(splits.train),
        "val": len(splits.val),
        "test": 30,
    }
    assert metrics["solution"]["converged"]
    share = metrics["penalty"] * 90 / len(splits.train)
    assert np.isclose(share, PENALTIES).any()
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert not fitted.head.params["kernel"][3].any()  # the constant feature


def test_the_refitted_head_is_scikit_learns_at_the_same_c():
    embeddings, labels, splits = problem(3)
    fitted, metrics = fit_arrays(config(), embeddings, labels, splits, NAMES)
    rows = np.sort(np.concatenate([splits.train, splits.val]))
    features = apply_scaling(embeddings, *feature_scaling(embeddings[rows], "standard"))
    reference = LogisticRegression(C=metrics["C"], tol=1e-7, solver="newton-cholesky")
    reference.fit(features[rows], labels[rows])
    expected = reference.decision_function(features)
    ours = np.asarray(fitted.head.apply(embeddings))
    # float32 weights on raw embeddings of order 300, and two solvers' tolerances
    np.testing.assert_allclose(
        ours - ours.mean(axis=1, keepdims=True), expected - expected.mean(axis=1, keepdims=True), atol=2e-3
    )


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("num_val", [0, 30])
def test_test_rows_choose_nothing(head, num_val):
    embeddings, labels, splits = problem(num_val=num_val)
    changed, other = embeddings.copy(), labels.copy()
    changed[splits.test] = 1e3
    other[splits.test] = 0
    options = config(head=head, hidden=(4,), epochs=3)
    first, metrics = fit_arrays(options, embeddings, labels, splits, NAMES)
    second, metrics_of_other = fit_arrays(options, changed, other, splits, NAMES)
    assert str(first.head.params) == str(second.head.params)
    np.testing.assert_array_equal(first.val_logits, second.val_logits)
    for result in (metrics, metrics_of_other):
        result["splits"].pop("test")
        result.pop("baseline")
        for epoch in result.get("history", []):
            epoch.pop("seconds")
    assert metrics == metrics_of_other


def test_the_validation_figure_is_of_heads_that_train_alone_gave():
    """Labels of pure noise: the best of 17 heads looks better than chance on the rows that picked it."""
    gaps = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        embeddings, labels = rng.normal(size=(60, 30)).astype(np.float32), rng.permutation(np.arange(60) % 2)
        parts = np.where(np.arange(60) < 40, "val", "train")
        splits = resolve_splits(labels, parts, class_names=NAMES[:2], val_fraction=0.2, seed=0)
        _, metrics = fit_arrays(config(), embeddings, labels, splits, NAMES[:2])
        best = max(point["accuracy"] for point in metrics["curve"])
        gaps.append(best - metrics["splits"]["val"]["accuracy"])
    assert np.mean(gaps) > 0


def test_no_refit_keeps_the_head_of_train_alone():
    embeddings, labels, splits = problem()
    fitted, metrics = fit_arrays(config(no_refit=True), embeddings, labels, splits, NAMES)
    embeddings[splits.val] += 1
    other, _ = fit_arrays(config(no_refit=True), embeddings, labels, splits, NAMES)
    assert metrics["fitted_on"] == "train"
    assert metrics["penalty"] in PENALTIES
    assert set(fitted.head.params) == set(other.head.params)
    assert metrics["C"] == pytest.approx(1 / (metrics["penalty"] * len(splits.train)))


def test_both_solvers_choose_and_reach_the_same():
    embeddings, labels, splits = problem(3)
    ours, theirs = (
        fit_arrays(config(solver=solver), embeddings, labels, splits, NAMES)[1]
        for solver in ("lbfgs", "sklearn")
    )
    assert ours["penalty"] == theirs["penalty"]
    assert ours["solution"]["objective"] == pytest.approx(theirs["solution"]["objective"], rel=1e-9)
    assert ours["splits"]["test"]["nll"] == pytest.approx(theirs["splits"]["test"]["nll"], rel=1e-4)


def test_head_of_several_layers_learns_what_no_line_separates():
    rng = np.random.default_rng(0)
    embeddings = rng.uniform(-1, 1, size=(400, 2)).astype(np.float32)
    labels = (embeddings[:, 0] * embeddings[:, 1] > 0).astype(int)
    splits = resolve_splits(
        labels,
        np.where(np.arange(400) < 100, "test", ""),
        class_names=NAMES[:2],
        val_fraction=0.2,
        seed=0,
    )
    options = config(head="mlp", hidden=(32, 16), epochs=30, learning_rate=1e-2)
    fitted, metrics = fit_arrays(options, embeddings, labels, splits, NAMES[:2])
    assert metrics["splits"]["test"]["accuracy"] > 0.9
    assert metrics["baseline"]["accuracy"] < 0.7
    assert fitted.head.hidden == (32, 16)
    assert [epoch["epoch"] for epoch in metrics["history"]] == list(range(1, 31))
    assert f"epoch {metrics['epoch']} of 30" in describe(metrics)


def test_description_has_figures_and_certificate():
    embeddings, labels, splits = problem(3)
    text = describe(fit_arrays(config(), embeddings, labels, splits, NAMES)[1])
    for part in (
        "train",
        "val",
        "test",
        "95 %",
        "scikit-learn",
        "λ",
        "objective",
        "gradient norm",
        "converged",
    ):
        assert part in text


def test_without_a_test_split_the_baseline_is_judged_on_validation():
    embeddings, labels, splits = problem(num_test=0)
    _, metrics = fit_arrays(config(), embeddings, labels, splits, NAMES)
    assert set(metrics["splits"]) == {"train", "val"}
    assert metrics["baseline"]["split"] == "val"
    assert "val" in describe(metrics)


def test_embeddings_that_are_not_finite_are_named():
    embeddings = np.zeros((9, 2), np.float32)
    embeddings[:7, 1] = [np.nan, np.inf, 0, -np.inf, np.nan, np.nan, np.nan]
    with pytest.raises(InputError, match=r"6 embeddings are not finite: 0\.png, 1\.png.* and 1 more\."):
        check_finite(embeddings, [b"%d.png" % row for row in range(9)])


@pytest.mark.parametrize("options", [{"hidden": (0,)}, {"head": "mlp", "hidden": ()}, {"val_fraction": 1.0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match="--"):
        config(**options)
