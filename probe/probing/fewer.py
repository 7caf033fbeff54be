"""How good the linear head would be with fewer labels: few-shot tables and learning curves.

Every fit here uses training rows alone: λ is chosen by folds of the rows that were drawn (one row a class leaves
nothing to choose by), and validation rows are never merged into them. What is drawn for a seed depends on the labels,
the number and the seed alone, and smaller draws are parts of larger ones. All heads are judged on the same rows: test,
else a given validation split.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from probe.config import FitLinearConfig
from probe.errors import InputError
from probe.heads import TrainedHead, class_logits
from probe.probing.convex import fit_convex
from probe.probing.protocol import Data, Report, row_weights, silent
from probe.probing.scaling import Scaling
from probe.probing.solver import Problem
from probe.splits import Splits, assign_folds

_STEPS = 6  # points of a learning curve, each twice the rows of the one before
_RATES = np.linspace(0.1, 1.5, 57)  # exponents that are tried for the power law
_RESAMPLES = 200
_LEAST_SEEDS, _LEAST_POINTS = 2, 4  # that an interval needs: one draw shows no deviation, three points fit exactly


def draw(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Row indices, ascending: of class c the first counts[c] in an order that the seed alone decides.

    Args:
      labels: [N] integers; counts: [C], at most as many as the class has.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    rows = [order[labels[order] == label][:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(rows))


def few_shot(config: FitLinearConfig, data: Data, report: Report = silent) -> list[dict[str, Any]]:
    """Accuracy with `shots` rows of each class: mean and deviation over seeds, and each seed's.

    Raises: InputError if a class has fewer rows than the most shots, naming it.
    """
    available = np.bincount(data.labels[data.splits.train], minlength=data.num_classes)
    short = [f"{name!r} has {n}" for name, n in zip(data.class_names, available, strict=True) if n < max(config.shots)]
    if short:
        raise InputError(
            f"--shots {max(config.shots)} needs as many training rows of each class, but {', '.join(short)}. "
            "Ask for fewer shots, or add examples."
        )
    table: list[dict[str, Any]] = []
    for shots in config.shots:
        counts = np.full(data.num_classes, shots)
        heads = []
        for i in range(config.seeds):
            report("few shots", len(table) * config.seeds + i, len(config.shots) * config.seeds, "heads")
            heads.append(_hits(config, data, counts, config.seed + i))
        table.append({"shots": shots, **_summary(heads)})
    return table


def learning_curve(config: FitLinearConfig, data: Data, report: Report = silent) -> dict[str, Any]:
    """Accuracy against the number of labels, and what twice and four times as many would give.

    The error is fitted as a + b·n^-c with a, b >= 0; the interval of an extrapolation is the middle 95 % of those
    from resampled seeds and rows to judge on, and does not know whether the law holds.
    """
    labels = data.labels[data.splits.train]
    available = np.bincount(labels, minlength=data.num_classes)
    points: list[dict[str, Any]] = []
    every = []
    for step in reversed(range(_STEPS)):
        counts = np.maximum(available // 2**step, np.minimum(available, 2))
        if not points or counts.sum() > points[-1]["n"]:
            heads = []
            for i in range(config.seeds):
                report("learning curve", len(points) * config.seeds + i, None, "heads")
                heads.append(_hits(config, data, counts, config.seed + i))
            every.append([hits for hits, _ in heads])
            points.append({"n": int(counts.sum()), **_summary(heads)})
    sizes = np.array([point["n"] for point in points], float)
    extrapolation = extrapolate(sizes, np.array(every), sizes[-1] * np.array([2, 4]), config.seed)
    return {"points": points, "extrapolation": extrapolation}


def head_warnings(what: str, lines: Sequence[dict[str, Any]]) -> list[str]:
    """What a person should know of the heads of a table's lines."""
    stopped = sum(line["num_unconverged"] for line in lines)
    every = sum(len(line["accuracies"]) for line in lines)
    return [f"{stopped} of {every} fits of {what} did not converge: raise λ with --penalties"] if stopped else []


def curve_warnings(curve: dict[str, Any]) -> list[str]:
    """What a person should know of how sure a `learning_curve` is."""
    points = curve["points"]
    if _enough(len(points), len(points[0]["accuracies"])):
        return []
    return [
        f"the learning curve has no interval: {len(points)} points of {len(points[0]['accuracies'])} seeds cannot tell "
        f"how sure it is, which takes {_LEAST_POINTS} points (more training rows) and --seeds {_LEAST_SEEDS} or more"
    ]


