"""The solver: the optimum that scikit-learn's newton-cholesky finds, or a certificate that says why not."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from probe.errors import NumericalError
from probe.probing.passes import NOTHING
from probe.probing.reference import solve_with_sklearn
from probe.probing.solver import Problem

PENALTIES = (10.0, 0.3, 1e-3, 1e-5)
WIDTH = 8  # one shape for all examples: hypothesis would compile anew for each


def problem(num_classes, seed=0, num_rows=60):
    """Overlapping classes on centred features of unequal scale, with a duplicated column."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % num_classes
    features = rng.normal(size=(num_rows, WIDTH)) * np.logspace(0, -2, WIDTH)
    features[:, 0] += labels
    features[:, -1] = features[:, 1]
    return (features - features.mean(axis=0)).astype(np.float32), labels


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("by_float32", [False, True])
def test_same_optimum_as_scikit_learn(num_classes, by_float32):
    features, labels = problem(num_classes)
    solver = Problem(features, labels, num_classes)
    for penalty in PENALTIES:
        ours, theirs = solver.fit(penalty, by_float32=by_float32), solve_with_sklearn(solver, features, labels, penalty)
        assert ours.converged
        assert ours.kernel.shape == (WIDTH, 1 if num_classes == 2 else num_classes)
        assert ours.objective == pytest.approx(theirs.objective, rel=1e-8)
        # The objective bends by at least λ in every direction: ‖ΔW‖ <= (sum of the gradient norms) / λ
        reach = (ours.gradient_norm + theirs.gradient_norm) / penalty
        np.testing.assert_allclose(ours.kernel, theirs.kernel, atol=reach + 1e-12)


def test_scikit_learn_makes_no_hessian_that_is_too_large():
    features, labels = problem(4)
    solver = Problem(features, labels, 4)
    by_newton, by_lbfgs = (
        solve_with_sklearn(solver, features, labels, 0.3, most_coefficients=most) for most in (36, 35)
    )
    assert by_lbfgs.num_iterations > by_newton.num_iterations  # it is another solver
    assert by_lbfgs.objective == pytest.approx(by_newton.objective, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(5, 60),
    num_classes=st.sampled_from([2, 3]),
    condition=st.floats(0, 8),
    penalty=st.floats(-8, 4),
    columns=st.sampled_from(["independent", "duplicated", "constant"]),
    lonely_class=st.booleans(),
    weighted=st.booleans(),
    shift=st.floats(0, 3),
    seed=st.integers(0, 2**32 - 1),
    by_float32=st.booleans(),
)
@example(30, 3, 8.0, -8.0, "duplicated", True, False, 3.0, 1, False)  # near-singular and separable
@example(30, 3, 8.0, -8.0, "duplicated", True, False, 3.0, 1, True)
@example(9, 3, 7.0, -7.5, "independent", True, True, 1.0, 40170443, False)  # L-BFGS sees a gap of 1e-10: it is 1e-6
def test_same_optimum_over_random_problems(
    num_rows, num_classes, condition, penalty, columns, lonely_class, weighted, shift, seed, by_float32
):
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % num_classes
    if lonely_class:
        labels = np.where(np.arange(num_rows) < num_classes, labels, labels % (num_classes - 1))
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    features = rng.normal(size=(num_rows, WIDTH)) + shift * rng.normal(size=(num_classes, WIDTH))[labels]
    features = (features * np.logspace(0, -condition, WIDTH)) @ basis
    if columns == "duplicated":
        features[:, 3] = features[:, 2]
    elif columns == "constant":
        features[:, 3] = 0
    features = (features - features.mean(axis=0)).astype(np.float32)
    weights = rng.uniform(0.1, 2, num_rows) if weighted else np.ones(num_rows)
    solver = Problem(features, labels, num_classes, weights=weights)
    ours = solver.fit(10.0**penalty, by_float32=by_float32)
    theirs = solve_with_sklearn(solver, features, labels, 10.0**penalty, weights=weights, tolerance=1e-12)
    assert ours.objective <= theirs.objective * (1 + 1e-6) or not ours.converged
    assert ours.objective <= theirs.objective * (1 + 1e-3)


