"""The prior of texts: the optimum of its objective, the plain probe at no strength, zero-shot's weights at the end."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize

from probe import (
    EmbedConfig,
    FinetuneConfig,
    FitLinearConfig,
    ZeroShotConfig,
    bundle,
    embed_images,
    finetune_images,
    fit_linear,
    zero_shot_images,
)
from probe.backbones import load_backbone, load_text_encoder
from probe.cache import Cache
from probe.demo import samples
from probe.probing.prompts import class_directions, zero_shot_head
from probe.probing.solver import Problem
from probe.training.start import text_head
from tests.test_cli import assert_refused, run

ROWS, WIDTH = 60, 5
_TEXT = {"views": ("projected",), "scalings": ("l2",), "no_report": True, "quiet": True}


def a_problem(num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [60, 5], labels that they partly explain, and a prior [5, M] whose columns sum to 0."""
    rng = np.random.default_rng(num_classes)
    features = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    features -= features.mean(axis=0)
    labels = (features @ rng.standard_normal((WIDTH, num_classes)) + rng.standard_normal((ROWS, num_classes))).argmax(1)
    prior = 2 * rng.standard_normal((WIDTH, num_classes if num_classes > 2 else 1))
    return features, labels, prior - prior.mean(axis=1, keepdims=True) if num_classes > 2 else prior


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_optimum_is_that_of_the_objective_written_out(num_classes: int) -> None:
    features, labels, prior = a_problem(num_classes)
    penalty = 0.3

    def objective(flat: np.ndarray) -> float:
        head = flat.reshape(WIDTH + 1, -1)
        logits = features @ head[:-1] + head[-1]
        logits = np.pad(logits, ((0, 0), (1, 0))) if num_classes == 2 else logits
        top = logits.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
        nll = (log_sums - logits[np.arange(ROWS), labels]).mean()
        return float(nll + penalty / 2 * np.sum((head[:-1] - prior) ** 2))

    solution = Problem(features, labels, num_classes, prior=prior).fit(penalty)
    assert solution.converged
    ours = np.concatenate([solution.kernel, solution.bias[None]]).ravel()
    assert objective(ours) == pytest.approx(solution.objective, abs=1e-7)
    found = minimize(objective, np.zeros(ours.size), options={"gtol": 1e-7})
    assert objective(ours) <= found.fun + 1e-9
    assert np.abs(solution.kernel - found.x.reshape(WIDTH + 1, -1)[:-1]).max() < 1e-3
    plain = Problem(features, labels, num_classes).fit(penalty)
    assert np.abs(solution.kernel - plain.kernel).max() > 0.1  # the prior did something


@pytest.mark.parametrize("num_classes", [2, 3])
def test_much_penalty_gives_the_prior_and_no_prior_the_plain_optimum(num_classes: int) -> None:
    features, labels, prior = a_problem(num_classes)
    pulled = Problem(features, labels, num_classes, prior=prior).fit(1e6)
    np.testing.assert_allclose(pulled.kernel, prior, atol=1e-5)
    nothing, plain = (
        Problem(features, labels, num_classes, **options).fit(0.1) for options in ({"prior": 0 * prior}, {})
    )
    np.testing.assert_array_equal(nothing.kernel, plain.kernel)
    weak = Problem(features, labels, num_classes, prior=1e-6 * prior).fit(0.1)
    np.testing.assert_allclose(weak.kernel, plain.kernel, atol=1e-5)


