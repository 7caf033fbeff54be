"""What is reported of a classifier: sums that merge and divide once, and figures with their intervals.

`Metrics` is what train and evaluation steps add up on the device, so that batch size cannot change an evaluation.
`summarize` is what metrics.json says of a split.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from probe.evaluation.calibration import calibration_error_interval
from probe.evaluation.figures import CALIBRATION, LOSSES, SHARES, Figures
from probe.evaluation.intervals import bootstrap_interval, resample_counts, share_interval, wilson_interval

Intervals = dict[str, list[float] | None]


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


def summarize(
    logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, full: bool = True, seed: int = 0
) -> dict[str, Any]:
    """What metrics.json holds for a split, as JSON values; None is what these rows cannot say.

    Args:
      logits: [N, C] of the softmax, N > 0 (log-probabilities will do as well), or of independent sigmoids.
      labels: [N] integers, or [N, C] bool.
      class_names: of the C classes.
      full: false leaves out what takes more than a pass over the rows: all intervals but accuracy's, and the
        figures of ranking.
      seed: of the bootstrap.
    Returns: n; each figure that `Figures` lists under its name, and its 95 % interval under name_interval_95;
      per_class: name to n, accuracy (share of its rows that are recognised, which is the recall; with labels in
      sets, share of all rows on which this label is right), precision, recall and f1; confusions: the wrong
      answers as [{"label", "predicted", "n"}], the most frequent first (none where labels are sets). With per_class
      these are the whole confusion matrix.
    """
    figures = Figures.of(logits, np.asarray(labels), ranking=full)
    values = figures.point()
    intervals: Intervals = {"accuracy": share_interval(int(figures.correct.sum()), figures.num_rows)}
    if full:
        intervals = _intervals(figures, values, seed)
    summary: dict[str, Any] = {"n": figures.num_rows}
    for name, value in values.items():
        summary[name] = _number(value)
        if name in intervals:
            summary[f"{name}_interval_95"] = intervals[name]
    summary["per_class"] = _per_class(figures, class_names)
    if not figures.multi_label:
        summary["confusions"] = _confusions(np.asarray(labels), figures.predicted, class_names)
    return summary


def _intervals(figures: Figures, values: dict[str, float], seed: int) -> Intervals:
    """Every figure's 95 % interval; None where these rows cannot say."""
    chunks = [(figures(counts), counts @ figures.gaps) for counts in resample_counts(figures.num_rows, seed)]
    intervals: Intervals = {}
    for name, value in values.items():
        samples = np.concatenate([sample[name] for sample, _ in chunks])
        num_answers = figures.num_answers(name)
        if name in SHARES:
            intervals[name] = share_interval(round(value * figures.num_rows), figures.num_rows)
        elif name not in LOSSES and value in (0, 1):  # every sample is the same then
            intervals[name] = wilson_interval(value * num_answers, num_answers)
        elif np.isnan(value) or figures.num_rows == 1:
            intervals[name] = None
        elif name == CALIBRATION:
            resampled = np.concatenate([gaps for _, gaps in chunks]) / figures.num_rows
            intervals[name] = calibration_error_interval(figures.gaps.mean(axis=0), resampled)
        else:
            intervals[name] = bootstrap_interval(samples, value)
    return intervals


def _per_class(figures: Figures, class_names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    actual, hits, said = (np.asarray(count).ravel() for count in figures.tally(np.ones((1, figures.num_rows))))
    asked, right = (np.asarray(which.sum(axis=0)).ravel() for which in figures.answers_by_class())
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: there is no such figure
        columns = {
            "accuracy": right / asked,
            "precision": hits / said,
            "recall": hits / actual,
            "f1": 2 * hits / (actual + said),
        }
    return {
        name: {"n": int(actual[c])} | {figure: _number(values[c]) for figure, values in columns.items()}
        for c, name in enumerate(class_names)
    }


def _confusions(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    wrong = labels != predicted
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        {"label": class_names[pairs[i, 0]], "predicted": class_names[pairs[i, 1]], "n": int(counts[i])} for i in order
    ]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def describe_splits(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for people on each split that there is, in the order in which they are used.

    Args:
      splits: name -> what `summarize` gives; or n, accuracy None, and "why" there is no figure. What stands under
        "of" says whose answers were judged.
    """
    lines = []
    for name in ("train", "val", "test"):
        figures = splits.get(name)
        if figures is None:
            lines.append(f"{name:5}  no rows")
        elif figures["accuracy"] is None:
            lines.append(f"{name:5}  no figure for its {figures['n']:,} rows: {figures['why']}")
        else:
            low, high = figures["accuracy_interval_95"]
            lines.append(
                f"{name:5}  accuracy {figures['accuracy']:.4f} (95 %: {low:.4f} to {high:.4f})"
                f"  negative log-likelihood {figures['nll']:.4f}  rows {figures['n']:,}"
                + (f"\n       (of {figures['of']})" if "of" in figures else "")
            )
    return lines
