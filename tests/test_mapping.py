"""The table between checkpoints and towers: complete, invertible, and all that does not fit is listed."""

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from probe.backbones import load_backbone
from probe.backbones.checkpoint import parse_config
from probe.backbones.mapping import arrays_from, mapping_table, variables_from
from probe.backbones.vit import ViTConfig
from probe.errors import InputError
from tests.golden.cases import CASES, TOWERS

PROJECTED = ViTConfig(
    hidden_size=12, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2
)


def random_arrays(config=PROJECTED, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint's arrays in PyTorch's layout."""
    rng = np.random.default_rng(seed)
    rows = mapping_table(config)
    return {
        row.torch_name: rng.standard_normal([row.shape[axis] for axis in row.torch_axes]).astype(np.float32)
        for row in rows
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_inverse_gives_back_what_transformers_saved(case) -> None:
    backbone = load_backbone(TOWERS / case.name)
    source = load_file(TOWERS / case.name / "model.safetensors")
    inverse = arrays_from(backbone.variables, backbone.config)
    prefix = {"clip-vision": "vision_model.", "resnet-bottleneck": "resnet."}.get(case.name, "")
    used = 0
    for name, array in inverse.items():
        theirs = source[name.removeprefix(prefix) if case.name == "clip-vision" else prefix + name]
        assert array.dtype == theirs.dtype
        np.testing.assert_array_equal(array, theirs)
        used += 1
    left = {name for name in source if name.startswith(("text_", "logit_scale", "classifier."))}
    assert used == len(source) - len(left)


def test_every_variable_is_filled_once() -> None:
    variables = variables_from(random_arrays(), PROJECTED)
    assert set(flatten_dict(variables)) == {row.path for row in mapping_table(PROJECTED)}
    assert all(leaf.dtype == np.float32 for leaf in flatten_dict(variables).values())


def test_other_parts_of_a_checkpoint_are_left_behind() -> None:
    extra = {
        "text_model.encoder.layers.0.mlp.fc1.weight": np.zeros((3, 3)),
        "text_projection.weight": np.zeros((3, 3)),
        "logit_scale": np.zeros(()),
        "classifier.weight": np.zeros((2, 12)),
        "vision_model.embeddings.position_ids": np.arange(5)[None],
    }
    alone, together = (flatten_dict(variables_from(random_arrays() | more, PROJECTED)) for more in ({}, extra))
    assert alone.keys() == together.keys()
    for path in alone:
        np.testing.assert_array_equal(alone[path], together[path])


def test_all_that_does_not_fit_is_listed_in_one_error() -> None:
    arrays = random_arrays()
    del arrays["vision_model.post_layernorm.bias"], arrays["visual_projection.weight"]
    arrays["vision_model.encoder.layers.2.mlp.fc1.bias"] = np.zeros(8, np.float32)
    arrays["logit_bias"] = np.zeros(())
    arrays["embeddings.class_embedding"] = np.zeros(12, np.float32)  # a second time, without prefix
    arrays["vision_model.pre_layrnorm.bias"] = np.zeros(13, np.float32)
    arrays["vision_model.encoder.layers.0.mlp.fc1.weight"] = np.zeros((12, 8), np.float32)  # transposed
    arrays["vision_model.encoder.layers.0.mlp.fc1.bias"] = np.zeros(8, np.int8)
    arrays["vision_model.encoder.layers.1.mlp.fc1.bias"] = np.full(8, np.nan, np.float32)
    with pytest.raises(InputError) as caught:
        variables_from(arrays, PROJECTED)
    assert str(caught.value) == (
        "the weights do not fit config.json; "
        "missing: vision_model.post_layernorm.bias, visual_projection.weight; "
        "not expected: embeddings.class_embedding, logit_bias, vision_model.encoder.layers.2.mlp.fc1.bias; "
        "vision_model.encoder.layers.0.mlp.fc1.bias has type int8, "
        "expected one of float16, bfloat16, float32, float64; "
        "vision_model.encoder.layers.0.mlp.fc1.weight has shape (12, 8), expected (8, 12); "
        "vision_model.encoder.layers.1.mlp.fc1.bias has values that are not finite in float32; "
        "vision_model.pre_layrnorm.bias has shape (13,), expected (12,)"
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_stored_floats_of_any_width_become_float32(dtype) -> None:
    stored = {name: array.astype(dtype) for name, array in random_arrays().items()}
    widened = {name: array.astype(np.float32) for name, array in stored.items()}
    ours, expected = (flatten_dict(variables_from(arrays, PROJECTED)) for arrays in (stored, widened))
    for path in expected:
        assert ours[path].dtype == np.float32
        np.testing.assert_array_equal(ours[path], expected[path])


VISION = {"hidden_size": 12, "num_attention_heads": 3, "projection_dim": 7}


@pytest.mark.parametrize(
    ("raw", "names", "projection_dim"),
    [
        ({"model_type": "clip_vision_model", **VISION}, [], None),
        ({"model_type": "clip_vision_model", **VISION}, ["visual_projection.weight"], 7),
        ({"model_type": "clip_vision_model", "architectures": ["CLIPVisionModelWithProjection"], **VISION}, [], 7),
        ({"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "vision_config": VISION}, [], None),
        ({"model_type": "clip", "vision_config": VISION, "projection_dim": 5}, ["visual_projection.kernel"], 5),
        ({"model_type": "clip", "vision_config": VISION}, ["visual_projection.weight"], 512),
        ({"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": VISION}, [], 512),
        ({"model_type": "clip", "architectures": ["CLIPVisionModel"], "vision_config": VISION}, [], None),
        (
            {"model_type": "clip", "architectures": ["CLIPVisionModelWithProjection"], "vision_config": VISION},
            ["visual_projection.weight"],
            7,
        ),
        (
            {"model_type": "clip", "vision_config": {"hidden_size": 99}, "vision_config_dict": VISION},
            ["visual_projection.weight"],
            512,
        ),
    ],
)
def test_a_clip_config_is_read_flat_or_nested(raw, names, projection_dim) -> None:
    expected = ViTConfig(hidden_size=12, num_attention_heads=3, projection_dim=projection_dim)
    assert parse_config(raw, names) == expected
