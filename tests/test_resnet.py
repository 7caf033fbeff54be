"""ResNet: its config, its numbers against PyTorch's, and its batch statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probe.backbones import ResNet, ResNetConfig, load_backbone
from probe.errors import InputError
from tests.golden.cases import CASES, TOWERS
from tests.parity import TOLERANCE, assert_equals_transformers, relative_error

RESNET_CASES = [case for case in CASES if case.name.startswith("resnet")]
TINY = ResNetConfig(embedding_size=4, hidden_sizes=(8, 16), depths=(1, 2))


def test_fields_and_defaults_are_those_of_transformers() -> None:
    from transformers import ResNetConfig as TheirConfig

    theirs, ours = TheirConfig(), ResNetConfig()
    for field in dataclasses.fields(ours):
        value = getattr(theirs, field.name)
        assert getattr(ours, field.name) == (tuple(value) if isinstance(value, list) else value)
    own = set(TheirConfig.__annotations__) - {"model_type", "layer_types"}
    assert own == {field.name for field in dataclasses.fields(ours)}


@pytest.mark.parametrize("case", RESNET_CASES, ids=lambda case: case.name)
def test_every_layer_equals_pytorch(case) -> None:
    folder = TOWERS / case.name
    with np.load(folder / "golden.npz") as golden:
        assert_equals_transformers(folder, dict(golden))


@pytest.mark.parametrize("case", RESNET_CASES, ids=lambda case: case.name)
def test_every_layer_equals_pytorch_run_now(case, tmp_path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed; the stored golden arrays stand in for it")
    from tests.golden.make_towers import make_model, make_pixels, run, save_checkpoint

    model, pixels = make_model(case, seed=5), make_pixels(case, seed=6)
    save_checkpoint(model, case, tmp_path)
    assert_equals_transformers(tmp_path, {"pixels": pixels, **run(model, pixels)})


@pytest.mark.parametrize("case", RESNET_CASES, ids=lambda case: case.name)
def test_training_mode_equals_pytorch(case) -> None:
    backbone = load_backbone(TOWERS / case.name)
    with np.load(TOWERS / case.name / "golden.npz") as golden, jax.default_matmul_precision("highest"):
        output, state = backbone.module.apply(backbone.variables, golden["pixels"], train=True, mutable=["batch_stats"])
        mean = state["batch_stats"]["embedder"]["normalization"]["mean"]
        assert relative_error(output.pooler_output, golden["train/pooler_output"]) <= TOLERANCE
        assert relative_error(mean, golden["train/running_mean"]) <= TOLERANCE


def test_evaluation_reads_the_statistics_and_leaves_them(tiny_resnet) -> None:
    backbone = load_backbone(tiny_resnet)
    pixels = jax.random.normal(jax.random.key(0), (3, 32, 32, 3))
    apply = jax.jit(backbone.module.apply)
    with jax.default_matmul_precision("highest"):  # a GPU's convolutions round float32 unless told not to
        together = apply(backbone.variables, pixels).pooler_output
        alone = [apply(backbone.variables, pixels[i : i + 1]).pooler_output[0] for i in range(3)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda stat: stat + 1.0, backbone.variables["batch_stats"])
    changed = apply(backbone.variables | {"batch_stats": moved}, pixels).pooler_output
    assert not np.allclose(together, changed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding_size": 0}, "embedding_size is 0; must be a positive integer"),
        ({"hidden_sizes": (), "depths": ()}, "hidden_sizes is (), depths is (); must be positive integers"),
        ({"depths": (1, 0)}, "depths is (1, 0); must be positive integers"),
        ({"depths": (1,)}, "depths is (1,); must be one integer for each stage of hidden_sizes (8, 16)"),
        ({"layer_type": "wide"}, "layer_type is 'wide'; must be basic or bottleneck"),
        ({"layer_type": None}, "layer_type is None; must be basic or bottleneck"),
        ({"hidden_sizes": (2, 16)}, "hidden_sizes is (2, 16); must be at least 4 each"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; must be one of"),
        ({"downsample_in_bottleneck": 1}, "downsample_in_bottleneck is 1; must be true or false"),
    ],
)
def test_a_config_that_no_tower_can_be_built_from_is_refused(fields, message) -> None:
    with pytest.raises(InputError) as caught:
        dataclasses.replace(TINY, **fields)
    assert message in str(caught.value)


def test_images_with_another_number_of_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes 3 channels, got images of \(16, 16, 1\)"):
        ResNet(TINY).init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))


def test_the_parameter_paths_are_those_that_users_freeze_by() -> None:
    variables = load_backbone(TOWERS / "resnet-bottleneck").variables
    assert set(variables) == {"params", "batch_stats"}
    for collection, leaves in (("params", {"scale", "bias"}), ("batch_stats", {"mean", "var"})):
        tree = variables[collection]
        assert set(tree) == {"embedder", "encoder"}
        assert set(tree["encoder"]) == {"stages_0", "stages_1"}
        assert set(tree["encoder"]["stages_1"]) == {"layers_0", "layers_1"}
        first, second = (tree["encoder"]["stages_1"][name] for name in ("layers_0", "layers_1"))
        assert set(first) == {"layer_0", "layer_1", "layer_2", "shortcut"}
        assert set(second) == {"layer_0", "layer_1", "layer_2"}
        assert set(second["layer_0"]["normalization"]) == leaves
