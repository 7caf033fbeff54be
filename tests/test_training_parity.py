"""Three steps of SGD give the parameters that PyTorch gives: gradients, part rates, loss and mask at once."""

import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from probe.backbones import load_backbone
from probe.heads import Classifier
from probe.training import optim, steps
from probe.training.full import make_apply_fn

FOLDER = Path(__file__).parent / "golden" / "training"  # made by make_training.py beside it


@pytest.mark.parametrize(("way", "num_classes", "momentum"), [("sgd", 3, None), ("momentum-binary", 2, 0.9)])
def test_three_steps_end_where_pytorch_ends(tmp_path, way, num_classes, momentum):
    golden = np.load(FOLDER / f"{way}.npz")
    backbone = load_backbone(FOLDER)
    start = {
        "backbone": backbone.variables["params"],
        "head": {name: golden[f"head/{name}"] for name in ("kernel", "bias")},
    }
    rates = dict(zip(("backbone", "head"), golden["rates"].tolist(), strict=True))
    parts = {rate: optax.sgd(rate, momentum) for rate in rates.values()}
    tx = optax.multi_transform(parts, optim.partition(start, rates))
    apply_fn = make_apply_fn(Classifier(num_classes, backbone.module), backbone.preprocessing)
    step = steps.make_train_step(apply_fn, tx)
    state = steps.TrainState.create(start, tx, seed=0)
    losses = []
    for images, true in zip(golden["images"], golden["labels"], strict=True):
        real = true >= 0
        batch = steps.padded_batch(images[real], true[real], len(images), examples=np.flatnonzero(real))
        state, sums = step(state, {}, batch)
        losses.append(float(sums.nll))
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-4)

    found, first = flatten_dict(state.params), flatten_dict(start)
    expected = flatten_dict(final_params(golden, tmp_path / "final"))
    assert found.keys() == expected.keys()
    for path, theirs in expected.items():
        error = np.linalg.norm(found[path] - theirs)
        assert error <= 1e-4 * np.linalg.norm(theirs), path
        if path[-2:] == ("k_proj", "bias"):
            continue  # softmax does not see it: its gradient is rounding error in both
        # Also of the way that they went, a few percent of their size: float32 leaves 1e-7 / 1e-2 of that.
        assert error <= 1e-3 * np.linalg.norm(theirs - first[path]), path


def final_params(golden, folder):
    """PyTorch's parameters in our layout: read as any checkpoint."""
    arrays = {name.removeprefix("final/"): golden[name] for name in golden.files if name.startswith("final/")}
    head = {name: arrays.pop(f"head.{name}") for name in ("kernel", "bias")}
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(FOLDER / name, folder)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return {"backbone": jax.tree.map(np.asarray, load_backbone(folder).variables["params"]), "head": head}
