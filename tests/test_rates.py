"""The options that say who learns how fast."""

import jax
import numpy as np
import pytest

from probe.backbones import load_backbone
from probe.errors import ConfigError
from probe.training import optim
from probe.training.rates import RateOptions, blocks, make_rules, num_frozen_blocks


def params_of(checkpoint):
    params = load_backbone(str(checkpoint)).variables["params"]
    return {"backbone": params, "head": {"kernel": np.zeros((16, 3)), "bias": np.zeros(3)}}


@pytest.fixture
def clip(tiny_clip):
    return params_of(tiny_clip)


@pytest.fixture
def resnet(tiny_resnet):
    return params_of(tiny_resnet)


def test_the_defaults(clip, resnet):
    assert make_rules(RateOptions(), resnet) == {"backbone": 1e-5, "head": 1e-3}
    assert make_rules(RateOptions(), clip) == {
        "backbone/visual_projection": "frozen",
        "backbone": 1e-5,
        "head": 1e-3,
    }


def test_blocks_are_counted_from_the_pixels_up(clip, resnet):
    assert blocks(clip) == ["backbone/encoder/layers_0", "backbone/encoder/layers_1"]
    assert blocks(resnet) == [
        f"backbone/encoder/stages_{stage}/layers_{layer}" for stage, layer in ((0, 0), (1, 0), (1, 1))
    ]
    many = {"backbone": {"encoder": {f"layers_{i}": {"kernel": 0} for i in range(12)}}}
    assert blocks(many)[-1] == "backbone/encoder/layers_11"


def test_rates_are_the_list_and_the_first_match_wins(clip):
    rates = ("backbone/encoder/layers_1=2e-5", "backbone/**=frozen", "head/bias=1", "head/**=1e-3")
    rules = make_rules(RateOptions(rates=rates), clip)
    assert list(rules.items())[1:] == [
        ("backbone/encoder/layers_1", 2e-5),
        ("backbone/**", "frozen"),
        ("head/bias", 1.0),
        ("head/**", 1e-3),
    ]
    labels = optim.partition(clip, rules)
    assert labels["head"] == {"kernel": 1e-3, "bias": 1.0}


def test_the_sugar_is_the_same_list(clip):
    sugar = make_rules(RateOptions(freeze=("backbone",), head_lr=0.1), clip)
    listed = make_rules(RateOptions(rates=("backbone=frozen", "head=0.1")), clip)
    assert optim.partition(clip, sugar) == optim.partition(clip, listed)


def test_layer_decay_is_geometric_from_the_head_down(clip, resnet):
    rules = make_rules(RateOptions(backbone_lr=1.0, layer_decay=0.5), clip)
    labels = optim.partition(clip, rules)["backbone"]
    assert set(jax.tree.leaves(labels["post_layernorm"])) == {1.0}
    assert set(jax.tree.leaves(labels["encoder"]["layers_1"])) == {1.0}
    assert set(jax.tree.leaves(labels["encoder"]["layers_0"])) == {0.5}
    assert set(jax.tree.leaves([labels["embeddings"], labels["pre_layernorm"]])) == {0.25}
    labels = optim.partition(resnet, make_rules(RateOptions(backbone_lr=1.0, layer_decay=0.5), resnet))
    assert set(jax.tree.leaves(labels["backbone"]["embedder"])) == {0.125}


def test_unfreeze_last_trains_the_top(clip, resnet):
    labels = optim.partition(clip, make_rules(RateOptions(unfreeze_last=1), clip))["backbone"]
    assert set(jax.tree.leaves([labels["post_layernorm"], labels["encoder"]["layers_1"]])) == {1e-5}
    rest = [labels["encoder"]["layers_0"], labels["embeddings"], labels["pre_layernorm"]]
    assert set(jax.tree.leaves(rest)) == {"frozen"}
    labels = optim.partition(resnet, make_rules(RateOptions(unfreeze_last=2, layer_decay=0.1), resnet))
    stages = labels["backbone"]["encoder"]
    assert set(jax.tree.leaves(stages["stages_1"]["layers_1"])) == {1e-5}
    np.testing.assert_allclose(jax.tree.leaves(stages["stages_1"]["layers_0"]), 1e-6)
    assert set(jax.tree.leaves([stages["stages_0"], labels["backbone"]["embedder"]])) == {"frozen"}


@pytest.mark.parametrize(
    ("options", "of_clip", "of_resnet"),
    [
        ({}, 0, 0),
        ({"unfreeze_last": 1}, 1, 2),
        ({"unfreeze_last": 2}, 0, 1),
        ({"freeze": ("backbone",)}, 2, 3),
        ({"freeze": ("backbone/encoder",)}, 0, 0),  # what is below the blocks learns
        ({"rates": ("**/bias=1", "**=frozen")}, 0, 0),
    ],
)
def test_frozen_blocks_are_those_below_all_that_learns(clip, resnet, options, of_clip, of_resnet):
    for params, expected in ((clip, of_clip), (resnet, of_resnet)):
        labels = optim.partition(params, make_rules(RateOptions(**options), params))
        assert num_frozen_blocks(labels) == expected


def test_a_block_that_learns_in_part_is_not_frozen(clip):
    rules = {"backbone/encoder/layers_1/mlp": 1.0, "backbone/post_layernorm": 1.0, "backbone": "frozen", "head": 1.0}
    assert num_frozen_blocks(optim.partition(clip, rules)) == 1
    del rules["backbone/encoder/layers_1/mlp"]
    assert num_frozen_blocks(optim.partition(clip, rules)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rates": ("head=1",), "freeze": ("backbone",), "head_lr": 1.0},
            "--rates is the whole list of rules and does not mix with --freeze, --head-lr: write these as rules",
        ),
        ({"rates": ("head",)}, r"--rates head: write pattern=rate"),
        ({"rates": ("head=fast",)}, r"--rates head=fast: the rate must be a positive number or 'frozen'"),
        ({"rates": ("head=-1",)}, "the rate must be a positive number"),
        ({"rates": ("head=1",)}, "parameters without a rule: backbone/embedder/"),
        ({"rates": ("backbone=1", "head=1", "neck=1")}, "rules without a parameter: neck; the parameters are"),
        ({"rates": ("**=1", "head=2")}, "--rates head: earlier rules take every parameter of it"),
        ({"rates": ("head=1", "backbone=1", "head=2")}, "--rates head: earlier rules take every parameter of it"),
        ({"freeze": ("backbone",), "backbone_lr": 1e-4}, "--backbone-lr cannot act: --freeze takes all"),
        ({"freeze": ("backbone",), "layer_decay": 0.9}, "--layer-decay cannot act: --freeze takes all"),
        ({"backbone_lr": 0.0, "unfreeze_last": 1}, "--unfreeze-last cannot act: --backbone-lr 0 freezes"),
        ({"freeze": ("head",), "head_lr": 1.0}, "--head-lr cannot act: --freeze takes all of the head"),
        ({"unfreeze_last": 4}, "--unfreeze-last 4: the backbone has 3 blocks"),
    ],
)
def test_clashes_are_errors(resnet, options, message):
    with pytest.raises(ConfigError, match=message):
        make_rules(RateOptions(**options), resnet)
