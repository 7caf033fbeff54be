"""fit-linear: test rows choose nothing, figures come from rows that chose nothing, and traps of other programs."""

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge

from probe import probing
from probe.cache import write_cache
from probe.config import FitLinearConfig
from probe.errors import ConfigError, InputError, NumericalError
from probe.evaluation import predictions
from probe.evaluation.calibration import fit_temperature
from probe.evaluation.choice import score
from probe.heads import class_logits
from probe.linear import apply_head, check_finite, describe, fit_data, fit_linear, make_data
from probe.probing.curve import Curve, RowScores, beyond
from probe.probing.ridge import Ridge
from probe.probing.scaling import Scaling
from probe.probing.solver import Problem

NAMES = ("ant", "bee", "cat")
SHORT = (1.0, 0.1, 0.01)  # a grid of three


def config(**options):
    return FitLinearConfig(cache="cache", out="run", **options)


def arrays(num_classes=3, seed=0, num_rows=120, width=6, num_test=30, num_val=0):
    """Overlapping classes far from the origin, one feature constant; the last rows are the test split."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % num_classes
    embeddings = rng.normal(size=(num_rows, width)) + 5
    embeddings[:, 1] += 1.5 * labels
    embeddings[:, 2] *= 100
    embeddings[:, 3] = 7
    splits = np.full(num_rows, "train", "<U5")
    splits[num_rows - num_test :] = "test"
    splits[:num_val] = "val"
    return embeddings.astype(np.float32), labels, splits


def run(options, embeddings, labels, splits, groups=None):
    views = embeddings if isinstance(embeddings, dict) else {"pooler": embeddings}
    num_classes = labels.shape[1] if labels.ndim == 2 else labels.max() + 1
    data, notes = make_data(options, views, labels, splits, groups, NAMES[:num_classes])
    return (data, *fit_data(options, data, notes))


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("num_val", [0, 30])
def test_metrics_are_those_of_the_saved_head(num_classes, num_val):
    data, fitted, metrics = run(config(), *arrays(num_classes, num_val=num_val))
    outputs = np.asarray(fitted.head.apply(data.embeddings["pooler"][data.splits.test]))
    predicted = outputs.argmax(axis=1) if num_classes > 2 else (outputs[:, 0] > 0).astype(int)
    assert metrics["splits"]["test"]["accuracy"] == pytest.approx(np.mean(predicted == data.labels[data.splits.test]))
    sizes = {name: figures["n"] for name, figures in metrics["splits"].items()}
    assert sizes == {"train": 90 - num_val, "val": num_val or 90, "test": 30}
    assert metrics["solution"]["converged"]
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert not fitted.head.params["kernel"][3].any()  # the constant feature
    assert fitted.out_of_fold.shape == (90 - num_val, num_classes)
    assert np.isfinite(fitted.out_of_fold).all()


@pytest.mark.parametrize("num_val", [0, 30])
@pytest.mark.parametrize("solver", ["lbfgs", "sklearn"])
def test_the_refitted_head_is_scikit_learns_at_the_same_c(num_val, solver):
    data, fitted, metrics = run(config(solver=solver), *arrays(3, num_val=num_val))
    assert_is_scikit_learns(data, fitted, metrics, np.concatenate([data.splits.train, data.splits.val]))


def assert_is_scikit_learns(data, fitted, metrics, rows):
    """The saved head is that of LogisticRegression, fitted on these rows at the same C, up to its temperature."""
    embeddings = data.embeddings["pooler"]
    features = Scaling.of(embeddings[rows], "standard").apply(embeddings)
    reference = LogisticRegression(C=metrics["C"], tol=1e-7, solver="newton-cholesky")
    reference.fit(features[rows], data.labels[rows])
    expected = reference.decision_function(features)
    ours = np.asarray(fitted.head.apply(embeddings)) * metrics["temperature"]
    # float32 weights on raw embeddings of order 300, and two solvers' tolerances
    centred = ours - ours.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred, expected - expected.mean(axis=1, keepdims=True), atol=3e-3)


def test_out_of_fold_logits_are_those_of_fits_without_the_fold():
    for num_val in (0, 30):
        options = config(penalties=(0.01,))
        data, fitted, metrics = run(options, *arrays(3, num_val=num_val))
        train = data.splits.train
        for fold in range(5):
            rest, held = train[data.folds[train] != fold], train[data.folds[train] == fold]
            features = Scaling.of(data.embeddings["pooler"][rest], "standard").apply(data.embeddings["pooler"])
            reference = LogisticRegression(C=metrics["C"], tol=1e-7, solver="newton-cholesky")
            expected = reference.fit(features[rest], data.labels[rest]).decision_function(features[held])
            ours = fitted.out_of_fold[data.folds[train] == fold]
            ours = ours - ours.mean(axis=1, keepdims=True)
            # the path's tolerance of 1e-5 of the objective allows logits to differ by some hundredths
            np.testing.assert_allclose(ours, expected - expected.mean(axis=1, keepdims=True), atol=0.12)


@pytest.mark.parametrize(
    "options",
    [
        {"head": "linear", "views": ("pooler", "projected"), "scalings": ("standard", "l2"), "penalties": SHORT},
        {"class_weights": ("balanced",), "one_standard_error": True, "penalties": SHORT},
        {"several_labels": True, "penalties": SHORT},
        {"head": "linear", "solver": "ridge"},
        {"head": "knn"},
        {"head": "mlp", "hidden": (4,), "epochs": 3},
    ],
    ids=["linear", "weighted", "several labels", "ridge", "knn", "mlp"],
)
@pytest.mark.parametrize("num_val", [0, 30])
def test_test_rows_choose_nothing(options, num_val):
    embeddings, labels, splits = arrays(num_val=num_val)
    options = dict(options)
    if options.pop("several_labels", False):
        labels = np.stack([labels == 0, labels > 0, embeddings[:, 0] > 5], axis=1)
    is_test = splits == "test"
    changed, other = embeddings.copy(), labels.copy()
    changed[is_test] = 1e3
    other[is_test] = 0
    results = []
    for values, targets in ((embeddings, labels), (changed, other)):
        views = {"pooler": values, "projected": values[:, :4] ** 2}
        views = {view: views[view] for view in options.get("views", ("pooler",))}
        _, fitted, metrics = run(config(**options), views, targets, splits)
        metrics["splits"].pop("test")
        metrics.pop("baseline", None)
        for epoch in metrics.get("history", []):
            epoch.pop("seconds")
        results.append((fitted, metrics))
    (first, metrics), (second, metrics_of_other) = results
    assert str(first.head.params) == str(second.head.params)
    np.testing.assert_array_equal(first.val_logits, second.val_logits)
    assert metrics == metrics_of_other


def test_the_figure_of_validation_is_not_the_best_of_many():
    """Labels of pure noise: the best of 17 heads looks better than chance on the rows that picked it."""
    for num_val in (0, 40):
        gaps = []
        for seed in range(4):
            rng = np.random.default_rng(seed)
            embeddings, labels = rng.normal(size=(60, 6)).astype(np.float32), rng.permutation(np.arange(60) % 2)
            splits = np.where(np.arange(60) < num_val, "val", "train")
            _, _, metrics = run(config(), embeddings, labels, splits)
            best = max(point["accuracy"] for point in metrics["curves"][0]["points"])
            gaps.append(best - metrics["splits"]["val"]["accuracy"])
        assert np.mean(gaps) > 0


def test_no_refit_keeps_the_head_of_train_alone():
    embeddings, labels, splits = arrays(num_val=30)
    _, fitted, metrics = run(config(no_refit=True, penalties=(0.01,)), embeddings, labels, splits)
    embeddings[splits == "val"] += 1
    _, other, metrics_of_other = run(config(no_refit=True, penalties=(0.01,)), embeddings, labels, splits)
    assert metrics["fitted_on"] == "train"
    assert metrics["C"] == pytest.approx(1 / (metrics["penalty"] * 60))
    # two starts, one optimum; the temperatures are of logits within the path's tolerance
    uncalibrated = [
        f.head.params["kernel"] * m["temperature"] for f, m in ((fitted, metrics), (other, metrics_of_other))
    ]
    np.testing.assert_allclose(*uncalibrated, atol=1e-4)


def test_c_is_held_when_validation_joins_train():
    _, _, alone = run(config(no_refit=True, penalties=(0.01,)), *arrays(num_val=30))
    _, _, joined = run(config(penalties=(0.01,)), *arrays(num_val=30))
    assert joined["C"] == pytest.approx(alone["C"])
    assert joined["penalty"] == pytest.approx(alone["penalty"] * 60 / 90)


def test_views_and_scalings_are_chosen_on_validation():
    embeddings, labels, splits = arrays()
    noise = np.random.default_rng(1).normal(size=(120, 5)).astype(np.float32)
    options = config(views=("pooler", "projected"), scalings=("none", "l2"), penalties=SHORT)
    _, fitted, metrics = run(options, {"pooler": noise, "projected": embeddings}, labels, splits)
    assert fitted.view == metrics["view"] == "projected"
    assert [(c["view"], c["scaling"]) for c in metrics["curves"]] == [
        (view, scaling) for view in ("pooler", "projected") for scaling in ("none", "l2")
    ]


def test_rows_of_norm_1_are_part_of_the_saved_head():
    data, fitted, _ = run(config(scalings=("l2",)), *arrays())
    embeddings = data.embeddings["pooler"]
    np.testing.assert_allclose(fitted.head.apply(embeddings), fitted.head.apply(embeddings * 7), atol=1e-3)


def test_class_weights_are_those_of_scikit_learn():
    embeddings, labels, splits = arrays()
    labels = np.where(np.arange(120) % 4 > 0, 0, labels)  # one class has three rows of four and more
    labels[:2] = 1, 2
    for weights, theirs in ((("balanced",), "balanced"), (("bee=3", "cat=5e-1"), {0: 1, 1: 3, 2: 0.5})):
        data, fitted, metrics = run(config(class_weights=weights), embeddings, labels, splits)
        train = data.splits.train
        features = Scaling.of(embeddings[train], "standard").apply(embeddings)
        counts = np.bincount(labels[train])
        by_class = np.array([theirs[c] for c in range(3)]) if isinstance(theirs, dict) else len(train) / 3 / counts
        c = metrics["C"]
        assert c == pytest.approx(1 / (metrics["penalty"] * by_class[labels[train]].sum()))
        reference = LogisticRegression(C=c, tol=1e-7, solver="newton-cholesky", class_weight=theirs)
        expected = reference.fit(features[train], labels[train]).decision_function(features)
        ours = np.asarray(fitted.head.apply(embeddings)) * metrics["temperature"]
        np.testing.assert_allclose(
            ours - ours.mean(axis=1, keepdims=True), expected - expected.mean(axis=1, keepdims=True), atol=3e-3
        )


def test_rows_without_a_label_are_noted():
    embeddings, labels, splits = arrays()
    labels[[0, 1, 119]] = -1
    data, notes = make_data(config(), {"pooler": embeddings}, labels, splits, None, NAMES)
    assert notes == ["3 rows without a label are left out"]
    assert len(data.splits.train) == 88


def test_rows_with_several_labels_that_are_never_left_out_are_noted():
    embeddings, labels, splits = arrays()
    sets = np.stack([labels == 0, labels > 0, np.arange(120) == 7], axis=1)
    _, notes = make_data(config(), {"pooler": embeddings}, sets, splits, None, NAMES)
    assert notes[-1].endswith("never left out, so that no fold is without their class: 1 in all")


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_rows_with_several_labels(solver):
    embeddings, labels, splits = arrays()
    sets = np.stack([labels == 0, labels > 0, embeddings[:, 0] > 5], axis=1)
    for num_val in (0, 30):
        splits[:30] = "val" if num_val else "train"
        data, fitted, metrics = run(config(solver=solver), embeddings, sets, splits)
        assert solver == "ridge" or metrics["solution"]["converged"]
        assert metrics["splits"]["val"]["n"] == (num_val or 90)
        assert fitted.head.params["kernel"].shape == (6, 3)
        test = data.splits.test
        right = ((apply_head(fitted, data, test) > 0) == sets[test]).mean()
        assert right > 0.8
        assert fitted.out_of_fold.shape == (len(data.splits.train), 3)
        points = metrics["curves"][0]["points"]  # of labels, where metrics["splits"] counts rows that are all right
        assert max(point["label_accuracy"] for point in points) > 0.8
        assert not any("accuracy" in point for point in points)
        assert "baseline" not in metrics
        assert describe(metrics)


@settings(max_examples=25, deadline=None)
@given(
    weighted=st.booleans(),
    several=st.booleans(),
    penalty=st.floats(-8, 2),
    num_rows=st.integers(4, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_ridge_and_its_leave_one_out_are_scikit_learns(weighted, several, penalty, num_rows, seed):
    """All rows, and all but each row, by fits of their own."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_rows, 5)) + 1
    targets = rng.random((num_rows, 3)) < 0.5 if several else np.eye(3)[rng.integers(0, 3, num_rows)]
    weights = rng.uniform(0.1, 3, num_rows) if weighted else np.ones(num_rows)
    ridge = Ridge(features, targets.astype(float), weights)
    reference = SklearnRidge(alpha=10.0**penalty * weights.sum(), solver="svd")  # C is held, as the sum of weights is
    kernel, bias = ridge.head(10.0**penalty)
    reference.fit(features, targets, sample_weight=weights)
    np.testing.assert_allclose(features @ kernel + bias, reference.predict(features), atol=1e-6)
    answers = ridge.left_out(10.0**penalty)
    for row in range(num_rows):
        rest = np.arange(num_rows) != row
        reference.fit(features[rest], targets[rest], sample_weight=weights[rest])
        # Without the row few rows may determine the fit barely: what then differs is divided by λ
        np.testing.assert_allclose(answers[row], reference.predict(features[row : row + 1])[0], rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(penalty=st.floats(-6, 2), largest=st.integers(1, 12), weighted=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_ridge_leaves_out_groups_whole(penalty, largest, weighted, seed):
    """As fits without the group do; groups of more rows than features too."""
    rng = np.random.default_rng(seed)
    groups = np.array([0] * largest + [1, 2, 2, 1, 3, 4, 4, 4, 1, 5])
    features, targets = rng.normal(size=(len(groups), 4)) + 1, np.eye(3)[rng.integers(0, 3, len(groups))]
    weights = rng.uniform(0.1, 3, len(groups)) if weighted else np.ones(len(groups))
    answers = Ridge(features, targets, weights, groups).left_out(10.0**penalty)
    for group in np.unique(groups):
        rest = groups != group
        reference = SklearnRidge(alpha=10.0**penalty * weights.sum(), solver="svd")
        reference.fit(features[rest], targets[rest], sample_weight=weights[rest])
        np.testing.assert_allclose(answers[~rest], reference.predict(features[~rest]), rtol=1e-4, atol=1e-4)


GROUPED = [{"penalties": (0.01,), "shots": (8,), "seeds": 1}, {"solver": "ridge"}, {"head": "knn"}]


@pytest.mark.parametrize("options", GROUPED, ids=["lbfgs", "ridge", "knn"])
def test_no_row_is_vouched_for_by_its_group(options):
    """Three views of each thing, and labels of pure noise: whoever sees the other two knows the third."""
    rng = np.random.default_rng(0)
    things = np.repeat(np.arange(60), 3)
    embeddings = (rng.normal(size=(60, 80))[things] + 0.01 * rng.normal(size=(180, 80))).astype(np.float32)
    labels = rng.permutation(np.arange(60) % 2)[things]
    splits, groups = np.where(np.arange(180) < 150, "train", "test"), np.char.add("thing ", things.astype(str))
    _, fitted, metrics = run(config(**options), embeddings, labels, splits, groups)
    assert metrics["splits"]["val"]["accuracy"] < 0.7
    assert (fitted.out_of_fold.argmax(axis=1) == labels[:150]).mean() < 0.7


@pytest.mark.parametrize("options", GROUPED[1:], ids=["ridge", "knn"])
def test_one_group_of_all_rows_leaves_nothing_to_judge_by(options):
    embeddings, labels, splits = arrays(num_val=30)
    with pytest.raises(InputError, match="all 60 training rows are one group"):
        run(config(**options), embeddings, labels, splits, np.where(splits == "train", "one", ""))


def test_ridge_heeds_class_weights():
    embeddings, labels, splits = arrays(num_val=30)
    shares = []
    for weight in ("0.2", "5"):
        options = config(solver="ridge", class_weights=(f"bee={weight}",), penalties=SHORT)
        data, fitted, metrics = run(options, embeddings, labels, splits)
        shares.append((apply_head(fitted, data, data.splits.test).argmax(axis=1) == 1).mean())
        assert metrics["fitted_on"] == "train + val"
    assert shares[0] < shares[1]


@pytest.mark.parametrize("num_val", [0, 30])
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("options", [{"solver": "ridge"}, {"head": "knn"}], ids=["ridge", "knn"])
def test_ridge_and_neighbours_learn(options, num_classes, num_val):
    data, fitted, metrics = run(config(**options), *arrays(num_classes, num_val=num_val))
    outputs = 1 if num_classes == 2 else num_classes
    assert fitted.head.apply(data.embeddings["pooler"][:2]).shape == (2, outputs)
    floor = 0.5 if options.get("head") else 0.7  # neighbours look at the feature of scale 100 alone
    assert metrics["splits"]["test"]["accuracy"] > floor - 0.2
    assert fitted.out_of_fold.shape == (90 - num_val, num_classes)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert describe(metrics)


def test_neighbours_vote_by_cosine():
    from probe.heads import neighbour_logits

    rng = np.random.default_rng(0)
    bank = rng.normal(size=(30, 4)).astype(np.float32)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    labels = np.arange(30) % 3
    logits = np.asarray(neighbour_logits(bank, bank, labels, 3, 5, 0.07, groups=np.arange(30)))
    cosines = bank @ bank.T
    np.fill_diagonal(cosines, -np.inf)
    for row in range(30):
        nearest = np.argsort(-cosines[row])[:5]
        votes = np.exp(cosines[row, nearest] / 0.07)
        shares = np.array([votes[labels[nearest] == c].sum() for c in range(3)]) / votes.sum()
        np.testing.assert_allclose(np.exp(logits[row]), (5 * shares + 1 / 3) / 6, rtol=1e-4)


def test_head_of_several_layers_learns_what_no_line_separates():
    rng = np.random.default_rng(0)
    embeddings = rng.uniform(-1, 1, size=(400, 2)).astype(np.float32)
    labels = (embeddings[:, 0] * embeddings[:, 1] > 0).astype(int)
    options = config(head="mlp", hidden=(32, 16), epochs=30, learning_rate=1e-2)
    _, fitted, metrics = run(options, embeddings, labels, np.where(np.arange(400) < 100, "test", ""))
    assert metrics["splits"]["test"]["accuracy"] > 0.9
    assert metrics["baseline"]["accuracy"] < 0.7
    assert fitted.head.hidden == (32, 16)
    assert [epoch["epoch"] for epoch in metrics["history"]] == list(range(1, 31))
    assert f"epoch {metrics['epoch']} of 30" in describe(metrics)


def test_description_has_figures_and_certificate():
    text = describe(run(config(), *arrays())[2])
    for part in ("train", "val", "test", "95 %", "scikit-learn", "λ", "objective", "gradient norm", "converged"):
        assert part in text


def test_a_choice_at_the_edge_of_the_grid_is_warned_of():
    _, _, metrics = run(config(penalties=(1e3, 1e2)), *arrays())
    assert "of the grid: give values" in metrics["warnings"][0]
    assert "warning: the λ chosen" in describe(metrics)


@pytest.mark.parametrize(
    ("penalty", "shift", "orders", "num_rows", "width", "told"),
    [
        (1e-20, 4, 4, 200, 40, "of the fits without each fold did not converge"),
        (1e-14, 1, 9, 120, 60, "fits of pooler none, which was not chosen, did not converge"),
    ],
)
def test_fits_that_did_not_converge_are_told_of(penalty, shift, orders, num_rows, width, told):
    """At next to no λ the optimum is far: for the folds' fits, and for the search that loses."""
    quarter = num_rows // 4
    embeddings, labels, splits = arrays(num_rows=num_rows, num_test=quarter, num_val=quarter, width=width)
    embeddings[:, 0] += shift * labels
    embeddings = (embeddings * np.logspace(-orders / 2, orders / 2, width)).astype(np.float32)
    _, _, metrics = run(config(penalties=(penalty,), scalings=("none", "l2")), embeddings, labels, splits)
    assert any(told in warning for warning in metrics["warnings"])


def test_rare_classes_are_warned_of_and_keep_a_row_in_train():
    embeddings, labels, splits = arrays()
    labels = labels % 2
    labels[5] = 2
    data, fitted, metrics = run(config(), embeddings, labels, splits)
    assert "fewer rows than the 5 folds: 'cat'" in metrics["warnings"][0]
    assert metrics["warnings"][1].endswith("without their class: 1 of 'cat'")
    assert data.folds[5] == -1
    assert np.isnan(fitted.out_of_fold[5]).all()
    assert metrics["splits"]["val"]["n"] == 89
    assert_is_scikit_learns(data, fitted, metrics, data.splits.train)


def test_a_class_in_one_group_is_part_of_the_final_fit():
    """It is never left out, and trains the head all the same."""
    embeddings, labels, splits = arrays()
    groups = np.where(labels == 2, "together", np.char.add("alone ", np.arange(120).astype(str)))
    data, fitted, metrics = run(config(), embeddings, labels, splits, groups)
    assert (data.folds[data.splits.train] == -1).sum() == 30
    assert any("never left out, so that no fold is without their class: 30 of 'cat'" in w for w in metrics["warnings"])
    assert_is_scikit_learns(data, fitted, metrics, data.splits.train)


def test_one_fold_alone_has_no_figure():
    """Which λ is best was chosen by the very rows that would be judged."""
    embeddings, labels, splits = arrays(2)
    groups = np.where((labels == 1) | (np.arange(120) % 4 == 0), "both classes", "one class")
    for options in ({}, {"one_standard_error": True}, {"criterion": "nll"}):
        data, fitted, metrics = run(config(penalties=SHORT, **options), embeddings, labels, splits, groups)
        assert len(set(data.folds[data.splits.train].tolist()) - {-1}) == 1
        assert fitted.val_logits is None
        assert "val" not in metrics["splits"]
        assert any("one fold alone" in warning for warning in metrics["warnings"])
        assert np.isfinite(fitted.out_of_fold).any()
        assert describe(metrics)
    _, _, metrics = run(config(penalties=SHORT), embeddings, labels, np.where(splits == "test", "", splits), groups)
    assert metrics["baseline"]["n"] == (groups == "one class").sum()


def test_one_row_a_class_beside_a_validation_split():
    embeddings, labels, splits = arrays()
    splits[:87] = "val"
    for options in ({}, {"class_weights": ("bee=2",)}, {"scalings": ("none", "l2")}):
        data, fitted, metrics = run(config(penalties=SHORT, **options), embeddings, labels, splits)
        assert len(data.splits.train) == 3
        assert np.isnan(fitted.out_of_fold).all()
        assert metrics["temperature"] == 1
        assert any("no temperature" in warning for warning in metrics["warnings"])
        assert metrics["splits"]["val"]["n"] == 87


@pytest.mark.parametrize(
    "options",
    [{}, {"scalings": ("l2",)}, {"solver": "ridge"}, {"head": "knn"}, {"head": "mlp", "hidden": (4,), "epochs": 1}],
    ids=["linear", "l2", "ridge", "knn", "mlp"],
)
def test_embeddings_that_are_all_the_same_are_refused(options):
    embeddings, labels, splits = arrays()
    embeddings[splits == "train"] = embeddings[0] * (1 + 5e-9 * np.arange(90)[:, None])
    with pytest.raises(InputError, match=r"all \d\d training images have the same embedding"):
        run(config(**options), embeddings, labels, splits)


def test_without_a_penalty_separable_classes_are_refused():
    embeddings, labels, splits = arrays()
    embeddings[:, 0] += 100 * labels
    with pytest.raises(NumericalError, match="Give a λ above 0"):
        run(config(penalties=(0.0,)), embeddings, labels, splits)


def test_embeddings_that_are_not_finite_are_named():
    embeddings = np.zeros((9, 2), np.float32)
    embeddings[:7, 1] = [np.nan, np.inf, 0, -np.inf, 1e18, np.nan, np.nan]
    with pytest.raises(InputError, match=r"6 embeddings are not finite, .*: 0\.png, 1\.png.* and 1 more\."):
        check_finite(embeddings, [b"%d.png" % row for row in range(9)])


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"hidden": (0,)}, "--hidden"),
        ({"head": "mlp", "hidden": ()}, "--hidden"),
        ({"val_fraction": 1.0}, "--val-fraction"),
        ({"folds": 1}, "--folds"),
        ({"penalties": (-1.0,)}, "--penalties"),
        ({"solver": "sklearn", "penalties": (0.0,)}, "--penalties"),
        ({"views": ()}, "--views"),
        ({"head": "knn", "scalings": ("l2", "none")}, "--scalings"),
        ({"class_weights": ("ant",)}, "--class-weights"),
        ({"class_weights": ("ant=²",)}, "NAME=WEIGHT with a weight above 0, got ant=²"),
        ({"class_weights": ("ant=inf",)}, "NAME=WEIGHT with a weight above 0"),
        ({"class_weights": ("ant=2", "ant=3")}, "one weight of each class"),
        ({"solver": "ridge", "shots": (1,)}, "--shots changes nothing with --solver ridge"),
        ({"solver": "ridge", "views": ("pooler", "projected")}, "--views"),
        ({"hidden": (8,)}, "--hidden changes nothing with --head linear: it belongs to --head mlp"),
        ({"epochs": 3}, "--epochs"),
        ({"head": "knn", "penalties": (1.0,)}, "--penalties changes nothing with --head knn"),
        ({"head": "knn", "scalings": ("l2",)}, "--scalings"),
        ({"head": "knn", "solver": "ridge"}, "--solver"),
        ({"head": "mlp", "criterion": "nll"}, "--criterion"),
        ({"head": "mlp", "one_standard_error": True}, "--one-standard-error"),
        ({"head": "mlp", "folds": 3}, "--folds"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, option):
    with pytest.raises(ConfigError, match=option):
        config(**options)


