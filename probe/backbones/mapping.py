"""The one table between a published checkpoint's arrays and our towers' variables, checked both ways.

A checkpoint comes in one of two layouts, whatever file it is in: transformers' PyTorch names and axes, or
those of its former Flax classes (`openai/clip-vit-base-patch32` has only the latter on its main branch). The
table is derived from the tower itself, so it covers every variable; each has one name in each layout, and so
the table can be inverted.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from probe.backbones.backbone import Config, build_tower
from probe.backbones.text import TextConfig, TextTower
from probe.backbones.vit import ViTConfig
from probe.errors import InputError

AnyConfig = Config | TextConfig

_MODULES = {"pre_layernorm": "pre_layrnorm"}  # sic: the published name is misspelt
# our leaf: its name in PyTorch's layout, its name in Flax's layout
_LEAVES = {
    "kernel": ("weight", "kernel"),
    "embedding": ("weight", "embedding"),
    "scale": ("weight", "scale"),
    "bias": ("bias", "bias"),
    "mean": ("running_mean", "mean"),
    "var": ("running_var", "var"),
    "class_embedding": ("class_embedding", "class_embedding"),
    "position_embedding": ("position_embedding.weight", "position_embedding.embedding"),
}
# our axes from PyTorch's, by rank: a dense layer's [out, in], a convolution's [out, in, height, width]
_KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}

# What a checkpoint holds besides the tower: CLIP's other side, a classifier trained for other classes, and
# buffers that can be recomputed or are never read.
_LEFT_BEHIND = re.compile(
    r"text_model\..*|text_projection\..*|logit_scale|classifier\..*|(.*\.)?position_ids|.*\.num_batches_tracked"
)
_LEFT_BEHIND_BY_TEXT = re.compile(r"vision_model\..*|visual_projection\..*|logit_scale|(.*\.)?position_ids")
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def _tower(config: AnyConfig) -> nn.Module:
    return TextTower(config) if isinstance(config, TextConfig) else build_tower(config)


def _any_input(config: AnyConfig) -> jax.Array:
    if isinstance(config, TextConfig):
        return jnp.zeros((1, 1), jnp.int32)
    size = config.image_size if isinstance(config, ViTConfig) else 32  # a ResNet's weights fit any size
    return jnp.zeros((1, size, size, config.num_channels))


@dataclasses.dataclass(frozen=True)
class Row:
    """One variable: its path (collection first) and shape, and where a checkpoint keeps it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    torch_name: str
    flax_name: str
    axes: tuple[int, ...]  # PyTorch's array, transposed by these, is ours

    @property
    def torch_axes(self) -> tuple[int, ...]:
        """Our array, transposed by these, is PyTorch's."""
        return tuple(int(axis) for axis in np.argsort(self.axes))


@functools.lru_cache(maxsize=8)
def mapping_table(config: AnyConfig) -> tuple[Row, ...]:
    """The table of a tower: a row for each of its variables, sorted by path."""
    variables = jax.eval_shape(lambda: _tower(config).init(jax.random.key(0), _any_input(config)))
    rows = []
    for path, leaf in sorted(flatten_dict(variables).items()):
        module = source_module(config, path[1:-1])
        torch_name, flax_name = (f"{module}.{name}" for name in _LEAVES[path[-1]])
        axes = _KERNEL_AXES[leaf.ndim] if path[-1] == "kernel" else tuple(range(leaf.ndim))
        rows.append(Row(path, leaf.shape, torch_name, flax_name, axes))
    assert len({row.torch_name for row in rows}) == len({row.flax_name for row in rows}) == len(rows)
    return tuple(rows)


def source_module(config: AnyConfig, modules: tuple[str, ...]) -> str:
    """The dotted name of one of our modules in a checkpoint, as CLIPModel and ResNetModel save it."""
    names = [re.sub(r"_(\d+)$", r".\1", _MODULES.get(name, name)) for name in modules]
    if isinstance(config, ViTConfig) and modules[0] != "visual_projection":
        names.insert(0, "vision_model")
    elif isinstance(config, TextConfig) and modules[0] != "text_projection":
        names.insert(0, "text_model")
    elif modules[0] == "embedder":  # the stem's convolution stands in an embedder within the embedder
        names.insert(0, "embedder")
    return ".".join(names)


