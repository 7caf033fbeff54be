"""The linear head at a certified optimum: λ, view and scaling chosen together, then one fit of all that may be used.

With a validation split, train fits the path of λ and validation chooses. Without one, k folds of train do: each row
is judged by the head of the other folds. Either way every training row gets logits of a head that was not fitted on
it, at the λ chosen; a temperature fitted on those is divided out of the saved weights.
"""

import dataclasses

import numpy as np

from probe.config import FitLinearConfig
from probe.errors import ConfigError
from probe.evaluation.calibration import fit_temperature
from probe.evaluation.choice import cross_fitted
from probe.heads import TrainedHead
from probe.probing.protocol import Curve, Data, Fitted
from probe.probing.reference import solve_with_sklearn
from probe.probing.scaling import Kind, Scaling
from probe.probing.solver import FoldPath, Problem, Solution

_VAL = -2  # the fold that a given validation split is; training rows are in folds from 0, or in -1


@dataclasses.dataclass(frozen=True)
class _Search:
    """The path of λ for one view and one scaling. rows: of train, or of train and a given validation split."""

    view: str
    kind: Kind
    rows: np.ndarray
    scaling: Scaling
    features: np.ndarray
    problem: Problem
    penalties: np.ndarray
    left_out: list[int]
    path: FoldPath
    curve: Curve
    best: int


def fit_convex(config: FitLinearConfig, data: Data) -> Fitted:
    """Chooses, fits and calibrates. Raises: NumericalError where λ is 0 and the classes can be separated."""
    searches = [_search(config, data, view, kind) for view in config.views for kind in config.scalings]
    scores = [(_score(search, config.criterion), -i) for i, search in enumerate(searches)]
    chosen = searches[-max(scores)[1]]  # of equals the first that was asked for
    out_of_fold = _out_of_fold(config, data, chosen)
    temperature = _temperature(out_of_fold, data.labels[data.splits.train])
    solution, features_of = _final(config, data, chosen)
    calibrated = {name: value / temperature for name, value in solution.params.items()}
    given = data.splits.val_is_given
    val_logits = _val_logits_of_given(config, data, searches) if given else _cross_validated(config, data, searches)
    judged = ~np.isnan(out_of_fold).any(axis=1)
    return Fitted(
        head=TrainedHead((), features_of.fold(calibrated)),
        view=chosen.view,
        val_rows=data.splits.val if given else data.splits.train[judged],
        val_logits=val_logits if given or val_logits is None else val_logits[judged],
        val_of=(
            "heads that train alone gave, each half of the rows judged by what the other half chose, not calibrated"
            if given
            else f"{config.folds} folds of train, each judged by heads that the others gave and chose, not calibrated"
        ),
        out_of_fold=out_of_fold,
        facts={
            "fitted_on": "train" if config.no_refit or not given else "train + val",
            "view": chosen.view,
            "scaling": chosen.kind,
            "penalty": solution.penalty,
            "C": _to_c(solution.penalty, _weights(config, data, _final_rows(config, data)).sum()),
            "solver": config.solver,
            "solution": solution.certificate(),
            "temperature": temperature,
            "chosen_by": config.criterion + (", one standard error" if config.one_standard_error else ""),
            "folds": None if given else len(chosen.left_out),
            "curves": [{"view": s.view, "scaling": s.kind, "points": s.curve.lines(s.penalties)} for s in searches],
        },
        warnings=_warnings(chosen, solution),
    )


def _search(config: FitLinearConfig, data: Data, view: str, kind: Kind) -> _Search:
    given = data.splits.val_is_given
    rows = np.concatenate([data.splits.train, data.splits.val]) if given else data.splits.train
    embeddings = data.embeddings[view]
    scaling = Scaling.of(embeddings[rows], kind)
    features = scaling.apply(embeddings[rows])
    folds = np.where(np.isin(rows, data.splits.val), _VAL, data.folds[rows])
    left_out = [_VAL] if given else sorted(set(folds.tolist()) - {-1})
    problem = Problem(
        features,
        data.labels[rows],
        data.num_classes,
        weights=_weights(config, data, rows),
        folds=folds,
        standardise_folds=kind == "standard",
    )
    penalties = _penalties(config, problem)
    path = problem.path(penalties.tolist(), left_out)
    curve = Curve(path.accuracy, path.nll, path.count)
    best = _best(config, data, curve)
    return _Search(view, kind, rows, scaling, features, problem, penalties, left_out, path, curve, best)