def test_a_weight_of_an_unknown_class_is_refused():
    with pytest.raises(ConfigError, match="no class 'dog'; there are 'ant', 'bee', 'cat'"):
        run(config(class_weights=("dog=2",)), *arrays())


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(st.tuples(st.integers(0, 10), st.floats(0.1, 3)), min_size=1, max_size=6),
    criterion=st.sampled_from(["accuracy", "nll"]),
)
def test_the_search_reads_the_score_of_what_it_picks(scores, criterion):
    """No neighbour on the grid has a better score than the candidate that is picked."""
    accuracy, nll = (np.array(column, float)[:, None] for column in zip(*scores, strict=True))
    best = Curve(accuracy / 10, nll, np.array([10])).best(criterion)
    if criterion == "accuracy":
        assert accuracy[best] == accuracy.max()
        assert nll[best] == nll[accuracy == accuracy.max()].min()
    else:
        assert nll[best] == nll.min()


def test_one_standard_error_prefers_the_simpler():
    accuracy = np.array([[0.70, 0.80], [0.74, 0.82], [0.75, 0.83]])
    curve = Curve(accuracy, 1 - accuracy, np.array([50, 50]))
    assert curve.best("accuracy") == curve.best("nll") == 2
    assert curve.best("accuracy", one_standard_error=True) == 0
    lines = curve.lines({"penalty": np.array([3.0, 2.0, 1.0])})
    assert lines[2]["accuracy"] == pytest.approx(0.79)
    assert lines[2]["accuracy_se"] == pytest.approx(0.04)


