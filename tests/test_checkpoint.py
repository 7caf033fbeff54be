"""Checkpoints on disk: every layout that is read, every message where one cannot be, and what is written."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from probe.backbones import Backbone, load_backbone, save_backbone
from probe.errors import InputError
from tests.golden.cases import CASES, FLAX, SHARED_GOLDEN, TOWERS, synthetic_images
from tests.parity import TOLERANCE, relative_error

INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tiny_clip: Path, tmp_path: Path) -> Path:
    """A copy of the tiny CLIP checkpoint, to be changed."""
    return Path(shutil.copytree(tiny_clip, tmp_path / "checkpoint"))


def assert_same_weights(first: Backbone, second: Backbone) -> None:
    ours, theirs = flatten_dict(first.variables), flatten_dict(second.variables)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype == np.float32
        np.testing.assert_array_equal(leaf, theirs[path])


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def split_into_shards(folder: Path, num_shards: int = 3) -> dict[str, str]:
    """Replaces model.safetensors by shards and an index, as transformers saves large models."""
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    weight_map = {array: names[i % num_shards] for i, array in enumerate(arrays)}
    for name in names:
        save_file({array: arrays[array] for array in arrays if weight_map[array] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_saving_and_loading_gives_the_same_to_the_bit(case, tmp_path) -> None:
    backbone = load_backbone(TOWERS / case.name)
    save_backbone(backbone, tmp_path / "saved")
    again = load_backbone(tmp_path / "saved")
    assert_same_weights(backbone, again)
    assert (again.config, again.preprocessing) == (backbone.config, backbone.preprocessing)
    assert again.fingerprint == backbone.fingerprint
    assert again.name == str(tmp_path / "saved")
    assert again.revision is None
    files = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in tmp_path.rglob("*")} == files | {"saved"}


def test_saving_over_a_folder_is_refused(tiny_clip, checkpoint) -> None:
    with pytest.raises(InputError, match="exists already"):
        save_backbone(load_backbone(tiny_clip), checkpoint)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pytorch_classes_load_what_is_saved(case, tmp_path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: its classes cannot load anything")
    import transformers

    backbone = load_backbone(TOWERS / case.name)
    save_backbone(backbone, tmp_path / "saved")
    architecture = json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, architecture).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    with np.load(TOWERS / case.name / "golden.npz") as golden, torch.no_grad():
        output = model.eval()(torch.from_numpy(golden["pixels"]).permute(0, 3, 1, 2))
        pooled = output.image_embeds if "projected" in golden else output.pooler_output.flatten(1)
        expected = golden["projected" if "projected" in golden else "pooler_output"]
    assert relative_error(pooled, expected) <= TOLERANCE


def test_a_flax_clip_checkpoint_gives_the_numbers_of_flax_clip() -> None:
    backbone = load_backbone(FLAX / "clip")
    assert_same_weights(backbone, load_backbone(TOWERS / "clip"))
    with np.load(FLAX / "clip" / "golden.npz") as golden, jax.default_matmul_precision("highest"):
        projected = backbone.module.apply(backbone.variables, golden["pixels"]).projected
        assert relative_error(projected, golden["projected"]) <= TOLERANCE


def test_flax_resnet_checkpoints_give_the_numbers_of_flax_resnet() -> None:
    for name in ("resnet-bottleneck", "resnet-basic"):
        backbone = load_backbone(FLAX / name)
        with np.load(FLAX / name / "golden.npz") as golden, jax.default_matmul_precision("highest"):
            ours = backbone.module.apply(backbone.variables, golden["pixels"]).pooler_output
            if "logits" in golden:
                ours, theirs = ours @ golden["classifier/kernel"] + golden["classifier/bias"], golden["logits"]
            else:
                theirs = golden["pooler_output"]
            assert relative_error(ours, theirs) <= TOLERANCE


def test_shards_are_read_as_one(checkpoint, tiny_clip) -> None:
    split_into_shards(checkpoint)
    assert_same_weights(load_backbone(checkpoint), load_backbone(tiny_clip))


def test_safetensors_come_before_msgpack(checkpoint, tiny_clip) -> None:
    (checkpoint / "flax_model.msgpack").write_bytes(b"not read")
    (checkpoint / "pytorch_model.bin").write_bytes(b"not read")
    assert_same_weights(load_backbone(checkpoint), load_backbone(tiny_clip))


def test_a_projection_that_the_checkpoint_lacks_is_no_view(checkpoint, tmp_path) -> None:
    arrays = load_file(checkpoint / "model.safetensors")
    del arrays["visual_projection.weight"]
    save_file(arrays, checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"missing: visual_projection\.weight$"):
        load_backbone(checkpoint)
    edit_json(checkpoint / "config.json", architectures=["CLIPVisionModel"])
    backbone = load_backbone(checkpoint)
    assert backbone.views == ("pooler",)
    save_backbone(backbone, tmp_path / "saved")
    assert load_backbone(tmp_path / "saved").config.projection_dim is None


def test_preprocessing_is_also_found_in_a_processor_config(checkpoint, tiny_clip) -> None:
    path = checkpoint / "preprocessor_config.json"
    nested = {"image_processor": json.loads(path.read_text()), "processor_class": "CLIPProcessor"}
    (checkpoint / "processor_config.json").write_text(json.dumps(nested))
    path.unlink()
    assert load_backbone(checkpoint).fingerprint == load_backbone(tiny_clip).fingerprint
    edit_json(checkpoint / "processor_config.json", image_processor=None)
    with pytest.raises(InputError, match="has no image_processor, and there is no preprocessor_config"):
        load_backbone(checkpoint)


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def config(**fields: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **fields)


def content(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def pickled(folder: Path) -> None:
    remove("model.safetensors")(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def shards(change: Callable[[Path, dict[str, str]], None]) -> Callable[[Path], None]:
    return lambda folder: change(folder, split_into_shards(folder))


def drop_two_shards(folder: Path, weight_map: dict[str, str]) -> None:
    remove("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")(folder)


def rename_in_index(folder: Path, weight_map: dict[str, str]) -> None:
    weight_map["ghost"] = weight_map.pop("visual_projection.weight")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def escape_from_folder(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, "../other.safetensors")}))


def foreign_type(folder: Path) -> None:
    array = {"dtype": "F4", "shape": [8, 16], "data_offsets": [0, 64]}  # 4 bits each
    header = json.dumps({"visual_projection.weight": array}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))


BAD = {
    "no config": (remove("config.json"), "has no config.json; it is not a checkpoint in Hugging Face layout"),
    "config is no JSON": (content("config.json", b'{"a'), "config.json: damaged, or not JSON: "),
    "config is a list": (content("config.json", b"[]"), "config.json: must hold a JSON object, got list"),
    "other model": (config(model_type="vit"), "model_type is 'vit'; only clip, clip_vision_model and resnet"),
    "no model type": (config(model_type=None), "config.json: model_type is None; only clip"),
    "nested nonsense": (config(vision_config="x"), "config.json: vision_config must be an object, got 'x'"),
    "impossible": (config(num_attention_heads=3), "config.json: num_attention_heads is 3; must be a divisor of"),
    "grey": (config(num_channels=1), "config.json: num_channels is 1, but images have 3 (RGB)"),
    "other size": (
        config(image_size=32),
        "preprocessor_config.json makes images of 16 x 16 (H x W), but config.json has image_size 32",
    ),
    "no preprocessing": (
        remove("preprocessor_config.json"),
        "has no preprocessor_config.json; without it nothing says how pictures are to be resized and normalised",
    ),
    "unknown preprocessing": (
        content("preprocessor_config.json", b'{"image_processor_type": "SamImageProcessor"}'),
        "preprocessor_config.json: image_processor_type 'SamImageProcessor'",
    ),
    "no weights": (remove("model.safetensors"), "has no weights; expected model.safetensors, model.safetensors.ind"),
    "pickled weights": (pickled, "has only pickled weights (pytorch_model.bin), and loading these can run any code"),
    "other depth": (config(num_hidden_layers=1), "not expected: vision_model.encoder.layers.1.layer_norm1.bias, "),
    "empty safetensors": (content("model.safetensors", b""), "model.safetensors: damaged, or not safetensors: "),
    "type that numpy lacks": (foreign_type, "; visual_projection.weight cannot be read: "),
    "missing shards": (
        shards(drop_two_shards),
        "2 of 3 shards are missing: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors",
    ),
    "index disagrees": (
        shards(rename_in_index),
        "only in the index: ['ghost']; only in the shards: ['visual_projection.weight']",
    ),
    "index leaves the folder": (
        shards(escape_from_folder),
        "index.json: names files outside its folder: ../other.safetensors",
    ),
    "empty index": (
        shards(lambda folder, _: (folder / INDEX).write_text("{}") and None),
        "index.json: has no weight_map from arrays to files",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_loaded_is_named_in_one_line(name, checkpoint) -> None:
    change, message = BAD[name]
    change(checkpoint)
    with pytest.raises(InputError) as caught:
        load_backbone(checkpoint)
    assert message in str(caught.value)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_neither_a_folder_nor_a_hub_id_is_named(tmp_path) -> None:
    cases = {
        str(tmp_path / "absent"): "absent: no such folder, and not a hub id either",
        "./absent/model": "no such folder, and not a hub id either (owner/name, owner/name@revision)",
        "resnet50-thin": "resnet50-thin: no such folder, and not a hub id either",
        "a/b/c": "a/b/c: no such folder",
        "../b": "../b: no such folder",
        "": "no such folder",
    }
    for name, message in cases.items():
        with pytest.raises(InputError) as caught:
            load_backbone(name)
        assert message in str(caught.value)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match=r"is a file; give the folder that holds config\.json and the weights"):
        load_backbone(file)
    with pytest.raises(InputError, match="names revision 'v1', but revision 'v2' was asked for"):
        load_backbone("owner/name@v1", revision="v2")


def test_a_folder_has_no_revisions(tiny_clip) -> None:
    with pytest.raises(InputError, match="a folder has no revisions, but revision 'main' was asked for"):
        load_backbone(tiny_clip, revision="main")


def test_a_path_of_any_kind_names_its_folder(tiny_clip, monkeypatch) -> None:
    monkeypatch.chdir(tiny_clip.parent)
    monkeypatch.setenv("HOME", str(tiny_clip.parent))
    names = [tiny_clip, str(tiny_clip), tiny_clip.name, f"./{tiny_clip.name}/", f"~/{tiny_clip.name}"]
    assert {load_backbone(name).name for name in names} == {str(tiny_clip.resolve())}


@pytest.mark.parametrize("source", [TOWERS / "clip-vision" / "model.safetensors", FLAX / "clip" / "flax_model.msgpack"])
def test_damaged_weights_never_load_as_something_else(source, tmp_path) -> None:
    """Cut short, every time an error; with one byte changed, an error or finite weights of the right shapes."""
    folder = Path(shutil.copytree(source.parent, tmp_path / "checkpoint"))
    whole = source.read_bytes()
    rng = np.random.default_rng(0)
    for length in [0, 1, 8, 100, *rng.integers(0, len(whole), 10), len(whole) - 1]:
        (folder / source.name).write_bytes(whole[: int(length)])
        with pytest.raises(InputError):
            load_backbone(folder)
    for position in [*range(0, 200, 10), *rng.integers(0, len(whole), 20)]:
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        (folder / source.name).write_bytes(damaged)
        try:
            variables = load_backbone(folder).variables
        except InputError:
            continue
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_a_msgpack_that_holds_no_arrays_is_refused(checkpoint) -> None:
    remove("model.safetensors")(checkpoint)
    path = checkpoint / "flax_model.msgpack"
    for content in ([1, 2], "text", {"a": {"b": "text"}}, {"visual_projection": {"kernel": 3.0}}):
        path.write_bytes(flax.serialization.msgpack_serialize(content))
        with pytest.raises(InputError):
            load_backbone(checkpoint)


@pytest.mark.photos
def test_the_real_resnet_gives_the_numbers_of_pytorch(shared) -> None:
    backbone = load_backbone(shared / "models" / "resnet50-thin")
    assert (backbone.width, backbone.views) == (1024, ("pooler",))
    with np.load(SHARED_GOLDEN) as golden, jax.default_matmul_precision("highest"):
        output = jax.jit(backbone.apply)(backbone.variables, synthetic_images())
        assert relative_error(output.pooler_output, golden["pooler_output"]) <= TOLERANCE
