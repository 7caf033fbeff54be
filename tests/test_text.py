"""CLIP's text tower: its config, its numbers against PyTorch's, where a text ends, and its tokenizer."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from probe.backbones import TextConfig, TextTower, load_backbone, load_text_encoder
from probe.backbones.mapping import arrays_from, source_module
from probe.backbones.text import end_positions
from probe.errors import InputError
from tests.golden.cases import TEXT_CASES, TEXTS, TOWERS
from tests.parity import TOLERANCE, relative_error

TINY = TextConfig(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=8,
    eos_token_id=19,
)


def test_fields_and_defaults_are_those_of_transformers() -> None:
    from transformers import CLIPTextConfig

    theirs = CLIPTextConfig()
    ours = TextConfig()
    assert dataclasses.asdict(ours) == {field.name: getattr(theirs, field.name) for field in dataclasses.fields(ours)}
    own = set(CLIPTextConfig.__annotations__) - {"model_type", "base_config_key", "pad_token_id", "bos_token_id"}
    assert own == {field.name for field in dataclasses.fields(ours)}


def assert_texts_equal_transformers(folder: Path, golden: Mapping[str, np.ndarray]) -> None:
    """Every layer, the outputs of the whole, and CLIP's logits where the checkpoint has both towers."""
    encoder = load_text_encoder(folder)
    with jax.default_matmul_precision("highest"):
        output, state = encoder.module.apply(
            encoder.variables, golden["tokens"], capture_intermediates=True, mutable=["intermediates"]
        )
    layers = {
        source_module(encoder.config, path[:-1]).removeprefix("text_model."): values[0]
        for path, values in flatten_dict(state["intermediates"]).items()
        if len(path) > 1 and path[-1] == "__call__"
    }
    errors = {
        name: relative_error(layers[name.removeprefix("module/")], theirs)
        for name, theirs in golden.items()
        if name.startswith("module/")
    }
    for name in ("last_hidden_state", "pooler_output", "projected"):
        errors[name] = relative_error(getattr(output, name), golden[name])
    if "logits_per_image" in golden:
        backbone = load_backbone(folder)
        with jax.default_matmul_precision("highest"):
            images = backbone.module.apply(backbone.variables, golden["pixels"]).projected
        images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, output.projected))
        errors["logits"] = relative_error(encoder.logit_scale * images @ texts.T, golden["logits_per_image"])
    assert len(errors) > 8
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)
def test_every_layer_equals_pytorch(case) -> None:
    folder = TEXTS / case.name
    with np.load(folder / "golden.npz") as golden:
        assert_texts_equal_transformers(folder, dict(golden))


@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)
def test_every_layer_equals_pytorch_run_now(case, tmp_path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed; the stored golden arrays stand in for it")
    from tests.golden.make_texts import make_tokens, run_texts
    from tests.golden.make_towers import make_model, make_pixels, save_checkpoint

    model = make_model(case, seed=5)
    save_checkpoint(model, case, tmp_path)
    golden = run_texts(model, make_tokens(case, seed=6), make_pixels(case, seed=7))
    assert_texts_equal_transformers(tmp_path, golden)


def test_a_text_ends_at_its_first_end_or_at_its_highest_id_where_the_config_is_of_the_old_kind() -> None:
    tokens = jnp.array([[18, 5, 11, 19, 11], [18, 11, 3, 2, 19]])
    np.testing.assert_array_equal(end_positions(tokens, 11), [2, 1])
    np.testing.assert_array_equal(end_positions(tokens, 2), [3, 4])


def test_what_follows_the_end_is_not_seen() -> None:
    tower = TextTower(TINY)
    tokens = np.array([[18, 4, 7, 19, 19, 19, 19, 19]])
    variables = tower.init(jax.random.key(0), tokens)
    other = tokens.copy()
    other[:, 4:] = 3
    short = tokens[:, :4]
    pooled = tower.apply(variables, tokens).pooler_output
    np.testing.assert_array_equal(pooled, tower.apply(variables, other).pooler_output)
    np.testing.assert_allclose(pooled, tower.apply(variables, short).pooler_output, atol=1e-5)
    before = tokens.copy()
    before[:, 1] = 5
    assert not np.allclose(pooled, tower.apply(variables, before).pooler_output)


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[B, at most 8\], got \(1, 9\)"):
        TextTower(TINY).init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; must be a positive integer"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5; must be a divisor of hidden_size 16"),
        ({"hidden_act": "swiglu"}, "hidden_act is 'swiglu'; must be one of gelu, quick_gelu, relu, silu"),
        ({"eos_token_id": None}, "eos_token_id is None; must be a number"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0; must be at least 0 and below 1"),
    ],
)
def test_a_config_that_no_tower_can_be_built_from_is_refused(fields, message) -> None:
    with pytest.raises(InputError) as caught:
        dataclasses.replace(TINY, **fields)
    assert message in str(caught.value)


def test_the_table_can_be_inverted() -> None:
    encoder = load_text_encoder(TEXTS / "clip-text")
    from safetensors.numpy import load_file

    stored = load_file(TEXTS / "clip-text" / "model.safetensors")
    arrays = arrays_from(encoder.variables, encoder.config)
    assert arrays.keys() == stored.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, stored[name])


def test_a_checkpoint_without_texts_is_refused() -> None:
    with pytest.raises(InputError, match="only clip and clip_text_model have texts"):
        load_text_encoder(TOWERS / "clip-vision")
    with pytest.raises(InputError, match="only clip and clip_text_model have texts"):
        load_text_encoder(TOWERS / "resnet-basic")


def test_weights_that_do_not_fit_are_listed(tmp_path) -> None:
    folder = shutil.copytree(TEXTS / "clip-text", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "vocab_size": 31}))
    with pytest.raises(InputError) as caught:
        load_text_encoder(folder)
    assert "missing: text_model.encoder.layers.2." in str(caught.value)
    assert "token_embedding.weight has shape (30, 16), expected (31, 16)" in str(caught.value)


def test_a_missing_tokenizer_is_named() -> None:
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        load_text_encoder(TEXTS / "clip-text").encode(["a cat"])