def test_one_standard_error_over_rows_where_there_is_one_part():
    hits = np.zeros((3, 100))
    hits[0, :88], hits[1, :60], hits[2, :90] = 1, 1, 1  # 0.88 is within 0.03 of 0.90
    scores = RowScores(hits, 1 - hits)
    curve = scores.curve()
    for criterion in ("accuracy", "nll"):
        assert curve.best(criterion) == 2
        assert curve.best(criterion, one_standard_error=True) == 0
    error = np.sqrt(0.9 * 0.1 / 99)
    assert curve.lines({"k": np.arange(3)})[2]["accuracy_se"] == pytest.approx(error)


@pytest.mark.parametrize("options", [{}, {"solver": "ridge"}, {"head": "knn"}], ids=["lbfgs", "ridge", "knn"])
@pytest.mark.parametrize("num_val", [0, 40])
def test_one_standard_error_takes_a_simpler_head(options, num_val):
    rng = np.random.default_rng(3)
    labels = np.arange(140) % 2
    embeddings = (rng.normal(size=(140, 5)) + 0.8 * labels[:, None]).astype(np.float32)
    splits = np.where(np.arange(140) < num_val, "val", "train")
    found = []
    for simpler in (False, True):
        _, _, metrics = run(config(one_standard_error=simpler, criterion="nll", **options), embeddings, labels, splits)
        found.append(metrics.get("num_neighbours") or metrics["penalty"])
        assert ("one standard error" in metrics["chosen_by"]) == simpler
    assert found[1] >= found[0]
    if not options:
        assert found[1] > found[0]


