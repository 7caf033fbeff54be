"""Partitions, the optimizer over them, the schedule and weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import ConfigError
from probe.training import optim


@pytest.fixture
def params():
    def block():
        return {"fc1": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}

    return {
        "backbone": {
            "embeddings": {
                "class_embedding": jnp.ones(2),
                "position_embedding": {"embedding": jnp.ones((3, 2))},
            },
            "layers_0": block(),
            "layers_1": block(),
            "layers_10": block(),
        },
        "head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    }


def labelled(params, rules):
    """The paths that carry each label."""
    found = {}
    for path, label in jax.tree_util.tree_leaves_with_path(optim.partition(params, rules)):
        found.setdefault(label, set()).add("/".join(key.key for key in path))
    return found


def test_a_prefix_covers_all_below_and_the_first_match_wins(params):
    found = labelled(params, {"backbone/layers_1": 1e-4, "backbone": "frozen", "head": 1e-3})
    assert found[1e-4] == {f"backbone/layers_1/{leaf}" for leaf in ("fc1/kernel", "fc1/bias", "norm/scale")}
    assert found[1e-3] == {"head/kernel", "head/bias"}
    assert len(found["frozen"]) == 8


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("backbone/**", 11),
        ("**/bias", 4),
        ("*/bias", 1),
        ("backbone/layers_*", 9),
        ("backbone/layers_1*", 6),
        ("**/fc1/kernel", 3),
        ("backbone/**/kernel", 3),
        ("head/", 2),
        ("**/position_embedding", 1),
    ],
)
def test_patterns(params, pattern, count):
    assert len(labelled(params, {pattern: "hit", "**": "rest"})["hit"]) == count


def test_gaps_on_both_sides_are_listed_at_once(params):
    with pytest.raises(ConfigError) as err:
        optim.partition(params, {"backbon": "frozen", "backbone/layers_*": "frozen", "heads": 1e-3})
    message = str(err.value)
    assert "parameters without a rule: backbone/embeddings/class_embedding, " in message
    assert "head/bias, head/kernel; rules without a parameter" in message
    assert "rules without a parameter: backbon, heads; the parameters" in message


def test_split_shares_no_leaf_and_loses_none(params):
    labels = optim.partition(params, {"**/bias": optim.FROZEN, "**": 1e-3})
    trainable, frozen = optim.split(params, labels)
    assert len(jax.tree.leaves(trainable)) == 9
    assert len(jax.tree.leaves(frozen)) == 4
    assert "bias" not in trainable["head"]
    assert frozen["head"]["bias"] is params["head"]["bias"]


def test_parts_count_what_each_rule_takes(params):
    rules = {
        "backbone/layers_1": optim.FROZEN,
        "**/norm": 1e-5,
        "backbone/*/norm": 1.0,
        "backbone": 1e-4,
        "head": 1e-3,
    }
    parts = [(part.pattern, part.label, part.num_parameters) for part in optim.parts(params, rules)]
    assert parts == [
        ("backbone/layers_1", "frozen", 8),
        ("**/norm", 1e-5, 4),
        ("backbone", 1e-4, 20),
        ("head", 1e-3, 9),
    ]


def test_labels_may_be_a_prefix_of_the_parameters(params):
    """As in the guide: one label per part, instead of one per leaf."""
    tx = optax.multi_transform(
        {"backbone": optax.set_to_zero(), "head": optax.sgd(1.0)}, {"backbone": "backbone", "head": "head"}
    )
    updates, _ = tx.update(params, tx.init(params), params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["backbone"]))
    np.testing.assert_array_equal(updates["head"]["bias"], -np.ones(3))


def test_each_part_moves_at_its_rate(params):
    labels = optim.partition(params, {"backbone": 1e-5, "head": 1e-3})
    tx = optim.make_optimizer(labels, num_steps=10, warmup_steps=0, weight_decay=0.0)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], -1e-3, rtol=1e-4)  # Adam's first step has length 1
    np.testing.assert_allclose(updates["backbone"]["layers_0"]["fc1"]["kernel"], -1e-5, rtol=1e-4)


def test_decay_shrinks_kernels_and_nothing_else_when_gradients_are_zero(params):
    """A decay placed after the sign flip would make weights grow; placed outside the rate, melt."""
    labels = optim.partition(params, {"backbone": 1e-3, "head": 1e-2})
    tx = optim.make_optimizer(labels, num_steps=4, warmup_steps=0, weight_decay=0.1)
    state, moved = tx.init(params), params
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, moved)
        moved = optax.apply_updates(moved, updates)
    shrunk = {
        "/".join(key.key for key in path): float(leaf.max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(moved)
        if leaf.max() != 1.0
    }
    assert set(shrunk) == {
        "head/kernel",
        *(f"backbone/layers_{block}/fc1/kernel" for block in (0, 1, 10)),
    }
    schedule = optim.warmup_cosine(1e-2, num_steps=4, warmup_steps=0)
    kept = (1 - 0.1 * float(schedule(0))) * (1 - 0.1 * float(schedule(1)))
    np.testing.assert_allclose(shrunk["head/kernel"], kept, rtol=1e-6)
    assert shrunk["head/kernel"] < shrunk["backbone/layers_0/fc1/kernel"] < 1


def test_a_gradient_is_clipped_over_all_parts_together(params):
    labels = optim.partition(params, {"backbone": 1.0, "head": 2.0})
    options = {"num_steps": 10**9, "warmup_steps": 0, "weight_decay": 0.0, "momentum": 0.0}
    norm = float(optax.tree.norm(params))
    for tx, scale in (
        (optim.make_optimizer(labels, **options), 1.0),
        (optim.make_optimizer(labels, **options, clip_norm=norm / 4), 0.25),
    ):
        updates, _ = tx.update(params, tx.init(params), params)
        np.testing.assert_allclose(updates["head"]["bias"], -2 * scale * np.ones(3), rtol=1e-6)
        np.testing.assert_allclose(updates["backbone"]["layers_0"]["norm"]["scale"], -scale * np.ones(2), rtol=1e-6)


@settings(deadline=None)
@given(num_steps=st.integers(1, 200), share=st.floats(0, 0.99))
def test_the_rate_rises_then_falls_and_is_never_zero(num_steps, share):
    warmup_steps = int(share * num_steps)
    schedule = optim.warmup_cosine(2.0, num_steps=num_steps, warmup_steps=warmup_steps)
    rates = np.asarray(schedule(np.arange(200)))[:num_steps]  # one shape, one compilation
    assert np.all(rates > 0)
    assert np.all(np.diff(rates[: warmup_steps + 1]) > 0)
    assert np.all(np.diff(rates[warmup_steps:]) < 0)
    np.testing.assert_allclose(rates[warmup_steps], 2.0, rtol=1e-6)
    np.testing.assert_allclose(schedule(num_steps), 0, atol=1e-6)
