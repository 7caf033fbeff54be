"""The audit finds faults that were planted, and on real photos as many of them as it claims."""

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from probe.auditing import answers, copies, labels, neighbours
from probe.cache import Cache, write_cache
from probe.cli import main
from probe.errors import ConfigError, MismatchError
from probe.sources.origin import describe_origin
from tests.conftest import write_image_folder
from tests.test_report import Page, assert_self_contained


def noisy_probabilities(num_rows: int, num_classes: int, share: float, seed: int = 0):
    """Probabilities that know the true class, the labels given, and which of these are wrong."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, num_classes, num_rows)
    logits = rng.normal(size=(num_rows, num_classes)) + 3 * (true[:, None] == np.arange(num_classes))
    given = true.copy()
    wrong = rng.random(num_rows) < share
    given[wrong] = (true[wrong] + rng.integers(1, num_classes, wrong.sum())) % num_classes
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), given, wrong


@pytest.mark.parametrize(("num_classes", "share"), [(2, 0.05), (5, 0.1), (20, 0.02), (3, 0.0)])
def test_label_errors_are_those_of_cleanlab(num_classes, share):
    cleanlab = pytest.importorskip("cleanlab.filter")
    probabilities, given, _ = noisy_probabilities(600, num_classes, share)
    theirs = cleanlab.find_label_issues(
        given, probabilities, filter_by="confident_learning", return_indices_ranked_by="self_confidence", n_jobs=1
    )
    ours = labels.label_errors(probabilities, given)
    assert ours.rows.tolist() == theirs.tolist()


def test_planted_label_errors_are_found():
    probabilities, given, wrong = noisy_probabilities(2000, 4, 0.05)
    found = labels.label_errors(probabilities, given)
    assert wrong[found.rows[:50]].mean() > 0.9
    assert wrong[found.rows].sum() > 0.7 * wrong.sum()
    assert (np.diff(found.scores) <= 0).all()
    assert (found.suggested != given[found.rows]).all()


def test_a_class_without_rows_is_never_suggested():
    probabilities, given, _ = noisy_probabilities(300, 3, 0.1)
    with_another = np.concatenate([probabilities * 0.5, np.full((300, 1), 0.5)], axis=1)
    assert not (labels.label_errors(with_another, given).suggested == 3).any()


def test_classes_that_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    true = np.repeat([0, 1, 2], 100)
    logits = rng.normal(size=(300, 3)) + 4 * (true[:, None] == np.arange(3))
    logits[:200, :2] = rng.normal(size=(200, 2)) + 4  # of the first two it knows nothing
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ((a, b, area, confusions),) = labels.inseparable(probabilities, true, 10)
    assert (a, b) == (0, 1)
    of_both = true < 2
    odds = np.log(probabilities[of_both, 0] / probabilities[of_both, 1])
    assert area == pytest.approx(roc_auc_score(true[of_both] == 0, odds))
    predicted = probabilities.argmax(axis=1)
    assert confusions == ((true == 0) & (predicted == 1)).sum() + ((true == 1) & (predicted == 0)).sum()


def test_neighbours_are_those_of_scikit_learn(monkeypatch):
    embeddings = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)
    scaled = (embeddings - embeddings.mean(axis=0)) / embeddings.std(axis=0)
    theirs, rows = NearestNeighbors(n_neighbors=11, metric="cosine").fit(scaled).kneighbors(scaled)
    for elements in (40_000_000, 500):  # at once, and in blocks of seven rows
        monkeypatch.setattr(neighbours, "_BLOCK_ELEMENTS", elements)
        indices, distances = neighbours.nearest(embeddings)
        np.testing.assert_array_equal(indices, rows[:, 1:])
        np.testing.assert_allclose(distances, theirs[:, 1:], atol=1e-5)


def test_near_duplicates_are_found_and_nothing_else():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(200, 32)).astype(np.float32)
    copies = embeddings[[3, 3, 3, 50]] + rng.normal(0, 0.05, (4, 32)).astype(np.float32)
    pairs = neighbours.near_duplicates(*neighbours.nearest(np.concatenate([embeddings, copies])))
    assert {(a, b) for a, b, _ in pairs} == {
        (3, 200),
        (3, 201),
        (3, 202),
        (200, 201),
        (200, 202),
        (201, 202),
        (50, 203),
    }
    assert all(0.5 < score <= 1 for _, _, score in pairs)
    assert neighbours.near_duplicates(*neighbours.nearest(embeddings)) == []


def test_embeddings_that_are_all_alike_are_no_error():
    indices, distances = neighbours.nearest(np.ones((5, 3), np.float32))
    assert neighbours.near_duplicates(indices, distances) == []
    assert neighbours.outliers(distances) == []


def test_outliers_are_far_from_everything():
    rng = np.random.default_rng(0)
    embeddings = np.concatenate([rng.normal(size=(2, 8)).repeat(60, axis=0) * 3 + rng.normal(size=(120, 8)),
                                 [[40.0, -40, 0, 0, 0, 0, 0, 40]]])  # fmt: skip
    _, distances = neighbours.nearest(embeddings.astype(np.float32))
    assert neighbours.outliers(distances)[0][0] == 120


def scene(seed: int) -> Image.Image:
    """Something like a photo: smooth, with detail, 400 × 300."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(coarse) + rng.normal(0, 15, (300, 400, 3)), 0, 255).astype(np.uint8))