def _penalties(config: FitLinearConfig, problem: Problem) -> np.ndarray:
    """Values of λ, falling: those asked for, or 17 over 8 decades about the features' mean variance."""
    if config.penalties:
        return np.array(sorted(config.penalties, reverse=True))
    return np.logspace(1, -7, 17) * problem.mean_variance


def _best(config: FitLinearConfig, data: Data, curve: Curve, without: int | None = None) -> int:
    criterion = "nll" if data.multi_label else config.criterion
    return curve.best(criterion, without=without, one_standard_error=config.one_standard_error)


def _score(search: _Search, criterion: str) -> tuple[float, float]:
    """Of the chosen λ, the higher the better: comparable between searches, as they judge the same rows."""
    accuracy, nll = (
        float(np.average(scores[search.best], weights=search.curve.count))
        for scores in (search.curve.accuracy, search.curve.nll)
    )
    return (round(accuracy, 12), -nll) if criterion == "accuracy" else (-nll, round(accuracy, 12))


def _logits(features: np.ndarray, head: np.ndarray, *, multi_label: bool) -> np.ndarray:
    """[N, C] logits of [D + 1, M] weights; the one logit of two classes becomes two."""
    logits = np.asarray(features @ head[:-1] + head[-1])
    if logits.shape[1] == 1 and not multi_label:
        return np.concatenate([np.zeros_like(logits), logits], axis=1)
    return logits


def _fold_logits(data: Data, search: _Search, heads: np.ndarray) -> np.ndarray:
    """[n, C] what each fold's head, [F, D + 1, M], says of its own rows; NaN for rows in no fold."""
    logits = np.full((len(search.rows), data.num_classes), np.nan, np.float32)
    for fold, head in zip(search.left_out, heads, strict=True):
        held = data.folds[search.rows] == fold
        logits[held] = _logits(search.features[held], head, multi_label=data.multi_label)
    return logits


def _cross_validated(config: FitLinearConfig, data: Data, searches: list[_Search]) -> np.ndarray:
    """[N train, C]: each fold by the head of the other folds, at the candidate that the other folds chose."""
    judged = np.full((len(data.splits.train), data.num_classes), np.nan, np.float32)
    for part, fold in enumerate(searches[0].left_out):
        picks = [(search, _best(config, data, search.curve, part)) for search in searches]
        scores = []
        for search, i in picks:
            others = np.arange(len(search.left_out)) != part
            weights = search.curve.count[others]
            accuracy = round(float(np.average(search.curve.accuracy[i, others], weights=weights)), 12)
            nll = float(np.average(search.curve.nll[i, others], weights=weights))
            scores.append((accuracy, -nll) if config.criterion == "accuracy" else (-nll, accuracy))
        search, i = picks[max(range(len(picks)), key=lambda k: (scores[k], -k))]
        held = data.folds[search.rows] == fold
        judged[held] = _logits(search.features[held], search.path.heads[i, part], multi_label=data.multi_label)
    return judged


def _val_logits_of_given(config: FitLinearConfig, data: Data, searches: list[_Search]) -> np.ndarray | None:
    """[N val, C]: each half of the validation rows by the candidate that the other half chose."""
    num_val, labels = len(data.splits.val), data.labels[data.splits.val]
    logits = np.stack(
        [
            _logits(search.features[-num_val:], head[0], multi_label=data.multi_label)
            for search in searches
            for head in search.path.heads
        ]
    )
    if data.multi_label or config.criterion == "nll" or config.one_standard_error:
        return _cross_fitted_by_nll(logits, labels)
    judged: np.ndarray | None = cross_fitted(logits, labels)
    return judged


