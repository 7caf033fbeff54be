"""CLIP's vision tower: its config, its numbers against PyTorch's, and what training mode changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probe.backbones import VisionTower, ViTConfig, build_tower, load_backbone
from probe.errors import InputError
from tests.golden.cases import CASES, TOWERS
from tests.parity import assert_equals_transformers

CLIP_CASES = [case for case in CASES if case.name.startswith("clip")]
TINY = ViTConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
)


def test_fields_and_defaults_are_those_of_transformers() -> None:
    from transformers import CLIPVisionConfig

    theirs = CLIPVisionConfig()
    ours = ViTConfig()
    assert dataclasses.asdict(ours) == {f.name: getattr(theirs, f.name) for f in dataclasses.fields(ours)}
    own = set(CLIPVisionConfig.__annotations__) - {"model_type", "base_config_key"}
    assert own == {field.name for field in dataclasses.fields(ours)}


@pytest.mark.parametrize("case", CLIP_CASES, ids=lambda case: case.name)
def test_every_layer_equals_pytorch(case) -> None:
    folder = TOWERS / case.name
    with np.load(folder / "golden.npz") as golden:
        assert_equals_transformers(folder, dict(golden))


@pytest.mark.parametrize("case", CLIP_CASES, ids=lambda case: case.name)
def test_every_layer_equals_pytorch_run_now(case, tmp_path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed; the stored golden arrays stand in for it")
    from tests.golden.make_towers import make_model, make_pixels, run, save_checkpoint

    model, pixels = make_model(case, seed=5), make_pixels(case, seed=6)
    save_checkpoint(model, case, tmp_path)
    assert_equals_transformers(tmp_path, {"pixels": pixels, **run(model, pixels)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0, "image_size": "224"}, "hidden_size is 0, image_size is '224'; must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5; must be a divisor of hidden_size 16"),
        ({"patch_size": 17}, "patch_size is 17; must be at most image_size 16"),
        ({"image_size": (16, 16)}, "image_size is"),
        ({"projection_dim": -1}, "projection_dim is -1"),
        ({"hidden_act": "swiglu"}, "hidden_act is 'swiglu'; must be one of gelu, quick_gelu, relu, silu"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None; must be a number"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0; must be above 0"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0; must be at least 0 and below 1"),
    ],
)
def test_a_config_that_no_tower_can_be_built_from_is_refused(fields, message) -> None:
    with pytest.raises(InputError) as caught:
        dataclasses.replace(TINY, **fields)
    assert message in str(caught.value)


def test_images_of_another_size_are_refused() -> None:
    tower = VisionTower(TINY)
    with pytest.raises(ValueError, match=r"images of \(16, 16, 3\) \(H, W, C\), got \(16, 24, 3\)"):
        tower.init(jax.random.key(0), jnp.zeros((1, 16, 24, 3)))


def test_the_border_beyond_the_last_whole_patch_is_not_seen() -> None:
    tower = VisionTower(dataclasses.replace(TINY, image_size=19))
    pixels = jax.random.normal(jax.random.key(1), (2, 19, 19, 3))
    variables = jax.jit(tower.init)(jax.random.key(0), pixels)
    border_changed = pixels.at[:, 16:].set(7.0).at[:, :, 16:].set(-7.0)
    apply = jax.jit(tower.apply)
    first, second = (apply(variables, each).pooler_output for each in (pixels, border_changed))
    np.testing.assert_array_equal(first, second)


def test_attention_dropout_acts_in_training_alone() -> None:
    tower = build_tower(dataclasses.replace(TINY, attention_dropout=0.5))
    without = build_tower(TINY)
    pixels = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    variables = jax.jit(tower.init)(jax.random.key(0), pixels)
    pooled = tower.apply(variables, pixels).pooler_output
    np.testing.assert_array_equal(pooled, without.apply(variables, pixels, train=True).pooler_output)
    dropped = [
        tower.apply(variables, pixels, train=True, rngs={"dropout": jax.random.key(seed)}).pooler_output
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert not np.allclose(dropped[0], dropped[2])
    assert not np.allclose(dropped[0], pooled)


def test_a_tower_from_scratch_starts_as_transformers_start_it() -> None:
    config = ViTConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=2)
    shape = (1, config.image_size, config.image_size, 3)
    params = jax.jit(VisionTower(config).init)(jax.random.key(0), jnp.zeros(shape))["params"]
    layer = params["encoder"]["layers_3"]
    expected = {  # of CLIPPreTrainedModel._init_weights
        "patch": (params["embeddings"]["patch_embedding"]["kernel"], 0.02),
        "query": (layer["self_attn"]["q_proj"]["kernel"], 128**-0.5 * 16**-0.5),
        "out": (layer["self_attn"]["out_proj"]["kernel"], 128**-0.5),
        "fc1": (layer["mlp"]["fc1"]["kernel"], 256**-0.5),
        "fc2": (layer["mlp"]["fc2"]["kernel"], 128**-0.5 * 16**-0.5),
        "projection": (params["visual_projection"]["kernel"], 128**-0.5),
    }
    for name, (kernel, std) in expected.items():
        assert float(jnp.std(kernel)) == pytest.approx(std, rel=0.05), name


def test_the_parameter_paths_are_those_that_users_freeze_by() -> None:
    params = load_backbone(TOWERS / "clip").variables["params"]
    assert set(params) == {
        "embeddings", "pre_layernorm", "encoder", "post_layernorm", "visual_projection",
    }  # fmt: skip
    assert set(params["embeddings"]) == {"class_embedding", "position_embedding", "patch_embedding"}
    assert set(params["encoder"]) == {"layers_0", "layers_1"}
    assert set(params["encoder"]["layers_0"]) == {"layer_norm1", "self_attn", "layer_norm2", "mlp"}