def test_a_grid_is_continued_where_its_edge_is_best():
    grid = np.logspace(1, -7, 17)
    np.testing.assert_allclose(beyond(grid, 0), np.logspace(3, 1.5, 4))
    np.testing.assert_allclose(beyond(grid, 16), np.logspace(-7.5, -9, 4))
    assert not len(beyond(grid, 8))
    embeddings, labels, splits = arrays()
    noise = np.random.default_rng(0).normal(size=embeddings.shape).astype(np.float32)
    for options in ({}, {"solver": "ridge"}):
        _, _, metrics = run(config(criterion="nll", **options), noise, labels, splits)
        penalties = [point["penalty"] for point in metrics["curves"][0]["points"]]
        assert penalties == sorted(penalties, reverse=True)
        assert len(penalties) == 21
        assert penalties[0] == pytest.approx(1e10 * penalties[-1])


@pytest.mark.parametrize("num_val", [0, 30])
@pytest.mark.parametrize(
    "options",
    [{"penalties": (0.01,)}, {"solver": "ridge"}, {"head": "knn"}],
    ids=["lbfgs", "ridge", "knn"],
)
def test_out_of_fold_answers_of_every_training_row_are_saved(tmp_path, options, num_val):
    """They are read back by name, and are what the fit made of the row that has the name."""
    embeddings, labels, splits = arrays(num_val=num_val)
    names = [f"{row * 7919 % 120:03d}.png".encode() for row in range(120)]
    write_cache(
        tmp_path / "cache",
        embeddings,
        names=names,
        labels=labels,
        class_names=NAMES,
        splits=splits.tolist(),
        shard_rows=50,
    )
    with_paths = FitLinearConfig(cache=tmp_path / "cache", out=tmp_path / "run", **options)
    fit_linear(with_paths)
    _, fitted, _ = run(config(**options), embeddings, labels, splits)
    saved = predictions.load(tmp_path / "run")
    train = saved.take(saved.splits == "train")
    row_of = {name: row for row, name in enumerate(names)}
    rows = [row_of[name] for name in train.names]
    assert sorted(rows) == np.flatnonzero(splits == "train").tolist()
    np.testing.assert_array_equal(train.labels, labels[rows])
    calibrated = fitted.out_of_fold / fitted.facts["temperature"]
    expected = dict(zip(np.flatnonzero(splits == "train"), calibrated, strict=True))
    np.testing.assert_allclose(train.logits, [expected[row] for row in rows], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"penalties": (0.001,)},
        {"solver": "sklearn", "penalties": (0.001,)},
        {"solver": "ridge", "penalties": (0.1,)},
        {"head": "knn"},
        {"head": "mlp", "hidden": (8,), "learning_rate": 1e-2, "batch_size": 8},
    ],
    ids=["lbfgs", "sklearn", "ridge", "knn", "mlp"],
)
@pytest.mark.parametrize("num_val", [0, 30])
def test_saved_answers_to_every_split_are_calibrated(tmp_path, options, num_val):
    """Else runs would differ in likelihood by their temperatures alone, on train and val but not on test."""
    embeddings, labels, splits = arrays(num_val=num_val)
    names = [f"{row:03d}.png".encode() for row in range(120)]
    saved_as = {"names": names, "labels": labels, "class_names": NAMES, "splits": splits.tolist()}
    write_cache(tmp_path / "cache", embeddings, **saved_as, shard_rows=50)
    fit_linear(FitLinearConfig(cache=tmp_path / "cache", out=tmp_path / "run", no_report=True, **options))
    data, fitted, metrics = run(config(**options), embeddings, labels, splits)
    temperature = metrics["temperature"]
    assert abs(temperature - 1) > 0.01
    saved = predictions.load(tmp_path / "run")
    of = {split: saved.take(saved.splits == split) for split in ("train", "val", "test")}
    np.testing.assert_allclose(of["test"].logits, apply_head(fitted, data, data.splits.test), rtol=1e-3, atol=1e-4)
    if options.get("head") != "mlp":  # the temperature is fitted on these: no other makes them likelier
        assert fit_temperature(of["train"].logits, of["train"].labels) == pytest.approx(1, rel=1e-3)
    if num_val or options.get("head") == "mlp":
        expected = fitted.val_logits / (1 if fitted.val_is_calibrated else temperature)
        np.testing.assert_allclose(of["val"].logits, expected, rtol=1e-3, atol=1e-4)
    if num_val and options.get("head") != "mlp":  # and what metrics.json says of val is of these very answers
        _, nll = score(of["val"].logits, of["val"].labels)
        assert nll == pytest.approx(metrics["splits"]["val"]["nll"], rel=1e-4)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("num_val", [0, 30])