_NAMED = {"animals & nature": ("butterfly", "cat", "tiger"), "objects": ("guitar", "key"), "food & drink": ("pizza",)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings by probe-tiny of things whose names it knows, each a class: one picture each, turned and moved."""
    root = tmp_path_factory.mktemp("text-prior")
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(samples()) as archive:
        for group, names in _NAMED.items():
            for name in names:
                with Image.open(archive.open(f"train/{group}/{name}.png")) as file:
                    picture = file.convert("RGB")
                for split, num in {"train": 9, "val": 3, "test": 3}.items():
                    folder = root / "emoji" / split / name
                    folder.mkdir(parents=True)
                    for index in range(num):
                        turned = picture.rotate(
                            rng.uniform(-20, 20), translate=tuple(rng.integers(-6, 7, 2).tolist()), fillcolor="white"
                        )
                        turned.save(folder / f"{index}.png")
    options = {"batch_size": 16, "precision": "float32", "num_workers": 1}
    embed_images(EmbedConfig(images=root / "emoji", backbone="probe-tiny", out=root / "cache", **options))
    return root / "cache"


def test_strength_and_penalty_are_searched_together(cache: Path, tmp_path: Path) -> None:
    plain = fit_linear(FitLinearConfig(cache=cache, out=tmp_path / "plain", **_TEXT))
    pulled = fit_linear(FitLinearConfig(cache=cache, out=tmp_path / "text", prior="text", **_TEXT))
    assert "prior_strength" not in plain
    assert [curve["prior_strength"] for curve in pulled["curves"]] == [0.0, 0.25, 0.5, 1.0]
    assert pulled["prior_strength"] in (0.0, 0.25, 0.5, 1.0)
    assert pulled["curves"][0]["points"] == plain["curves"][0]["points"]  # at no strength it is the plain probe
    best = [max(point["accuracy"] for point in curve["points"]) for curve in pulled["curves"]]
    assert max(best) >= best[0]


def test_at_infinite_strength_it_is_zero_shot(cache: Path, tmp_path: Path) -> None:
    """Up to the biases, which no penalty holds: they take up how frequent classes are."""
    fit_linear(FitLinearConfig(cache=cache, out=tmp_path / "run", prior="text", penalties=(1e6,), **_TEXT))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    strength, temperature = metrics["prior_strength"], metrics["temperature"]
    assert strength > 0  # nothing else is known at such a penalty
    encoder = load_text_encoder("probe-tiny")
    directions = class_directions(encoder, Cache.open(cache).class_names, FitLinearConfig.prompts)
    expected = zero_shot_head(directions, encoder.logit_scale).params["kernel"]
    expected = strength * (expected - expected.mean(axis=1, keepdims=True)) / temperature
    np.testing.assert_allclose(bundle.load(tmp_path / "run").head.params["kernel"], expected, rtol=1e-3, atol=1e-4)


def test_zero_shot_stands_beside_the_probe(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its figures are those of `probe zero-shot` on the same rows, and the report shows them."""
    options = ["--views", "projected", "--scalings", "l2", "--prior", "text", "--prompts", "{}", "an emoji of {}"]
    options += ["--penalties", "0.1"]
    code, text, _ = run(capsys, "fit-linear", cache, "--out", tmp_path / "run", *options)
    assert code == 0
    words = zero_shot_images(
        ZeroShotConfig(
            images=cache.parent / "emoji", backbone="probe-tiny", prompts=("{}", "an emoji of {}"), num_workers=1
        )
    )["splits"]["test"]
    beside = json.loads((tmp_path / "run" / "metrics.json").read_text())["zero_shot"]
    assert (beside["split"], beside["n"]) == ("test", 18)
    assert (beside["accuracy"], beside["accuracy_interval_95"]) == (words["accuracy"], words["accuracy_interval_95"])
    assert beside["nll"] == pytest.approx(words["nll"], rel=1e-3)
    assert f"for comparison, zero-shot on test: accuracy {words['accuracy']:.4f}, " in text
    assert "zero-shot, by names" in (tmp_path / "run" / "report.html").read_text()


def test_what_the_prior_cannot_do_is_refused(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["fit-linear", cache, "--out", tmp_path / "run", "--prior", "text"]
    assert_refused(run(capsys, *options), 2, "--prior must be none except with --views projected --scalings l2")
    options += ["--views", "projected", "--scalings", "l2"]
    assert_refused(run(capsys, *options, "--solver", "sklearn"), 2, "--prior must be none except with --head linear")
    assert_refused(run(capsys, *options, "--prompts", "a photo"), 2, "--prompts must be texts with {}")


def test_fine_tuning_that_starts_from_texts_starts_at_zero_shot(cache: Path, tmp_path: Path) -> None:
    backbone, encoder = load_backbone("probe-tiny"), load_text_encoder("probe-tiny")
    opened = Cache.open(cache)
    zero_shot = zero_shot_head(class_directions(encoder, opened.class_names, ["{}"]), encoder.logit_scale)
    pooled = opened.embeddings("pooler")
    started = np.asarray(text_head(backbone, zero_shot, pooled).apply(pooled))
    projected = pooled @ np.asarray(backbone.variables["params"]["visual_projection"]["kernel"])
    asked = np.asarray(zero_shot.apply(projected))
    norms = np.linalg.norm(projected, axis=1, keepdims=True)
    # the same directions, by the mean norm instead of each image's own: every decision is the same
    np.testing.assert_allclose(started, asked * norms / norms.mean(), rtol=1e-3, atol=1e-3)

    images = cache.parent / "emoji"
    config = FinetuneConfig(
        images=images, backbone="probe-tiny", out=tmp_path / "run", cache=cache, init="text", prompts=("{}",), epochs=1,
        freeze=("backbone",), wise="0", num_workers=1, no_report=True,
    )  # fmt: skip
    metrics = finetune_images(config)
    words = zero_shot_images(ZeroShotConfig(images=images, backbone="probe-tiny", prompts=("{}",), num_workers=1))
    assert metrics["splits"]["test"]["accuracy"] == words["splits"]["test"]["accuracy"]