@settings(max_examples=25, deadline=None)
@given(
    num_classes=st.sampled_from([2, 6]),  # each is compiled anew, and so is that of several labels
    several=st.booleans(),
    condition=st.floats(0, 4),
    penalty=st.floats(-6, 4),
    shift=st.floats(0, 3),
    seed=st.integers(0, 2**32 - 1),
    by_float32=st.booleans(),
)
def test_well_conditioned_problems_converge(num_classes, several, condition, penalty, shift, seed, by_float32):
    """No certificate that says why not: to the optimum, with deviations four decades apart at most."""
    rng = np.random.default_rng(seed)
    num_classes = 6 if several else num_classes
    labels = np.arange(60) % num_classes
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    features = rng.normal(size=(60, WIDTH)) + shift * rng.normal(size=(num_classes, WIDTH))[labels]
    features = (features * np.logspace(0, -condition, WIDTH)) @ basis
    features = (features - features.mean(axis=0)).astype(np.float32)
    targets = np.eye(num_classes, dtype=bool)[labels] ^ (rng.random((60, num_classes)) < 0.1) if several else labels
    solver = Problem(features, targets, num_classes)
    ours = solver.fit(10.0**penalty, by_float32=by_float32)
    theirs = solve_with_sklearn(solver, features, targets, 10.0**penalty, tolerance=1e-12)
    assert ours.converged
    assert ours.objective <= theirs.objective * (1 + 1e-6)


def test_several_labels_a_row_are_independent_problems():
    features, labels = problem(3)
    sets = np.stack([labels == 0, labels != 1, features[:, 2] > 0], axis=1)
    together = Problem(features, sets, 3).fit(1e-3)
    assert together.converged
    for label in range(3):
        alone = Problem(features, sets[:, label].astype(int), 2).fit(1e-3)
        np.testing.assert_allclose(together.kernel[:, label], alone.kernel[:, 0], atol=1e-5)
        np.testing.assert_allclose(together.bias[label], alone.bias[0], atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_lanes_are_the_fits_without_their_fold(several):
    """Every fold and every λ of a path, against fits of the other rows alone, scaled by their own deviations."""
    features, labels = problem(3)
    targets = np.stack([labels == 0, labels != 1, labels == 2], axis=1) if several else labels
    folds = np.arange(60) % 2
    deviations = features.std(axis=0)
    solver = Problem(features / deviations, targets, 3, folds=folds, standardise_folds=True)
    path = solver.path([1.0, 0.01], [0, 1], tolerance=1e-7)
    again = solver.path([0.01], [0, 1], start=path.heads[1])
    assert path.converged.all()
    assert again.num_iterations.max() <= 1
    np.testing.assert_allclose(again.heads[0], path.heads[1], atol=3e-3)
    for fold in (0, 1):
        rows, held = folds != fold, folds == fold
        own = features[rows].std(axis=0)
        scaled = (features - features[rows].mean(axis=0)) / own
        for i, penalty in enumerate([1.0, 0.01]):
            # C is held: half of the rows, twice the λ
            alone = Problem(scaled[rows], targets[rows], 3).fit(2 * penalty)
            expected = alone.kernel * (deviations / own)[:, None]
            np.testing.assert_allclose(path.heads[i, fold][:-1], expected, atol=3e-3)
            logits = scaled[held] @ alone.kernel + alone.bias
            if several:
                nll = np.logaddexp(0, np.where(targets[held], -logits, logits)).sum(axis=1)
                right = (logits > 0) == targets[held]
            else:
                nll = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(held.sum()), labels[held]]
                right = logits.argmax(axis=1) == labels[held]
            assert path.nll[i, fold] == pytest.approx(nll.mean(), rel=1e-2)
            assert path.accuracy[i, fold] == pytest.approx(right.mean())
            assert path.count[fold] == 30