def blocks_of(pictures: dict[str, Image.Image], folder: Path) -> tuple[np.ndarray, list[str], str]:
    folder.mkdir()
    for name, picture in pictures.items():
        picture.save(folder / name, quality=75)
    names = sorted(pictures)
    keys = [hashlib.sha256((folder / name).read_bytes()).digest() for name in names]
    rows = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
    (folder / "changed.png").unlink(missing_ok=True)
    blocks, missing = copies.read_blocks(describe_origin(folder), [name.encode() for name in names], rows)
    return blocks, names, missing


def test_small_copies_are_found_by_their_pixels_and_nothing_else(tmp_path):
    """Reduced to 30 % and 15 %, encoded again, squeezed; a film's next frame, a negative and another grey are none."""
    pictures = {f"{seed:02d}.png": scene(seed) for seed in range(12)}
    pictures["03-small.jpg"] = pictures["03.png"].resize((120, 90))
    pictures["04-tiny.jpg"] = pictures["04.png"].resize((60, 45))
    pictures["05-squeezed.jpg"] = pictures["05.png"].resize((100, 200))
    pictures["05-again.jpg"] = pictures["05.png"]
    moved = pictures["06.png"].copy()
    moved.paste(scene(99).crop((0, 0, 60, 60)), (150, 100))
    pictures["06-moved.png"] = moved
    pictures["07-negative.png"] = Image.eval(pictures["07.png"], lambda level: 255 - level)
    pictures |= {"grey-a.png": Image.new("RGB", (90, 90), "#777"), "grey-b.png": Image.new("RGB", (80, 80), "#787878")}
    blocks, names, missing = blocks_of(pictures, tmp_path / "images")
    assert missing == ""
    found = {(names[a], names[b]) for a, b, _ in copies.copies(blocks)}
    assert found == {
        ("03-small.jpg", "03.png"),
        ("04-tiny.jpg", "04.png"),
        ("05-squeezed.jpg", "05.png"),
        ("05-again.jpg", "05.png"),
        ("05-again.jpg", "05-squeezed.jpg"),
    }
    assert all(0.5 < likeness <= 1 for _, _, likeness in copies.copies(blocks))


def test_what_is_gone_or_changed_has_no_pixels(tmp_path, monkeypatch):
    pictures = {"a.png": scene(0), "changed.png": scene(0), "c.png": scene(0)}
    blocks, _, missing = blocks_of(pictures, tmp_path / "images")
    assert np.isnan(blocks).all(axis=1).tolist() == [False, False, True]
    assert missing == "1 of 3 images are gone, changed or cannot be read"
    assert [pair[:2] for pair in copies.copies(blocks)] == [(0, 1)]
    assert (
        "nowhere" in copies.read_blocks(describe_origin(tmp_path / "nowhere"), [b"a"], np.zeros((1, 32), np.uint8))[1]
    )
    monkeypatch.setattr(copies, "MAX_IMAGES", 2)
    assert "at most 2" in blocks_of(pictures, tmp_path / "many")[2]


