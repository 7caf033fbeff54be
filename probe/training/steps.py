"""The train and eval steps, the state they change, and batches of one shape.

Knows an `apply_fn`, not which mode it is in. The hinge is

    apply_fn: (params, model_state, inputs, key) -> (logits, model_state)

Head only, `params` is {"head": …}, inputs are embeddings [B, D] and the state is empty. Full, `params` is
{"backbone": …, "head": …}, inputs are images [B, H, W, 3] uint8 and the state holds batch statistics. `key`
feeds dropout and augmentation; it is None in evaluation, where nothing is random and the state stays: there the
full mode adds to it the embeddings [B, D] that the head was given, as `EMBEDDINGS`.
Logits are [B, C], or [B, 1] for two classes.

Only `TrainState.params` is differentiated. What is frozen comes in as `frozen`, an argument of its own of the
compiled step: no gradient, no optimizer state, no second copy, and not a constant in the program.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util

from probe.devices import fetch
from probe.evaluation.metrics import Metrics
from probe.heads import class_logits

EMBEDDINGS = "embeddings"

Params = dict[str, Any]  # nested dicts of arrays
ApplyFn = Callable[[Params, Any, Any, jax.Array | None], tuple[jax.Array, Any]]
Prepare = Callable[[jax.Array, "Batch"], tuple[Any, jax.Array]]


@struct.dataclass
class Batch:
    """Examples for one step; every batch of a run has the same shapes.

    inputs [B, …], on the host of one of several processes its own rows alone; labels [B] int32; mask [B] bool, false
    where a row only fills the batch up; examples [B] int32, the examples' numbers in the training set; epoch [] int32,
    counted from 0.
    """

    inputs: Any
    labels: Any
    mask: Any
    examples: Any
    epoch: Any


@struct.dataclass
class TrainState:
    """All that a step changes. `key` never changes: each step folds its number into it.

    average: an exponential moving average of `params`, or None.
    """

    step: jax.Array
    params: Params
    model_state: Any
    opt_state: optax.OptState
    key: jax.Array
    average: Params | None

    @classmethod
    def create(
        cls,
        params: Params,
        tx: optax.GradientTransformation,
        *,
        seed: int,
        model_state: Any = None,
        averaged: bool = False,
    ) -> "TrainState":
        """The state before the first step, in arrays of its own, since a step overwrites what it is given.

        Args:
          params: the trainable leaves, nested dicts.
          tx: the optimizer over exactly these leaves.
          seed: of dropout and augmentation.
          model_state: batch statistics, or nothing.
          averaged: whether a moving average of the parameters is kept.
        """
        params = jax.tree.map(jnp.array, params)  # jnp.array copies
        return cls(
            step=jnp.zeros((), jnp.int32),  # a Python int would compile the step again at every count
            params=params,
            model_state=jax.tree.map(jnp.array, {} if model_state is None else model_state),
            opt_state=tx.init(params),
            key=jax.random.key(seed),
            average=jax.tree.map(jnp.array, params) if averaged else None,
        )

    @property
    def judged(self) -> Params:
        """The parameters that are evaluated and kept: the average where there is one."""
        return self.params if self.average is None else self.average


class TrainStep(Protocol):
    def __call__(self, state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]: ...


class EvalStep(Protocol):
    def __call__(self, params: Params, frozen: Params, model_state: Any, inputs: Any) -> jax.Array: ...


class AnswerStep(Protocol):
    def __call__(
        self, params: Params, frozen: Params, model_state: Any, inputs: Any
    ) -> tuple[jax.Array, jax.Array | None]: ...


def make_train_step(
    apply_fn: ApplyFn,
    tx: optax.GradientTransformation,
    *,
    prepare: Prepare | None = None,
    num_microbatches: int = 1,
    average_decay: float | None = None,
) -> TrainStep:
    """Compiles (state, frozen, batch) -> (state, sums over the batch). The state that goes in is donated.

    The loss is the mean cross-entropy in nats over the real rows of the batch, however many microbatches it
    is computed in; the sums are of the cross-entropy with the true labels, whatever `prepare` made of them.

    Args:
      prepare: (key of the run, batch) -> (inputs, targets [B, C]), for augmentation.
      num_microbatches: into how many parts the batch is cut, to need the memory of one; it divides B.
      average_decay: of the moving average of the parameters.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        inputs, targets = (batch.inputs, None) if prepare is None else prepare(state.key, batch)
        num_real = batch.mask.sum()

        def loss_fn(params: Params, model_state: Any, part: Any, key: jax.Array) -> Any:
            inputs, targets, labels, mask = part
            logits, model_state = apply_fn(merge(params, frozen), model_state, inputs, key)
            logits = class_logits(logits)
            sums = Metrics.from_logits(logits, labels, mask)
            if targets is None:
                loss = sums.nll_sum
            else:
                loss = jnp.sum(jnp.where(mask, optax.softmax_cross_entropy(logits, targets), 0.0))
            return loss / num_real, (sums, model_state)

        gradient = jax.grad(loss_fn, has_aux=True)
        whole = (inputs, targets, batch.labels, batch.mask)
        if num_microbatches == 1:
            grads, (sums, model_state) = gradient(state.params, state.model_state, whole, key)
        else:

            def add_part(carry: Any, part_and_number: Any) -> tuple[Any, None]:
                grads, sums, model_state = carry
                part, number = part_and_number
                part_key = jax.random.fold_in(key, number)
                part_grads, (part_sums, model_state) = gradient(state.params, model_state, part, part_key)
                return (*jax.tree.map(jnp.add, (grads, sums), (part_grads, part_sums)), model_state), None

            parts = jax.tree.map(lambda leaf: leaf.reshape(num_microbatches, -1, *leaf.shape[1:]), whole)
            first = jax.tree.map(lambda leaf: leaf[0], parts)
            shapes = jax.eval_shape(gradient, state.params, state.model_state, first, key)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0], shapes[1][0]))
            (grads, sums, model_state), _ = jax.lax.scan(
                add_part, (*zeros, state.model_state), (parts, jnp.arange(num_microbatches))
            )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average_decay is not None:
            # Early on the average follows closely: else it would hold the start for 1 / (1 - decay) steps.
            decay = jnp.minimum(average_decay, (state.step + 1) / (state.step + 10))
            average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        done = {"params": params, "model_state": model_state, "opt_state": opt_state, "average": average}
        return dataclasses.replace(state, step=state.step + 1, **done), sums

    return train_step


