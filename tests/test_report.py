"""The report: what stands on the page, that it asks nobody and runs nothing, and what it does without its sources."""

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import pdist, squareform
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.metrics import log_loss

from probe import bundle
from probe.cli import main
from probe.errors import CorruptError, InputError, MismatchError
from probe.evaluation.calibration import fit_temperature
from probe.evaluation.metrics import summarize
from probe.reporting import components
from probe.reporting.answers import Answers, confusion_matrix, reliability, scaled
from probe.reporting.charts import Series, line_chart, number
from probe.reporting.embedding_map import STEPS, make_map
from probe.reporting.page import MAX_BYTES, write_report
from probe.sources.origin import describe_origin
from tests.runs import make_answers, renamed, save_run

EVIL = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "=cmd|' /C calc'!A0", "a & \"b\" 'c'")


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, the text outside of scripts, and the scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self._text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self._text).split())
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, text):
        {"script": self.scripts, "style": self.styles}.get(self._inside, self._text).append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def assert_self_contained(page: Page) -> None:
    """Nothing is asked for, nothing runs but the script that the policy names."""
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    for kind, (content,) in (("style", page.styles), ("script", page.scripts[1:])):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "form", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name != "style", "the policy would block it"
            if name in ("src", "href"):
                assert value.startswith(("data:image/webp;base64,", "#"))
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|WebSocket|innerHTML", "".join(page.styles + page.scripts[1:]))


@pytest.fixture(scope="module")
def trained(tiny_clip, tmp_path_factory):
    """Images, cache and run of one `fit-linear` by the command line."""
    from tests.conftest import write_image_folder

    root = tmp_path_factory.mktemp("report")
    write_image_folder(root / "images", {"train": 12, "test": 4})
    assert main(["embed", str(root / "images"), "--backbone", str(tiny_clip), "--out", str(root / "cache")]) == 0
    options = ["--learning-curve", "--seeds", "2", "--shots", "1", "4"]
    assert main(["fit-linear", str(root / "cache"), *options, "--out", str(root / "run")]) == 0
    return root


def test_fit_linear_writes_a_page_that_tells_what_the_run_folder_holds(trained):
    page = Page(trained / "run" / "report.html")
    assert_self_contained(page)
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    test = metrics["splits"]["test"]
    assert f"{100 * test['accuracy']:.1f} % right, of 12 test images" in page.text
    assert f"95 % interval: {100 * test['accuracy_interval_95'][0]:.1f} to" in page.text
    for heading in (
        "What to do next",
        "What is taken for what",
        "Map of the embeddings",
        "Whether its probabilities mean what they say",
        "What more labels would give",
        "How it was chosen",
        "How it was made",
    ):
        assert heading in page.text
    for fact in (
        "scikit-learn default",
        f"probe fit-linear {trained / 'cache'} --learning-curve",
        f"{metrics['splits']['val']['nll']:.3f}",
        json.loads((trained / "cache" / "cache.json").read_text())["fingerprint"],
        "jax ",
        " cores",
        "chosen: λ",
    ):
        assert fact in page.text, fact
    rows = page.data["rows"]
    assert sorted(rows["name"])[:2] == ["test/blue/000.png", "test/blue/001.png"]
    wrong = [label != predicted for label, predicted in zip(rows["label"], rows["predicted"], strict=True)]
    assert rows["wrong"] == [int(one) for one in wrong]
    assert sum(wrong) == 12 - round(12 * test["accuracy"])
    assert len(set(zip(rows["x"], rows["y"], strict=True))) == 12


def test_thumbnails_are_small_pictures_without_metadata(trained):
    page = Page(trained / "run" / "report.html")
    uris = [*page.data["thumbs"].values(), *(image["src"] for image in page.all("img"))]
    assert len(uris) == 12
    for uri in uris:
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
            assert (image.format, image.size) == ("WEBP", (128, 128))
            assert not {"exif", "xmp", "icc_profile"} & image.info.keys()


def test_every_picture_has_a_text(trained):
    page = Page(trained / "run" / "report.html")
    assert page.all("img")
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    assert [tag for tag, _ in page.elements if tag == "h1"] == ["h1"]