@given(num_rows=st.integers(1, 30), seed=st.integers(0, 99), rows_at_a_time=st.integers(1, 9))
def test_copies_are_those_of_each_pair_by_itself(num_rows, seed, rows_at_a_time):
    rng = np.random.default_rng(seed)
    blocks = rng.uniform(0, 255, (num_rows, 768)).astype(np.float32)
    for row in range(1, num_rows, 2):
        blocks[row] = blocks[row - 1] + rng.normal(0, rng.choice([1, 10, 20, 40]), 768)
    wanted = set()
    for a in range(num_rows):
        for b in range(a + 1, num_rows):
            variance = (np.var(blocks[a], dtype=float) + np.var(blocks[b], dtype=float)) / 2
            relative = np.mean((blocks[a].astype(float) - blocks[b]) ** 2) / variance
            most = np.abs(blocks[a] - blocks[b]).reshape(-1, 3).mean(axis=1).max()
            if relative < 0.1 and most < 40:
                wanted.add((a, b))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "_ROWS", rows_at_a_time)
        assert {(a, b) for a, b, _ in copies.copies(blocks)} == wanted


@given(pairs=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=15))
def test_clusters_are_the_connected_components(pairs):
    ours = neighbours.clusters(pairs, 12)
    graph = csr_array((np.ones(len(pairs)), tuple(np.array(pairs, int).reshape(-1, 2).T)), shape=(12, 12))
    _, theirs = connected_components(graph, directed=False)
    assert (ours[:, None] == ours).tolist() == (theirs[:, None] == theirs).tolist()
    assert all(ours[row] == np.flatnonzero(ours == ours[row])[0] for row in range(12))