def make_eval_step(apply_fn: ApplyFn) -> EvalStep:
    """Compiles (params, frozen, model_state, inputs) -> logits [B, C], two classes having two columns.

    Two steps of one `apply_fn` share their compilation, that of `make_answer_step` too.
    """
    answer = make_answer_step(apply_fn)
    return lambda params, frozen, model_state, inputs: answer(params, frozen, model_state, inputs)[0]


def make_answer_step(apply_fn: ApplyFn) -> AnswerStep:
    """Compiles (params, frozen, model_state, inputs) -> logits, as above, and the embeddings [B, D] that the head was
    given, or None where `apply_fn` shows none."""
    return functools.partial(_answer, apply_fn)


@functools.partial(jax.jit, static_argnums=0)
def _answer(
    apply_fn: ApplyFn, params: Params, frozen: Params, model_state: Any, inputs: Any
) -> tuple[jax.Array, jax.Array | None]:
    logits, shown = apply_fn(merge(params, frozen), model_state, inputs, None)
    return class_logits(logits), (shown or {}).get(EMBEDDINGS)


def merge(params: Params, frozen: Params) -> Params:
    """Joins two nested dicts that share no leaf."""
    flat, other = traverse_util.flatten_dict(params), traverse_util.flatten_dict(frozen)
    assert flat.keys().isdisjoint(other)
    return dict(traverse_util.unflatten_dict({**flat, **other}))


def shuffled(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch, [N] indices: a function of (seed, epoch) and of nothing else."""
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def padded_batches(
    inputs: np.ndarray, labels: np.ndarray, batch_size: int, order: np.ndarray | None = None
) -> Iterator[Batch]:
    """Yields every example once, in batches of one shape; the last is filled up and masked.

    Args:
      inputs: [N, …]; labels: [N] integers.
      batch_size: B, rows per batch.
      order: indices of the rows to yield (default: all, as they stand).
    """
    order = np.arange(len(labels)) if order is None else order
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield padded_batch(inputs[rows], labels[rows], batch_size, examples=rows)


def padded_batch(inputs: np.ndarray, labels: np.ndarray, batch_size: int, *, examples: np.ndarray) -> Batch:
    """One batch of `batch_size` rows from [n, …] inputs and [n] labels and numbers, 0 < n <= batch_size.

    It is filled up with the same rows again, masked: statistics over the batch meet nothing strange.
    """
    at = filled_up(np.arange(len(labels)), batch_size)
    whole = len(at) == len(labels)
    return make_batch(inputs if whole else inputs[at], labels[at], len(labels), examples=examples[at])


def filled_up(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """[batch_size] of 0 < n <= batch_size rows: the same again where they are fewer."""
    assert 0 < len(rows) <= batch_size
    return rows if len(rows) == batch_size else rows[np.arange(batch_size) % len(rows)]


def make_batch(inputs: np.ndarray, labels: np.ndarray, num_real: int, *, examples: np.ndarray) -> Batch:
    """A batch that is filled up already, of which the first `num_real` rows count."""
    return Batch(
        inputs=inputs,
        labels=labels.astype(np.int32),
        mask=np.arange(len(labels)) < num_real,
        examples=examples.astype(np.int32),
        epoch=np.int32(0),
    )


def predict_logits(
    eval_step: EvalStep,
    params: Params,
    frozen: Params,
    model_state: Any,
    batches: Iterable[Batch],
    place_batch: Callable[[Batch], Batch] = lambda batch: batch,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, C] float32 and labels [N] of the real rows of all batches, in their order.

    place_batch: puts a batch on devices.
    """

    def logits_alone(params: Params, frozen: Params, model_state: Any, inputs: Any) -> tuple[jax.Array, None]:
        return eval_step(params, frozen, model_state, inputs), None

    logits, _, labels = predict(logits_alone, params, frozen, model_state, batches, place_batch)
    return logits, labels


def predict(
    answer_step: AnswerStep,
    params: Params,
    frozen: Params,
    model_state: Any,
    batches: Iterable[Batch],
    place_batch: Callable[[Batch], Batch] = lambda batch: batch,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Logits [N, C], embeddings [N, D] or None, both float32, and labels [N], by the same rows in the same order."""
    parts = []
    for batch in batches:
        real = np.asarray(batch.mask)
        answer = fetch(answer_step(params, frozen, model_state, place_batch(batch).inputs))
        parts.append(jax.tree.map(lambda leaf, real=real: leaf[real], (*answer, np.asarray(batch.labels))))
    logits, embeddings, labels = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return logits, embeddings, labels
