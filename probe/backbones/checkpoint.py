"""Checkpoints in Hugging Face layout: a folder or a hub id -> `Backbone`, and back.

    config.json               which tower: model_type clip, clip_vision_model or resnet
    preprocessor_config.json  how a picture becomes its input; else image_processor in processor_config.json
    model.safetensors         its weights; else model.safetensors.index.json, shards; else flax_model.msgpack

Of a CLIPModel the vision tower is taken and the text tower left. Weights are never read from pickle, and no
code that comes with a checkpoint is run. A checkpoint without preprocessing is refused: the defaults of
transformers are those of one model of each family (a CLIP for 336 pixels would be fed 224), and wrong pixels
give wrong numbers silently.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict

from probe.backbones.backbone import Backbone, Config, config_fields
from probe.backbones.hub import fetch
from probe.backbones.mapping import arrays_from, has_projection, variables_from
from probe.backbones.resnet import ResNetConfig
from probe.backbones.vit import ViTConfig
from probe.errors import InputError
from probe.images import Preprocessing
from probe.storage import atomic_folder

CONFIG, _PREPROCESSOR, _PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
_SAFETENSORS, _INDEX, _MSGPACK = "model.safetensors", "model.safetensors.index.json", "flax_model.msgpack"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WITH_PROJECTION = {"CLIPModel", "CLIPVisionModelWithProjection"}
_MODELS = Path(__file__).parents[1] / "models"
BUNDLED = ("probe-tiny",)  # what this package carries itself, in probe/models
_AGAIN = "Copy or download it again."


def load_backbone(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Backbone:
    """Loads a pretrained tower with its preprocessing.

    Args:
      name_or_path: a folder in Hugging Face layout, a hub id (owner/name, optionally owner/name@revision), or
        "probe-tiny", the small CLIP that this package carries.
      revision: of a hub id: branch, tag or commit hash (default: the main branch).
    Returns: the backbone, float32; for a hub id its `revision` is the commit that was loaded.
    Raises: InputError if it is not there, not of a kind that is known here, damaged, or if its weights do not
      fit its config (all that is wrong listed at once).
    """
    name, folder, commit = locate(name_or_path, revision)
    raw_config = read_json(folder / CONFIG, "it is not a checkpoint in Hugging Face layout")
    preprocessing = _read_preprocessing(folder)
    arrays = read_weights(folder)
    try:
        config = parse_config(raw_config, arrays)
    except InputError as err:
        raise InputError(f"{folder / CONFIG}: {err}") from err
    _check_input(folder, config, preprocessing)
    try:
        variables = variables_from(arrays, config)
    except InputError as err:
        raise InputError(f"{folder}: {err}") from err
    return Backbone(name, commit, config, variables, preprocessing)


def locate(
    name_or_path: str | os.PathLike[str], revision: str | None, *, with_tokenizer: bool = False
) -> tuple[str, Path, str | None]:
    """Finds a checkpoint: a folder, a bundled model or a hub id, which is downloaded where it must be.

    Returns: the name to know it by, its folder, and of a hub id the commit.
    Raises: InputError as `load_backbone`.
    """
    name = os.fspath(name_or_path)
    folder = Path(name).expanduser()
    is_folder = bool(name) and folder.is_dir()
    if is_folder or name in BUNDLED:
        if revision is not None:
            kind = "a folder" if is_folder else "a bundled model"
            raise InputError(f"{name}: {kind} has no revisions, but revision {revision!r} was asked for")
        return (str(folder.resolve()), folder, None) if is_folder else (name, _MODELS / name, None)
    name, revision = _hub_id(name, revision)
    folder, commit = fetch(name, revision, with_tokenizer=with_tokenizer)
    return name, folder, commit


def save_backbone(backbone: Backbone, folder: Path) -> None:
    """Writes a backbone in Hugging Face layout, for `load_backbone` and for transformers' PyTorch classes.

    Args:
      folder: to be made; it appears only once it is whole. `load_backbone` reads the same back, to the bit.
    Raises: InputError if `folder` exists and is not empty; StorageError if the disk is full or fails.
    """
    contents = {
        CONFIG: json_bytes(published_config(backbone)),
        _PREPROCESSOR: json_bytes(backbone.preprocessing.to_config()),
        _SAFETENSORS: published_weights(arrays_from(backbone.variables, backbone.config)),
    }
    with atomic_folder(folder) as partial:
        for name, content in contents.items():
            (partial / name).write_bytes(content)


def published_config(backbone: Backbone) -> dict[str, Any]:
    """The config.json by which transformers' classes build the tower."""
    fields = config_fields(backbone.config)
    if isinstance(backbone.config, ResNetConfig):
        kind = {"architectures": ["ResNetModel"], "model_type": "resnet"}
    elif backbone.config.projection_dim is None:
        kind = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
        del fields["projection_dim"]  # transformers takes no null; without the array there is no projection
    else:
        kind = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"}
    return {**kind, "dtype": "float32", **fields}


