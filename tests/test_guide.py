"""Flax's transfer-learning guide as one script, which docs/from-the-guides.md shows; and the second seed's system."""

import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from probe.backbones import load_backbone
from probe.heads import make_head
from probe.training import steps, train

SCRIPT = Path(__file__).with_name("guide_script.py")


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("tower", ["tiny_clip", "tiny_resnet"])
def test_the_guide_step_by_step(tower, num_classes, tmp_path, monkeypatch, request):
    script = tmp_path / SCRIPT.name
    script.write_text(SCRIPT.read_text().replace("num_classes = 3", f"num_classes = {num_classes}"))
    monkeypatch.setattr(sys, "argv", [str(script), str(request.getfixturevalue(tower))])
    steps = runpy.run_path(str(script))
    assert steps["losses"][0] > steps["losses"][-1]
    assert np.isclose(steps["losses"][0], np.log(num_classes))  # a head of zeros guesses uniformly
    pretrained = steps["vision_variables"]["params"]
    # Frozen is bit-equal.
    jax.tree.map(np.testing.assert_array_equal, steps["state"].params["backbone"], pretrained)
    assert np.any(steps["state"].params["head"]["kernel"] != 0)


def test_a_resnet_without_its_last_layer_and_several_dense_layers(tiny_resnet):
    """The second seed's system, small: shuffled batches, Adam, epochs, verification on unseen images.

    The pictures are noise of two tints; the backbone is random, as the weights of the seed's own ResNet were.
    """
    backbone = load_backbone(str(tiny_resnet))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 96)
    images = rng.integers(0, 120, (96, 32, 32, 3), np.uint8)
    images[labels == 1, ..., 0] += 130
    features = np.asarray(jax.jit(backbone.apply)(backbone.variables, images).pooler_output)
    unseen = np.arange(96) >= 64
    features = (features - features[~unseen].mean(0)) / (features[~unseen].std(0) + 1e-6)

    head = make_head(2, hidden=(32, 16))
    params = {"head": head.init(jax.random.key(0), features)["params"]}

    def apply_fn(params, model_state, inputs, key):
        return head.apply({"params": params["head"]}, inputs), model_state

    result = train.fit(
        apply_fn,
        optax.adam(1e-2),
        params,
        train_batches=lambda epoch: steps.padded_batches(
            features[~unseen], labels[~unseen], 10, steps.shuffled(64, seed=0, epoch=epoch)
        ),
        val_batches=lambda: steps.padded_batches(features[unseen], labels[unseen], 10),
        num_epochs=10,
        seed=0,
    )
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert result.history[-1].val_accuracy >= 0.9
