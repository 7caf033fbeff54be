"""One candidate of the linear head: the path of λ for a view, a scaling and a strength of the prior, and its scores."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from probe import distributed
from probe.config import FitLinearConfig
from probe.probing.curve import Curve, RowScores, beyond
from probe.probing.features import Features, completed, pieces
from probe.probing.protocol import Data, Report, row_weights
from probe.probing.scaling import Kind, Scaling
from probe.probing.solution import FoldPath
from probe.probing.solver import Problem

AT_ONCE = 1024  # rows whose logits, of all candidates, are made at once
VAL = -2  # the fold that a given validation split is; training rows are in folds from 0, or in -1


@dataclasses.dataclass(frozen=True)
class Search:
    """The path of λ for one view, one scaling and one strength of the prior: weights are pulled to the zero-shot
    head's, times that.

    rows: of train, or of train and a given validation split. curve: what folds, or the rows of that split, say of each
    λ; val_scores: of each λ on each row of that split, if given.
    """

    view: str
    kind: Kind
    strength: float
    rows: np.ndarray
    scaling: Scaling
    features: Features
    problem: Problem
    penalties: np.ndarray
    left_out: list[int]
    path: FoldPath
    curve: Curve
    val_scores: RowScores | None

    @property
    def name(self) -> str:
        return _name(self.view, self.kind, self.strength)

    def facts(self, data: Data) -> dict[str, str | float]:
        """For metrics.json; the strength where a prior was asked for."""
        strength = {} if data.text_weights is None else {"prior_strength": self.strength}
        return {"view": self.view, "scaling": self.kind, **strength}


def search_path(config: FitLinearConfig, data: Data, view: str, kind: Kind, strength: float, report: Report) -> Search:
    """Scores every λ of one view, scaling and strength of the prior, and some more where the grid's edge is best."""
    given = data.splits.val_is_given
    rows = np.concatenate([data.splits.train, data.splits.val]) if given else data.splits.train
    embeddings = data.embeddings[view]
    scaling = Scaling.of(embeddings[rows], kind)
    features = scaling.apply(embeddings[rows])
    folds = np.where(np.isin(rows, data.splits.val), VAL, data.folds[rows])
    left_out = [VAL] if given else sorted(set(folds.tolist()) - {-1})
    problem = Problem(
        features,
        data.labels[rows],
        data.num_classes,
        weights=row_weights(config, data, rows),
        folds=folds,
        standardise_folds=kind == "standard",
        prior=prior_of(data, strength),
    )
    several = len(config.views) * len(config.scalings) > 1 or data.text_weights is not None

    def watch(num_done: int, num_fits: int, _passes: int) -> None:
        what = f"choosing λ, {_name(view, kind, strength)}" if several else "choosing λ"
        report(what, num_done, num_fits, "fits")

    penalties = _penalties(config, problem)
    path = problem.path(penalties.tolist(), left_out, watch=watch)
    curve, scores = _judge(data, features, path)
    _, best = choose_best(config, data, [curve])
    more = np.zeros(0) if config.penalties else beyond(penalties, best)
    if len(more):
        # Made as long as the grid, whose program is compiled already: a λ that repeats takes no pass.
        padded = np.pad(more, (0, len(penalties) - len(more)), mode="edge")
        further = problem.path(padded.tolist(), left_out, start=path.heads[best], watch=watch).first(len(more))
        parts = [(more, further), (penalties, path)]
        (penalties, path), (others, rest) = parts if best == 0 else parts[::-1]
        penalties, path = np.concatenate([penalties, others]), path.then(rest)
        curve, scores = _judge(data, features, path)
    return Search(view, kind, strength, rows, scaling, features, problem, penalties, left_out, path, curve, scores)


def prior_of(data: Data, strength: float) -> np.ndarray | None:
    """[D, M] that the penalty pulls to, or None for 0. A constant of all classes is no part of it: it changes no
    answer."""
    if data.text_weights is None or strength == 0:
        return None
    weights = data.text_weights
    return strength * (weights - weights.mean(axis=1, keepdims=True) if weights.shape[1] > 1 else weights)


def _name(view: str, kind: Kind, strength: float) -> str:
    return f"{view} {kind}" + (f", text × {strength:g}" if strength else "")


def _penalties(config: FitLinearConfig, problem: Problem) -> np.ndarray:
    """Values of λ, falling: those asked for, or 17 over 8 decades about the features' mean variance."""
    if config.penalties:
        return np.array(sorted(config.penalties, reverse=True))
    return np.logspace(1, -7, 17) * problem.mean_variance


def criterion_of(config: FitLinearConfig, data: Data) -> str:
    return "nll" if data.multi_label else config.criterion


def choose_best(
    config: FitLinearConfig, data: Data, curves: Sequence[Curve], without: int | None = None
) -> tuple[int, int]:
    """Which search, and which λ on its path; of equals the first that was asked for. without: a part without a say."""
    criterion = criterion_of(config, data)
    best = [curve.best(criterion, without=without, one_standard_error=config.one_standard_error) for curve in curves]
    scores = [curve.score(i, criterion, without=without) for curve, i in zip(curves, best, strict=True)]
    which = min(range(len(curves)), key=lambda k: scores[k])
    return distributed.agreed((which, best[which]))


def _judge(data: Data, features: Features, path: FoldPath) -> tuple[Curve, RowScores | None]:
    """What the folds say of each λ, or the rows of a given validation split, the last of the features."""
    if not data.splits.val_is_given:
        return Curve(path.accuracy, path.nll, path.count), None
    heads, labels = path.heads[:, 0], data.labels[data.splits.val]
    num_candidates, _, num_outputs = heads.shape
    kernel = heads[:, :-1].transpose(1, 0, 2).reshape(features.shape[1], -1)
    scores = RowScores(*np.empty((2, num_candidates, len(labels))))
    of_val = features[-len(labels) :]
    for at, part in pieces(of_val, AT_ONCE):
        logits = (part @ kernel).reshape(len(part), num_candidates, num_outputs).transpose(1, 0, 2)
        of_part = RowScores.of(logits_of_classes(logits + heads[:, None, -1], data), labels[at])
        scores.hits[:, at], scores.losses[:, at] = of_part.hits, of_part.losses
    for values in (scores.hits, scores.losses):
        completed(of_val, values.T)
    return scores.curve(), scores


def logits_of_classes(logits: np.ndarray, data: Data) -> np.ndarray:
    """[…, M] -> [..., C]: the one logit of two classes becomes two."""
    if logits.shape[-1] == 1 and not data.multi_label:
        return np.concatenate([np.zeros_like(logits), logits], axis=-1)
    return logits
