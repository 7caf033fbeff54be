"""The linear head at a certified optimum: λ, view and scaling chosen together, then one fit of all that may be used.

With a validation split, train fits the path of λ and validation chooses. Without one, k folds of train do: each row
is judged by the head of the other folds. Either way every training row gets logits of a head that was not fitted on
it, at the λ chosen; a temperature fitted on those is divided out of the saved weights.
"""

import itertools
from collections.abc import Mapping

import numpy as np

from probe.config import FitLinearConfig
from probe.evaluation.calibration import fit_temperature
from probe.heads import TrainedHead
from probe.probing.curve import Curve, RowScores, edge_warning
from probe.probing.features import Features, completed, pieces
from probe.probing.protocol import Data, Fitted, Report, row_weights, silent
from probe.probing.reference import solve_with_sklearn
from probe.probing.scaling import Scaling
from probe.probing.search import (
    AT_ONCE,
    VAL,
    Search,
    choose_best,
    criterion_of,
    logits_of_classes,
    prior_of,
    search_path,
)
from probe.probing.solution import Solution
from probe.probing.solver import Problem

_STRENGTHS = (0.0, 0.25, 0.5, 1.0)  # of the prior, 0 the plain probe


def fit_convex(config: FitLinearConfig, data: Data, report: Report = silent) -> Fitted:
    """Chooses, fits and calibrates. Raises: NumericalError where λ is 0 and the classes can be separated."""
    strengths = (0.0,) if data.text_weights is None else _STRENGTHS
    candidates = itertools.product(config.views, config.scalings, strengths)
    searches = [search_path(config, data, *candidate, report) for candidate in candidates]
    which, best = choose_best(config, data, [search.curve for search in searches])
    chosen = searches[which]
    out_of_fold, num_stopped = _out_of_fold(config, data, chosen, best, report)
    temperature = _temperature(out_of_fold, data.labels[data.splits.train])
    solution, features_of = _final(config, data, chosen, best, report)
    calibrated = {name: value / temperature for name, value in solution.params.items()}
    given = data.splits.val_is_given
    val_logits = _judged_by_halves(config, data, searches) if given else _judged_by_folds(config, data, searches)
    judged = ~np.isnan(out_of_fold).any(axis=1)
    if val_logits is not None:  # folds of train gave the temperature, which may be judged on validation alone
        val_logits = val_logits / np.float32(temperature) if given else val_logits[judged]
    return Fitted(
        head=TrainedHead((), features_of.fold(calibrated)),
        view=chosen.view,
        val_rows=data.splits.val if given else data.splits.train[judged],
        val_logits=val_logits,
        val_of=(
            "heads that train alone gave, each half of the rows judged by what the other half chose"
            if given
            else f"{config.folds} folds of train, each judged by heads that the others gave and chose, not calibrated"
        ),
        val_is_calibrated=given,
        out_of_fold=out_of_fold,
        facts={
            "fitted_on": "train" if config.no_refit or not given else "train + val",
            **chosen.facts(data),
            "penalty": solution.penalty,
            "C": _to_c(solution.penalty, row_weights(config, data, _final_rows(config, data)).sum()),
            "solver": config.solver,
            "solution": solution.certificate(),
            "temperature": temperature,
            "chosen_by": criterion_of(config, data) + (", one standard error" if config.one_standard_error else ""),
            "folds": None if given else len(chosen.left_out),
            "curves": [
                s.facts(data) | {"points": s.curve.lines({"penalty": s.penalties}, accuracy=data.curve_accuracy)}
                for s in searches
            ],
        },
        warnings=(*_unjudged(chosen, judged), *_warnings(config, searches, chosen, best, solution, num_stopped)),
    )


def _logits_by_fold(data: Data, features: Features, folds: np.ndarray, heads: Mapping[int, np.ndarray]) -> np.ndarray:
    """[n, C] what each fold's head, [D + 1, M], says of the rows of that fold; NaN for rows of no such fold.

    Args:
      folds: [n] of each row of the features.
    """
    logits = np.full((len(folds), data.num_classes), np.nan, np.float32)
    for at, part in pieces(features, AT_ONCE):
        for fold, head in heads.items():
            held = folds[at] == fold
            logits[at[held]] = logits_of_classes(part[held] @ head[:-1] + head[-1], data)
    return completed(features, logits)