@pytest.mark.parametrize(
    "options",
    [{"head": "knn"}, {"head": "mlp", "hidden": (8,), "learning_rate": 1e-2, "batch_size": 8}],
    ids=["knn", "mlp"],
)
def test_neighbours_and_layers_are_calibrated_too(options, num_classes, num_val):
    """The saved head's probabilities are sharper or flatter than those of the votes or layers, by its temperature."""
    embeddings, labels, splits = arrays(num_classes, num_val=num_val)
    data, fitted, metrics = run(config(**options), embeddings, labels, splits)
    temperature = metrics["temperature"]
    assert temperature != 1
    if options["head"] == "knn":
        raw = dataclasses.replace(fitted.head, params={**fitted.head.params, "calibration": np.float32(1)})
        assert fit_temperature(fitted.out_of_fold, labels[data.splits.train]) == pytest.approx(temperature)
        ratio = np.asarray(raw.apply(embeddings)) / np.asarray(fitted.head.apply(embeddings))
        np.testing.assert_allclose(ratio, temperature, rtol=1e-4)
    else:  # no other number makes its answers to validation likelier
        val = np.asarray(class_logits(fitted.head.apply(embeddings[data.splits.val])))
        assert fit_temperature(val, labels[data.splits.val]) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("num_val", [0, 30])
