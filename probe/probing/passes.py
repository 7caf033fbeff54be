"""One pass over the rows: loss and gradient of many logistic regressions at once, as two wide matrix products.

A *lane* is one problem: a fold that is left out, and (sigmoids) a label. The columns of all lanes stand side by side,
since XLA runs narrow products at a third of the rate of wide ones. Rows lie on the device, where a pass is one program,
or are streamed: then a loop on the host adds pieces of one shape to the sums, each by one program.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

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


@struct.dataclass
class Lanes:
    """K problems that run side by side.

    fold: [K] the fold that is left out, or NOTHING. label: [K] the column of `Rows.labels` (sigmoids).
    total: [K] sum of the weights of the rows that train the lane. ratio: [K, D] what features must be multiplied
    with to be scaled by the lane's own rows. penalties: [L, K] values of λ, falling. prior: weights that the penalty
    pulls to, [1, D + 1, M], its bias row 0, or [1, 1, 1] of 0.
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
    """What one pass over the rows gives for weights U [K, D + 1, M]; every sum is divided by the lane's
    total.

    loss [K]; grad [K, D + 1, M]; curvature [K], the mean of p(1 - p); held_nll and held_correct [K], plain
    sums over the rows of the lane's fold.
    """

    loss: Any
    grad: Any
    curvature: Any
    held_nll: Any
    held_correct: Any


def evaluate(rows: Rows | StreamedRows, lanes: Lanes, weights: jax.Array) -> Sums:
    """One pass: the sums at weights [K, D + 1, M]. Those on the device may be a part of a larger program."""
    sums = zero_sums(weights)
    if isinstance(rows, Rows):
        added: Sums = jax.lax.scan(lambda sums, chunk: (_add_chunk(sums, chunk, lanes, weights), None), sums, rows)[0]
        return added
    for chunk in rows:
        before, sums = sums, _add_chunk(sums, chunk, lanes, weights)
        before.loss.block_until_ready()  # else reading runs ahead of computing, and chunks pile up
    return sums


@jax.jit
def _add_chunk(sums: Sums, chunk: Rows, lanes: Lanes, weights: jax.Array) -> Sums:
    added: Sums = jax.tree.map(jnp.add, sums, _evaluate_chunk(chunk, lanes, weights))
    return added


def zero_sums(weights: jax.Array) -> Sums:
    """What a pass starts from."""
    zeros = jnp.zeros(weights.shape[0], weights.dtype)
    return Sums(zeros, jnp.zeros_like(weights), zeros, zeros, zeros)


def _evaluate_chunk(chunk: Rows, lanes: Lanes, weights: jax.Array) -> Sums:
    """The part of the sums that [B] rows contribute."""
    num_lanes, width, num_outputs = weights.shape[0], weights.shape[1] - 1, weights.shape[2]
    features = chunk.features.astype(weights.dtype)
    kernel = (weights[:, :-1] * lanes.ratio[:, :, None]).transpose(1, 0, 2).reshape(width, -1)
    product = jnp.matmul(features, kernel, precision="highest")
    logits = product.reshape(-1, num_lanes, num_outputs) + weights[:, -1]
    held = (chunk.folds[:, None] == lanes.fold) & (chunk.weights[:, None] > 0)
    share = jnp.where(held, 0, chunk.weights[:, None].astype(weights.dtype)) / lanes.total  # [B, K]
    # What an answer lacks is summed up as such: 1 - p of a row that is right beyond doubt would be float32's rounding.
    if num_outputs == 1:
        targets = chunk.labels[:, lanes.label, None] > 0
        wrong = jnp.where(targets, -logits, logits)  # the logit of the wrong answer
        nll = jax.nn.softplus(wrong)[..., 0]
        probs = jax.nn.sigmoid(wrong)
        residuals = jnp.where(targets, -probs, probs)
        correct = ((logits > 0) == targets)[..., 0]
    else:
        targets = chunk.labels[:, None, None] == jnp.arange(num_outputs)
        highest = logits.max(axis=-1, keepdims=True)
        exps = jnp.exp(logits - highest)
        others = jnp.sum(jnp.where(targets, 0, exps), axis=-1, keepdims=True)
        normalizer = exps.sum(axis=-1, keepdims=True)
        probs = exps / normalizer
        residuals = jnp.where(targets, -others, exps) / normalizer
        behind = (highest - jnp.sum(jnp.where(targets, logits, 0), axis=-1, keepdims=True))[..., 0]
        correct = behind <= 0
        nll = behind + jnp.where(correct, jnp.log1p(others[..., 0]), jnp.log(normalizer[..., 0]))
    residuals *= share[..., None]
    grad = jnp.matmul(features.T, residuals.reshape(-1, num_lanes * num_outputs), precision="highest")
    grad = grad.reshape(width, num_lanes, num_outputs).transpose(1, 0, 2) * lanes.ratio[:, :, None]
    return Sums(
        loss=jnp.sum(nll * share, axis=0),
        grad=jnp.concatenate([grad, residuals.sum(axis=0)[:, None]], axis=1),
        curvature=jnp.sum(jnp.mean(probs * (1 - probs), axis=-1) * share, axis=0),
        held_nll=jnp.sum(jnp.where(held, nll, 0), axis=0),
        held_correct=jnp.sum(held & correct, axis=0, dtype=weights.dtype),
    )
