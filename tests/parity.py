"""How our towers are compared with transformers': every layer's output, then the outputs of the whole.

The arrays to compare with come from `tests/golden/make_towers.py`, stored, or run again where PyTorch is there.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from probe.backbones import load_backbone
from probe.backbones.mapping import source_module

# float32 keeps 7 digits; sums of a few hundred products in another order, through a dozen layers, lose one or two.
TOLERANCE = 1e-5


def relative_error(ours: object, theirs: object) -> float:
    """The largest difference, as a share of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_equals_transformers(folder: Path, golden: Mapping[str, np.ndarray]) -> None:
    """Loads the checkpoint and compares all that `golden` holds: module/<name in transformers> and outputs."""
    backbone = load_backbone(folder)

    @jax.jit
    def apply(variables, pixels):
        return backbone.module.apply(variables, pixels, capture_intermediates=True, mutable=["intermediates"])

    with jax.default_matmul_precision("highest"):
        output, state = apply(backbone.variables, golden["pixels"])
    layers = {
        source_module(backbone.config, path[:-1]).removeprefix("vision_model."): values[0]
        for path, values in flatten_dict(state["intermediates"]).items()
        if len(path) > 1 and path[-1] == "__call__"
    }
    errors = {}
    for name, theirs in golden.items():
        if name.startswith("module/"):
            errors[name] = relative_error(layers[name.removeprefix("module/")], theirs)
    for name in ("last_hidden_state", "pooler_output", "projected"):
        ours = getattr(output, name)
        assert (ours is None) == (name not in golden)
        if ours is not None:
            errors[name] = relative_error(ours, golden[name])
    assert len(errors) > 3
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