@pytest.mark.parametrize("standardise_folds", [False, True])
def test_rows_that_are_never_left_out_train_every_lane(standardise_folds):
    """Fold -1 is a row's; the lane that leaves nothing out has another sign."""
    features, labels = problem(3)
    features /= features.std(axis=0)
    folds = np.where(labels == 2, -1, np.arange(60) % 2)
    split = Problem(features, labels, 3, folds=folds, standardise_folds=standardise_folds)
    with_folds, plain = split.fit(1e-2), Problem(features, labels, 3).fit(1e-2)
    assert with_folds.objective == pytest.approx(plain.objective, rel=1e-9)
    np.testing.assert_allclose(with_folds.kernel, plain.kernel, atol=1e-4)
    alone = split.path([1e-2], [NOTHING])
    assert alone.count.tolist() == [0]
    np.testing.assert_allclose(alone.heads[0, 0, :-1], plain.kernel, atol=3e-2)
    rows = folds != 0
    without = Problem(features[rows] / (features[rows].std(axis=0) if standardise_folds else 1), labels[rows], 3)
    own = without.fit(1e-2 * 60 / rows.sum()).kernel / (features[rows].std(axis=0)[:, None] if standardise_folds else 1)
    np.testing.assert_allclose(split.path([1e-2], [0], tolerance=1e-7).heads[0, 0, :-1], own, atol=3e-3)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_rows_that_are_right_beyond_doubt_keep_their_digits(num_classes):
    """1 - p of p next to 1 is float32's rounding: a path over separable classes stalled on it, at λ below 1e-4."""
    features, labels = problem(num_classes, num_rows=600)
    folds = np.arange(600) // num_classes % 3
    features += np.eye(WIDTH, dtype=np.float32)[labels + 2] * 8
    features -= features.mean(axis=0)
    solver = Problem(features, labels, num_classes, folds=folds)
    path = solver.path(np.logspace(1, -8, 10).tolist(), [0, 1, 2])
    assert path.converged.all()
    assert path.nll[-1].mean() < 1e-4
    exact = solver.fit(1e-8)
    head = np.concatenate([exact.kernel, exact.bias[None]]).astype(np.float32)
    again = solver.path([1e-8], [0], start=head[None], max_iterations=0)
    logits = features.astype(np.float64) @ head[:-1] + head[-1]
    logits = np.pad(logits, ((0, 0), (1, 0))) if num_classes == 2 else logits
    others = logits - logits[np.arange(600), labels][:, None]
    nll = np.log1p(np.where(np.arange(num_classes) == labels[:, None], 0, np.exp(others)).sum(axis=1))
    assert again.nll[0, 0] == pytest.approx(nll[folds == 0].mean(), rel=1e-4)


def test_the_tolerance_of_a_path_does_not_change_the_choice():
    """By loss, 1e-5 picks of 17 λ what 1e-7 picks, but for ties: neighbours within a tenth of a standard error."""
    num_same = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 5, 400)
        features = rng.normal(size=(400, 16)) + rng.uniform(0.3, 1.5) * rng.normal(size=(5, 16))[labels]
        basis = np.linalg.qr(rng.normal(size=(16, 16)))[0]
        features = (features * np.logspace(0, -rng.uniform(0, 2), 16)) @ basis
        solver = Problem((features - features.mean(axis=0)).astype(np.float32), labels, 5, folds=np.arange(400) % 5)
        penalties = (np.logspace(1, -7, 17) * solver.mean_variance).tolist()
        rough, fine = (solver.path(penalties, range(5), tolerance=tolerance) for tolerance in (1e-5, 1e-7))
        assert fine.num_iterations.sum() > 1.5 * rough.num_iterations.sum()  # there is something to save
        losses = fine.nll.mean(axis=1)
        picked, best = rough.nll.mean(axis=1).argmin(), losses.argmin()
        num_same += picked == best
        assert abs(picked - best) <= 1
        assert losses[picked] - losses[best] <= 0.1 * fine.nll[best].std(ddof=1) / 5**0.5
    assert num_same >= 10


