"""`probe predict`: every readable image gets its own prediction, and no other's."""

import csv
import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from probe.cli import main
from probe.compare import compare
from probe.config import CompareConfig, PredictConfig
from probe.errors import InputError
from probe.evaluation import predictions
from probe.predict import describe, predict
from tests.checkpoints import write_tiny_clip
from tests.conftest import write_image_folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, clip/, cache/, run/ (fit-linear) and tuned/ (finetune)."""
    root = tmp_path_factory.mktemp("predict")
    write_image_folder(root / "images", {"train": 12, "val": 4, "test": 4})
    write_tiny_clip(root / "clip")
    images, backbone = str(root / "images"), ["--backbone", str(root / "clip")]
    assert main(["embed", images, *backbone, "--out", str(root / "cache")]) == 0
    assert main(["fit-linear", str(root / "cache"), "--out", str(root / "run")]) == 0
    assert main(["finetune", images, *backbone, "--out", str(root / "tuned"), "--epochs", "1"]) == 0
    return root


@pytest.mark.parametrize("run", ["run", "tuned"])
def test_predictions_are_those_of_the_metrics(run: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.csv"
    result = predict(PredictConfig(run=trained / run, images=(trained / "images" / "test",), out=out, batch_size=5))
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "predicted", "blue", "green", "red"]
    assert [row["path"] for row in rows] == sorted(
        str(path.relative_to(trained / "images" / "test")) for path in (trained / "images" / "test").rglob("*.png")
    )
    probabilities = np.array([[float(row[name]) for name in ("blue", "green", "red")] for row in rows])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert [row["predicted"] for row in rows] == [("blue", "green", "red")[p.argmax()] for p in probabilities]
    accuracy = np.mean([row["path"].startswith(row["predicted"]) for row in rows])
    metrics = json.loads((trained / run / "metrics.json").read_text())
    assert accuracy == pytest.approx(metrics["splits"]["test"]["accuracy"])
    assert "12 images" in describe(result)


@pytest.mark.parametrize("split", ["val", "test"])
def test_both_kinds_of_run_answered_the_same_rows_and_compare(split: str, trained: Path) -> None:
    result = compare(CompareConfig(run_a=trained / "run", run_b=trained / "tuned", split=split))
    for run, side in (("run", "a"), ("tuned", "b")):
        metrics = json.loads((trained / run / "metrics.json").read_text())["splits"][split]
        for name, line in result["figures"].items():
            assert line[side] == pytest.approx(metrics[name]), name
    assert result["n"] == metrics["n"]


def test_saved_answers_are_those_of_the_image_they_name(trained: Path, tmp_path: Path) -> None:
    """An image that has no row, in the middle of the others, moves nobody's answer to another's name."""
    images = write_image_folder(tmp_path / "images", {"train": 6, "test": 3})
    for name in ("train/blue/002.png", "test/green/001.png"):
        (images / name).write_bytes(b"no picture")
    out = ["--out", str(tmp_path / "cache")]
    assert main(["embed", str(images), "--backbone", str(trained / "clip"), *out]) == 0
    assert main(["fit-linear", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]) == 0
    saved = predictions.load(tmp_path / "run")
    saved = saved.take(saved.splits == "test")
    again = predict(PredictConfig(run=tmp_path / "run", images=(images,)))["predictions"]
    probabilities = {line["path"]: line["probabilities"] for line in again}
    assert len(saved.names) == 8
    for name, key, label, logits in zip(saved.names, saved.keys, saved.labels, saved.logits, strict=True):
        path = os.fsdecode(name)
        assert hashlib.sha256((images / path).read_bytes()).digest() == key.tobytes()
        assert path.split("/")[1] == saved.class_names[label]
        np.testing.assert_allclose(softmax(logits), probabilities[path], rtol=1e-5)


def test_a_prediction_does_not_depend_on_the_batch_it_came_in(trained: Path) -> None:
    images = trained / "images" / "test"
    whole = predict(PredictConfig(run=trained / "run", images=(images,), batch_size=4))["predictions"]
    alone = predict(PredictConfig(run=trained / "run", images=(images / "red" / "000.png",), batch_size=4))[
        "predictions"
    ]
    (same,) = [p for p in whole if p["path"] == "red/000.png"]
    assert alone[0]["probabilities"] == same["probabilities"]  # to the bit: same batch shape, other place and fill


def test_several_sources_are_classified_under_the_names_they_were_given_as(trained: Path, tmp_path: Path) -> None:
    images = trained / "images" / "test"
    with zipfile.ZipFile(tmp_path / "green.zip", "w") as archive:
        for path in sorted((images / "green").iterdir()):
            archive.write(path, path.name)
    photo = images / "blue" / "000.png"
    given = (photo, images / "red", tmp_path / "green.zip")
    answers = predict(PredictConfig(run=trained / "run", images=given))["predictions"]
    paths = [str(photo)]
    paths += [str(path) for path in sorted((images / "red").iterdir())]
    paths += [str(tmp_path / "green.zip" / path.name) for path in sorted((images / "green").iterdir())]
    assert [line["path"] for line in answers] == paths
    whole = predict(PredictConfig(run=trained / "run", images=(images,)))["predictions"]
    as_one = {line["path"]: line["probabilities"] for line in whole}
    for line in answers:
        name = line["path"].replace(str(tmp_path / "green.zip"), "green").removeprefix(f"{images}/")
        assert line["probabilities"] == as_one[name]
    with pytest.raises(InputError, match="more than once"):
        predict(PredictConfig(run=trained / "run", images=(photo, photo)))


def test_unreadable_images_are_reported_and_shift_nothing(trained: Path, tmp_path: Path) -> None:
    images = write_image_folder(tmp_path / "images", {"": 2})
    (images / "green" / "000a.jpg").write_bytes(b"<!DOCTYPE html>")
    result = predict(PredictConfig(run=trained / "run", images=(images,)))
    assert [failure["path"] for failure in result["failures"]] == ["green/000a.jpg"]
    (images / "green" / "000a.jpg").unlink()
    assert predict(PredictConfig(run=trained / "run", images=(images,)))["predictions"] == result["predictions"]
    (images / "green" / "000a.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"000a\.jpg.*--on-error skip"):
        predict(PredictConfig(run=trained / "run", images=(images,), on_error="fail", out=tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()


def test_cells_that_a_spreadsheet_would_run_are_defused(trained: Path, tmp_path: Path) -> None:
    images = write_image_folder(tmp_path / "images", {"": 1})
    (images / "red" / "000.png").rename(images / "=cmd|' calc'!A1.png")
    predict(PredictConfig(run=trained / "run", images=(images,), out=tmp_path / "out.csv"))
    with open(tmp_path / "out.csv", newline="") as file:
        assert "'=cmd|' calc'!A1.png" in [row["path"] for row in csv.DictReader(file)]


def test_names_that_are_no_text_keep_their_bytes(trained: Path, tmp_path: Path) -> None:
    images = write_image_folder(tmp_path / "images", {"": 1})
    (images / "red" / "000.png").rename(os.fsdecode(os.fsencode(images) + b"/\xff\xfe,\n.png"))
    predict(PredictConfig(run=trained / "run", images=(images,), out=tmp_path / "out.csv"))
    assert b'"\xff\xfe,\n.png"' in (tmp_path / "out.csv").read_bytes()