def _enough(num_points: int, num_seeds: int) -> bool:
    return num_points >= _LEAST_POINTS and num_seeds >= _LEAST_SEEDS


def extrapolate(sizes: np.ndarray, hits: np.ndarray, wanted: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Accuracies that the power law gives at other sizes.

    Args:
      sizes: [P]; hits: [P, S, J] bool, which of J rows the heads of S seeds answered rightly; wanted: sizes asked for;
        seed: of the resampling, of seeds at each size and of rows, the same at all.
    Returns: for each size {"n", "accuracy", "interval_95"}, the interval None where there are fewer than 2 seeds, or
      fewer than 4 sizes for the 3 parameters.
    """
    rng = np.random.default_rng(seed)
    best = 1 - _power_law(sizes, 1 - hits.mean(axis=(1, 2)), wanted)
    num_points, num_seeds, num_rows = hits.shape
    if not _enough(num_points, num_seeds):
        return [{"n": int(n), "accuracy": float(a), "interval_95": None} for n, a in zip(wanted, best, strict=True)]
    drawn = []
    for _ in range(_RESAMPLES):
        accuracies = hits @ (rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows)) / num_rows)
        seeds = rng.integers(0, num_seeds, accuracies.shape)
        drawn.append(1 - _power_law(sizes, 1 - np.take_along_axis(accuracies, seeds, axis=1).mean(axis=1), wanted))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return [
        {"n": int(n), "accuracy": float(a), "interval_95": [float(lo), float(hi)]}
        for n, a, lo, hi in zip(wanted, best, low, high, strict=True)
    ]


def _power_law(sizes: np.ndarray, errors: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """a + b·n^-c by least squares, a and b not negative, at the sizes wanted."""
    fits = []
    for rate in _RATES:
        scaled = (sizes / sizes[-1]) ** -rate
        coefficients, residual = nnls(np.stack([np.ones_like(scaled), scaled], axis=1), errors)
        fits.append((residual, rate, coefficients))
    _, rate, (floor, slope) = min(fits, key=lambda fit: fit[0])
    return np.asarray(floor + slope * (wanted / sizes[-1]) ** -rate)


def _hits(config: FitLinearConfig, data: Data, counts: np.ndarray, seed: int) -> tuple[np.ndarray, bool]:
    """[J] bool: which of the rows to judge on the head that the drawn rows alone give answers rightly; and whether its
    fit converged."""
    train = data.splits.train[draw(data.labels[data.splits.train], counts, seed)]
    judged = data.splits.test if len(data.splits.test) else data.splits.val
    if not len(judged):
        raise InputError("--shots and --learning-curve need a test or a val split to judge on: hold some rows out.")
    splits = Splits(train, np.zeros(0, int), data.splits.test, val_is_given=False)
    folds = np.full(len(data.labels), -1, np.int32)
    groups = None if data.groups is None else data.groups[train]
    folds[train], _ = assign_folds(data.labels[train], groups, min(config.folds, len(train)), seed=seed)
    if (folds[train] >= 0).any():
        fitted = fit_convex(config, dataclasses.replace(data, splits=splits, folds=folds))
        view, head, converged = fitted.view, fitted.head, bool(fitted.facts["solution"]["converged"])
    else:
        view = config.views[0]
        head, converged = _fit_without_choice(config, dataclasses.replace(data, splits=splits))
    logits = np.asarray(class_logits(head.apply(data.in_memory(view)[judged])))
    return np.asarray(logits.argmax(axis=1) == data.labels[judged]), converged


def _fit_without_choice(config: FitLinearConfig, data: Data) -> tuple[TrainedHead, bool]:
    """One row of each class: none can be left out, and λ is the features' mean variance. And whether it converged."""
    rows = data.splits.train
    embeddings = data.in_memory(config.views[0])[rows]
    scaling = Scaling.of(embeddings, config.scalings[0])
    weights = row_weights(config, data, rows)
    problem = Problem(scaling.apply(embeddings), data.labels[rows], data.num_classes, weights=weights)
    solution = problem.fit(problem.mean_variance)
    return TrainedHead((), scaling.fold(solution.params)), solution.converged


def _summary(heads: Sequence[tuple[np.ndarray, bool]]) -> dict[str, Any]:
    accuracies = [float(hits.mean()) for hits, _ in heads]
    several = len(accuracies) > 1
    return {
        "accuracy": float(np.mean(accuracies)),
        "deviation": float(np.std(accuracies, ddof=1)) if several else None,
        "accuracies": accuracies,
        "num_unconverged": sum(not converged for _, converged in heads),
    }
