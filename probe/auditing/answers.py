"""What is said of each row by heads that were not fitted on it: from a run, or from a head fitted for the audit."""

from pathlib import Path

import numpy as np
from scipy.special import softmax

from probe import bundle
from probe.cache import Cache
from probe.config import FitLinearConfig
from probe.errors import MismatchError
from probe.evaluation import predictions
from probe.heads import class_logits
from probe.probing.convex import fit_convex
from probe.probing.protocol import Data
from probe.splits import assign_folds, resolve_splits

_PENALTIES = (10.0, 1.0, 0.1, 0.01)  # wrong labels want strong ones: of these the likelihood chooses


def of_run(run: Path, cache: Cache) -> np.ndarray:
    """[N, C] probabilities for the cache's rows; NaN where the run has no answer.

    Raises: MismatchError if the run knows other classes, or has no answer to any row; what `bundle.load` raises.
    """
    classifier = bundle.load(run)
    if classifier.class_names != cache.class_names:
        raise MismatchError(
            f"{run}: its classes are {list(classifier.class_names)}, those of {cache.root} are "
            f"{list(cache.class_names)}. Give the run of this cache."
        )
    answers = predictions.load(run)
    row_of = {bytes(key) + name: row for row, (key, name) in enumerate(zip(answers.keys, answers.names, strict=True))}
    found = np.full((len(cache.table), len(cache.class_names)), np.nan)
    probabilities = softmax(answers.logits.astype(np.float64), axis=1)
    for row, (key, name) in enumerate(zip(cache.table.keys, cache.table.names, strict=True)):
        if (theirs := row_of.get(bytes(key) + name)) is not None:
            found[row] = probabilities[theirs]
    if np.isnan(found).all():
        raise MismatchError(f"{run}: it has no answer to any row of {cache.root}. Give the run of this cache.")
    return found


def fitted_now(cache: Cache, embeddings: np.ndarray, clusters: np.ndarray, seed: int) -> np.ndarray:
    """[N, C] probabilities for the cache's rows: of training rows out of fold, of others by the head that train gave.

    Duplicates are left out together, so that none is vouched for by its copy. NaN where there is no answer.
    Raises: InputError as `resolve_splits` does.
    """
    table = cache.table
    splits = resolve_splits(table.labels, table.splits, class_names=cache.class_names, val_fraction=0, seed=seed)
    groups = np.where(table.groups == "", np.char.add("row ", clusters.astype(str)), table.groups)
    folds = np.full(len(table), -1, np.int32)
    folds[splits.train], _ = assign_folds(table.labels[splits.train], groups[splits.train], 5, seed=seed)
    others = np.concatenate([splits.val, splits.test])
    alone = type(splits)(splits.train, np.zeros(0, int), splits.test, val_is_given=False)
    data = Data({"pooler": embeddings}, table.labels, alone, folds, cache.class_names)
    config = FitLinearConfig(cache=cache.root, out=cache.root, criterion="nll", penalties=_PENALTIES, no_refit=True)
    fitted = fit_convex(config, data)
    found = np.full((len(table), len(cache.class_names)), np.nan)
    if fitted.out_of_fold is not None:
        found[splits.train] = softmax(fitted.out_of_fold.astype(np.float64) / fitted.facts["temperature"], axis=1)
    if len(others):
        logits = np.asarray(class_logits(fitted.head.apply(embeddings[others])), np.float64)
        found[others] = softmax(logits, axis=1)
    return found