def _judged_by_folds(config: FitLinearConfig, data: Data, searches: list[Search]) -> np.ndarray | None:
    """[N train, C]: each fold by the head of the other folds, at the candidate that the other folds chose; None where
    there is no other fold that could choose: then no honest figure exists."""
    if len(searches[0].left_out) < 2:
        return None
    curves, folds = [search.curve for search in searches], data.folds[data.splits.train]
    heads: dict[int, dict[int, np.ndarray]] = {}
    for part, fold in enumerate(searches[0].left_out):
        which, i = choose_best(config, data, curves, part)
        heads.setdefault(which, {})[fold] = searches[which].path.heads[i, part]
    judged = np.full((len(folds), data.num_classes), np.nan, np.float32)
    for which, of_folds in heads.items():
        held = np.isin(folds, list(of_folds))
        judged[held] = _logits_by_fold(data, searches[which].features[held], folds[held], of_folds)
    return judged


def _judged_by_halves(config: FitLinearConfig, data: Data, searches: list[Search]) -> np.ndarray | None:
    """[N val, C]: each half of the validation rows by the candidate that the other half chose."""
    every = [search.val_scores for search in searches if search.val_scores is not None]
    starts = np.cumsum([0] + [len(scores.hits) for scores in every])
    together = RowScores(*(np.concatenate(s) for s in ([e.hits for e in every], [e.losses for e in every])))

    def choose(curve: Curve) -> int:
        parts = [curve[first:end] for first, end in itertools.pairwise(starts)]
        which, i = choose_best(config, data, parts)
        return int(starts[which]) + i

    labels = data.labels[data.splits.val]
    halves = together.cross_fitted(labels, choose)
    if not halves:
        return None
    judged = np.empty((len(labels), data.num_classes), np.float32)
    for pick, rows, _ in halves:
        which = int(np.searchsorted(starts, pick, side="right")) - 1
        features, heads = searches[which].features[len(data.splits.train) + rows], searches[which].path.heads
        judged[rows] = _logits_by_fold(data, features, np.zeros(len(rows)), {0: heads[pick - starts[which], 0]})
    return judged


def _out_of_fold(
    config: FitLinearConfig, data: Data, chosen: Search, best: int, report: Report
) -> tuple[np.ndarray, int]:
    """[N train, C] at the λ chosen, and how many fits made for it did not converge. With a given validation split, the
    folds are fitted now, from train's head; where none can be left out, all are NaN."""
    train = data.splits.train
    folds, features, heads = data.folds[train], chosen.features[: len(train)], chosen.path.heads[best]
    left_out, num_stopped = chosen.left_out, 0
    if data.splits.val_is_given:
        left_out = sorted(set(folds.tolist()) - {-1})
        if not left_out:
            return np.full((len(train), data.num_classes), np.nan, np.float32), 0
        weights = row_weights(config, data, train)
        problem = Problem(
            features,
            data.labels[train],
            data.num_classes,
            weights=weights,
            folds=folds,
            standardise_folds=chosen.kind == "standard",
            prior=prior_of(data, chosen.strength),
        )
        penalty = chosen.penalties[best] * row_weights(config, data, chosen.rows).sum() / weights.sum()

        def watch(num_done: int, num_fits: int, _passes: int) -> None:
            report("fitting without each fold", num_done, num_fits, "fits")

        path = problem.path([penalty], left_out, start=np.repeat(heads, len(left_out), axis=0), watch=watch)
        heads, num_stopped = path.heads[0], int((~path.converged).sum())
    return _logits_by_fold(data, features, folds, dict(zip(left_out, heads, strict=True))), num_stopped


def _final_rows(config: FitLinearConfig, data: Data) -> np.ndarray:
    if data.splits.val_is_given and not config.no_refit:
        return np.concatenate([data.splits.train, data.splits.val])
    return data.splits.train


