"""Figures of a classifier: sums that merge and divide once, so that batch size cannot change an evaluation.

`Metrics` is what train and evaluation steps add up on the device; `summarize` is what metrics.json says of a
split.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from scipy.special import log_softmax

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


@struct.dataclass
class Metrics:
    """Sums over examples; add those of batches with `merge`, divide at the end.

    nll_sum: scalar, nats; class_correct, class_count: [C] int32, by true class.
    """

    nll_sum: Any
    class_correct: Any
    class_count: Any

    @classmethod
    def from_logits(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> "Metrics":
        """Sums over the real rows of a batch.

        Args:
          logits: [B, C], two classes having two columns (`heads.class_logits`); labels: [B] integers;
          mask: [B] bool, false for padding, whose logits and labels do not matter.
        """
        num_classes = logits.shape[-1]
        labels = jnp.where(mask, labels, 0)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        one_hot = (labels[:, None] == jnp.arange(num_classes)) & mask[:, None]
        correct = jnp.argmax(logits, axis=-1) == labels
        return cls(
            nll_sum=jnp.sum(jnp.where(mask, nll, 0.0)),
            class_correct=jnp.sum(one_hot & correct[:, None], axis=0, dtype=jnp.int32),
            class_count=jnp.sum(one_hot, axis=0, dtype=jnp.int32),
        )

    def merge(self, other: "Metrics") -> "Metrics":
        merged: Metrics = jax.tree.map(lambda a, b: a + b, self, other)
        return merged

    @property
    def num_examples(self) -> Any:
        return self.class_count.sum()

    @property
    def accuracy(self) -> Any:
        return self.class_correct.sum() / self.num_examples

    @property
    def nll(self) -> Any:
        """Mean negative log-likelihood, nats per example."""
        return self.nll_sum / self.num_examples


def summarize(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """What metrics.json holds for a split.

    Args:
      logits: [N, C] of the softmax, N > 0; log-probabilities will do as well; labels: [N] integers.
      class_names: of the C classes; one without examples has accuracy None.
    Returns: n, accuracy, its 95 % interval by Wilson's score, nll in nats, and n and accuracy per class.
    """
    labels = np.asarray(labels)
    log_probs = log_softmax(np.asarray(logits, np.float64), axis=1)
    correct = log_probs.argmax(axis=1) == labels
    count = np.bincount(labels, minlength=len(class_names))
    hits = np.bincount(labels[correct], minlength=len(class_names))
    return {
        "n": len(labels),
        "accuracy": float(correct.mean()),
        "accuracy_interval_95": wilson_interval(int(correct.sum()), len(labels)),
        "nll": float(-log_probs[np.arange(len(labels)), labels].mean()),
        "per_class": {
            name: {"n": int(n), "accuracy": float(hit / n) if n else None}
            for name, n, hit in zip(class_names, count, hits, strict=True)
        },
    }


def wilson_interval(num_correct: int, num_examples: int) -> list[float]:
    """95 % score interval [low, high] of a share; it keeps its level near 0 and 1. Source: Wilson 1927."""
    share, spread = num_correct / num_examples, _Z95**2 / num_examples
    centre = share + spread / 2
    half_width = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = (centre - half_width) / (1 + spread), (centre + half_width) / (1 + spread)
    return [max(0.0, low), min(1.0, high)]
