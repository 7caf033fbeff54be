"""`probe zero-shot`: CLIP's own arithmetic, a run like others, and errors that say what is missing."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from probe import bundle
from probe.backbones import load_text_encoder
from probe.demo import samples
from probe.evaluation import predictions
from probe.heads import class_logits
from probe.probing.prompts import class_directions, zero_shot_head
from tests.conftest import write_image_folder
from tests.test_cli import assert_refused, run

PROMPTS = ("{}", "a picture of {}")


@pytest.fixture(scope="module")
def some_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tenth of the sample images, in their class folders."""
    root = tmp_path_factory.mktemp("zero-shot") / "emoji"
    with zipfile.ZipFile(samples()) as archive:
        archive.extractall(root, archive.namelist()[::10])
    return root


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_heads_logits_are_clips(num_classes: int) -> None:
    encoder = load_text_encoder("probe-tiny")
    names = ("banana", "house_cat", "flag")[:num_classes]
    head = zero_shot_head(class_directions(encoder, names, PROMPTS), encoder.logit_scale)
    embeddings = np.random.default_rng(0).standard_normal((7, encoder.config.projection_dim)).astype(np.float32)
    texts = [
        encoder.encode([f"{name}", f"a picture of {name}"]).mean(axis=0) for name in ("banana", "house cat", "flag")
    ]
    directions = np.stack([text / np.linalg.norm(text) for text in texts])[:num_classes]
    cosines = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True) @ directions.T
    logits = np.asarray(class_logits(head.apply(embeddings)))
    expected = encoder.logit_scale * cosines
    if num_classes == 2:  # one logit stands for both: their difference
        logits, expected = logits - logits[:, :1], expected - expected[:, :1]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_run_is_judged_saved_and_classifies(
    some_samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = [some_samples, "--backbone", "probe-tiny", "--prompts", *PROMPTS, "--out", out, "--num-workers", "1"]
    code, text, _ = run(capsys, "zero-shot", *options, "--json")
    assert code == 0
    metrics = json.loads(text)
    assert metrics == {"schema_version": 1} | json.loads((out / "metrics.json").read_text())
    assert set(metrics["splits"]) == {"train", "val", "test"}
    low, high = metrics["splits"]["test"]["accuracy_interval_95"]
    assert low <= metrics["splits"]["test"]["accuracy"] <= high

    answers = predictions.load(out)
    for split, figures in metrics["splits"].items():
        of = answers.splits == split
        hits = answers.logits[of].argmax(axis=1) == answers.labels[of]
        assert hits.mean() == pytest.approx(figures["accuracy"])
    code, text, _ = run(capsys, "predict", out, some_samples / "test", "--json", "--num-workers", "1")
    assert code == 0
    said = {row["path"]: row["predicted"] for row in json.loads(text)["predictions"]}
    for name, logits, split in zip(answers.names, answers.logits, answers.splits, strict=True):
        if split == "test":
            assert said[name.decode().removeprefix("test/")] == answers.class_names[logits.argmax()]
    assert bundle.load(out).view == "projected"
    code, text, _ = run(capsys, "report", out, "--json")
    assert code == 0
    assert json.loads(text)["num_points"] == metrics["splits"]["test"]["n"], "the map needs no cache"


def test_where_no_split_is_named_all_rows_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_image_folder(tmp_path / "images", {"": 2})
    code, text, _ = run(capsys, "zero-shot", images, "--backbone", "probe-tiny", "--num-workers", "1")
    assert code == 0
    assert text.startswith("all    accuracy ")
    assert "rows 6" in text


def test_what_has_no_texts_is_refused(
    some_samples: Path, tiny_clip: Path, tiny_resnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for backbone in (tiny_clip, tiny_resnet):
        refused = run(capsys, "zero-shot", some_samples, "--backbone", backbone)
        assert_refused(refused, 3, "config.json", "only clip and clip_text_model have texts")


def test_a_prompt_without_a_place_for_the_name_is_refused(
    some_samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = run(capsys, "zero-shot", some_samples, "--backbone", "probe-tiny", "--prompts", "a photo")
    assert_refused(refused, 2, "--prompts must be texts with {} where the class's name goes, got 'a photo'")


def test_images_without_labels_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = tmp_path / "flat"
    write_image_folder(tmp_path / "images", {"": 1})
    flat.mkdir()
    for index, path in enumerate(sorted((tmp_path / "images").rglob("*.png"))):
        path.rename(flat / f"{index}.png")
    assert_refused(run(capsys, "zero-shot", flat, "--backbone", "probe-tiny"), 3, "no labels")


def test_out_is_not_overwritten(some_samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note.txt").write_text("mine")
    refused = run(capsys, "zero-shot", some_samples, "--backbone", "probe-tiny", "--out", tmp_path / "run")
    assert_refused(refused, 3, "run")
    assert (tmp_path / "run" / "note.txt").read_text() == "mine"
