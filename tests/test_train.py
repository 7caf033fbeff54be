"""The train step, its batches and `fit`, on a tiny Flax classifier."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import MismatchError, NumericalError
from probe.evaluation import choice
from probe.training import checkpoints, steps, train


class Tiny(nn.Module):
    """A backbone with batch statistics and dropout, and a head: everything that a step may have to carry."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="backbone")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.num_classes, name="head")(x)


def tiny_apply(params, model_state, inputs, key):
    variables = {"params": params, **model_state}
    if key is None:
        return Tiny().apply(variables, inputs), model_state
    return Tiny().apply(variables, inputs, train=True, mutable=["batch_stats"], rngs={"dropout": key})


def linear_apply(params, model_state, inputs, key):
    return inputs @ params["head"]["kernel"] + params["head"]["bias"], model_state


def linear_params(width=4, num_logits=3):
    return {
        "head": {
            "kernel": np.zeros((width, num_logits), np.float32),
            "bias": np.zeros(num_logits, np.float32),
        }
    }


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    return rng.normal(size=(30, 4)).astype(np.float32) + 3 * np.eye(3, 4, dtype=np.float32)[labels], labels


@settings(deadline=None)
@given(num_examples=st.integers(1, 40), batch_size=st.integers(1, 16), epoch=st.integers(0, 3))
def test_every_example_is_seen_once(num_examples, batch_size, epoch):
    inputs = np.arange(num_examples, dtype=np.float32)[:, None]
    order = steps.shuffled(num_examples, seed=0, epoch=epoch)
    batches = list(steps.padded_batches(inputs, np.arange(num_examples), batch_size, order))
    assert {b.inputs.shape for b in batches} == {(batch_size, 1)}
    np.testing.assert_array_equal(np.concatenate([b.inputs[b.mask] for b in batches]), inputs[order])
    np.testing.assert_array_equal(np.concatenate([b.labels[b.mask] for b in batches]), order)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_examples))


