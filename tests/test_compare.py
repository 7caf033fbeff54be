"""`probe compare`: the same rows or a refusal, joined by content, and differences that chance is held against."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from scipy import stats

from probe import bundle
from probe.cli import main
from probe.compare import align, compare, describe
from probe.config import CompareConfig
from probe.errors import CorruptError, InputError, MismatchError
from probe.evaluation import predictions
from probe.evaluation.metrics import summarize
from probe.evaluation.predictions import Predictions
from probe.heads import TrainedHead

CLASSES = ("cat", "dog", "owl")


def answers(num_rows=60, *, seed=0, skill=1.0, multi_label=False):
    """Answers to the same images whatever the seed, which is that of the classifier."""
    rng = np.random.default_rng(99)
    names = [f"test/{i:03d}.png".encode() for i in range(num_rows)]
    labels = rng.integers(0, 3, num_rows, np.int32)
    one_hot = np.eye(3, dtype=bool)[labels]
    noise = np.random.default_rng(seed).normal(size=(num_rows, 3))
    return Predictions(
        class_names=CLASSES,
        names=names,
        keys=np.stack([np.frombuffer(hashlib.sha256(name).digest(), np.uint8) for name in names]),
        splits=np.full(num_rows, "test"),
        labels=one_hot if multi_label else labels,
        logits=(noise + skill * (2.0 * one_hot - 1)).astype(np.float32),
    )


def save_run(path, saved=None):
    bundle.save(
        path,
        head=TrainedHead(hidden=(), params={"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(3, np.float32)}),
        class_names=CLASSES,
        view="pooler",
        backbone=bundle.BackboneReference(name="somewhere", revision=None, fingerprint="0" * 64),
        preprocessor_config={},
        config={},
        metrics={},
        files={predictions.FILE_NAME: predictions.to_bytes(saved)} if saved else {},
    )
    return path


def compare_saved(tmp_path, a, b):
    runs = [save_run(tmp_path / name, one) for name, one in (("a", a), ("b", b))]
    return compare(CompareConfig(run_a=runs[0], run_b=runs[1]))


def shuffled(of, seed=0):
    return of.take(np.random.default_rng(seed).permutation(len(of.names)))


def test_rows_are_joined_by_content_not_by_position(tmp_path):
    a, b = answers(seed=1), answers(seed=2)
    moved = dataclasses.replace(b, names=[b"elsewhere/" + name[::-1] for name in b.names])
    in_order = compare_saved(tmp_path / "1", a, b)
    out_of_order = compare_saved(tmp_path / "2", a, shuffled(moved))
    for result in (in_order, out_of_order):
        del result["run_a"], result["run_b"]
    assert out_of_order == in_order


def test_classes_are_joined_by_name(tmp_path):
    a, b = answers(seed=1), answers(seed=2)
    order = [2, 0, 1]
    renumbered = dataclasses.replace(
        b,
        class_names=tuple(CLASSES[c] for c in order),
        logits=b.logits[:, order],
        labels=np.array([order.index(label) for label in b.labels], np.int32),
    )
    aligned = align(a, renumbered)
    assert aligned.class_names == CLASSES
    np.testing.assert_array_equal(aligned.logits, b.logits)
    np.testing.assert_array_equal(aligned.labels, a.labels)


def test_an_image_that_is_there_twice_under_two_labels(tmp_path):
    """Content alone does not tell such rows apart, content and label do."""
    a = answers(6)
    keys = a.keys.copy()
    keys[1] = keys[0]
    a = dataclasses.replace(a, keys=keys, labels=np.array([0, 1, 2, 0, 1, 2], np.int32))
    np.testing.assert_array_equal(align(a, shuffled(a)).logits, a.logits)


def test_figures_are_those_of_each_run(tmp_path):
    a, b = answers(seed=1), answers(seed=2, skill=1.5)
    result = compare_saved(tmp_path, a, b)
    of_a, of_b = (summarize(one.logits, one.labels, CLASSES, full=True) for one in (a, b))
    for name, line in result["figures"].items():
        assert line["a"] == pytest.approx(of_a[name])
        assert line["b"] == pytest.approx(of_b[name])
        assert line["difference"] == pytest.approx(of_b[name] - of_a[name])
        low, high = line["interval_95"]
        assert low <= line["difference"] <= high
    for name, line in result["per_class"].items():
        assert line["n"] == of_a["per_class"][name]["n"]
        assert line["accuracy_a"] == pytest.approx(of_a["per_class"][name]["accuracy"])
        assert line["accuracy_b"] == pytest.approx(of_b["per_class"][name]["accuracy"])


def test_mcnemar_and_flips_are_counted_from_the_rows(tmp_path):
    a, b = answers(seed=1), answers(seed=2, skill=1.5)
    result = compare_saved(tmp_path, a, b)
    said_a, said_b = a.logits.argmax(axis=1), b.logits.argmax(axis=1)
    only_a = int(((said_a == a.labels) & (said_b != a.labels)).sum())
    only_b = int(((said_b == a.labels) & (said_a != a.labels)).sum())
    p_value = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert result["mcnemar"] == {"only_a_correct": only_a, "only_b_correct": only_b, "p_value": pytest.approx(p_value)}
    assert {flip["path"] for flip in result["flips"]} == {a.names[i].decode() for i in np.flatnonzero(said_a != said_b)}
    changes = [flip["change"] for flip in result["flips"]]
    assert changes == sorted(changes, key=["fixed", "broken", "other"].index)
    assert (changes.count("fixed"), changes.count("broken")) == (only_b, only_a)
    for flip in result["flips"]:
        i = a.names.index(flip["path"].encode())
        assert flip["label"] == CLASSES[a.labels[i]]
        assert (flip["a"], flip["b"]) == (CLASSES[said_a[i]], CLASSES[said_b[i]])


def test_a_paired_interval_is_narrower_than_two_of_its_own(tmp_path):
    a = answers(400, seed=1)
    b = dataclasses.replace(a, logits=a.logits + 0.1 * answers(400, seed=2).logits)
    low, high = compare_saved(tmp_path, a, b)["figures"]["nll"]["interval_95"]
    alone = summarize(a.logits, a.labels, CLASSES)["nll_interval_95"]
    assert high - low < 0.5 * (alone[1] - alone[0])


def test_a_run_and_itself(tmp_path):
    result = compare_saved(tmp_path, answers(), answers())
    assert result["flips"] == []
    assert result["mcnemar"] == {"only_a_correct": 0, "only_b_correct": 0, "p_value": 1}
    low, high = result["figures"]["accuracy"]["interval_95"]
    assert low == -high
    assert high == pytest.approx(1.96 * np.sqrt(2) / 62, rel=1e-4)  # one disagreement of each kind in 60 + 2 rows
    assert result["figures"]["nll"]["interval_95"] == [0, 0]
    assert "no class shows a difference" in describe(result)
    assert "better" not in describe(result)


def test_a_difference_beyond_every_doubt_is_shown(tmp_path):
    """1,200 answers that all went one way: p is below the smallest double, and 0 is no missing p."""
    labels = np.zeros(1200, np.int32)
    a = dataclasses.replace(answers(1200), labels=labels, logits=np.tile(np.float32([0, 1, 0]), (1200, 1)))
    b = dataclasses.replace(a, logits=np.tile(np.float32([1, 0, 0]), (1200, 1)))
    result = compare_saved(tmp_path, a, b)
    assert result["per_class"]["cat"]["p_value_holm"] == 0
    text = describe(result)
    assert "classes that show a difference in accuracy: 1 of 3" in text
    assert "cat: 0.0000 to 1.0000" in text


def test_sets_of_labels(tmp_path):
    a, b = answers(seed=1, multi_label=True), answers(seed=2, skill=2, multi_label=True)
    result = compare_saved(tmp_path, a, shuffled(b))
    assert result["figures"]["accuracy"]["b"] == pytest.approx(summarize(b.logits, b.labels, CLASSES)["accuracy"])
    assert result["per_class"]["cat"]["n"] == 60
    flip = result["flips"][0]
    assert isinstance(flip["label"], list)
    assert flip["a"] != flip["b"]
    assert "{'" in describe(result)


def without(of, name):
    return of.take(np.array([other != name for other in of.names]))


def test_other_rows_are_refused_and_all_differences_named(tmp_path):
    a, b = answers(), answers(seed=1)
    only_b = without(a, b"test/007.png"), b
    labels = b.labels.copy()
    labels[3] = (labels[3] + 1) % 3
    keys = b.keys.copy()
    keys[5, 0] ^= 1
    changed = dataclasses.replace(
        without(b, b"test/020.png"), labels=np.delete(labels, 20), keys=np.delete(keys, 20, 0)
    )
    with pytest.raises(MismatchError, match=r"1 rows are in B alone \(test/007.png\)"):
        align(*only_b)
    with pytest.raises(MismatchError) as refused:
        align(a, changed)
    for words in (
        "1 rows are in A alone (test/020.png)",
        "1 names stand for other images in B (test/005.png)",
        "1 images have another label (test/003.png is",
        "Compare runs that were judged on the same images",
    ):
        assert words in str(refused.value)
    assert "B alone" not in str(refused.value)


def test_an_image_that_one_run_has_more_often_is_named():
    a = answers(5)
    twice = a.take(np.array([0, 1, 2, 3, 4, 4]))
    with pytest.raises(MismatchError, match=r"1 rows are in B alone \(test/004.png\)"):
        align(a, twice)


def test_other_classes_and_other_kinds_of_labels_are_refused():
    a = answers()
    other = dataclasses.replace(a, class_names=("cat", "bat", "ant"))
    with pytest.raises(MismatchError, match="only A has dog, owl; only B has ant, bat"):
        align(a, other)
    with pytest.raises(MismatchError, match="A gives a row one label, B a set of labels"):
        align(a, answers(multi_label=True))


def test_runs_that_cannot_be_compared(tmp_path, capsys):
    whole, bare = save_run(tmp_path / "whole", answers()), save_run(tmp_path / "bare")
    with pytest.raises(InputError, match="Train it again"):
        compare(CompareConfig(run_a=whole, run_b=bare))
    with pytest.raises(InputError, match="holds no answers to val rows, but to test"):
        compare(CompareConfig(run_a=whole, run_b=whole, split="val"))
    assert main(["compare", str(whole), str(tmp_path / "nowhere")]) == 3
    assert "not found" in capsys.readouterr().err
    file = whole / predictions.FILE_NAME
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=f"{predictions.FILE_NAME} is damaged"):
        compare(CompareConfig(run_a=whole, run_b=whole))


def test_on_the_command_line(tmp_path, capsys):
    a, b = answers(200, seed=1), answers(200, seed=2, skill=2.0)
    odd = dataclasses.replace(a, names=[b"\xff\x1b.png", *a.names[1:]])
    runs = [str(save_run(tmp_path / name, one)) for name, one in (("a", odd), ("b", b))]
    assert main(["compare", *runs, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 200
    assert main(["compare", *runs]) == 0
    out = capsys.readouterr().out
    assert "200 test rows" in out
    assert "exact McNemar p = " in out
    assert any(line.startswith("accuracy ") and line.endswith("B is better") for line in out.splitlines())
    assert any(line.startswith("nll ") and line.endswith("B is better") for line in out.splitlines())
    assert "more, which --json lists" in out
    assert main(["compare", *reversed(runs)]) == 0
    assert "A is better" in capsys.readouterr().out
