"""`--head knn`: the training rows themselves as the classifier, as DINOv2's evaluation has it.

A row's nearest neighbours by cosine vote for their classes with weight exp(cosine / temperature). Source: Wu et al.
2018, arXiv:1805.01978; temperature 0.07 and k of 10, 20, 100 and 200 as in DINOv2's `eval/knn.py`. Votes are no
probabilities: another temperature, fitted on answers to train without the row itself, makes them such.
"""

import numpy as np

from probe.config import FitLinearConfig
from probe.evaluation.calibration import fit_temperature
from probe.heads import TrainedHead, class_logits, neighbour_logits
from probe.probing.curve import Curve, RowScores
from probe.probing.protocol import Data, Fitted, train_groups
from probe.probing.scaling import unit_rows

TEMPERATURE = 0.07
_COUNTS = (200, 100, 20, 10)  # k, the smoothest first: of equals it is taken


def fit_knn(config: FitLinearConfig, data: Data) -> Fitted:
    """k by the accuracy on train without each row and its group, or by a given val split; then all is the memory.

    Raises: InputError if all training rows are one group.
    """
    view, splits, given = config.views[0], data.splits, data.splits.val_is_given
    unit = unit_rows(data.in_memory(view)).astype(np.float32)
    judged_rows = splits.val if given else splits.train
    labels = data.labels[judged_rows]
    groups = train_groups(data)
    available = len(splits.train) - (0 if given else int(np.bincount(groups).max()))
    counts = [k for k in _COUNTS if k <= available] or [available]
    bank, bank_labels = unit[splits.train], data.labels[splits.train]
    out_of_fold = [_logits(bank, bank, bank_labels, data.num_classes, k, groups) for k in counts]
    logits = np.stack(
        out_of_fold
        if not given
        else [_logits(unit[splits.val], bank, bank_labels, data.num_classes, k) for k in counts]
    )
    scores = RowScores.of(logits, labels)

    def choose(curve: Curve) -> int:
        return curve.best(config.criterion, one_standard_error=config.one_standard_error)

    curve = scores.curve()
    best = choose(curve)
    halves = scores.cross_fitted(labels, choose)
    judged = np.empty_like(logits[0])
    for pick, rows, _ in halves:
        judged[rows] = logits[pick, rows]
    calibration = fit_temperature(out_of_fold[best], bank_labels)
    fitted_on = splits.train
    if given and not config.no_refit:
        fitted_on = np.concatenate([splits.train, splits.val])
    params = {
        "bank": unit[fitted_on],
        "bank_labels": data.labels[fitted_on].astype(np.float32),
        "num_classes": np.float32(data.num_classes),
        "num_neighbours": np.float32(counts[best]),
        "temperature": np.float32(TEMPERATURE),
        "calibration": np.float32(calibration),
    }
    return Fitted(
        head=TrainedHead((), params),
        view=view,
        val_rows=judged_rows,
        val_logits=(judged / np.float32(calibration) if given else judged) if halves else None,
        val_of=(
            "neighbours in train, k for each half of the rows chosen by the other half"
            if given
            else "neighbours in train other than the row itself, k for each half of the rows chosen by the other half, "
            "not calibrated"
        ),
        val_is_calibrated=given,
        out_of_fold=out_of_fold[best],
        facts={
            "fitted_on": "train" if len(fitted_on) == len(splits.train) else "train + val",
            "view": view,
            "num_neighbours": counts[best],
            "temperature": calibration,
            "chosen_by": config.criterion + (", one standard error" if config.one_standard_error else ""),
            "curves": curve.lines({"num_neighbours": np.array(counts)}),
        },
    )


def _logits(
    queries: np.ndarray,
    bank: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    k: int,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    found = neighbour_logits(queries, bank, labels, num_classes, k, TEMPERATURE, groups=groups)
    return np.asarray(class_logits(found))