def test_the_first_step_ends_where_there_is_still_something_to_learn():
    # Newton's step from zero makes the logits of 50 classes that lie apart some 50: all gradients there are flat.
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, 1000)
    features = (2 * rng.standard_normal((50, 64))[labels] + rng.standard_normal((1000, 64))).astype(np.float32)
    solution = Problem(features - features.mean(axis=0), labels, 50).fit(1e-3)
    assert solution.converged
    assert solution.num_iterations <= 45  # 35; with whole steps 75


def test_weights_are_as_good_as_repeated_rows():
    features, labels = problem(3)
    times = np.arange(60) // 3 % 3  # of every class: the bias of one that has no rows would fall for ever
    weighted = Problem(features, labels, 3, weights=times.astype(float)).fit(1e-2)
    repeated = Problem(np.repeat(features, times, axis=0), np.repeat(labels, times), 3).fit(1e-2)
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-9)
    np.testing.assert_allclose(weighted.kernel, repeated.kernel, atol=1e-4)


def test_softmax_biases_are_centred_and_free_of_the_penalty():
    features, labels = problem(3)
    solution = Problem(features, labels, 3).fit(1e6)
    assert solution.bias.sum() == pytest.approx(0, abs=1e-12)
    assert np.abs(solution.kernel).max() < 1e-5
    np.testing.assert_allclose(np.exp(solution.bias), 1, rtol=1e-4)  # three classes of equal size
    binary = Problem(features, np.minimum(labels, 1), 2).fit(1e6)
    assert binary.bias[0] == pytest.approx(np.log(2), abs=1e-4)  # twice as many of one as of the other


@pytest.mark.parametrize("by_float32", [False, True])
def test_an_unfinished_solution_says_so(by_float32):
    features, labels = problem(3)
    solution = Problem(features, labels, 3).fit(1e-6, max_iterations=2, by_float32=by_float32)
    assert not solution.converged
    assert solution.num_iterations == 2
    assert solution.certificate()["gradient_norm"] > 1e-6 * solution.initial_gradient_norm


@pytest.mark.parametrize("num_classes", [2, 3])
def test_without_a_penalty_separable_classes_have_no_optimum(num_classes):
    features, labels = problem(num_classes)
    features[:, 0] += 10 * labels
    with pytest.raises(NumericalError, match="can be separated"):
        Problem(features, labels, num_classes).fit(0.0)


def test_without_a_penalty_one_separable_class_is_enough():
    """The weights of class 0 grow for ever; those of 1 and 2, which overlap, do not."""
    features, labels = problem(3)
    features[:, 0] = np.random.default_rng(5).normal(size=60) + 10 * (labels == 0)
    with pytest.raises(NumericalError, match="can be separated"):
        Problem(features - features.mean(axis=0), labels, 3).fit(0.0)


def test_without_a_penalty_separable_groups_of_classes_have_no_optimum():
    """0 and 1 overlap, and so do 2 and 3, but the pairs do not."""
    features, labels = problem(4)
    features[:, 0] = np.random.default_rng(5).normal(size=60) + 10 * (labels > 1)
    with pytest.raises(NumericalError, match="some of them from the rest"):
        Problem(features - features.mean(axis=0), labels, 4).fit(0.0)


def test_without_a_penalty_overlapping_classes_have_one():
    features, _ = problem(2)
    for num_classes in (2, 3):
        labels = np.random.default_rng(1).integers(0, num_classes, 60)
        assert Problem(features, labels, num_classes).fit(0.0).converged


def test_solving_leaves_the_rest_in_float32():
    features, labels = problem(2)
    Problem(features, labels, 2).fit(1.0)
    assert jnp.ones(1).dtype == jnp.float32
