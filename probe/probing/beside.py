"""What stands beside a head: what one would have without it, judged on the same rows."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from probe.evaluation.metrics import summarize
from probe.heads import TrainedHead, class_logits
from probe.probing.features import Stream, completed, pieces
from probe.probing.protocol import Data
from probe.probing.reference import default_decisions
from probe.probing.scaling import Scaling

_KEPT = ("n", "accuracy", "accuracy_interval_95", "nll")


def scikit_learn(data: Data, view: str) -> dict[str, Any]:
    """{"baseline": …}: scikit-learn's logistic regression as it comes: standardised features, C = 1, nothing chosen;
    {} where it cannot."""
    embeddings = data.embeddings[view]
    if data.multi_label or isinstance(embeddings, Stream):
        return {}
    fitted_on, judged, split = _rows(data)
    scaling = Scaling.of(embeddings[fitted_on], "standard")
    decisions = default_decisions(
        scaling.apply(embeddings[fitted_on]), data.labels[fitted_on], scaling.apply(embeddings[judged])
    )
    figures = _judge(data, decisions, judged)
    return {"baseline": {"program": "scikit-learn LogisticRegression", "C": 1.0, "split": split, **figures}}


def zero_shot(data: Data) -> dict[str, Any]:
    """{"zero_shot": …}: what the names of the classes give alone, where `--prior text` had them encoded; else {}."""
    if data.text_weights is None:
        return {}
    _, judged, split = _rows(data)
    kernel = data.text_weights.astype(np.float32)
    params = {"kernel": kernel, "bias": np.zeros(kernel.shape[1], np.float32), "unit_norm": np.ones((), np.float32)}
    head = TrainedHead(hidden=(), params=params)
    embeddings, answers = data.embeddings["projected"][judged], np.empty((len(judged), kernel.shape[1]), np.float32)
    for at, part in pieces(embeddings):
        answers[at] = head.apply(part)
    return {"zero_shot": {"split": split, **_judge(data, completed(embeddings, answers), judged)}}


def _judge(data: Data, outputs: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """outputs: [n, M] of a head."""
    logits = np.asarray(class_logits(jnp.asarray(outputs)))
    figures = summarize(logits, data.labels[rows], data.class_names, full=False)
    return {key: figures[key] for key in _KEPT}


def _rows(data: Data) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows to fit on, rows to judge on, and the latter's split.

    Train and validation are fitted and test judges; without a test split train is fitted and a given validation split
    judges; with neither all folds but the first that can be left out are fitted, and that one judges.
    """
    splits = data.splits
    if len(splits.test):
        return np.concatenate([splits.train, splits.val]), splits.test, "test"
    if len(splits.val):
        return splits.train, splits.val, "val"
    folds = data.folds[splits.train]
    first = folds == folds[folds >= 0].min()
    return splits.train[~first], splits.train[first], "val"
