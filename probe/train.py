"""Training: batches of one shape, the train state, the train and eval steps, and `fit`.

Knows an `apply_fn`, not which mode it is in. The hinge is

    apply_fn: (params, model_state, inputs, key) -> (logits, model_state)

Head only, `params` is {"head": …}, inputs are embeddings [B, D] and the state is empty. Full, `params` is
{"backbone": …, "head": …}, inputs are images [B, H, W, 3] uint8 and the state holds batch statistics. `key`
feeds dropout and augmentation; it is None in evaluation, where nothing is random and the state stays.
Logits are [B, C], or [B, 1] for two classes.

Only `TrainState.params` is differentiated. What is frozen comes in as `frozen`, an argument of its own of the
compiled step: no gradient, no optimizer state, no second copy, and not a constant in the program.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util

from probe.errors import NumericalError
from probe.heads import class_logits
from probe.metrics import Metrics

Params = dict[str, Any]  # nested dicts of arrays
ApplyFn = Callable[[Params, Any, Any, jax.Array | None], tuple[jax.Array, Any]]

_STEPS_BETWEEN_CHECKS = 50  # how many steps may run ahead before the host looks at their losses


@struct.dataclass
class Batch:
    """Examples for one step; every batch of a run has the same shapes.

    inputs [B, …]; labels [B] int32; mask [B] bool, false where a row only fills the batch up.
    """

    inputs: Any
    labels: Any
    mask: Any


@struct.dataclass
class TrainState:
    """All that a step changes. `key` never changes: each step folds its number into it."""

    step: jax.Array
    params: Params
    model_state: Any
    opt_state: optax.OptState
    key: jax.Array

    @classmethod
    def create(
        cls, params: Params, tx: optax.GradientTransformation, *, seed: int, model_state: Any = None
    ) -> "TrainState":
        """The state before the first step, in arrays of its own, since a step overwrites what it is given.

        Args:
          params: the trainable leaves, nested dicts.
          tx: the optimizer over exactly these leaves.
          seed: of dropout and augmentation.
          model_state: batch statistics, or nothing.
        """
        params = jax.tree.map(jnp.array, params)  # jnp.array copies
        return cls(
            step=jnp.zeros((), jnp.int32),  # a Python int would compile the step again at every count
            params=params,
            model_state=jax.tree.map(jnp.array, {} if model_state is None else model_state),
            opt_state=tx.init(params),
            key=jax.random.key(seed),
        )


class TrainStep(Protocol):
    def __call__(self, state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]: ...


class EvalStep(Protocol):
    def __call__(self, params: Params, frozen: Params, model_state: Any, inputs: Any) -> jax.Array: ...


def make_train_step(apply_fn: ApplyFn, tx: optax.GradientTransformation) -> TrainStep:
    """Compiles (state, frozen, batch) -> (state, sums over the batch). The state that goes in is donated.

    The loss is the mean cross-entropy in nats over the real rows of the batch.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)

        def loss_fn(params: Params) -> tuple[jax.Array, tuple[Metrics, Any]]:
            logits, model_state = apply_fn(merge(params, frozen), state.model_state, batch.inputs, key)
            sums = Metrics.from_logits(class_logits(logits), batch.labels, batch.mask)
            return sums.nll_sum / sums.num_examples, (sums, model_state)

        grads, (sums, model_state) = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        done = {"params": params, "model_state": model_state, "opt_state": opt_state}
        return dataclasses.replace(state, step=state.step + 1, **done), sums

    return train_step


def make_eval_step(apply_fn: ApplyFn) -> EvalStep:
    """Compiles (params, frozen, model_state, inputs) -> logits [B, C], two classes having two columns.

    Two steps of one `apply_fn` share their compilation.
    """
    return functools.partial(_eval_step, apply_fn)


@functools.partial(jax.jit, static_argnums=0)
def _eval_step(apply_fn: ApplyFn, params: Params, frozen: Params, model_state: Any, inputs: Any) -> jax.Array:
    logits, _ = apply_fn(merge(params, frozen), model_state, inputs, None)
    return class_logits(logits)


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
    """Yields every example once, in batches of one shape; the last is filled up with zeros and masked.

    Args:
      inputs: [N, …]; labels: [N] integers.
      batch_size: B, rows per batch.
      order: indices of the rows to yield (default: all, as they stand).
    """
    order = np.arange(len(labels)) if order is None else order
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield padded_batch(inputs[rows], labels[rows], batch_size)


def padded_batch(inputs: np.ndarray, labels: np.ndarray, batch_size: int) -> Batch:
    """One batch of `batch_size` rows from [n, …] inputs and [n] labels, 0 < n <= batch_size."""
    num_real = len(labels)
    assert 0 < num_real <= batch_size
    if num_real < batch_size:
        missing = batch_size - num_real
        inputs = np.concatenate([inputs, np.zeros((missing, *inputs.shape[1:]), inputs.dtype)])
        labels = np.concatenate([labels, np.zeros(missing, labels.dtype)])
    return Batch(inputs=inputs, labels=labels.astype(np.int32), mask=np.arange(batch_size) < num_real)