def test_the_linear_head_is_calibrated_by_its_out_of_fold_answers(num_val, several):
    """One number, fitted on answers to training rows alone, divides the weights of the certified optimum."""
    embeddings, labels, splits = arrays(num_val=num_val)
    targets = np.stack([labels == 0, labels > 0, embeddings[:, 0] > 5], axis=1) if several else labels
    data, fitted, metrics = run(config(penalties=(1e-3,)), embeddings, targets, splits)
    temperature = metrics["temperature"]
    train = data.splits.train
    assert temperature != 1
    assert fit_temperature(fitted.out_of_fold, targets[train]) == pytest.approx(temperature, rel=1e-4)
    rows = np.concatenate([train, data.splits.val])
    scaling = Scaling.of(embeddings[rows], "standard")
    exact = Problem(scaling.apply(embeddings[rows]), targets[rows], 3).fit(metrics["penalty"])
    saved = fitted.head.params["kernel"] * temperature
    np.testing.assert_allclose(saved, scaling.fold(exact.params)["kernel"], rtol=1e-3, atol=1e-4)


def test_no_failure_is_taken_for_a_score():
    """Where any error counts as a score of 0, a search picks among what happened not to fail."""
    root = Path(probing.__file__).parents[1]
    modules = [*root.glob("probing/*.py"), *root.glob("evaluation/*.py"), root / "linear.py", root / "compare.py"]
    assert len(modules) > 20
    caught = [
        ast.unparse(handler.type) if handler.type else "anything"
        for module in modules
        for handler in ast.walk(ast.parse(module.read_text()))
        if isinstance(handler, ast.ExceptHandler)
    ]
    assert not {"anything", "Exception", "BaseException"} & set(caught)


def test_a_search_stops_where_one_of_its_fits_has_no_optimum():
    """The other scaling has one, and would win if a failure were a low score."""
    embeddings, labels, splits = arrays()
    embeddings[:, 0] += 100 * labels
    options = config(penalties=(1.0, 0.0), scalings=("standard", "l2"), criterion="nll")
    with pytest.raises(NumericalError, match="Give a λ above 0"):
        run(options, embeddings, labels, splits)