@pytest.fixture(scope="module")
def faulty(tiny_clip, tmp_path_factory) -> Path:
    """Images with planted faults, and their cache: a test image in train, byte for byte, under another label; another
    one twice in test; and a manifest that names groups, one of which stands in both splits."""
    root = tmp_path_factory.mktemp("audit")
    images = write_image_folder(root / "images", {"train": 12, "test": 4})
    shutil.copy(images / "test/red/000.png", images / "train/blue/=copy.png")
    shutil.copy(images / "test/red/001.png", images / "test/red/twin.png")
    rows = [["path", "label", "split", "group"]]
    for path in sorted(images.rglob("*.png")):
        split, label, name = path.relative_to(images).parts
        rows.append([f"{split}/{label}/{name}", label, split, "film" if name == "002.png" and label == "green" else ""])
    with open(root / "all.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    options = ["--image-root", str(images), "--backbone", str(tiny_clip), "--out", str(root / "cache")]
    assert main(["embed", str(root / "all.csv"), *options]) == 0
    return root


def contents(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.png")}


def test_audit_finds_copies_and_fix_leaves_them_out(faulty, tiny_clip, tmp_path, capsys):
    before = contents(faulty / "images")
    out, fixed = tmp_path / "audit", tmp_path / "fixed.csv"
    assert main(["audit", str(faulty / "cache"), "--out", str(out), "--fix", str(fixed), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    copies = [finding for finding in result["findings"] if finding["kind"] == "exact duplicate"]
    assert [(one["path"], one["other"], one["action"]) for one in copies] == [
        ("train/blue/=copy.png", "test/red/000.png", "drop"),
        ("test/red/twin.png", "test/red/001.png", "drop"),
    ]
    assert copies[0]["detail"] == "across splits: train and test; under different labels"
    assert result["groups"] == [{"group": "film", "splits": {"test": 1, "train": 1}}]
    num_leaked = result["accuracy"]["num_leaked"]
    assert num_leaked == 1, "a tower of random weights may take others for near duplicates: their pixels say no"
    assert {one["action"] for one in result["findings"] if one["kind"] == "lookalike"} <= {"look"}
    assert (result["accuracy"]["all"]["n"], result["accuracy"]["clean"]["n"]) == (13, 13 - num_leaked)
    with open(out / "audit.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(result["findings"])
    assert {"exact duplicate", "group"} <= {line["kind"] for line in lines}
    assert all(line["path"] and 0 <= float(line["score"]) <= 1 for line in lines)
    (leak,) = [line for line in lines if line["kind"] == "group"]
    assert (leak["path"], leak["other"], leak["action"]) == ("train/green/002.png", "test/green/002.png", "look")
    page = Page(out / "audit.html")
    assert_self_contained(page)
    assert "train/blue/=copy.png = test/red/000.png" in page.text
    assert f"{num_leaked} of 13 test images have a copy in train or validation" in page.text
    assert len(page.all("img")) >= 4

    with open(fixed, newline="") as file:
        kept = [row["path"] for row in csv.DictReader(file)]
    dropped = {finding["path"] for finding in result["findings"] if finding["action"] == "drop"}
    assert set(kept) == set(before) - dropped
    assert contents(faulty / "images") == before
    options = ["--image-root", str(faulty / "images"), "--backbone", str(tiny_clip), "--out", str(tmp_path / "clean")]
    assert main(["embed", str(fixed), *options]) == 0
    assert main(["audit", str(tmp_path / "clean"), "--out", str(tmp_path / "again"), "--json"]) == 0
    assert "exact duplicate" not in json.loads(capsys.readouterr().out.splitlines()[-1])["counts"]


def test_the_findings_stand_in_the_report_of_the_run(faulty, tmp_path, capsys):
    run, cache = tmp_path / "run", shutil.copytree(faulty / "cache", tmp_path / "cache")
    assert main(["fit-linear", str(cache), "--out", str(run), "--penalties", "1", "0.1"]) == 0
    assert "What may be wrong" not in Page(run / "report.html").text
    capsys.readouterr()
    cache.rename(tmp_path / "moved")
    assert main(["audit", str(tmp_path / "moved"), "--run", str(run)]) == 0
    said = capsys.readouterr().out
    assert "train/blue/=copy.png = test/red/000.png (across splits: train and test; under different labels)" in said
    assert "group film stands in test, train" in said
    page = Page(run / "report.html")
    assert_self_contained(page)
    assert "What may be wrong with the data" in page.text
    assert "Map of the embeddings" in page.text, "the cache is where the audit was told"
    assert "Groups in more than one split: 1" in page.text
    assert "group film: 1 in test, 1 in train train/green/002.png and test/green/002.png score 1.00" in page.text
    assert main(["report", str(run)]) == 0
    assert "What may be wrong with the data" in Page(run / "report.html").text
    assert main(["audit", str(faulty / "cache"), "--run", str(run)]) == 3, "an audit is replaced only when asked"
    assert main(["audit", str(faulty / "cache"), "--run", str(run), "--overwrite"]) == 0


def test_classes_that_look_the_same_are_a_finding_with_two_images(tmp_path):
    rng = np.random.default_rng(0)
    labels_of = np.arange(90) % 3
    embeddings = rng.normal(size=(90, 6)).astype(np.float32) + 9 * (labels_of == 2)[:, None]
    write_cache(tmp_path / "cache", embeddings, labels=labels_of, class_names=("ape", "monkey", "zebra"))
    out = tmp_path / "audit"
    assert main(["audit", str(tmp_path / "cache"), "--out", str(out)]) == 0
    result = json.loads((out / "audit.json").read_text())
    (found,) = [finding for finding in result["findings"] if finding["kind"] == "classes"]
    assert (found["label"], found["suggested"]) == ("ape", "monkey")
    assert found["score"] == pytest.approx(min(1, 2 * (1 - result["pairs"][0]["area"])), abs=1e-4)
    names = [os.fsdecode(name) for name in Cache.open(tmp_path / "cache").table.names]
    assert [labels_of[names.index(found[key])] for key in ("path", "other")] == [0, 1]
    page = Page(out / "audit.html")
    assert "Classes that are hard to tell apart: 1" in page.text
    assert f"ape and monkey {found['detail']} {found['path']} and {found['other']} score" in page.text


def test_answers_of_a_run_are_taken_by_content_and_name(faulty, tmp_path):
    run = tmp_path / "run"
    assert main(["fit-linear", str(faulty / "cache"), "--out", str(run), "--penalties", "1", "--no-report"]) == 0
    cache = Cache.open(faulty / "cache")
    found = answers.of_run(run, cache)
    test = cache.table.splits == "test"
    figures = json.loads((run / "metrics.json").read_text())["splits"]["test"]
    accuracy = (found[test].argmax(axis=1) == cache.table.labels[test]).mean()
    assert accuracy == pytest.approx(figures["accuracy"])
    write_cache(tmp_path / "other", np.eye(4, 16, dtype=np.float32), labels=np.arange(4) % 2, class_names=("a", "b"))
    with pytest.raises(MismatchError, match=r"its classes are \['blue', 'green', 'red'\]"):
        answers.of_run(run, Cache.open(tmp_path / "other"))


def test_several_labels_a_row(tmp_path, capsys):
    rng = np.random.default_rng(0)
    sets = [("a",), ("a", "b"), (), ("b",)] * 10
    embeddings = rng.normal(size=(40, 8)).astype(np.float32)
    write_cache(tmp_path / "cache", embeddings, labels=sets, class_names=("a", "b"), multi_label=True)
    assert main(["audit", str(tmp_path / "cache"), "--out", str(tmp_path / "audit")]) == 0
    assert "labels are not judged where an image may have several" in capsys.readouterr().out
    options = ["--out", str(tmp_path / "two"), "--fix", str(tmp_path / "fixed.csv")]
    assert main(["audit", str(tmp_path / "cache"), *options]) == ConfigError.exit_code
    assert not (tmp_path / "two" / "audit.csv").exists()


def test_fix_needs_a_folder_of_images(tmp_path, capsys):
    labels_of = np.arange(20) % 2
    embeddings = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    write_cache(tmp_path / "cache", embeddings, labels=labels_of, class_names=("a", "b"))
    options = ["--out", str(tmp_path / "audit"), "--fix", str(tmp_path / "fixed.csv")]
    assert main(["audit", str(tmp_path / "cache"), *options]) == 2
    assert "give the folder with --images" in capsys.readouterr().err


@pytest.fixture(scope="module")
def photos(shared, tmp_path_factory) -> Path:
    """All 800 photos; and in train, under other names, 20 of test: copied, reduced to 60 %, 30 % or 20 %, or encoded
    again at quality 30."""
    root = tmp_path_factory.mktemp("photos")
    images = root / "images"
    shutil.copytree(shared / "data" / "dogs_cats", images)
    for i, path in enumerate(sorted((images / "test").rglob("*.jpg"))[5::10][:20]):
        copy = images / "train" / path.parent.name / f"planted-{i:02d}-{path.name}"
        with Image.open(path) as image:
            if i % 5 == 0:
                shutil.copy(path, copy)
            elif i % 5 == 1:
                image.save(copy, quality=30)
            else:
                tenths = {2: 6, 3: 3, 4: 2}[i % 5]
                image.resize((image.width * tenths // 10, image.height * tenths // 10)).save(copy, quality=75)
    backbone = str(shared / "models" / "resnet50-thin")
    assert main(["embed", str(images), "--backbone", backbone, "--out", str(root / "cache")]) == 0
    return root


@pytest.mark.photos
@pytest.mark.timeout(1200)
def test_all_of_20_photos_copied_resized_or_encoded_again_are_found(photos, tmp_path):
    assert main(["audit", str(photos / "cache"), "--out", str(tmp_path / "audit")]) == 0
    found = json.loads((tmp_path / "audit" / "audit.json").read_text())
    copies = {one["path"]: one["other"] for one in found["findings"] if one["kind"].endswith("duplicate")}
    assert len(copies) == 20
    for path, other in copies.items():
        assert Path(path).name.partition("-")[2].partition("-")[2] == Path(other).name
    assert found["counts"]["exact duplicate"] == 4
    assert found["accuracy"]["num_leaked"] == 20
    assert found["accuracy"]["clean"]["n"] == 180


@pytest.mark.photos
@pytest.mark.timeout(1200)
def test_flipped_labels_lead_the_list(photos, tmp_path):
    """5 % of the labels of 800 photos flipped: of the 5 % least likely labels at least 80 % are such, over 5 seeds."""
    cache = Cache.open(photos / "cache")
    rows = np.array([row for row, name in enumerate(cache.table.names) if b"planted" not in name])
    embeddings, true = cache.embeddings(rows=rows), cache.table.labels[rows]
    precisions = []
    for seed in range(5):
        flipped = np.zeros(len(rows), bool)
        flipped[np.random.default_rng(seed).permutation(len(rows))[: len(rows) // 20]] = True
        given = np.where(flipped, 1 - true, true)
        folder = tmp_path / str(seed)
        write_cache(folder, embeddings, labels=given, class_names=cache.class_names)
        probabilities = answers.fitted_now(Cache.open(folder), embeddings, np.arange(len(rows)), seed)
        least_likely = np.argsort(probabilities[np.arange(len(rows)), given])[: len(rows) // 20]
        precisions.append(flipped[least_likely].mean())
    print("precision of the top 5 %:", precisions)
    assert np.mean(precisions) >= 0.8
