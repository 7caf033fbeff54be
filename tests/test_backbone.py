"""The backbone as one value: pixels in, views out, and a fingerprint of all that decides the numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probe.backbones import Backbone, load_backbone, normalize_pixels, save_backbone

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)


def test_pixels_are_rescaled_and_normalised_as_the_checkpoint_says(tiny_clip) -> None:
    preprocessing = load_backbone(tiny_clip).preprocessing
    exact = (IMAGES.astype(np.float64) / 255 - preprocessing.mean) / preprocessing.std
    pixels = jax.jit(lambda images: normalize_pixels(images, preprocessing))(IMAGES)
    assert pixels.dtype == jnp.float32
    np.testing.assert_allclose(pixels, exact, atol=5e-7)  # a few steps of float32 around 2


def test_pixels_that_may_be_scaled_already_are_refused(tiny_clip) -> None:
    backbone = load_backbone(tiny_clip)
    with pytest.raises(TypeError, match=r"images must be uint8 in 0\.\.255, got float32"):
        backbone.apply(backbone.variables, IMAGES.astype(np.float32) / 255)


def test_apply_is_the_module_on_normalised_pixels(tiny_clip) -> None:
    backbone = load_backbone(tiny_clip)
    output = backbone.apply(backbone.variables, IMAGES)
    pixels = normalize_pixels(IMAGES, backbone.preprocessing)
    again = backbone.module.apply(backbone.variables, pixels)
    np.testing.assert_array_equal(output.pooler_output, again.pooler_output)
    assert backbone.views == ("pooler", "projected")
    assert output.pooler_output.shape == (2, backbone.width) == (2, backbone.view_width("pooler"))
    assert output.projected.shape == (2, backbone.view_width("projected")) == (2, 8)
    assert output.last_hidden_state.shape == (2, 1 + 4, 16)


def test_training_returns_the_updated_batch_statistics(tiny_resnet) -> None:
    backbone = load_backbone(tiny_resnet)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    output, updated = backbone.apply(backbone.variables, images, train=True, mutable=["batch_stats"])
    assert backbone.views == ("pooler",)
    assert output.pooler_output.shape == (2, 16) == (2, backbone.width)
    assert output.projected is None
    shapes = jax.tree.map(jnp.shape, backbone.variables["batch_stats"])
    assert jax.tree.map(jnp.shape, updated["batch_stats"]) == shapes
    old, new = (state["batch_stats"]["embedder"]["normalization"]["mean"] for state in (backbone.variables, updated))
    assert not np.allclose(old, new)


def test_a_view_that_is_not_there_is_named(tiny_resnet) -> None:
    with pytest.raises(KeyError, match="no view 'projected', only pooler"):
        load_backbone(tiny_resnet).view_width("projected")


def replace_leaf(backbone: Backbone, change) -> Backbone:
    """The backbone with one of its weights changed."""
    params = jax.tree.map(lambda leaf: leaf, backbone.variables["params"])
    params["post_layernorm"]["bias"] = change(params["post_layernorm"]["bias"])
    return dataclasses.replace(backbone, variables={"params": params})


def test_the_fingerprint_tells_what_decides_the_numbers_and_nothing_else(tiny_clip, tmp_path) -> None:
    backbone = load_backbone(tiny_clip)
    save_backbone(backbone, tmp_path / "copy")
    copy = load_backbone(tmp_path / "copy")
    assert copy.name != backbone.name
    renamed = dataclasses.replace(backbone, name="x", revision="0" * 40)
    assert copy.fingerprint == backbone.fingerprint == renamed.fingerprint
    assert len(backbone.fingerprint) == 64
    with_int = dataclasses.replace(backbone, config=dataclasses.replace(backbone.config, attention_dropout=0))
    assert with_int.fingerprint == backbone.fingerprint

    changed = [
        replace_leaf(backbone, lambda bias: bias.at[3].set(jnp.nextafter(bias[3], 9.0))),
        replace_leaf(backbone, lambda bias: bias.reshape(1, -1)),
        dataclasses.replace(backbone, config=dataclasses.replace(backbone.config, hidden_act="gelu")),
        dataclasses.replace(backbone, config=dataclasses.replace(backbone.config, layer_norm_eps=1e-6)),
        dataclasses.replace(backbone, preprocessing=dataclasses.replace(backbone.preprocessing, resample=2)),
        dataclasses.replace(backbone, preprocessing=dataclasses.replace(backbone.preprocessing, mean=(0.5,) * 3)),
    ]
    assert len({each.fingerprint for each in changed} | {backbone.fingerprint}) == 1 + len(changed)
