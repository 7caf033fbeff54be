"""Fewer labels: draws are nested and of train alone, and the curve's extrapolation finds a known law."""

import dataclasses

import numpy as np
import pytest

from probe.errors import InputError
from probe.linear import describe, fit_data, make_data
from probe.probing.fewer import draw, extrapolate, few_shot, learning_curve
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


def test_a_power_law_is_found_again():
    sizes = np.array([50, 100, 200, 400, 800])
    error = 0.05 + 2 * sizes**-0.5
    noise = np.random.default_rng(0).normal(size=(5, 8)) * 0.002
    found = extrapolate(sizes, 1 - error[:, None] + noise, np.array([1600, 3200]), seed=0)
    for line in found:
        truth = 0.95 - 2 * line["n"] ** -0.5
        assert line["accuracy"] == pytest.approx(truth, abs=0.01)
        assert line["interval_95"][0] <= truth <= line["interval_95"][1]