def test_no_report_where_it_is_not_wanted(trained, tmp_path):
    assert main(["fit-linear", str(trained / "cache"), "--no-report", "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "report.html").exists()
    assert main(["predict", str(tmp_path / "run"), str(trained / "images" / "test" / "red")]) == 0


def test_images_that_are_not_there_leave_the_page_as_it_is(trained, capsys):
    run = trained / "run"
    before = (run / "report.html").read_bytes()
    assert main(["report", str(run), "--images", str(trained / "nowhere")]) == 3
    assert "nowhere does not exist" in capsys.readouterr().err
    assert (run / "report.html").read_bytes() == before


def test_the_report_verb_gives_the_same_page(trained, tmp_path, capsys):
    before = (trained / "run" / "report.html").read_bytes()
    assert main(["report", str(trained / "run"), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (tmp_path / "page.html").read_bytes() == before
    assert said == {
        "schema_version": 1,
        "report": str(tmp_path / "page.html"),
        "bytes": len(before),
        "num_rows": 12,
        "num_points": 12,
        "num_thumbnails": 12,
        "notes": [],
    }


def test_images_and_cache_that_have_moved(trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    made = json.loads((run / "made.json").read_text())
    made["source"]["images"], made["cache"]["path"] = str(tmp_path / "images"), str(tmp_path / "cache")
    (run / "made.json").write_text(json.dumps(made))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["made.json"] = hashlib.sha256((run / "made.json").read_bytes()).hexdigest()
    (run / "manifest.json").write_text(json.dumps(manifest))
    without = write_report(run)
    assert (without["num_points"], without["num_thumbnails"]) == (0, 0)
    assert any("the images are not where they were" in note for note in without["notes"])
    assert any("There is no map of the embeddings" in note and "is not a cache" in note for note in without["notes"])
    page = Page(run / "report.html")
    assert_self_contained(page)
    assert "Map of the embeddings" not in page.text
    found = write_report(run, images=trained / "images", cache=trained / "cache")
    assert (found["num_points"], found["num_thumbnails"], found["notes"]) == (12, 12, [])


def test_an_image_that_has_changed_is_not_shown(trained, tmp_path):
    images = shutil.copytree(trained / "images", tmp_path / "images")
    shutil.copy(images / "test/red/000.png", images / "test/red/001.png")
    (images / "test/blue/000.png").unlink()
    (images / "test/blue/001.png").write_bytes(b"no image")
    result = write_report(trained / "run", images=images, out=tmp_path / "page.html")
    assert result["num_thumbnails"] == 9
    assert "3 of 12 images are gone, changed or cannot be read" in result["notes"][0]


def test_a_cache_of_other_images_is_refused(trained, tiny_clip, tmp_path):
    from tests.conftest import write_image_folder

    write_image_folder(tmp_path / "images", {"train": 3}, seed=1)
    cache = tmp_path / "cache"
    assert main(["embed", str(tmp_path / "images"), "--backbone", str(tiny_clip), "--out", str(cache)]) == 0
    with pytest.raises(MismatchError, match="it lacks 12 of the 12 images"):
        write_report(trained / "run", cache=cache)
    with pytest.raises(InputError, match="not a run folder"):
        write_report(cache)


def test_a_page_that_cannot_be_written_costs_only_the_page(trained, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["fit-linear", str(trained / "cache"), "--out", str(out)]) == 0
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    assert main(["report", str(out)]) == 7
    assert "report.html: cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["test", "val"])
def test_finetune_writes_a_page_with_a_map_of_its_own_embeddings(split, tiny_clip, image_folder, tmp_path):
    """Without a cache, and the same again later: they are those of the classifier that was kept."""
    out, images = tmp_path / "run", image_folder
    if split == "val":
        (images / "test").rename(images / "val")
    options = ["--epochs", "2", "--batch-size", "8", "--backbone-lr", "1e-3", "--keep", "finetuned", "--wise", "off"]
    options += ["--backbone", str(tiny_clip), "--num-workers", "1"]
    assert main(["finetune", str(images), *options, "--out", str(out)]) == 0
    page = Page(out / "report.html")
    assert_self_contained(page)
    for fact in ("Probe against fine-tuned", "Loss by epoch", "Map of the embeddings", "probe finetune "):
        assert fact in page.text, fact
    assert len(page.all("img")) + len(page.data["thumbs"]) == 12
    assert main(["report", str(out), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == (out / "report.html").read_bytes()
    run, rows = bundle.load(out), page.data["rows"]
    assert run.finetuned
    backbone = run.load_backbone()
    pixels = np.stack([backbone.preprocessing.apply(Image.open(images / name)) for name in rows["name"]])
    plane = PCA(2).fit_transform(np.asarray(backbone.apply(backbone.variables, pixels).pooler_output))
    shown = np.stack([rows["x"], rows["y"]], axis=1) / STEPS
    # a position is a whole number of 4,095 steps
    np.testing.assert_allclose(pdist(shown), pdist(plane) / np.ptp(plane, axis=0).max(), atol=1e-3)


def test_few_axes_give_the_map_of_all(tmp_path):
    """What a run keeps of its embeddings, 50 numbers each, has the plane and the shares of 300."""
    rng = np.random.default_rng(0)
    embeddings = (rng.normal(size=(400, 300)) * np.arange(1, 301) ** -0.7 + 5).astype(np.float32)
    keys = rng.integers(0, 256, (400, 32)).astype(np.uint8)
    (tmp_path / components.FILE_NAME).write_bytes(components.to_bytes(keys, embeddings))
    kept = components.load(tmp_path)
    assert kept.values.shape == (400, 50)
    order = rng.permutation(400)
    ours = make_map(kept.values[kept.rows([keys[row].tobytes() for row in order])], variance=kept.variance)
    theirs = make_map(embeddings[order])
    assert ours.note == theirs.note
    assert np.allclose(pdist(ours.positions), pdist(theirs.positions), atol=3)
    assert kept.rows([b"\0" * 32]) is None
    assert "0 % and 0 %" in make_map(np.ones((5, 4), np.float32)).note
    (tmp_path / components.FILE_NAME).write_bytes(b"no tensors")
    with pytest.raises(CorruptError, match=r"map\.safetensors: damaged"):
        components.load(tmp_path)


def test_umap_keeps_neighbours_together():
    pytest.importorskip("umap", reason="the extra umap is not installed")
    rng, labels = np.random.default_rng(0), np.arange(90) % 3
    embeddings = (rng.normal(size=(90, 16)) + 9 * np.eye(16)[labels]).astype(np.float32)
    plane = make_map(embeddings, "umap")
    assert plane.note.startswith("UMAP")
    assert plane.positions.min() == 0
    assert plane.positions.max() == STEPS
    distances = squareform(pdist(plane.positions)) + np.diag(np.full(90, np.inf))
    assert (labels[distances.argmin(axis=1)] == labels).all()


def test_umap_that_is_not_installed(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "umap", None)
    assert main(["report", str(trained / "run"), "--map", "umap", "--out", str(tmp_path / "page.html")]) == 2
    assert "pip install 'probe-jax[umap]'" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("split", "solver", "known"), [("train", "ridge", True), ("val", "lbfgs", True), ("val", "ridge", False)]
)
def test_calibration_before_and_after_without_a_test_split(split, solver, known, tmp_path):
    answers = renamed(make_answers(200, ("a", "b", "c")), splits=np.repeat(split, 200))
    run = save_run(tmp_path / "run", answers, metrics={"temperature": 2.5, "solver": solver})
    write_report(run)
    page = Page(run / "report.html")
    raw = reliability(Answers.of_run(renamed(answers, logits=answers.logits * np.float32(2.5))))
    for bin in raw:
        line = f"before temperature scaling: {bin.n} answers of confidence {100 * bin.confidence:.1f} %"
        assert (line in page.text) == known
    assert ("divided by the temperature 2.5" in page.text) == known


@pytest.mark.parametrize("split", ["test", "val"])
def test_what_temperature_scaling_would_do_to_a_run_that_has_none(split, tmp_path):
    """Too sure by a factor of 3: validation tells it, and rows are scaled by others."""
    answers = make_answers(400, ("a", "b", "c"))
    splits = np.array(["val", "test"] * 200) if split == "test" else np.repeat("val", 400)
    answers = renamed(answers, splits=splits, logits=3 * answers.logits)
    judged = Answers.of_run(answers)
    temperature, after = scaled(judged, answers)
    val = answers.take(splits == "val")
    assert temperature == pytest.approx(fit_temperature(val.logits, val.labels))
    raw, true = judged.of.logits, judged.of.labels
    factors = after.of.logits[:, 0] / raw[:, 0]
    assert len(set(factors.round(4))) == (1 if split == "test" else 2)
    assert log_loss(true, softmax(after.of.logits, axis=1)) < log_loss(true, softmax(raw, axis=1))
    run = save_run(tmp_path / "run", answers)
    write_report(run)
    page = Page(run / "report.html")
    for bin in reliability(after):
        assert f"after temperature scaling: {bin.n} answers of confidence {100 * bin.confidence:.1f} %" in page.text
    assert f"{number(temperature)} by all validation rows" in page.text


def write_odd_images(root: Path, names: list[bytes]) -> np.ndarray:
    """[n, 32] keys of small pictures of these names."""
    keys = []
    for i, name in enumerate(names):
        path = root / name.decode("utf-8", "surrogateescape")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 12, 3), i, np.uint8)).save(path, "PNG")
        keys.append(hashlib.sha256(path.read_bytes()).digest())
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)


def test_names_that_would_be_markup_are_text(tmp_path):
    names = [
        b"test/=cmd|' \x1b.png",
        b"test/<img src=x onerror=alert(3)>.png",
        b'test/\xff".png',
        b"test/{{ 7*7 }}.png",
    ]
    keys = write_odd_images(tmp_path / "images", names)
    answers = make_answers(4, EVIL, names=names, keys=keys, skill=0.1)
    metrics = {"warnings": ["<script>alert(4)</script>"], "head": "linear"}
    run = save_run(tmp_path / "run", answers, metrics=metrics, source=describe_origin(tmp_path / "images"))
    assert write_report(run)["num_thumbnails"] == 4
    page = Page(run / "report.html")
    assert_self_contained(page)
    assert len(page.all("script")) == 2
    assert page.data["texts"] == list(EVIL)
    for name in EVIL[:3]:
        assert name in page.text
    assert "<script>alert(4)</script>" in page.text
    assert "test/<img src=x onerror=alert(3)>.png" in page.text
    assert 'test/\\xff".png' in page.text
    assert "test/=cmd|' \\x1b.png" in page.text
    assert "{{ 7*7 }}" in page.text


def test_sets_of_labels(tmp_path):
    run = save_run(tmp_path / "run", make_answers(40, ("a", "b", "c"), multi_label=True, skill=3))
    write_report(run)
    page = Page(run / "report.html")
    assert_self_contained(page)
    assert "What is taken for what" not in page.text
    assert "Classes, the worst first" in page.text
    assert "a, b" in page.data["texts"]
    right = sum(a == b for a, b in zip(page.data["rows"]["label"], page.data["rows"]["predicted"], strict=True))
    assert f"{100 * right / 40:.1f} % right" in page.text


def test_a_run_without_answers(tmp_path):
    run = save_run(tmp_path / "run", None)
    result = write_report(run)
    page = Page(run / "report.html")
    assert_self_contained(page)
    assert "There are no rows that could judge it" in page.text
    assert "Hold rows out" in page.text
    assert result["num_rows"] == 0


def test_more_images_than_fit(tmp_path):
    """Noise does not compress: 900 pictures of it are more than the limit, and the page says how many it has."""
    rng = np.random.default_rng(0)
    names = [b"%03d.bmp" % i for i in range(900)]
    (tmp_path / "images").mkdir()
    keys = []
    for name in names:
        path = tmp_path / "images" / name.decode()
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)).save(path)
        keys.append(hashlib.sha256(path.read_bytes()).digest())
    keys = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
    answers = make_answers(900, ("cat", "dog"), names=names, keys=keys)
    run = save_run(tmp_path / "run", answers, source=describe_origin(tmp_path / "images"))
    result = write_report(run)
    assert 0.9 * MAX_BYTES < result["bytes"] == (run / "report.html").stat().st_size <= MAX_BYTES
    assert 100 < result["num_thumbnails"] < 900
    page = Page(run / "report.html")
    assert len(page.all("img")) == 36, "galleries come first"
    assert len(page.all("img")) + len(page.data["thumbs"]) == result["num_thumbnails"]