def published_weights(arrays: dict[str, np.ndarray]) -> bytes:
    """The content of a model.safetensors that transformers' PyTorch classes read."""
    return bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))  # transformers asks for it


def parse_config(raw: Mapping[str, Any], array_names: Iterable[str]) -> Config:
    """Reads a config.json.

    Args:
      raw: its content; fields that do not bear on the tower are passed over.
      array_names: of the checkpoint; they tell whether there is a projection where `raw` does not.
    Raises: InputError for another model_type, and for fields that no tower can be built from.
    """
    kind = raw.get("model_type")
    if kind == "resnet":
        return ResNetConfig(**known_fields(ResNetConfig, raw))
    if kind not in ("clip", "clip_vision_model"):
        raise InputError(f"model_type is {kind!r}; only clip, clip_vision_model and resnet are known here")
    # In old checkpoints vision_config_dict is there too, and transformers lets it win.
    flat = raw if kind == "clip_vision_model" else {}
    vision = raw.get("vision_config_dict") or raw.get("vision_config") or flat
    if not isinstance(vision, Mapping):
        raise InputError(f"vision_config must be an object, got {vision!r}")
    fields = known_fields(ViTConfig, vision)
    architectures = set(raw.get("architectures") or ())
    if not architectures & _WITH_PROJECTION and not has_projection(array_names):
        fields["projection_dim"] = None
    elif kind == "clip" and "CLIPVisionModelWithProjection" not in architectures:
        fields["projection_dim"] = raw.get("projection_dim", ViTConfig.projection_dim)  # CLIPModel reads its own
    return ViTConfig(**fields)