def _final(config: FitLinearConfig, data: Data, chosen: Search, best: int, report: Report) -> tuple[Solution, Scaling]:
    """The certified fit of all rows that may be used, at the C chosen, and what its features are."""
    rows = _final_rows(config, data)
    weights = row_weights(config, data, rows)
    penalty = float(chosen.penalties[best]) * row_weights(config, data, chosen.rows).sum() / weights.sum()
    problem, scaling, features = chosen.problem, chosen.scaling, chosen.features
    if len(rows) != len(chosen.rows):  # train alone, where the path was fitted beside validation
        scaling = Scaling.of(data.embeddings[chosen.view][rows], chosen.kind)
        features = scaling.apply(data.embeddings[chosen.view][rows])
        prior = prior_of(data, chosen.strength)
        problem = Problem(features, data.labels[rows], data.num_classes, weights=weights, prior=prior)
    if config.solver == "sklearn":
        assert isinstance(features, np.ndarray), "fit_linear streams only for our own solver"
        return solve_with_sklearn(problem, features, data.labels[rows], penalty, weights=weights), scaling

    def watch(_done: int, _fits: int, num_passes: int) -> None:
        report("final fit", num_passes, None, "passes")

    return problem.fit(penalty, start=chosen.path.heads[best].mean(axis=0), watch=watch), scaling


def _temperature(out_of_fold: np.ndarray, labels: np.ndarray) -> float:
    judged = ~np.isnan(out_of_fold).any(axis=1)
    return fit_temperature(out_of_fold[judged], labels[judged]) if judged.any() else 1.0


def _to_c(penalty: float, total: float) -> float | None:
    return 1 / (penalty * total) if penalty > 0 else None


def _unjudged(chosen: Search, judged: np.ndarray) -> tuple[str, ...]:
    """What is missing where too few rows can be left out. judged: [N train] bool, whether a row was."""
    if not judged.any():
        return (
            "no training row can be left out: there are no out-of-fold answers and no temperature fitted on them, "
            "so that probabilities are as they were fitted. Add training examples.",
        )
    if chosen.left_out == [VAL] or len(chosen.left_out) > 1:
        return ()
    return (
        "one fold alone can be left out, and it chose λ: there is no validation figure. Add examples or groups, or a "
        "val split.",
    )


def _warnings(
    config: FitLinearConfig, searches: list[Search], chosen: Search, best: int, solution: Solution, num_stopped: int
) -> tuple[str, ...]:
    """What a person should know of the fits. num_stopped: of those without each fold, how many did not converge."""
    found = [*edge_warning(chosen.penalties, best)]
    or_standardise = "" if chosen.kind == "standard" else ", or standardise the features"
    fits = chosen.path.converged
    if not fits.all():
        near = fits[max(best - 1, 0) : best + 2]
        touched = (
            f"{int((~near).sum())} of them at the λ chosen or next to it, so that another choice may be as good"
            if not near.all()
            else "none of them at the λ chosen or next to it, where the choice is made"
        )
        found.append(
            f"{int((~fits).sum())} of {fits.size} fits that choose λ did not converge, {touched}: "
            f"leave out the smallest λ with --penalties{or_standardise}"
        )
    for search in searches:
        if search is not chosen and not search.path.converged.all():
            stopped = ~search.path.converged
            found.append(
                f"{int(stopped.sum())} of {stopped.size} fits of {search.name}, "
                "which was not chosen, did not converge, so that it may be better than it looks: leave out the "
                "smallest λ with --penalties"
            )
    if num_stopped:
        found.append(
            f"{num_stopped} of the fits without each fold did not converge, so that answers to training rows and the "
            f"temperature are not quite those of the optimum: raise λ with --penalties{or_standardise}"
        )
    if not solution.converged:
        better = "use --solver lbfgs" if config.solver == "sklearn" else f"raise λ with --penalties{or_standardise}"
        found.append(
            f"the final fit did not converge: its objective, {solution.objective:.6g}, is some {solution.gap:.1e} "
            f"above the optimum: {better}"
        )
    return tuple(found)
