"""One pass over the rows: loss and gradient of many logistic regressions at once, as two wide matrix products.

A *lane* is one problem: a fold that is left out, and (sigmoids) a label. The columns of all lanes stand side by side,
since XLA runs narrow products at a third of the rate of wide ones. Rows lie on the device, where a pass is one program,
or are streamed: then a loop on the host adds pieces of one shape to the sums, each by one program. Where several
processes have a part of the rows each, the runtime adds up their sums, pass by pass.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from probe import distributed
from probe.probing.features import Stream

NOTHING = int(np.iinfo(np.int32).min)  # left out by a lane that trains on every row: no row's fold, unlike -1


@struct.dataclass
class Rows:
    """Rows on the device, in chunks of one shape [n, B]; a row that only fills a chunk up has weight 0.

    features [n, B, D] float32; labels [n, B] int32 for a softmax, [n, B, C] of 0 and 1 for sigmoids; weights
    [n, B]; folds [n, B] int32, the lane group that does not train on the row and is judged on it.
    """

    features: Any
    labels: Any
    weights: Any
    folds: Any


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedRows:
    """What `Rows` holds, [N, …] on the host, with features that are streamed `chunk` at a time."""

    features: Stream
    labels: np.ndarray
    weights: np.ndarray
    folds: np.ndarray
    chunk: int

    def __iter__(self) -> Iterator[Rows]:
        """Chunks [B, …], the last one filled up with rows of weight 0."""
        for at, part in self.features.pieces(self.chunk):
            yield Rows(
                features=self._filled_up(part, np.float32),
                labels=self._filled_up(self.labels[at], np.int32),
                weights=self._filled_up(self.weights[at], np.float32),
                folds=self._filled_up(self.folds[at], np.int32),
            )

    def _filled_up(self, values: np.ndarray, dtype: Any) -> np.ndarray:
        filled = np.zeros((self.chunk, *values.shape[1:]), dtype)
        filled[: len(values)] = values
        return filled


@dataclasses.dataclass(frozen=True, eq=False)
class DividedRows:
    """This process's part of the rows; the others have theirs, and all pass over them together."""

    own: Rows | StreamedRows


AnyRows = Rows | StreamedRows | DividedRows


@struct.dataclass
class Lanes:
    """K problems that run side by side.

    fold: [K] the fold that is left out, or NOTHING. label: [K] the column of `Rows.labels` (sigmoids).
    total: [K] sum of the weights of the rows that train the lane. ratio: [K, D] what features must be multiplied
    with to be scaled by the lane's own rows. penalties: [L, K] values of λ, falling. prior: weights that the penalty
    pulls to, [1, M, D + 1], its biases 0, or [1, 1, 1] of 0.
    eigenvalues [D], eigenvectors [D, D]: of the second moment of the features.
    """

    fold: Any
    label: Any
    total: Any
    ratio: Any
    penalties: Any
    prior: Any
    eigenvalues: Any
    eigenvectors: Any


@struct.dataclass
class Sums:
    """What one pass over the rows gives for weights U [K, M, D + 1]; every sum is divided by the lane's
    total.

    loss [K]; grad [K, M, D + 1]; curvature [K], the mean of p(1 - p); held_nll and held_correct [K], plain
    sums over the rows of the lane's fold.
    """

    loss: Any
    grad: Any
    curvature: Any
    held_nll: Any
    held_correct: Any


def evaluate(rows: AnyRows, lanes: Lanes, weights: jax.Array) -> Sums:
    """One pass: the sums at weights [K, M, D + 1]. Those on the device may be a part of a larger program."""
    if isinstance(rows, DividedRows):
        own = evaluate_rows if isinstance(rows.own, Rows) else evaluate
        of_all: Sums = distributed.total(own(rows.own, lanes, weights))
        return of_all
    sums = zero_sums(weights)
    scaled = _scaled(weights, lanes)
    if isinstance(rows, Rows):
        sums = jax.lax.scan(lambda sums, chunk: (_add_chunk(sums, chunk, lanes, scaled), None), sums, rows)[0]
    else:
        for chunk in rows:
            before, sums = sums, _add_chunk(sums, chunk, lanes, scaled)
            before.loss.block_until_ready()  # else reading runs ahead of computing, and chunks pile up
    return dataclasses.replace(sums, grad=_scaled(sums.grad, lanes))


evaluate_rows = jax.jit(evaluate)  # of `Rows`, where it is a program of its own


