"""The verbs on real photos with real pretrained weights: cats and dogs through a thin ResNet-50.

    pytest -m photos

Needs the folder `shared` beside the checkout. The figures asked for are those of the second seed's job, and better.
"""

import json
import shutil
from pathlib import Path

import pytest

from probe.cli import main

pytestmark = [pytest.mark.photos, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def backbone(shared: Path) -> str:
    return str(shared / "models" / "resnet50-thin")


@pytest.fixture(scope="module")
def cache(shared: Path, backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings of all 800 photos."""
    out = tmp_path_factory.mktemp("photos") / "cache"
    assert main(["embed", str(shared / "data" / "dogs_cats"), "--backbone", backbone, "--out", str(out)]) == 0
    return out


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def test_linear_head_gets_190_of_200(cache: Path, tmp_path: Path) -> None:
    assert main(["fit-linear", str(cache), "--out", str(tmp_path / "run")]) == 0
    test = metrics_of(tmp_path / "run")["splits"]["test"]
    assert test["n"] == 200
    assert test["accuracy"] >= 0.95


def test_sklearn_reaches_the_same_optimum(cache: Path, tmp_path: Path) -> None:
    for solver in ("lbfgs", "sklearn"):
        assert main(["fit-linear", str(cache), "--solver", solver, "--out", str(tmp_path / solver)]) == 0
    ours, theirs = (metrics_of(tmp_path / solver) for solver in ("lbfgs", "sklearn"))
    assert ours["splits"]["test"]["nll"] == pytest.approx(theirs["splits"]["test"]["nll"], rel=1e-2)


def test_second_seeds_head_of_several_layers(cache: Path, tmp_path: Path) -> None:
    """A ResNet without its last layer, several Dense layers, dogs vs cats, verified on photos not trained on."""
    options = ["--head", "mlp", "--hidden", "1000", "256", "--epochs", "10"]
    assert main(["fit-linear", str(cache), *options, "--out", str(tmp_path / "run")]) == 0
    assert metrics_of(tmp_path / "run")["splits"]["test"]["accuracy"] >= 0.94


def test_finetune_with_a_frozen_backbone(shared: Path, backbone: str, tmp_path: Path) -> None:
    options = ["--freeze", "backbone", "--head-lr", "1e-2", "--epochs", "3", "--backbone", backbone]
    assert main(["finetune", str(shared / "data" / "dogs_cats"), *options, "--out", str(tmp_path / "run")]) == 0
    assert metrics_of(tmp_path / "run")["splits"]["test"]["accuracy"] >= 0.94


def test_finetuning_everything_improves_on_the_head_it_started_from(
    shared: Path, backbone: str, tmp_path: Path
) -> None:
    """One epoch on a subset, from a head that was fitted on the training photos alone."""
    images = tmp_path / "subset"
    for split, source, rows in (("train", "train", slice(0, 60)), ("val", "train", slice(60, 110))):
        for name in ("cat", "dog"):
            (images / split / name).mkdir(parents=True)
            for photo in sorted((shared / "data" / "dogs_cats" / source / name).iterdir())[rows]:
                shutil.copy(photo, images / split / name)
    options = ["--backbone", backbone]
    assert main(["embed", str(images), *options, "--out", str(tmp_path / "cache")]) == 0
    assert main(["fit-linear", str(tmp_path / "cache"), "--no-refit", "--out", str(tmp_path / "head")]) == 0
    options += ["--init", str(tmp_path / "head"), "--epochs", "1", "--wise", "off"]
    assert main(["finetune", str(images), *options, "--out", str(tmp_path / "tuned")]) == 0
    head, tuned = metrics_of(tmp_path / "head")["splits"], metrics_of(tmp_path / "tuned")["splits"]
    assert tuned["train"]["nll"] < head["train"]["nll"]
    # Not worse beyond the interval: 95 % of the start's own on the 100 validation photos.
    assert tuned["val"]["accuracy"] >= head["val"]["accuracy_interval_95"][0]
