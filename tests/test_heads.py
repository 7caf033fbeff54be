"""Heads: two classes have one logit, and scaling folded into the weights changes no logit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.heads import Classifier, TrainedHead, class_logits, fold_scaling, make_head, num_logits


def test_two_classes_have_one_logit():
    assert [num_logits(2), num_logits(3), num_logits(2, multi_label=True)] == [1, 3, 2]
    np.testing.assert_array_equal(class_logits(jnp.array([[1.5], [-2.0]])), [[0, 1.5], [0, -2]])
    logits = jnp.ones((2, 3))
    np.testing.assert_array_equal(class_logits(logits), logits)


def test_linear_head_starts_at_a_uniform_guess():
    params = make_head(3).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert not np.any(params["kernel"])
    assert not np.any(params["bias"])


def test_classifier_parameters_are_partitioned_by_prefix():
    class Tower(nn.Module):
        @nn.compact
        def __call__(self, pixels, train=False):
            return Output(nn.Dense(5)(pixels.mean(axis=(1, 2))))

    @struct.dataclass
    class Output:
        pooler_output: jax.Array

    pixels = jnp.ones((2, 4, 4, 3))
    for num_classes, hidden in ((2, ()), (3, (7,))):
        model = Classifier(num_classes, Tower(), hidden)
        variables = model.init(jax.random.key(0), pixels)
        assert set(variables["params"]) == {"backbone", "head"}
        assert model.apply(variables, pixels).shape == (2, num_classes)


@settings(max_examples=15, deadline=None)
@given(hidden=st.sampled_from([(), (5,), (5, 4)]), constant=st.booleans(), seed=st.integers(0, 2**31))
def test_folded_scaling_gives_the_same_logits(hidden, constant, seed):
    rng = np.random.default_rng(seed)
    mean, scale = rng.normal(size=6) * 3, rng.uniform(0.1, 4, size=6)
    embeddings = rng.normal(size=(8, 6)) * scale + mean
    if constant:
        scale[2], embeddings[:, 2] = 0, mean[2]
    head = make_head(3, hidden)
    params = head.init(jax.random.key(seed), jnp.ones((1, 6)))["params"]
    params = jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape)), params)
    scaled = np.divide(embeddings - mean, scale, out=np.zeros_like(embeddings), where=scale > 0)
    expected = TrainedHead(hidden, params).apply(scaled)
    folded = TrainedHead(hidden, fold_scaling(params, mean, scale))
    # float32 sums of some tens of terms of order 10, whose cancellation costs two digits
    np.testing.assert_allclose(folded.apply(embeddings), expected, atol=1e-4, rtol=1e-4)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded.params)} == {np.dtype(np.float32)}


def test_a_constant_feature_gets_no_weight():
    params = {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}
    folded = fold_scaling(params, np.array([5.0, 1.0]), np.array([0.0, 2.0]))
    np.testing.assert_array_equal(folded["kernel"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(folded["bias"], [-0.5, -0.5, -0.5])


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_trained_head_is_the_module(hidden):
    head = make_head(2, hidden)
    embeddings = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    params = jax.tree.map(np.asarray, head.init(jax.random.key(1), embeddings)["params"])
    np.testing.assert_allclose(
        TrainedHead(hidden, params).apply(embeddings), head.apply({"params": params}, embeddings), rtol=1e-6
    )