def test_the_order_depends_on_seed_and_epoch_alone():
    orders = [steps.shuffled(50, seed=s, epoch=e).tolist() for s in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert steps.shuffled(50, seed=1, epoch=1).tolist() == orders[3]


def test_the_second_step_compiles_nothing(rows):
    inputs, labels = rows
    variables = Tiny().init(jax.random.key(0), inputs)
    tx = optax.adam(1e-3)
    state = steps.TrainState.create(
        variables["params"], tx, seed=0, model_state={"batch_stats": variables["batch_stats"]}
    )
    step, evaluate = steps.make_train_step(tiny_apply, tx), steps.make_eval_step(tiny_apply)
    compiled = steps._answer._cache_size()
    for batch in steps.padded_batches(inputs, labels, 8):
        state, _ = step(state, {}, batch)
        evaluate(state.params, {}, state.model_state, batch.inputs)
    assert step._cache_size() == 1
    assert steps._answer._cache_size() == compiled + 1
    assert int(state.step) == 4


def test_padding_changes_no_update(rows):
    inputs, labels = rows
    tx = optax.sgd(1.0)
    step = steps.make_train_step(linear_apply, tx)
    whole, _ = step(
        steps.TrainState.create(linear_params(), tx, seed=0),
        {},
        steps.padded_batch(inputs, labels, 30, examples=np.arange(len(labels))),
    )
    padded, sums = step(
        steps.TrainState.create(linear_params(), tx, seed=0),
        {},
        steps.padded_batch(inputs, labels, 64, examples=np.arange(len(labels))),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, padded.params)
    assert float(sums.num_examples) == 30


def test_frozen_leaves_get_no_gradient_and_stay_as_they_are(rows):
    inputs, labels = rows
    variables = Tiny().init(jax.random.key(0), inputs)
    trainable = {"head": variables["params"]["head"]}
    frozen = {name: leaf for name, leaf in variables["params"].items() if name != "head"}
    before = jax.tree.map(np.array, variables["params"])
    tx = optax.adam(1e-2)
    state = steps.TrainState.create(trainable, tx, seed=0, model_state={"batch_stats": variables["batch_stats"]})
    step = steps.make_train_step(tiny_apply, tx)
    for batch in steps.padded_batches(inputs, labels, 8):
        state, _ = step(state, frozen, batch)
    assert set(state.params) == {"head"}
    assert len(jax.tree.leaves(state.opt_state)) == 1 + 2 * 2  # Adam's count, and two moments of two leaves
    jax.tree.map(np.testing.assert_array_equal, frozen, {n: before[n] for n in frozen})
    jax.tree.map(np.testing.assert_array_equal, trainable, {"head": before["head"]})  # donated nothing of ours


@settings(deadline=None, max_examples=8)
@given(batch_size=st.integers(1, 40))
def test_evaluation_does_not_depend_on_the_batch_size(batch_size):
    rng = np.random.default_rng(1)
    inputs, labels = rng.normal(size=(30, 4)).astype(np.float32), np.arange(30) % 3
    params = {"head": {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)}}
    evaluate = steps.make_eval_step(linear_apply)
    logits, seen = steps.predict_logits(evaluate, params, {}, {}, steps.padded_batches(inputs, labels, batch_size))
    np.testing.assert_array_equal(seen, labels)
    np.testing.assert_allclose(logits, inputs @ params["head"]["kernel"], atol=1e-5)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_fit_separates_a_separable_toy(num_classes):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % num_classes
    inputs = rng.normal(size=(60, 4)).astype(np.float32) + 6 * np.eye(num_classes, 4, dtype=np.float32)[labels]
    num_logits = 1 if num_classes == 2 else num_classes
    seen = []
    result = train.fit(
        linear_apply,
        optax.adam(0.1),
        linear_params(4, num_logits),
        train_batches=lambda epoch: steps.padded_batches(inputs, labels, 16, steps.shuffled(60, seed=0, epoch=epoch)),
        val_batches=lambda: steps.padded_batches(inputs, labels, 16),
        num_epochs=6,
        seed=0,
        on_epoch=seen.append,
    )
    assert result.history == seen
    assert [line.step for line in seen] == [4, 8, 12, 16, 20, 24]
    assert seen[-1].train_loss < seen[0].train_loss < np.log(num_classes)
    assert result.val_logits.shape == (6, 60, num_classes)
    assert seen[result.best].val_accuracy == max(line.val_accuracy for line in seen) == 1.0
    # The parameters kept are those of the best epoch.
    evaluate = steps.make_eval_step(linear_apply)
    logits, _ = steps.predict_logits(evaluate, result.params, {}, {}, steps.padded_batches(inputs, labels, 16))
    np.testing.assert_array_equal(logits, result.val_logits[result.best])


def test_fitting_twice_gives_the_same_bits(rows):
    inputs, labels = rows
    variables = Tiny().init(jax.random.key(0), inputs)

    def run(seed):
        return train.fit(
            tiny_apply,
            optax.adam(1e-2),
            variables["params"],
            model_state={"batch_stats": variables["batch_stats"]},
            train_batches=lambda epoch: steps.padded_batches(
                inputs, labels, 8, steps.shuffled(30, seed=seed, epoch=epoch)
            ),
            val_batches=lambda: steps.padded_batches(inputs, labels, 8),
            num_epochs=2,
            seed=seed,
        )

    np.testing.assert_array_equal(run(0).val_logits, run(0).val_logits)
    assert np.any(run(0).val_logits != run(1).val_logits)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(rows):
    inputs, labels = rows
    broken = inputs.copy()
    broken[17] = np.nan  # the 17th of 30 rows is in the 3rd batch of 8
    with pytest.raises(NumericalError, match=r"training loss is nan at step 3: lower the learning rates"):
        train.fit(
            linear_apply,
            optax.sgd(0.1),
            linear_params(),
            train_batches=lambda epoch: steps.padded_batches(broken, labels, 8),
            val_batches=lambda: steps.padded_batches(inputs, labels, 8),
            num_epochs=1,
            seed=0,
        )


def one_step(batch, *, prepare=None, **options):
    tx = optax.sgd(1.0)
    params = {"head": {"kernel": jnp.eye(4, 3), "bias": jnp.zeros(3)}}
    state = steps.TrainState.create(params, tx, seed=0, averaged="average_decay" in options)
    return steps.make_train_step(linear_apply, tx, prepare=prepare, **options)(state, {}, batch)