def has_projection(names: Iterable[str], module: str = "visual_projection") -> bool:
    """Whether a checkpoint with arrays of these names holds CLIP's projection of images (or "text_projection")."""
    return any(re.fullmatch(rf"(params\.)?{module}\.(weight|kernel)", name) for name in names)


def variables_from(arrays: Mapping[str, np.ndarray], config: AnyConfig) -> dict[str, Any]:
    """A tower's variables from a checkpoint's arrays, in either layout.

    Args:
      arrays: by their dotted names. What belongs to another part of the checkpoint is left behind; of a lazy
        mapping only what the tower needs is read.
    Returns: nested dicts of float32 device arrays, the collection first.
    Raises: InputError that lists all at once: arrays that are missing, not expected, not readable, of another
      shape, not floating point, or not finite.
    """
    is_flax = any(name.endswith(".kernel") for name in arrays)
    left_behind = _LEFT_BEHIND_BY_TEXT if isinstance(config, TextConfig) else _LEFT_BEHIND
    wanted = {(row.flax_name if is_flax else row.torch_name): row for row in mapping_table(config)}
    found: dict[str, str] = {}  # name in the table: name in the checkpoint
    unexpected = []
    for name in arrays:
        canonical = _canonical_name(name, config)
        if canonical in wanted and canonical not in found:
            found[canonical] = name
        elif not left_behind.fullmatch(canonical):
            unexpected.append(name)
    missing = wanted.keys() - found.keys()
    problems = [f"missing: {', '.join(sorted(missing))}"] if missing else []
    problems += [f"not expected: {', '.join(sorted(unexpected))}"] if unexpected else []
    variables: dict[tuple[str, ...], jax.Array] = {}
    for canonical, name in sorted(found.items()):
        row = wanted[canonical]
        try:
            array = arrays[name]
        except InputError as err:
            problems.append(str(err))
            continue
        shape = row.shape if is_flax else tuple(row.shape[axis] for axis in row.torch_axes)
        if array.shape != shape:
            problems.append(f"{name} has shape {array.shape}, expected {shape}")
        elif str(array.dtype) not in _FLOATS:
            problems.append(f"{name} has type {array.dtype}, expected one of {', '.join(_FLOATS)}")
        elif not np.isfinite(array := array.astype(np.float32)).all():
            problems.append(f"{name} has values that are not finite in float32")
        else:
            variables[row.path] = jnp.asarray(array if is_flax else array.transpose(row.axes))
    if problems:
        raise InputError(f"the weights do not fit config.json; {'; '.join(problems)}")
    return dict(unflatten_dict(variables))


def arrays_from(variables: Mapping[str, Any], config: AnyConfig) -> dict[str, np.ndarray]:
    """The inverse of `variables_from`: a checkpoint's arrays in PyTorch's layout, float32."""
    flat = flatten_dict(variables)
    table = mapping_table(config)
    assert flat.keys() == {row.path for row in table}, "the variables are not those of the config's tower"
    arrays = {
        row.torch_name: np.ascontiguousarray(np.asarray(flat[row.path], np.float32).transpose(row.torch_axes))
        for row in table
    }
    # PyTorch's batch norm counts its batches and never reads the count, but transformers warns without it.
    norms = [name.removesuffix("running_var") for name in arrays if name.endswith("running_var")]
    return arrays | {f"{norm}num_batches_tracked": np.zeros((), np.int64) for norm in norms}


def _canonical_name(name: str, config: AnyConfig) -> str:
    """The name as in the table, whichever of transformers' classes saved the checkpoint."""
    name = re.sub(r"^(params|batch_stats)\.", "", name)  # a Flax checkpoint with batch statistics has both
    if isinstance(config, ViTConfig):
        # a CLIPVisionModel that transformers 5 saved has no prefix
        return re.sub(r"^(?=(embeddings|pre_layrnorm|encoder|post_layernorm)\.)", "vision_model.", name)
    if isinstance(config, TextConfig):
        return re.sub(r"^(?=(embeddings|encoder|final_layer_norm)\.)", "text_model.", name)
    name = name.removeprefix("resnet.")  # ResNetForImageClassification
    return re.sub(r"\.layer\.layer_(\d+)\.", r".layer.\1.", name)  # basic layers of FlaxResNetModel
