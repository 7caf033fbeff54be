"""Fewer labels: draws are nested and of train alone, and the curve's extrapolation finds a known law."""

import dataclasses
import json

import numpy as np
import pytest

from probe.errors import InputError
from probe.linear import describe, fit_data, make_data
from probe.probing.fewer import draw, extrapolate, few_shot, head_warnings, learning_curve
from tests.test_linear import NAMES, SHORT, arrays, config


def make(num_val=0, **options):
    embeddings, labels, splits = arrays(num_val=num_val)
    of = config(penalties=SHORT, seeds=2, **options)
    return of, make_data(of, {"pooler": embeddings}, labels, splits, None, NAMES)[0]


def test_smaller_draws_are_parts_of_larger_ones():
    labels = np.arange(60) % 3
    small, large = (draw(labels, np.full(3, shots), seed=4) for shots in (2, 5))
    assert np.bincount(labels[small]).tolist() == [2, 2, 2]
    assert set(small) < set(large)
    assert set(small) != set(draw(labels, np.full(3, 2), seed=5))


@pytest.mark.parametrize("num_val", [0, 30])
def test_few_shots_are_drawn_from_train_alone(num_val):
    """Nothing changes when validation rows do: they are never merged into what is fitted."""
    options, data = make(num_val, shots=(1, 8))
    table = few_shot(options, data)
    assert [line["shots"] for line in table] == [1, 8]
    assert table[1]["accuracy"] > table[0]["accuracy"]
    assert len(table[0]["accuracies"]) == 2
    data.embeddings["pooler"][data.splits.val] += 5
    assert few_shot(options, data) == table


def test_too_many_shots_are_refused():
    options, data = make(shots=(31,))
    with pytest.raises(InputError, match="needs as many training rows of each class, but 'ant' has 30"):
        few_shot(options, data)


def test_rows_to_judge_on_are_needed():
    options, data = make(shots=(2,))
    data = dataclasses.replace(data, splits=dataclasses.replace(data.splits, test=np.zeros(0, int)))
    with pytest.raises(InputError, match="need a test or a val split"):
        few_shot(options, data)


def test_the_curve_ends_with_all_of_train():
    options, data = make(learning_curve=True)
    curve = learning_curve(options, data)
    sizes = [point["n"] for point in curve["points"]]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 90
    assert [line["n"] for line in curve["extrapolation"]] == [180, 360]
    text = describe(fit_data(options, data)[1])
    assert "90 labels: accuracy" in text
    assert "180 labels, expected" in text


def answered(sizes, num_seeds, num_rows, seed=0):
    """Hits [P, S, J] of heads whose error is 0.05 + 2·n^-0.5."""
    error = 0.05 + 2 * np.asarray(sizes)[:, None, None] ** -0.5
    return np.random.default_rng(seed).random((len(sizes), num_seeds, num_rows)) >= error


def test_a_power_law_is_found_again():
    sizes = np.array([50, 100, 200, 400, 800])
    found = extrapolate(sizes, answered(sizes, 8, 4000), np.array([1600, 3200]), seed=0)
    for line in found:
        truth = 0.95 - 2 * line["n"] ** -0.5
        assert line["accuracy"] == pytest.approx(truth, abs=0.02)
        assert line["interval_95"][0] <= truth <= line["interval_95"][1]


def test_few_rows_to_judge_on_widen_the_interval():
    """By the same heads: what 40 rows say of them is ten times less sure than what 4,000 do."""
    sizes = np.array([50, 100, 200, 400, 800])
    hits = np.repeat(answered(sizes, 1, 4000), 5, axis=1)  # draws that agree: the rows are all that there is of noise
    few, many = (extrapolate(sizes, of, np.array([1600]), seed=0)[0]["interval_95"] for of in (hits[..., :40], hits))
    assert many[1] - many[0] > 0.02
    assert few[1] - few[0] > 3 * (many[1] - many[0])


@pytest.mark.parametrize(("sizes", "num_seeds"), [([50, 100, 200, 400], 1), ([50, 100, 200], 5), ([50], 5)])
def test_too_little_is_measured_for_an_interval(sizes, num_seeds):
    (line,) = extrapolate(np.array(sizes), answered(sizes, num_seeds, 100), np.array([1600]), seed=0)
    assert line["interval_95"] is None
    assert 0 <= line["accuracy"] <= 1


def test_a_curve_without_an_interval_says_so():
    options, data = make(learning_curve=True)
    _, metrics = fit_data(dataclasses.replace(options, seeds=1), data)
    assert metrics["learning_curve"]["extrapolation"][0]["interval_95"] is None
    assert any("the learning curve has no interval" in warning for warning in metrics["warnings"])
    assert "180 labels, expected" in describe(metrics)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_one_shot_heads_heed_class_weights():
    """A class that weighs nearly nothing is hardly ever answered, and its accuracy goes to the others."""
    accuracies = []
    for weight in ("0.000001", "1"):
        options, data = make(shots=(1,), class_weights=(f"bee={weight}",))
        of_bees = np.array([row for row in data.splits.test if data.labels[row] == 1])
        data = dataclasses.replace(data, splits=dataclasses.replace(data.splits, test=of_bees))
        accuracies.append(few_shot(options, data)[0]["accuracy"])
    assert accuracies[0] < accuracies[1]


def test_heads_that_did_not_converge_are_told_of():
    lines = [{"accuracies": [0.5, 0.5], "num_unconverged": 1}, {"accuracies": [0.5, 0.5], "num_unconverged": 0}]
    assert head_warnings("few shots", lines) == ["1 of 4 fits of few shots did not converge: raise λ with --penalties"]
    assert not head_warnings("few shots", lines[1:])