def known_fields(cls: type[Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a config that the dataclass `cls` has too, ready to make one."""
    fields = {field.name: raw[field.name] for field in dataclasses.fields(cls) if field.name in raw}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _check_input(folder: Path, config: Config, preprocessing: Preprocessing) -> None:
    if config.num_channels != 3:
        raise InputError(f"{folder / CONFIG}: num_channels is {config.num_channels}, but images have 3 (RGB)")
    if isinstance(config, ViTConfig) and preprocessing.image_size != (config.image_size, config.image_size):
        height, width = preprocessing.image_size
        raise InputError(
            f"{folder}: {_PREPROCESSOR} makes images of {height} x {width} (H x W), but {CONFIG} has "
            f"image_size {config.image_size}, the only size the tower has positions for. Mend one of them."
        )


def _read_preprocessing(folder: Path) -> Preprocessing:
    path = folder / _PREPROCESSOR
    if path.exists() or not (folder / _PROCESSOR).exists():
        raw = read_json(
            path,
            "without it nothing says how pictures are to be resized and normalised. Copy it from the model "
            "that this one was made from",
        )
    else:  # transformers 5 saves a whole CLIPProcessor in one file
        path = folder / _PROCESSOR
        raw = read_json(path).get("image_processor", {})
        if not isinstance(raw, dict) or not raw:
            raise InputError(f"{path}: has no image_processor, and there is no {_PREPROCESSOR}")
    try:
        return Preprocessing.from_config(raw)
    except InputError as err:
        raise InputError(f"{folder}: {err}") from err


class _SafetensorsFiles(Mapping[str, np.ndarray]):
    """The arrays of safetensors files, each read when asked for: those of CLIP's text tower never are."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: dict[str, Any] = {}  # name of an array: the file that holds it
        for path in paths:
            try:
                file: Any = safetensors.safe_open(path, framework="numpy")
            except (safetensors.SafetensorError, OSError) as err:
                raise InputError(f"{path}: damaged, or not safetensors: {err}. {_AGAIN}") from err
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return np.asarray(self._files[name].get_tensor(name))
        except (
            safetensors.SafetensorError,
            TypeError,
            AttributeError,
        ) as err:  # a type that numpy lacks, say
            raise InputError(f"{name} cannot be read: {err}") from err

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_weights(folder: Path) -> Mapping[str, np.ndarray]:
    """The arrays of the first kind of weights that there is. Raises: InputError if none can be trusted."""
    if (folder / _SAFETENSORS).exists():
        return _SafetensorsFiles([folder / _SAFETENSORS])
    if (folder / _INDEX).exists():
        return _read_shards(folder)
    if (folder / _MSGPACK).exists():
        return _read_msgpack(folder / _MSGPACK)
    expected = f"expected {_SAFETENSORS}, {_INDEX} with its shards, or {_MSGPACK}"
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{folder}: has only pickled weights ({', '.join(pickled)}), and loading these can run any code; "
            f"{expected}. Where you trust them, save them anew with transformers and PyTorch: "
            f"`AutoModel.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)` writes {_SAFETENSORS}."
        )
    raise InputError(f"{folder}: has no weights; {expected}")


def _read_shards(folder: Path) -> Mapping[str, np.ndarray]:
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map from arrays to files")
    names = sorted({str(name) for name in weight_map.values()})
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise InputError(f"{index}: names files outside its folder: {', '.join(foreign)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
    arrays = _SafetensorsFiles([folder / name for name in names])
    named, present = set(weight_map), set(arrays)
    if named != present:
        raise InputError(
            f"{index}: index and shards disagree; only in the index: {sorted(named - present)}; "
            f"only in the shards: {sorted(present - named)}"
        )
    return arrays


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    try:
        # Maps, strings, numbers and arrays: no code can hide in it.
        flat = flatten_dict(flax.serialization.msgpack_restore(path.read_bytes()), sep=".")
        return {name: np.asarray(array) for name, array in flat.items()}
    except Exception as err:  # of the parser, of an array's header, of what is no map: they have no common ground
        raise InputError(f"{path}: damaged, or not a Flax checkpoint: {err!r}. {_AGAIN}") from err


def read_json(path: Path, without_it: str = "it is needed") -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path.parent}: has no {path.name}; {without_it}") from None
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: damaged, or not JSON: {err}. {_AGAIN}") from err
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def _hub_id(name: str, revision: str | None) -> tuple[str, str | None]:
    """Splits owner/name@revision. Raises: InputError for what can only mean a folder that is not there."""
    repo_id, _, own_revision = name.partition("@")
    if Path(name).expanduser().is_file():
        raise InputError(f"{name}: is a file; give the folder that holds {CONFIG} and the weights")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", repo_id, re.ASCII):
        raise InputError(f"{name}: no such folder, and not a hub id either (owner/name, owner/name@revision)")
    if own_revision and revision and own_revision != revision:
        raise InputError(f"{name}: names revision {own_revision!r}, but revision {revision!r} was asked for")
    return repo_id, own_revision or revision


def json_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