@pytest.mark.parametrize("num_real", [24, 30, 5])
def test_accumulated_gradients_are_those_of_the_large_batch(rows, num_real):
    """With masked rows too: microbatches with fewer real rows must not count as much as full ones."""
    inputs, labels = rows
    batch = steps.padded_batch(inputs[:num_real], labels[:num_real], 32, examples=np.arange(num_real))
    whole, whole_sums = one_step(batch)
    parts, parts_sums = one_step(batch, num_microbatches=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, parts.params)
    assert int(parts_sums.num_examples) == int(whole_sums.num_examples) == num_real


def test_the_average_follows_the_parameters(rows):
    batch = steps.padded_batch(*rows, 30, examples=np.arange(30))
    state, _ = one_step(batch, average_decay=0.99)
    start, now = np.eye(4, 3), state.params["head"]["kernel"]
    # After the first step the decay is 1 / 10, not yet 0.99.
    np.testing.assert_allclose(state.average["head"]["kernel"], 0.1 * start + 0.9 * now, atol=1e-6)
    assert state.judged is state.average


def test_prepared_targets_train_and_true_labels_are_counted(rows):
    inputs, labels = rows
    batch = steps.padded_batch(inputs, labels, 32, examples=np.arange(30))
    plain, plain_sums = one_step(batch)
    same, _ = one_step(batch, prepare=lambda key, batch: (batch.inputs, jax.nn.one_hot(batch.labels, 3)))
    wrong, wrong_sums = one_step(batch, prepare=lambda key, batch: (batch.inputs, jnp.ones((32, 3)) / 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain.params, same.params)
    assert np.any(plain.params["head"]["kernel"] != wrong.params["head"]["kernel"])
    np.testing.assert_allclose(plain_sums.nll_sum, wrong_sums.nll_sum, rtol=1e-6)


class Cut(Exception):  # noqa: N818
    """The power fails."""


def tiny_fit(rows, folder, *, cut_at=None, resume=False, num_epochs=4, average_decay=0.9, record=None):
    inputs, labels = rows
    variables = Tiny().init(jax.random.key(0), inputs)
    drawn = 0

    def train_batches(epoch):
        nonlocal drawn
        for batch in steps.padded_batches(inputs, labels, 8, steps.shuffled(30, seed=0, epoch=epoch)):
            drawn += 1
            if drawn == cut_at:
                raise Cut
            yield batch

    checkpointing = train.Checkpointing(folder=folder, every_steps=3, record=record or {"config": "a"}, resume=resume)
    return train.fit(
        tiny_apply,
        optax.adam(1e-2),
        variables["params"],
        model_state={"batch_stats": variables["batch_stats"]},
        train_batches=train_batches,
        val_batches=lambda: steps.padded_batches(inputs, labels, 8),
        num_epochs=num_epochs,
        seed=0,
        average_decay=average_decay,
        checkpointing=checkpointing,
    )


def test_a_run_that_was_cut_off_goes_on_to_the_bit(rows, tmp_path):
    """Dropout, batch statistics, the average, the sums of the epoch under way and its order included."""
    whole = tiny_fit(rows, tmp_path / "whole")
    for cut_at in (2, 6, 14):  # before the first checkpoint; within the second epoch; within the last
        folder = tmp_path / f"cut-{cut_at}"
        with pytest.raises(Cut):
            tiny_fit(rows, folder, cut_at=cut_at)
        resumed = tiny_fit(rows, folder, resume=True)
        np.testing.assert_array_equal(whole.val_logits, resumed.val_logits)
        kept = [(result.params, result.model_state) for result in (whole, resumed)]
        jax.tree.map(np.testing.assert_array_equal, *kept)
        assert whole.best == resumed.best
        for one, other in zip(whole.history, resumed.history, strict=True):
            assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(other, seconds=0.0)


def test_only_the_same_run_goes_on(rows, tmp_path):
    tiny_fit(rows, tmp_path, num_epochs=1)
    with pytest.raises(MismatchError, match=r"record config: the checkpoint has a, this run b"):
        tiny_fit(rows, tmp_path, resume=True, record={"config": "b"})


def test_a_finished_run_is_not_trained_again(rows, tmp_path):
    first = tiny_fit(rows, tmp_path)
    again = tiny_fit(rows, tmp_path, resume=True, cut_at=1)
    np.testing.assert_array_equal(first.val_logits, again.val_logits)


def test_patience_ends_a_run_that_gets_no_better(rows):
    inputs, labels = rows
    result = train.fit(
        linear_apply,
        optax.sgd(0.0),  # nothing moves: the first epoch stays the best
        linear_params(),
        train_batches=lambda epoch: steps.padded_batches(inputs, labels, 8),
        val_batches=lambda: steps.padded_batches(inputs, labels, 8),
        num_epochs=50,
        seed=0,
        patience=3,
    )
    assert result.best + 3 == len(result.history) - 1 < 49


def test_a_broken_loss_names_the_last_good_checkpoint(rows, tmp_path):
    inputs, labels = rows
    tiny_fit((inputs, labels), tmp_path, num_epochs=1)
    inputs = inputs.copy()
    inputs[3] = np.nan
    with pytest.raises(NumericalError, match=r"training loss is nan at step [5-8].*last good checkpoint is .*-step-4"):
        tiny_fit((inputs, labels), tmp_path, num_epochs=2, resume=True)


def test_weights_that_are_not_finite_are_no_good_checkpoint(rows, tmp_path):
    """The gradient breaks before the loss: the one that shows it is that of the next step."""
    inputs, labels = rows

    def broken_gradient(params, model_state, inputs, key):
        bias = jnp.sqrt(jnp.abs(params["head"]["bias"]))  # its slope at 0 is no number
        return inputs @ params["head"]["kernel"] + bias, model_state

    with pytest.raises(NumericalError, match=r"weights are not finite after step 1: lower the learning rates"):
        train.fit(
            broken_gradient,
            optax.sgd(0.1),
            linear_params(),
            train_batches=lambda epoch: steps.padded_batches(inputs, labels, 8),
            val_batches=lambda: steps.padded_batches(inputs, labels, 8),
            num_epochs=1,
            seed=0,
            checkpointing=train.Checkpointing(folder=tmp_path, every_steps=1, record={}, resume=False),
        )
    assert checkpoints.find(tmp_path, "last") is None


def test_the_best_checkpoint_is_that_of_the_best_epoch(rows, tmp_path):
    """Also where the weights of others are wanted."""
    inputs, labels = rows
    train.fit(
        linear_apply,
        optax.sgd(0.0),  # nothing moves: the first epoch stays the best
        linear_params(),
        train_batches=lambda epoch: steps.padded_batches(inputs, labels, 8),
        val_batches=lambda: steps.padded_batches(inputs, labels, 8),
        num_epochs=3,
        seed=0,
        wanted=lambda logits, labels: {0, len(logits) - 1},
        checkpointing=train.Checkpointing(folder=tmp_path, every_steps=100, record={}, resume=False),
    )
    assert checkpoints.find(tmp_path, "best").name == "000001-step-4-best"
    assert checkpoints.find(tmp_path, "last").name == "000003-step-12"


def test_the_best_candidate_is_the_most_accurate_then_the_surest_then_the_earliest():
    labels = np.array([0, 1])
    sure = np.array([[4.0, 0.0], [0.0, 4.0]])
    assert choice.best_candidate(np.stack([sure / 4, sure, -sure]), labels) == 1
    assert choice.best_candidate(np.stack([-sure, sure, sure]), labels) == 1


def test_a_cross_fitted_figure_of_useless_candidates_is_chance():
    """The best of many coin tosses looks good on the rows that chose it, and is not."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    chosen, honest = [], []
    for _ in range(60):
        logits = rng.normal(size=(11, 40, 2))
        chosen.append(np.mean(logits[choice.best_candidate(logits, labels)].argmax(1) == labels))
        honest.append(np.mean(choice.cross_fitted(logits, labels).argmax(1) == labels))
    assert np.mean(chosen) > 0.58  # 11 tosses of 40 coins
    assert abs(np.mean(honest) - 0.5) < 3 * 0.5 / np.sqrt(40 * 60)


def test_one_row_cannot_both_choose_and_judge():
    assert choice.cross_fitted(np.zeros((2, 1, 2)), np.array([1])) is None
    two = np.array([[[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2])
    np.testing.assert_array_equal(choice.cross_fitted(two, np.array([0, 0])), two[0])


def test_inputs_may_be_any_tree():
    step = steps.make_eval_step(lambda params, state, inputs, key: (inputs["x"] * params["a"], state))
    np.testing.assert_array_equal(step({"a": jnp.ones(())}, {}, {}, {"x": np.eye(2)}), np.eye(2))
