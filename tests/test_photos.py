"""The verbs on real photos with real pretrained weights: cats and dogs through a thin ResNet-50.

    pytest -m photos

Needs the folder `shared` beside the checkout. The figures asked for are those of the second seed's job, and better.
"""

import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from probe import bundle
from probe.cache import Cache
from probe.cli import main
from probe.config import PredictConfig
from probe.images import load_image
from probe.predict import predict

pytestmark = [pytest.mark.photos, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def backbone(shared: Path) -> str:
    return str(shared / "models" / "resnet50-thin")


@pytest.fixture(scope="module")
def cache(shared: Path, backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embeddings of all 800 photos."""
    out = tmp_path_factory.mktemp("photos") / "cache"
    assert (
        main(
            [
                "embed",
                str(shared / "data" / "dogs_cats"),
                "--backbone",
                backbone,
                "--precision",
                "float32",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def test_linear_head_gets_190_of_200(cache: Path, tmp_path: Path) -> None:
    assert main(["fit-linear", str(cache), "--out", str(tmp_path / "run")]) == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["warnings"] == []
    test = metrics["splits"]["test"]
    assert test["n"] == 200
    assert test["accuracy"] >= 0.95


def test_sklearn_reaches_the_same_optimum(cache: Path, tmp_path: Path) -> None:
    for solver in ("lbfgs", "sklearn"):
        assert main(["fit-linear", str(cache), "--solver", solver, "--out", str(tmp_path / solver)]) == 0
    ours, theirs = (metrics_of(tmp_path / solver) for solver in ("lbfgs", "sklearn"))
    assert ours["penalty"] == theirs["penalty"]
    assert ours["solution"]["objective"] == pytest.approx(theirs["solution"]["objective"], rel=1e-6)


def test_second_seeds_head_of_several_layers(cache: Path, tmp_path: Path) -> None:
    """A ResNet without its last layer, several Dense layers, dogs vs cats, verified on photos not trained on."""
    options = ["--head", "mlp", "--hidden", "1000", "256", "--epochs", "10"]
    assert main(["fit-linear", str(cache), *options, "--out", str(tmp_path / "run")]) == 0
    assert metrics_of(tmp_path / "run")["splits"]["test"]["accuracy"] >= 0.94


def test_finetune_with_a_frozen_backbone(shared: Path, backbone: str, tmp_path: Path) -> None:
    options = ["--init", "zeros", "--freeze", "backbone", "--head-lr", "1e-2", "--epochs", "3", "--backbone", backbone]
    assert main(["finetune", str(shared / "data" / "dogs_cats"), *options, "--out", str(tmp_path / "run")]) == 0
    assert metrics_of(tmp_path / "run")["splits"]["test"]["accuracy"] >= 0.94


def test_three_seeds_of_fine_tuning_are_no_worse_than_the_probe(shared: Path, backbone: str, tmp_path: Path) -> None:
    """With the defaults, on photos drawn by the seed. What is saved is the probe unless it was beaten beyond chance."""
    for seed in range(3):
        images, out = tmp_path / f"images-{seed}", tmp_path / f"run-{seed}"
        draw_photos(shared, images, {"train": 16, "val": 24}, seed=seed)
        options = ["--backbone", backbone, "--seed", str(seed), "--out", str(out)]
        assert main(["finetune", str(images), *options]) == 0
        metrics = metrics_of(out)
        verdict = metrics["verdict"]
        assert verdict["n"] == 48
        assert verdict["probe"]["accuracy"] > 0.8
        for tuned in ("finetuned", "interpolated"):
            low, high = verdict[tuned]["accuracy_difference_interval_95"]
            assert low <= verdict[tuned]["accuracy_difference"] <= high
            assert high >= 0, f"seed {seed}: {tuned} is worse than the probe, beyond chance"
        assert metrics["history"][-1]["train_loss"] < metrics["history"][0]["train_loss"]
        assert verdict["won"] == (verdict["interpolated"]["accuracy_difference_interval_95"][0] > 0)
        assert verdict["kept"] == ("finetuned" if verdict["won"] else "probe")
        if verdict["kept"] == "probe":
            assert not (out / "backbone").exists()
            assert metrics["splits"]["val"]["accuracy"] == verdict["probe"]["accuracy"]


def draw_photos(shared: Path, to: Path, num_per_class: dict[str, int], *, seed: int) -> None:
    """Copies photos of the training set, drawn without replacement, to split/class/."""
    for name in ("cat", "dog"):
        photos = sorted((shared / "data" / "dogs_cats" / "train" / name).iterdir())
        drawn = iter(random.Random(f"{seed}-{name}").sample(photos, sum(num_per_class.values())))
        for split, num in num_per_class.items():
            (to / split / name).mkdir(parents=True)
            for photo in itertools.islice(drawn, num):
                shutil.copy(photo, to / split / name)


def test_finetuning_everything_improves_on_the_head_it_started_from(
    shared: Path, backbone: str, tmp_path: Path
) -> None:
    """One epoch on a subset, from the probe, which is fitted on the training photos alone; α = 0 is that start."""
    images = tmp_path / "subset"
    for split, rows in (("train", slice(0, 60)), ("val", slice(60, 110))):
        for name in ("cat", "dog"):
            (images / split / name).mkdir(parents=True)
            for photo in sorted((shared / "data" / "dogs_cats" / "train" / name).iterdir())[rows]:
                shutil.copy(photo, images / split / name)
    options = ["--backbone", backbone, "--epochs", "1", "--keep", "finetuned"]
    for wise, out in (("0", "start"), ("off", "tuned")):
        assert main(["finetune", str(images), *options, "--wise", wise, "--out", str(tmp_path / out)]) == 0
    start, tuned = metrics_of(tmp_path / "start"), metrics_of(tmp_path / "tuned")
    assert tuned["splits"]["train"]["nll"] < start["splits"]["train"]["nll"]
    low, high = tuned["verdict"]["finetuned"]["accuracy_difference_interval_95"]
    assert low <= tuned["verdict"]["finetuned"]["accuracy_difference"] <= high
    assert high >= 0, "worse on validation than the probe, beyond chance"


def test_bfloat16_is_near_float32_and_moves_no_decision(
    shared: Path, backbone: str, cache: Path, tmp_path: Path
) -> None:
    """Of a ResNet, whose convolutions are in bfloat16 but for the first ones; `cache` is float32."""
    images, rounded = str(shared / "data" / "dogs_cats"), tmp_path / "cache"
    options = ["--backbone", backbone, "--precision", "bfloat16", "--batch-size", "8", "--out", str(rounded)]
    assert main(["embed", images, *options]) == 0
    exact, ours = (Cache.open(each).embeddings("pooler").astype(np.float64) for each in (cache, rounded))
    cosines = (exact * ours).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(ours, axis=1)
    assert cosines.min() >= 0.9999
    accuracies = []
    for folder, out in ((cache, "exact"), (rounded, "rounded")):
        assert main(["fit-linear", str(folder), "--out", str(tmp_path / out)]) == 0
        accuracies.append(metrics_of(tmp_path / out)["splits"]["test"])
    low, high = accuracies[0]["accuracy_interval_95"]
    assert low <= accuracies[1]["accuracy"] <= high


def test_onnx_answers_as_predict_does(shared: Path, cache: Path, tmp_path: Path) -> None:
    """On real photos through a real ResNet-50; the largest difference of any probability is printed."""
    runtime = pytest.importorskip("onnxruntime")
    run, out = tmp_path / "run", tmp_path / "run.onnx"
    assert main(["fit-linear", str(cache), "--out", str(run)]) == 0
    assert main(["export", str(run), "--format", "onnx", "--out", str(out)]) == 0
    photos = sorted((shared / "data" / "dogs_cats" / "test").rglob("*.jpg"))
    preprocessing = bundle.load(run).load_backbone().preprocessing
    images = np.stack([load_image(photo.read_bytes(), preprocessing) for photo in photos])
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"images": images[i : i + 32]}) for i in range(0, len(images), 32)]
    logits, probabilities = (np.concatenate(column) for column in zip(*parts, strict=True))
    answers = predict(PredictConfig(run=run, images=tuple(photos)))["predictions"]
    expected = np.array([answer["probabilities"] for answer in answers])
    print(
        f"{len(photos)} photos: probabilities differ by {np.abs(probabilities - expected).max():.1e} at most,", end=" "
    )
    known = np.log(expected[:, 1]) - np.log(expected[:, 0])
    print(f"logits by {np.abs(logits[:, 1] - known).max():.1e} of {np.abs(known).max():.1f}")
    assert np.abs(probabilities - expected).max() < 1e-5
    assert (probabilities.argmax(axis=1) == expected.argmax(axis=1)).all()