def _scaled(weights: jax.Array, lanes: Lanes) -> jax.Array:
    """[K, M, D + 1] with each lane's ratio on the weights of features, and the bias as it is."""
    return weights * jnp.pad(lanes.ratio, ((0, 0), (0, 1)), constant_values=1)[:, None]


@jax.jit
def _add_chunk(sums: Sums, chunk: Rows, lanes: Lanes, weights: jax.Array) -> Sums:
    added: Sums = jax.tree.map(jnp.add, sums, _evaluate_chunk(chunk, lanes, weights))
    return added


def zero_sums(weights: jax.Array) -> Sums:
    """What a pass starts from."""
    zeros = jnp.zeros(weights.shape[0], weights.dtype)
    return Sums(zeros, jnp.zeros_like(weights), zeros, zeros, zeros)


def _evaluate_chunk(chunk: Rows, lanes: Lanes, weights: jax.Array) -> Sums:
    """The part of the sums that [B] rows contribute.

    Logits are [K, M, B]: what runs over the outputs of a row is then done for many rows at once, where reductions along
    the last axis are not vectorised on CPU. With [B, K, M], 500 columns took 3.5 times as long.
    """
    num_lanes, num_outputs, width = weights.shape[0], weights.shape[1], weights.shape[2] - 1
    features = chunk.features.astype(weights.dtype)
    kernel = weights[..., :-1].reshape(-1, width)
    logits = _product(kernel, features, along_rows=False).reshape(num_lanes, num_outputs, -1) + weights[..., -1:]
    held = (chunk.folds == lanes.fold[:, None]) & (chunk.weights > 0)
    share = jnp.where(held, 0, chunk.weights.astype(weights.dtype)) / lanes.total[:, None]  # [K, B]
    answers = _sigmoids(logits, chunk.labels.T[lanes.label]) if num_outputs == 1 else _softmax(logits, chunk.labels)
    nll, correct, residuals, curvature = answers
    residuals *= share[:, None]
    grad = _product(residuals.reshape(-1, residuals.shape[-1]), features, along_rows=True)
    grad = grad.reshape(num_lanes, num_outputs, width)
    return Sums(
        loss=jnp.sum(nll * share, axis=1),
        grad=jnp.concatenate([grad, residuals.sum(axis=2, keepdims=True)], axis=2),
        curvature=jnp.sum(curvature * share, axis=1),
        held_nll=jnp.sum(jnp.where(held, nll, 0), axis=1),
        held_correct=jnp.sum(held & correct, axis=1, dtype=weights.dtype),
    )


def _product(left: jax.Array, features: jax.Array, *, along_rows: bool) -> jax.Array:
    """left @ features, or left @ features.T where the sum is not along the rows."""
    contracted = ((1,), (0 if along_rows else 1,))
    return jax.lax.dot_general(left, features, (contracted, ((), ())), precision="highest")


# What an answer lacks is summed up as such: 1 - p of a row that is right beyond doubt would be float32's rounding.


def _softmax(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    """Of logits [K, M, B] and labels [B]: nll, correct [K, B], gradient [K, M, B], mean of p(1 - p) over M, [K, B]."""
    targets = labels == jnp.arange(logits.shape[1])[:, None]
    highest = logits.max(axis=1)
    behind = highest - jnp.sum(jnp.where(targets, logits, 0), axis=1)
    exps = jnp.exp(logits - highest[:, None])
    of_others = jnp.where(targets, 0, exps)
    others = of_others.sum(axis=1)
    normalizer = others + jnp.exp(-behind)
    wrong = others / normalizer
    correct = behind <= 0
    residuals = jnp.where(targets, -wrong[:, None], exps * (1 / normalizer)[:, None])
    squares = jnp.sum(of_others**2, axis=1) / normalizer**2
    curvature = (2 * wrong - wrong**2 - squares) / logits.shape[1]  # 1 - Σ p², with 1 - wrong as the target's p
    return behind + jnp.where(correct, jnp.log1p(others), jnp.log(normalizer)), correct, residuals, curvature


def _sigmoids(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    """What `_softmax` gives, of logits [K, 1, B] and labels [K, B] of 0 and 1."""
    targets = labels > 0
    wrong = jnp.where(targets, -logits[:, 0], logits[:, 0])  # the logit of the wrong answer
    probs = jax.nn.sigmoid(wrong)
    residuals = jnp.where(targets, -probs, probs)[:, None]
    return jax.nn.softplus(wrong), (logits[:, 0] > 0) == targets, residuals, probs * (1 - probs)