@pytest.mark.parametrize("multi_label", [False, True])
def test_long_names_and_sets_of_labels_do_not_break_the_limit(tmp_path, multi_label):
    """Then the page knows fewer rows, and says how many."""
    names = [b"test/" + "写真".encode() * 80 + b"%05d.jpg" % i for i in range(10_000)]
    classes = tuple(f"a rather long name of the class {i:02d}" for i in range(40 if multi_label else 4))
    answers = make_answers(10_000, classes, names=names, multi_label=multi_label)
    run = save_run(tmp_path / "run", answers)
    result = write_report(run)
    assert result["bytes"] <= MAX_BYTES
    assert 1_000 < result["num_rows"] < 10_000
    page = Page(run / "report.html")
    rows = page.data["rows"]
    assert len(rows["name"]) == len(rows["label"]) == result["num_rows"]
    wrong = [a != b for a, b in zip(rows["label"], rows["predicted"], strict=True)]
    assert [int(one) for one in wrong] == rows["wrong"]
    if multi_label:
        judged = Answers.of_run(answers)
        place = names.index(rows["name"][7].encode())
        assert page.data["texts"][rows["label"][7]] == judged.texts[judged.label[place]]
        assert len(page.data["texts"]) <= 2 * len(rows["name"])


def test_reliability_bins_add_up_to_the_calibration_error():
    for multi_label in (False, True):
        answers = make_answers(500, ("a", "b", "c"), multi_label=multi_label)
        bins = reliability(Answers.of_run(answers))
        error = summarize(answers.logits, answers.labels, answers.class_names)["expected_calibration_error"]
        total = sum(bin.n for bin in bins)
        assert total == (1500 if multi_label else 500)
        assert sum(bin.n * abs(bin.share - bin.confidence) for bin in bins) / total == pytest.approx(error)


