"""Which rows train, which choose, and which are opened once at the end."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from probe.errors import InputError


@dataclasses.dataclass(frozen=True)
class Splits:
    """Row indices, ascending and disjoint.

    train fits, val chooses, test is opened once; val_is_given: whether the data had a validation split, else
    val was held out of train.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    val_is_given: bool


def resolve_splits(
    labels: np.ndarray,
    splits: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    class_names: Sequence[str],
    val_fraction: float,
    seed: int,
) -> Splits:
    """Decides which rows train, choose and test.

    Args:
      labels: [N] integers, -1 for rows without a label, which are left out; or [N, C] bool, several labels a row.
      splits: [N] of "train", "val", "test", or "" for none said, which counts as train.
      groups: [N] of text; rows of one group stay together when validation rows are held out; "" is no group.
      class_names: of the C classes.
      val_fraction: share of train, class by class, that is held out where no row says "val"; 0 holds out nothing.
      seed: of the rows held out.
    Raises: InputError as `check_classes` does, or if no row can be held out.
    """
    labelled = labels >= 0 if labels.ndim == 1 else np.ones(len(labels), bool)
    (test,) = np.nonzero(labelled & (splits == "test"))
    (val,) = np.nonzero(labelled & (splits == "val"))
    (train,) = np.nonzero(labelled & (splits != "test") & (splits != "val"))
    check_classes(labels, {"train": train, "val": val, "test": test}, class_names)
    if len(val) or not val_fraction:
        return Splits(train, val, test, val_is_given=len(val) > 0)
    held = _hold_out(labels[train], None if groups is None else groups[train], val_fraction, seed)
    if not held.any():
        raise InputError(
            f"none of the {len(train)} training rows can be held out to choose on: each class has one row "
            "or one group alone. Add examples, or a val split."
        )
    return Splits(train[~held], train[held], test, val_is_given=False)


def assign_folds(
    labels: np.ndarray, groups: np.ndarray | None, num_folds: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Deals rows to folds, class by class, rows of one group together.

    A row that is left out must leave its class behind: rows of a class (or without a label) that only one fold has
    stay in train whatever is left out.

    Args:
      labels: [N] integers, or [N, C] bool; groups: [N] of text, "" for none, or None.
    Returns: folds [N] int32 in 0..num_folds - 1, or -1 for a row that stays in train; and the classes, ascending,
      that have fewer rows than there are folds.
    """
    num_rows = len(labels)
    rng = np.random.default_rng(seed)
    folds = np.empty(num_rows, np.int32)
    grouped = groups is not None and bool((groups != "").any())
    if grouped:
        assert groups is not None
        numbers = group_numbers(groups)
        folds = _deal_groups(labels if labels.ndim == 1 else labels.sum(axis=1), numbers, num_folds, rng)
    else:
        numbers = np.arange(num_rows)
        strata = labels if labels.ndim == 1 else np.zeros(num_rows, int)
        order = rng.permutation(num_rows)
        order = order[np.argsort(strata[order], kind="stable")]  # dealt on from class to class: folds of equal size
        folds[order] = np.arange(num_rows) % num_folds
    members = labels.T if labels.ndim == 2 else [labels == label for label in np.unique(labels)]
    for member in members:
        for side in (member, ~member):
            if side.any() and len(set(folds[side]) - {-1}) == 1 and not (folds[side] == -1).any():
                folds[np.isin(numbers, numbers[side])] = -1
    few = [c for c, member in enumerate(members) if 0 < member.sum() < num_folds]
    return folds, np.unique(labels)[few] if labels.ndim == 1 else np.array(few, int)


def _deal_groups(labels: np.ndarray, numbers: np.ndarray, num_folds: int, rng: np.random.Generator) -> np.ndarray:
    """[N] int32 folds: the largest groups first, each to the fold that has the least of its classes, then of rows."""
    _, labels = np.unique(labels, return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    groups = np.split(order, np.nonzero(np.diff(numbers[order]))[0] + 1)
    rng.shuffle(groups)
    groups.sort(key=len, reverse=True)
    share = 1 / np.bincount(labels)  # a row counts as part of its class
    held = np.zeros((num_folds, len(share)))
    folds = np.empty(len(labels), np.int32)
    for rows in groups:
        classes, counts = np.unique(labels[rows], return_counts=True)
        like = held[:, classes] @ (counts * share[classes])
        fold = min(range(num_folds), key=lambda f: (round(float(like[f]), 12), round(float(held[f].sum()), 12)))
        held[fold, classes] += counts * share[classes]
        folds[rows] = fold
    return folds


def group_numbers(groups: np.ndarray) -> np.ndarray:
    """[N] integers of [N] of text; a row of no group is a group of its own."""
    names, numbers = np.unique(groups, return_inverse=True)
    alone = groups == ""
    numbers[alone] = len(names) + np.arange(alone.sum())
    return numbers


def check_classes(labels: np.ndarray, rows: dict[str, np.ndarray], class_names: Sequence[str]) -> None:
    """Refuses splits that cannot be learned from or judged.

    Raises: InputError if train has fewer than two classes, or lacks one that is named or that another split
    has; or if each of its rows, with several labels, has one and the same.
    """

    def classes_in(split: str) -> list[int]:
        of_split = labels[rows[split]]
        present: list[int] = (np.unique(of_split) if labels.ndim == 1 else np.nonzero(of_split.any(axis=0))[0]).tolist()
        return present

    present = {split: {class_names[label] for label in classes_in(split)} for split in rows}
    if len(present["train"]) < 2:
        raise InputError(
            f"the training rows have {len(present['train'])} class ({_quote(present['train']) or 'none'}); a "
            "classifier needs at least two. Give each class a folder or a label of its own."
        )
    missing = set(class_names) - present["train"]
    if missing:
        found = [f"{split} has {_quote(names & missing)}" for split, names in present.items() if names & missing]
        raise InputError(
            f"classes that train lacks: {_quote(missing)} ({'; '.join(found) or 'no row has them'}); "
            f"train has {_quote(present['train'])}. Add training examples of them, or take them out."
        )
    if labels.ndim == 2 and (in_all := labels[rows["train"]].all(axis=0)).any():
        everywhere = {class_names[label] for label in np.flatnonzero(in_all).tolist()}
        raise InputError(
            f"every training row has {_quote(everywhere)}, so nothing tells what it looks like not to have it. Take it "
            "out, or add training examples without it."
        )


def _quote(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _hold_out(labels: np.ndarray, groups: np.ndarray | None, fraction: float, seed: int) -> np.ndarray:
    """[N] bool: a stratified share; of each class one row stays, and one goes where there are two."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    if groups is not None and (groups != "").any():
        group_of_row = group_numbers(groups)
        folds = _deal_groups(labels, group_of_row, max(2, round(1 / fraction)), rng)
        for fold in range(folds.max() + 1):
            held[folds == fold] = True
            for label in np.setdiff1d(labels, labels[~held]):  # a class in one group alone must be trained on
                held[np.isin(group_of_row, group_of_row[labels == label])] = False
            if held.any():
                break
        return held
    for label in np.unique(labels):
        (rows,) = np.nonzero(labels == label)
        num_held = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held[rng.permutation(rows)[:num_held]] = True
    return held
