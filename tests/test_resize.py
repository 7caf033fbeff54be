"""Backbones at another image size."""

import jax
import numpy as np
import pytest

from probe.backbones import load_backbone, save_backbone
from probe.backbones.resize import interpolate_positions, resize_backbone
from probe.errors import ConfigError


def test_clip_takes_larger_images(tiny_clip, tmp_path):
    backbone = load_backbone(str(tiny_clip))
    larger = resize_backbone(backbone, 40)
    assert larger.preprocessing.image_size == (40, 40)
    assert larger.variables["params"]["embeddings"]["position_embedding"].shape == (1 + 5 * 5, 16)
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    output = larger.apply(larger.variables, images)
    assert output.pooler_output.shape == (2, 16)
    assert larger.fingerprint != backbone.fingerprint
    save_backbone(larger, tmp_path / "larger")
    again = load_backbone(tmp_path / "larger")
    assert again.fingerprint == larger.fingerprint


def test_a_resnet_keeps_its_weights(tiny_resnet):
    backbone = load_backbone(str(tiny_resnet))
    larger = resize_backbone(backbone, 64)
    assert larger.preprocessing.image_size == (64, 64)
    assert larger.preprocessing.resize == 72  # 36 for 32: the same share is cropped
    jax.tree.map(np.testing.assert_array_equal, larger.variables, backbone.variables)


def test_the_size_it_has_changes_nothing(tiny_clip):
    backbone = load_backbone(str(tiny_clip))
    assert resize_backbone(backbone, 16) is backbone


def test_positions_on_a_plane_stay_on_it():
    """A cubic reproduces what is linear, away from the border; the class token stays to the bit."""
    rows, columns = np.mgrid[:8, :8].astype(np.float32)
    positions = np.concatenate([[[7.0, 9.0]], np.stack([rows, columns], axis=-1).reshape(64, 2)]).astype(np.float32)
    found = interpolate_positions(positions, 8, 16)
    np.testing.assert_array_equal(found[0], positions[0])
    grid = found[1:].reshape(16, 16, 2)[4:-4, 4:-4]
    centres = (np.arange(16) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(grid[..., 0], np.broadcast_to(centres[4:-4, None], (8, 8)), atol=1e-5)


def test_images_smaller_than_a_patch_are_refused(tiny_clip):
    with pytest.raises(ConfigError, match=r"--image-size 4: the patches of .* are 8 wide"):
        resize_backbone(load_backbone(str(tiny_clip)), 4)
