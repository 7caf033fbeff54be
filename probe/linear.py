"""`probe fit-linear`: trains a head on cached embeddings, and says how good it is on rows that it never saw.

Who chose what on which rows: train fits, validation chooses λ (or the MLP's epoch), test is opened once at
the end. The linear head is then fitted again on train and validation together, so nothing is left to judge
that head but the test split; what stands under "val" is the figure of heads that train alone gave, each half
of the validation rows answered by the head that the other half chose.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from probe import bundle, predictions
from probe.choice import best_candidate, cross_fitted
from probe.config import FitLinearConfig, to_json
from probe.errors import InputError
from probe.heads import Params, TrainedHead, class_logits, fold_scaling, make_head, num_logits
from probe.metrics import summarize
from probe.solver import Solution, solve_path, solve_with_sklearn
from probe.splits import Splits, resolve_splits
from probe.steps import padded_batches, shuffled
from probe.train import fit

PENALTIES = tuple(float(penalty) for penalty in np.logspace(2, -6, 17))  # λ, for standardised features
_CONSTANT = 1e-6  # a deviation below this share of the mean is float32's rounding, not a feature
_NAMED = 5  # how many of many rows a message names


@dataclasses.dataclass(frozen=True)
class FittedHead:
    """A trained head and how it came about.

    head: acts on raw embeddings. val_logits: [N, C] of the validation rows that may be judged, or None where
    there are too few to choose and to judge. facts: what metrics.json says of the choice, as JSON values.
    """

    head: TrainedHead
    val_logits: np.ndarray | None
    facts: dict[str, Any]


def fit_linear(config: FitLinearConfig) -> dict[str, Any]:
    """Trains the head that the config asks for and writes the run folder.

    Returns: what metrics.json holds.
    Raises: InputError for labels or embeddings that cannot be learned from, and what reading a cache raises.
    """
    from probe.backbones import load_backbone
    from probe.cache import Cache

    cache = Cache.open(config.cache)
    table = cache.table
    embeddings = cache.embeddings()
    check_finite(embeddings, table.names)
    splits = resolve_splits(
        table.labels,
        table.splits,
        table.groups,
        class_names=cache.class_names,
        val_fraction=config.val_fraction,
        seed=config.seed,
    )
    fitted, metrics = fit_arrays(config, embeddings, table.labels, splits, cache.class_names)
    answers = predictions.collect(
        _answers(fitted, embeddings, splits),
        class_names=cache.class_names,
        names=table.names,
        keys=table.keys,
        labels=table.labels,
    )
    provenance = cache.provenance
    reference = bundle.BackboneReference(
        name=provenance["backbone"],
        revision=provenance["backbone_revision"],
        fingerprint=provenance["backbone_fingerprint"],
    )
    bundle.save(
        config.out,
        head=fitted.head,
        class_names=cache.class_names,
        view="pooler",
        backbone=reference,
        preprocessor_config=provenance["preprocessor_config"],
        backbone_copy=(load_backbone(reference.name, revision=reference.revision) if config.bundle_backbone else None),
        config=to_json(config),
        metrics=metrics,
        files={predictions.FILE_NAME: predictions.to_bytes(answers)},
        overwrite=config.overwrite,
    )
    return metrics


def fit_arrays(
    config: FitLinearConfig,
    embeddings: np.ndarray,
    labels: np.ndarray,
    splits: Splits,
    class_names: Sequence[str],
) -> tuple[FittedHead, dict[str, Any]]:
    """Chooses, fits and judges a head: all of `fit_linear` but the files.

    Args:
      embeddings: [N, D] float32, finite; labels: [N] integers, -1 where there is none.
    Returns: the head, and what metrics.json holds.
    """
    fit_head = _fit_mlp if config.head == "mlp" else _fit_convex
    fitted = fit_head(config, embeddings, labels, splits, class_names)
    train_logits = np.asarray(class_logits(fitted.head.apply(embeddings[splits.train])))
    figures = {"train": summarize(train_logits, labels[splits.train], class_names, full=False)}
    for name, (rows, logits) in _answers(fitted, embeddings, splits).items():
        figures[name] = summarize(logits, labels[rows], class_names)
    if "val" in figures:
        figures["val"]["of"] = "heads that train alone gave, each half of the rows judged by what the other chose"
    return fitted, {
        "splits": figures,
        "head": config.head,
        "val_is_given": splits.val_is_given,
        **fitted.facts,
        "baseline": _baseline(embeddings, labels, splits, class_names),
    }


def describe(metrics: dict[str, Any]) -> str:
    """The metrics as a few lines for people."""
    lines = []
    for name in ("train", "val", "test"):
        if figures := metrics["splits"].get(name):
            low, high = figures["accuracy_interval_95"]
            lines.append(
                f"{name:5}  accuracy {figures['accuracy']:.4f} (95 %: {low:.4f} to {high:.4f})"
                f"  nll {figures['nll']:.4f}  n {figures['n']:,}"
            )
    baseline = metrics["baseline"]
    lines.append(
        f"{baseline['split']:5}  accuracy {baseline['accuracy']:.4f}, nll {baseline['nll']:.4f}"
        f" by scikit-learn's LogisticRegression(C=1)"
    )
    if "solution" in metrics:
        solution = metrics["solution"]
        state = "converged" if solution["converged"] else "NOT CONVERGED"
        lines.append(
            f"λ {metrics['penalty']:.3g} (C {metrics['C']:.3g}), objective {solution['objective']:.8f}, "
            f"gradient norm {solution['gradient_norm']:.2e} from {solution['initial_gradient_norm']:.2e}, "
            f"{state} after {solution['num_iterations']} iterations"
        )
    else:
        lines.append(f"epoch {metrics['epoch']} of {metrics['num_epochs']} kept")
    return "\n".join(lines)


def check_finite(embeddings: np.ndarray, names: Sequence[bytes]) -> None:
    """Raises InputError, naming the rows, if an embedding has a NaN or an infinity."""
    (rows,) = np.nonzero(~np.isfinite(embeddings).all(axis=1))
    if len(rows):
        named = ", ".join(os.fsdecode(names[row]) for row in rows[:_NAMED])
        rest = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        raise InputError(
            f"{len(rows)} embeddings are not finite: {named}{rest}. Look at these images and at the "
            "backbone's weights, and embed them again."
        )


def feature_scaling(embeddings: np.ndarray, scaling: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale, each [D] float64, by which features are standardised; scale 0 marks a constant feature.

    Args:
      embeddings: [N, D], the training rows alone.
      scaling: "standard", or "none" for mean 0 and scale 1.
    """
    if scaling == "none":
        return np.zeros(embeddings.shape[1]), np.ones(embeddings.shape[1])
    mean = embeddings.mean(axis=0, dtype=np.float64)
    deviation = embeddings.std(axis=0, dtype=np.float64)
    return mean, np.where(deviation > _CONSTANT * np.abs(mean), deviation, 0)


