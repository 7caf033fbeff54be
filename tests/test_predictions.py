"""Saved predictions: what is written is read, under names of any bytes."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import CorruptError, InputError
from probe.evaluation import predictions
from probe.evaluation.predictions import FILE_NAME, Predictions


def some_predictions(names, *, num_classes=3, multi_label=False, seed=0):
    rng = np.random.default_rng(seed)
    n = len(names)
    labels = rng.random((n, num_classes)) < 0.5 if multi_label else rng.integers(0, num_classes, n, np.int32)
    return Predictions(
        class_names=tuple("abçdefg"[:num_classes]),
        names=list(names),
        keys=rng.integers(0, 256, (n, 32), np.uint8),
        splits=rng.choice(["train", "val", "test"], n),
        labels=labels,
        logits=rng.normal(size=(n, num_classes)).astype(np.float32),
    )


def assert_equal(a, b):
    assert (a.class_names, a.names, a.multi_label) == (b.class_names, b.names, b.multi_label)
    for field in ("keys", "splits", "labels", "logits"):
        left, right = getattr(a, field), getattr(b, field)
        assert left.dtype == right.dtype or field == "splits"
        np.testing.assert_array_equal(left, right)


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.binary(max_size=12), max_size=6),
    num_classes=st.sampled_from([2, 3]),
    multi_label=st.booleans(),
)
def test_what_is_saved_is_loaded(names, num_classes, multi_label, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    saved = some_predictions(names, num_classes=num_classes, multi_label=multi_label)
    content = predictions.to_bytes(saved)
    assert content == predictions.to_bytes(saved)
    (run / FILE_NAME).write_bytes(content)
    assert_equal(predictions.load(run), saved)


def test_rows_that_lie_apart_in_memory_are_saved_as_they_read(tmp_path):
    saved = some_predictions([b"x", b"y", b"z"])
    transposed = dataclasses.replace(saved, logits=np.asfortranarray(saved.logits), keys=np.asfortranarray(saved.keys))
    assert predictions.to_bytes(transposed) == predictions.to_bytes(saved)


def test_rows_are_taken_by_mask_and_by_index():
    saved = some_predictions([b"x", b"yy", b"z"])
    assert_equal(saved.take(np.array([True, False, True])), saved.take(np.array([0, 2])))
    assert saved.take(np.array([2, 0])).names == [b"z", b"x"]
    np.testing.assert_array_equal(saved.take(np.array([2, 0])).logits, saved.logits[[2, 0]])


def test_answers_are_collected_with_their_own_rows():
    saved = some_predictions([b"v", b"w", b"x", b"y"])
    answers = {"test": (np.array([3, 0]), saved.logits[[3, 0]]), "val": (np.array([2]), saved.logits[[2]])}
    kept = {field: getattr(saved, field) for field in ("class_names", "names", "keys", "labels")}
    collected = predictions.collect(answers, **kept)
    assert collected.splits.tolist() == ["test", "test", "val"]
    assert_equal(dataclasses.replace(collected, splits=saved.splits[[3, 0, 2]]), saved.take(np.array([3, 0, 2])))
    nothing = predictions.collect({}, **kept)
    assert (nothing.names, nothing.logits.shape, nothing.labels.dtype) == ([], (0, 3), np.int32)


def test_a_run_without_predictions(tmp_path):
    with pytest.raises(InputError, match=rf"{FILE_NAME}.*Train it again"):
        predictions.load(tmp_path)


def test_a_damaged_file_and_one_of_another_time(tmp_path):
    content = predictions.to_bytes(some_predictions([b"x", b"y"]))
    for damaged in (content[:-4], content[20:], b"", safetensors.numpy.save({"logits": np.zeros(2)})):
        (tmp_path / FILE_NAME).write_bytes(damaged)
        with pytest.raises(CorruptError, match=rf"{FILE_NAME}: damaged"):
            predictions.load(tmp_path)
    header = json.dumps({"format_version": 2, "class_names": []})
    (tmp_path / FILE_NAME).write_bytes(safetensors.numpy.save({"logits": np.zeros(2)}, metadata={"probe": header}))
    with pytest.raises(CorruptError, match="format version 2, but this program reads 1"):
        predictions.load(tmp_path)