def _cross_fitted_by_nll(logits: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """`choice.cross_fitted` with the lowest loss for choice, for one label a row or several."""
    if len(labels) < 2:
        return None
    if labels.ndim == 2:
        nll = np.logaddexp(0, np.where(labels, -logits, logits)).sum(axis=2)
    else:
        nll = np.logaddexp.reduce(logits, axis=2) - logits[:, np.arange(len(labels)), labels]
    half = np.arange(len(labels)) % 2 == 1
    if labels.ndim == 1:  # dealt class by class
        half[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % 2 == 1
    judged: np.ndarray = np.empty_like(logits[0])
    for rows in (half, ~half):
        judged[rows] = logits[nll[:, ~rows].mean(axis=1).argmin()][rows]
    return judged


def _out_of_fold(config: FitLinearConfig, data: Data, chosen: _Search) -> np.ndarray:
    """[N train, C] at the λ chosen. With a given validation split, the folds are fitted now, from train's head."""
    if not data.splits.val_is_given:
        return _fold_logits(data, chosen, chosen.path.heads[chosen.best])
    train = data.splits.train
    folds = data.folds[train]
    left_out = sorted(set(folds.tolist()) - {-1})
    weights = _weights(config, data, train)
    problem = Problem(
        chosen.features[: len(train)],
        data.labels[train],
        data.num_classes,
        weights=weights,
        folds=folds,
        standardise_folds=chosen.kind == "standard",
    )
    penalty = chosen.penalties[chosen.best] * _weights(config, data, chosen.rows).sum() / weights.sum()
    start = np.repeat(chosen.path.heads[chosen.best], len(left_out), axis=0)
    heads = problem.path([penalty], left_out, start=start).heads[0]
    on_train = dataclasses.replace(chosen, rows=train, features=chosen.features[: len(train)], left_out=left_out)
    return _fold_logits(data, on_train, heads)


def _final_rows(config: FitLinearConfig, data: Data) -> np.ndarray:
    if data.splits.val_is_given and not config.no_refit:
        return np.concatenate([data.splits.train, data.splits.val])
    return data.splits.train


def _final(config: FitLinearConfig, data: Data, chosen: _Search) -> tuple[Solution, Scaling]:
    """The certified fit of all rows that may be used, at the C chosen, and what its features are."""
    rows = _final_rows(config, data)
    weights = _weights(config, data, rows)
    penalty = float(chosen.penalties[chosen.best]) * _weights(config, data, chosen.rows).sum() / weights.sum()
    problem, scaling, features = chosen.problem, chosen.scaling, chosen.features
    if len(rows) != len(chosen.rows):  # train alone, where the path was fitted beside validation
        scaling = Scaling.of(data.embeddings[chosen.view][rows], chosen.kind)
        features = scaling.apply(data.embeddings[chosen.view][rows])
        problem = Problem(features, data.labels[rows], data.num_classes, weights=weights)
    if config.solver == "sklearn":
        return solve_with_sklearn(problem, features, data.labels[rows], penalty, weights=weights), scaling
    return problem.fit(penalty, start=chosen.path.heads[chosen.best].mean(axis=0)), scaling


def _temperature(out_of_fold: np.ndarray, labels: np.ndarray) -> float:
    judged = ~np.isnan(out_of_fold).any(axis=1)
    return fit_temperature(out_of_fold[judged], labels[judged]) if judged.any() else 1.0


def _weights(config: FitLinearConfig, data: Data, rows: np.ndarray) -> np.ndarray:
    """[n] how much each row counts, by its class: as often as others where balanced, or as said."""
    if not config.class_weights:
        return np.ones(len(rows))
    by_class = np.ones(data.num_classes)
    if config.class_weights == ("balanced",):
        by_class = len(data.splits.train) / (
            data.num_classes * np.bincount(data.labels[data.splits.train], minlength=data.num_classes)
        )
    else:
        for item in config.class_weights:
            name, _, weight = item.rpartition("=")
            if name not in data.class_names:
                known = ", ".join(map(repr, data.class_names))
                raise ConfigError(f"--class-weights {item}: no class {name!r}; there are {known}")
            by_class[data.class_names.index(name)] = float(weight)
    return np.asarray(by_class[data.labels[rows]])


def _to_c(penalty: float, total: float) -> float | None:
    return 1 / (penalty * total) if penalty > 0 else None


def _warnings(chosen: _Search, solution: Solution) -> tuple[str, ...]:
    found = []
    last = len(chosen.penalties) - 1
    if last > 0 and chosen.best in (0, last):
        side, more = ("largest", "above") if chosen.best == 0 else ("smallest", "below")
        found.append(
            f"the λ chosen, {chosen.penalties[chosen.best]:.3g}, is the {side} of the grid: "
            f"give values {more} it with --penalties"
        )
    if not chosen.path.converged.all():
        num = int((~chosen.path.converged).sum())
        found.append(f"{num} of {chosen.path.converged.size} fits that choose λ did not converge: raise the smallest λ")
    if not solution.converged:
        found.append(
            f"the final fit did not converge: its objective is some {solution.gap:.1e} above the optimum "
            f"of {solution.objective:.6g}. Raise λ with --penalties, or standardise the features"
        )
    return tuple(found)