def test_galleries_are_in_order_of_confidence():
    answers = Answers.of_run(make_answers(300, ("a", "b", "c")))
    mistakes, hits = answers.mistakes(10), answers.doubtful_hits(10)
    assert not answers.correct[mistakes].any()
    assert answers.correct[hits].all()
    assert answers.confidence[mistakes].tolist() == sorted(answers.confidence[~answers.correct])[::-1][:10]
    assert answers.confidence[hits].tolist() == sorted(answers.confidence[answers.correct])[:10]


def test_the_matrix_of_many_classes_has_those_with_most_mistakes():
    answers = make_answers(2000, tuple(f"class {c:02d}" for c in range(40)), skill=4)
    labels = answers.labels.copy()
    swapped = labels == 7
    logits = answers.logits.copy()
    logits[swapped, 31] += 20
    judged = Answers.of_run(renamed(answers, logits=logits))
    matrix = confusion_matrix(judged, 24)
    assert (len(matrix.classes), matrix.num_classes) == (24, 40)
    assert matrix.counts[matrix.classes.index(7)][matrix.classes.index(31)] == swapped.sum() == 50
    whole = np.array(confusion_matrix(judged, 40).counts)
    assert whole.sum() == 2000
    assert whole.trace() == judged.correct.sum()


def test_validation_stands_in_where_there_is_no_test_split():
    answers = make_answers(30, ("a", "b"))
    splits = np.array(["train"] * 10 + ["val"] * 20)
    assert Answers.of_run(renamed(answers, splits=splits)).split == "val"
    assert Answers.of_run(renamed(answers, splits=np.repeat("train", 30))).split == "train"
    assert Answers.of_run(answers.take(np.zeros(30, bool))) is None


@given(
    points=st.lists(st.tuples(st.floats(1e-8, 1e8), st.floats(-1e6, 1e6)), min_size=1, max_size=9),
    log_x=st.booleans(),
)
def test_whatever_is_drawn_is_drawn_inside(points, log_x):
    x, y = zip(*points, strict=True)
    chart = line_chart([Series(name="s", x=x, y=y)], title="t", description="d", x_label="x", y_label="y", log_x=log_x)
    for mark in chart.series[0].marks:
        assert chart.left <= mark.x <= chart.right
        assert chart.top <= mark.y <= chart.bottom
    for ticks, low, high in ((chart.x_ticks, chart.left, chart.right), (chart.y_ticks, chart.top, chart.bottom)):
        assert all(low - 0.1 <= tick.at <= high + 0.1 for tick in ticks)
        assert len(ticks) <= 12
    assert len(chart.y_ticks) >= 2


def test_numbers_are_written_short():
    written = {0: "0", 0.05: "0.05", 12: "12", 3200: "3,200", 1e-5: "1e-5", 0.31622776: "0.316", 2.5e7: "2.5e7"}
    assert {value: number(value) for value in written} == written