def apply_scaling(embeddings: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[N, D] float32 embeddings, scaled in float64 and rounded once; constant features become 0."""
    centred = embeddings - mean
    scaled = np.divide(centred, scale, out=np.zeros_like(centred), where=scale > 0)
    return np.asarray(scaled, np.float32)


def _answers(fitted: FittedHead, embeddings: np.ndarray, splits: Splits) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split to (its rows, their logits [n, C]): what may be judged, since no row chose or trained what answers it."""
    answers = {}
    if fitted.val_logits is not None:
        answers["val"] = (splits.val, fitted.val_logits)
    if len(splits.test):
        answers["test"] = (splits.test, np.asarray(class_logits(fitted.head.apply(embeddings[splits.test]))))
    return answers


def _fit_convex(
    config: FitLinearConfig,
    embeddings: np.ndarray,
    labels: np.ndarray,
    splits: Splits,
    class_names: Sequence[str],
) -> FittedHead:
    """λ chosen on validation along the path; then one fit of train and validation together."""
    solutions, heads = _solve(config, embeddings[splits.train], labels[splits.train], len(class_names), PENALTIES)
    val_embeddings, val_labels = embeddings[splits.val], labels[splits.val]
    val_logits = np.stack([class_logits(head.apply(val_embeddings)) for head in heads])
    best = best_candidate(val_logits, val_labels)  # of equals the first, which is the most penalised
    solution, head, fitted_on = solutions[best], heads[best], splits.train
    if not config.no_refit:
        fitted_on = np.sort(np.concatenate([splits.train, splits.val]))
        # C is held, not λ: with more rows the penalty weighs less beside them.
        penalty = PENALTIES[best] * len(splits.train) / len(fitted_on)
        (solution,), (head,) = _solve(config, embeddings[fitted_on], labels[fitted_on], len(class_names), (penalty,))
    curve = [
        {"penalty": penalty, **_pick(summarize(logits, val_labels, class_names, full=False), "accuracy", "nll")}
        for penalty, logits in zip(PENALTIES, val_logits, strict=True)
    ]
    return FittedHead(
        head=head,
        val_logits=cross_fitted(val_logits, val_labels),
        facts={
            "fitted_on": "train" if config.no_refit else "train + val",
            "penalty": solution.penalty,
            "C": 1 / (solution.penalty * len(fitted_on)),
            "solver": config.solver,
            "solution": solution.certificate(),
            "curve": curve,
        },
    )


def _solve(
    config: FitLinearConfig,
    embeddings: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    penalties: Sequence[float],
) -> tuple[list[Solution], list[TrainedHead]]:
    """The optimum for each λ, and the same as heads on raw embeddings."""
    mean, scale = feature_scaling(embeddings, config.scaling)
    features = apply_scaling(embeddings, mean, scale)
    if config.solver == "sklearn":
        solutions = [solve_with_sklearn(features, labels, num_classes, penalty) for penalty in penalties]
    else:
        solutions = solve_path(features, labels, num_classes, penalties)
    return solutions, [TrainedHead((), fold_scaling(solution.params, mean, scale)) for solution in solutions]


def _fit_mlp(
    config: FitLinearConfig,
    embeddings: np.ndarray,
    labels: np.ndarray,
    splits: Splits,
    class_names: Sequence[str],
) -> FittedHead:
    """Adam on shuffled batches of train, the epoch chosen on validation. There is no second fit: the number
    of epochs that suits train would not be the one that suits more rows."""
    mean, scale = feature_scaling(embeddings[splits.train], config.scaling)
    features, train_labels = apply_scaling(embeddings[splits.train], mean, scale), labels[splits.train]
    val_features, val_labels = apply_scaling(embeddings[splits.val], mean, scale), labels[splits.val]
    module = make_head(num_logits(len(class_names)), config.hidden)
    params = module.init(jax.random.key(config.seed), jnp.zeros((1, embeddings.shape[1])))["params"]

    def apply_fn(params: Params, model_state: Any, inputs: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
        return jnp.asarray(module.apply({"params": params["head"]}, inputs)), model_state

    def train_batches(epoch: int) -> Any:
        order = shuffled(len(train_labels), seed=config.seed, epoch=epoch)
        return padded_batches(features, train_labels, config.batch_size, order)

    result = fit(
        apply_fn,
        optax.adam(config.learning_rate),
        {"head": params},
        train_batches=train_batches,
        val_batches=functools.partial(padded_batches, val_features, val_labels, config.batch_size),
        num_epochs=config.epochs,
        seed=config.seed,
    )
    return FittedHead(
        head=TrainedHead(config.hidden, fold_scaling(result.params["head"], mean, scale)),
        val_logits=cross_fitted(result.val_logits, result.val_labels),
        facts={
            "fitted_on": "train",
            "hidden": list(config.hidden),
            "epoch": result.best + 1,
            "num_epochs": config.epochs,
            "history": [dataclasses.asdict(epoch) for epoch in result.history],
        },
    )


def _baseline(embeddings: np.ndarray, labels: np.ndarray, splits: Splits, class_names: Sequence[str]) -> dict[str, Any]:
    """What scikit-learn gives as it comes: standardised features, C = 1, nothing chosen.

    Fitted on train and validation and judged on test; without a test split, fitted on train and judged on
    validation.
    """
    name, rows = ("test", splits.test) if len(splits.test) else ("val", splits.val)
    fitted_on = np.concatenate([splits.train, splits.val]) if len(splits.test) else splits.train
    mean, scale = feature_scaling(embeddings[fitted_on], "standard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a baseline as people get it; n_iter is reported
        model = LogisticRegression(max_iter=1000).fit(
            apply_scaling(embeddings[fitted_on], mean, scale), labels[fitted_on]
        )
    decisions = model.decision_function(apply_scaling(embeddings[rows], mean, scale))
    logits = np.asarray(class_logits(jnp.asarray(decisions.reshape(len(rows), -1))))
    summary = summarize(logits, labels[rows], class_names, full=False)
    figures = _pick(summary, "accuracy", "accuracy_interval_95", "nll")
    return {"program": "scikit-learn LogisticRegression", "C": 1.0, "split": name, **figures}


def _pick(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}
