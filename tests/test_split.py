"""A tower cut in two is the same tower."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from probe.backbones import load_backbone, normalize_pixels
from probe.backbones.split import count_blocks, make_prefix, make_suffix


@pytest.fixture(params=["tiny_clip", "tiny_resnet"])
def backbone(request):
    return load_backbone(str(request.getfixturevalue(request.param)))


def test_the_parts_one_after_the_other_are_the_whole(backbone):
    """At every block, by the variables of the whole tower; two programs differ by float error alone."""
    images = np.random.default_rng(0).integers(0, 256, (3, *backbone.preprocessing.image_size, 3), np.uint8)
    pixels = normalize_pixels(images, backbone.preprocessing)
    whole = jax.jit(backbone.module.apply)(backbone.variables, pixels)
    total = count_blocks(backbone.config)
    assert total == {"ViTConfig": 2, "ResNetConfig": 3}[type(backbone.config).__name__]
    for num_blocks in range(1, total + 1):
        activations = jax.jit(make_prefix(backbone.config, num_blocks))(backbone.variables, pixels)
        output = jax.jit(make_suffix(backbone.config, num_blocks).apply)(backbone.variables, activations)
        np.testing.assert_allclose(output.pooler_output, whole.pooler_output, atol=1e-5)
    assert activations.shape[1:-1] in ((1,), (1, 1))  # after the last block the pooler reads no more


def test_a_suffix_has_the_paths_of_the_whole_and_no_others(backbone):
    """Its own init makes what it has: a part of the tree, under the same names and in the same shapes."""
    pixels = np.zeros((1, *backbone.preprocessing.image_size, 3), np.float32)
    of_whole = {path: leaf.shape for path, leaf in flatten_dict(backbone.variables).items()}
    activations = make_prefix(backbone.config, 1)(backbone.variables, pixels)
    made = jax.eval_shape(make_suffix(backbone.config, 1).init, jax.random.key(0), activations)
    found = {path: leaf.shape for path, leaf in flatten_dict(made).items()}
    assert found.items() < of_whole.items()
    names = {"/".join(path[1:4]) for path in of_whole.keys() - found.keys()}
    assert any("layers_0" in name for name in names)
    assert not any("layers_1" in name or "stages_1" in name for name in names)
