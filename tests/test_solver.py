"""The solver: the same optimum as scikit-learn's, however many classes, and the certificate tells."""

import numpy as np
import pytest

from probe.solver import solve_path, solve_with_sklearn

PENALTIES = (10.0, 0.3, 1e-3, 1e-5)


def problem(num_classes, seed=0, num_examples=60, width=8):
    """Overlapping classes on features of unequal scale, with a duplicated column."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_examples) % num_classes
    features = rng.normal(size=(num_examples, width)) * np.logspace(0, -2, width)
    features[:, 0] += labels
    features[:, -1] = features[:, 1]
    return features.astype(np.float32), labels


@pytest.mark.parametrize("num_classes", [2, 4])
def test_same_optimum_as_scikit_learn(num_classes):
    features, labels = problem(num_classes)
    for ours, penalty in zip(solve_path(features, labels, num_classes, PENALTIES), PENALTIES, strict=True):
        theirs = solve_with_sklearn(features, labels, num_classes, penalty)
        assert ours.converged
        assert ours.penalty == theirs.penalty == penalty
        assert ours.kernel.shape == (8, 1 if num_classes == 2 else num_classes)
        assert ours.objective == pytest.approx(theirs.objective, rel=1e-9)
        # The objective bends by at least λ in every direction: ‖ΔW‖ <= (sum of the gradient norms) / λ
        reach = (ours.gradient_norm + theirs.gradient_norm) / penalty
        np.testing.assert_allclose(ours.kernel, theirs.kernel, atol=reach + 1e-12)


def test_softmax_biases_are_centred_and_free_of_the_penalty():
    features, labels = problem(3)
    (solution,) = solve_path(features, labels, 3, [1e6])
    assert solution.bias.sum() == pytest.approx(0, abs=1e-12)
    assert np.abs(solution.kernel).max() < 1e-5
    np.testing.assert_allclose(np.exp(solution.bias), 1, rtol=1e-4)  # three classes of equal size
    (binary,) = solve_path(features, np.minimum(labels, 1), 2, [1e6])
    assert binary.bias[0] == pytest.approx(np.log(2), abs=1e-4)  # twice as many of one as of the other


def test_an_unfinished_solution_says_so():
    features, labels = problem(3)
    (solution,) = solve_path(features, labels, 3, [1e-6], max_iterations=2)
    assert not solution.converged
    assert solution.num_iterations == 2
    assert solution.certificate()["gradient_norm"] > 1e-7 * solution.initial_gradient_norm


def test_solving_leaves_the_rest_in_float32():
    import jax.numpy as jnp

    features, labels = problem(2)
    solve_path(features, labels, 2, [1.0])
    assert jnp.ones(1).dtype == jnp.float32