def predict_logits(
    eval_step: EvalStep, params: Params, frozen: Params, model_state: Any, batches: Iterable[Batch]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, C] float32 and labels [N] of the real rows of all batches, in their order."""
    logits, labels = [], []
    for batch in batches:
        logits.append(np.asarray(eval_step(params, frozen, model_state, batch.inputs))[batch.mask])
        labels.append(batch.labels[batch.mask])
    return np.concatenate(logits), np.concatenate(labels)


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One line of the history: losses in nats, accuracies as shares; training's are means on the way."""

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What `fit` found.

    params, model_state: of the best epoch, as NumPy arrays; the trainable leaves only.
    history: one line per epoch, and `best`, the index of the best.
    val_logits: [E, N, C], what was said of the N validation rows after each epoch; val_labels: [N].
    """

    params: Params
    model_state: Any
    history: list[Epoch]
    best: int
    val_logits: np.ndarray
    val_labels: np.ndarray


def fit(
    apply_fn: ApplyFn,
    tx: optax.GradientTransformation,
    params: Params,
    *,
    train_batches: Callable[[int], Iterable[Batch]],
    val_batches: Callable[[], Iterable[Batch]],
    num_epochs: int,
    seed: int,
    frozen: Params | None = None,
    model_state: Any = None,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> FitResult:
    """Trains for `num_epochs` and keeps the parameters of the epoch that does best on validation.

    Args:
      apply_fn, tx: see the module.
      params: the trainable leaves, nested dicts; the arrays are left as they are.
      train_batches: epoch, counted from 0 -> its batches; all of one shape.
      val_batches: -> the validation rows, the same at every call.
      seed: of dropout and augmentation; the order of the examples is the business of `train_batches`.
      frozen: the other leaves that `apply_fn` needs.
      model_state: batch statistics, or nothing.
      on_epoch: told each line of the history as it is made.
    Raises: NumericalError if a loss is not finite, naming it and the step.
    """
    frozen = {} if frozen is None else frozen
    state = TrainState.create(params, tx, seed=seed, model_state=model_state)
    train_step, eval_step = make_train_step(apply_fn, tx), make_eval_step(apply_fn)
    history: list[Epoch] = []
    val_logits: list[np.ndarray] = []
    best, best_params, best_state = 0, params, model_state
    for epoch in range(num_epochs):
        start = time.monotonic()
        state, train_loss, train_accuracy = _run_epoch(train_step, state, frozen, train_batches(epoch))
        logits, labels = predict_logits(eval_step, state.params, frozen, state.model_state, val_batches())
        val_accuracy, val_loss = _score(logits, labels)
        step = int(state.step)
        _check_finite("validation loss", val_loss, step)
        seconds = time.monotonic() - start
        history.append(Epoch(epoch + 1, step, train_loss, train_accuracy, val_loss, val_accuracy, seconds))
        on_epoch(history[-1])
        val_logits.append(logits)
        best = best_candidate(np.stack(val_logits), labels)
        if best == epoch:
            # NumPy copies: the next step is given these arrays to overwrite.
            best_params, best_state = jax.tree.map(np.array, (state.params, state.model_state))
    return FitResult(best_params, best_state, history, best, np.stack(val_logits), labels)


def best_candidate(logits: np.ndarray, labels: np.ndarray) -> int:
    """Which of K classifiers is best on these rows: highest accuracy, then lowest loss, then the earliest.

    Args:
      logits: [K, N, C], of epochs or of other candidates; labels: [N].
    """
    scores = [_score(candidate, labels) for candidate in logits]
    return min(range(len(scores)), key=lambda k: (-scores[k][0], scores[k][1]))


def cross_fitted(logits: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """Logits [N, C] that may be judged on the rows that chose: each half is answered as the other half picks.

    The figure of the best of K candidates on the rows that picked it is too good. Here the rows are dealt,
    class by class, into two halves, and each gets the logits of the candidate that the other finds best.

    Args:
      logits: [K, N, C]; labels: [N].
    Returns: None where a half would be empty: then no honest figure exists.
    """
    half = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        (rows,) = np.nonzero(labels == label)
        half[rows[1::2]] = True
    if half.all() or not half.any():
        return None
    judged: np.ndarray = np.empty_like(logits[0])
    judged[half] = logits[best_candidate(logits[:, ~half], labels[~half])][half]
    judged[~half] = logits[best_candidate(logits[:, half], labels[half])][~half]
    return judged


def _run_epoch(
    train_step: TrainStep, state: TrainState, frozen: Params, batches: Iterable[Batch]
) -> tuple[TrainState, float, float]:
    """One pass: the new state, the mean loss in nats and the accuracy over its examples."""
    total: Metrics | None = None
    ahead: list[Metrics] = []  # on the device: steps are dispatched without waiting for one another

    def settle(total: Metrics | None) -> Metrics:
        sums: list[Metrics] = jax.device_get(ahead)
        for index, step_sums in enumerate(sums):
            _check_finite("training loss", step_sums.nll_sum, int(state.step) - len(sums) + index + 1)
            total = step_sums if total is None else total.merge(step_sums)
        ahead.clear()
        assert total is not None, "an epoch has a batch or more"
        return total

    for batch in batches:
        state, sums = train_step(state, frozen, batch)
        ahead.append(sums)
        if len(ahead) == _STEPS_BETWEEN_CHECKS:
            total = settle(total)
    total = settle(total)
    return state, float(total.nll), float(total.accuracy)


def _check_finite(metric: str, value: float, step: int) -> None:
    if not np.isfinite(value):
        raise NumericalError(
            f"{metric} is {value} at step {step}: lower the learning rates, or look for broken inputs"
        )


def _score(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy and mean negative log-likelihood in nats of [N, C] logits."""
    logits = logits.astype(np.float64)
    log_normalizer = np.logaddexp.reduce(logits, axis=1)
    nll = log_normalizer - np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return float(np.mean(logits.argmax(axis=1) == labels)), float(np.mean(nll))
