"""Splits: every labelled row is in one place, what is held out is stratified, and classes are checked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import InputError
from probe.splits import assign_folds, resolve_splits

NAMES = ("ant", "bee", "cat", "dog")


def resolve(labels, splits=None, groups=None, *, fraction=0.25, seed=0):
    labels = np.asarray(labels)
    splits = np.full(len(labels), "") if splits is None else np.asarray(splits)
    names = NAMES[: labels.max(initial=0) + 1]
    return resolve_splits(labels, splits, groups, class_names=names, val_fraction=fraction, seed=seed)


@settings(max_examples=50, deadline=None)
@given(
    rest=st.lists(st.integers(-1, 3), max_size=40),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 100),
)
def test_held_out_rows_are_stratified(rest, fraction, seed):
    labels = np.array([0, 0, 1, 2, 3, *rest])
    found = resolve(labels, fraction=fraction, seed=seed)
    again = resolve(labels, fraction=fraction, seed=seed)
    np.testing.assert_array_equal(found.val, again.val)
    assert sorted([*found.train, *found.val]) == np.nonzero(labels >= 0)[0].tolist()
    assert not found.val_is_given
    for label in set(labels[labels >= 0].tolist()):
        num, num_held = (labels == label).sum(), (labels[found.val] == label).sum()
        assert (labels[found.train] == label).any()
        assert num == 1 or num_held >= 1
        assert abs(num_held - fraction * num) <= 1


def test_given_splits_are_kept():
    splits = ["train", "val", "test", "", "train", "test"]
    found = resolve([0, 1, 0, 1, -1, -1], splits)
    assert (found.train.tolist(), found.val.tolist(), found.test.tolist()) == ([0, 3], [1], [2])
    assert found.val_is_given


def test_groups_stay_together():
    labels = np.repeat([0, 1, 2, 3], 12)
    groups = np.array([f"patient {i // 3}" if i % 12 < 9 else "" for i in range(48)])
    found = resolve(labels, groups=groups)
    assert not set(groups[found.train]) & (set(groups[found.val]) - {""})
    assert 6 <= len(found.val) <= 18
    assert set(labels[found.val]) == {0, 1, 2, 3}


def test_a_class_of_one_group_stays_in_train():
    groups = np.array(["a"] * 5 + ["b"] * 3 + ["c"] * 3 + ["d"] * 3)
    found = resolve([0] * 5 + [1] * 9, groups=groups)
    assert 0 not in np.array([0] * 5 + [1] * 9)[found.val]


@pytest.mark.parametrize(
    ("labels", "splits", "message"),
    [
        ([2, 2], None, r"1 class \('cat'\); a classifier needs at least two"),
        ([-1, -1], None, r"0 class \(none\)"),
        (
            [0, 1, 2, 3],
            ["train", "train", "test", "val"],
            r"'cat', 'dog' \(val has 'dog'; test has 'cat'\); train has 'ant', 'bee'",
        ),
        ([0, 2], None, r"lacks: 'bee' \(no row has them\)"),
        ([0, 1], None, "can be held out"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(labels, splits, message):
    with pytest.raises(InputError, match=message):
        resolve(labels, splits)


def test_a_label_that_every_training_row_has_is_refused():
    """Nothing tells what it looks like not to have it, and its bias would grow for ever."""
    labels = np.random.default_rng(0).random((20, 3)) < 0.5
    labels[:15, 1], labels[15:, 1] = True, False
    splits = np.where(np.arange(20) < 15, "train", "test")
    with pytest.raises(InputError, match=r"every training row has 'bee'.*Take it out, or add training"):
        resolve_splits(labels, splits, class_names=NAMES[:3], val_fraction=0, seed=0)
    labels[0, 1] = False
    assert len(resolve_splits(labels, splits, class_names=NAMES[:3], val_fraction=0, seed=0).train) == 15


@settings(max_examples=50, deadline=None)
@given(
    rest=st.lists(st.integers(0, 3), max_size=40),
    num_folds=st.integers(2, 6),
    group_size=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 100),
)
def test_a_fold_that_is_left_out_leaves_every_class_behind(rest, num_folds, group_size, seed):
    labels = np.array([0, 1, *rest])
    groups = np.array([f"g{row // group_size}" if group_size else "" for row in range(len(labels))])
    folds, few = assign_folds(labels, groups, num_folds, seed=seed)
    for fold in set(folds.tolist()) - {-1}:
        assert set(labels[folds != fold]) == set(labels)
    for group in set(groups) - {""}:
        assert len(set(folds[groups == group].tolist())) == 1
    assert few.tolist() == [label for label in np.unique(labels) if (labels == label).sum() < num_folds]
    if not group_size:
        for label in np.unique(labels):
            counts = np.bincount(folds[labels == label] + 1, minlength=num_folds + 1)[1:]
            assert counts.max() - counts.min() <= 1


def test_folds_of_rows_with_several_labels_leave_every_label_behind():
    labels = np.random.default_rng(0).random((40, 3)) < [0.5, 0.9, 0.05]
    labels[0, 2] = True
    folds, _ = assign_folds(labels, None, 5, seed=0)
    for fold in set(folds.tolist()) - {-1}:
        rest = labels[folds != fold]
        assert (rest.any(axis=0) & ~rest.all(axis=0)).all()
