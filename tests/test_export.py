"""`probe export`: every form answers as `probe predict` does, says what goes in, and appears whole or not at all."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import ModelCard
from PIL import Image
from scipy.special import expit, softmax

from probe import bundle
from probe.backbones import load_backbone, make_embed_fn
from probe.cli import main
from probe.config import PredictConfig
from probe.exporting import numpy_head
from probe.exporting.numpy_head import NumpyHead
from probe.heads import TrainedHead, class_logits, make_head, num_logits
from probe.images import load_image
from probe.predict import predict
from tests.checkpoints import write_tiny_clip, write_tiny_resnet
from tests.conftest import write_image_folder
from tests.golden.cases import CASES, TOWERS

TOLERANCE = 2e-6  # of probabilities: float32 sums of some dozen products, in another order


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, cache/ and the runs clip (of fit-linear), resnet and tuned (with weights of its own)."""
    root = tmp_path_factory.mktemp("export")
    images = str(write_image_folder(root / "images", {"train": 12, "test": 4}))
    clip, resnet = write_tiny_clip(root / "backbone-clip"), write_tiny_resnet(root / "backbone-resnet")
    options = ["--precision", "float32", "--batch-size", "8", "--num-workers", "1"]
    assert main(["embed", images, "--backbone", str(clip), *options, "--out", str(root / "cache")]) == 0
    out = ["--out", str(root / "clip"), "--no-report", "--quiet"]
    assert main(["fit-linear", str(root / "cache"), *out]) == 0
    save_random(root / "resnet", resnet, "linear")
    save_random(root / "tuned", clip, "tuned")
    return root


def save_random(out: Path, checkpoint: Path, kind: str) -> Path:
    """A run with a head of random weights: linear, two (classes), mlp, sets (of labels), projected (and l2), tuned."""
    backbone = load_backbone(str(checkpoint))
    if kind == "tuned":
        backbone = dataclasses.replace(backbone, variables=jax.tree.map(lambda leaf: 1.1 * leaf, backbone.variables))
    hidden, classes = ((8, 4) if kind == "mlp" else ()), ("blue", "green", "red")[: 2 if kind == "two" else 3]
    view = "projected" if kind == "projected" else "pooler"
    width = num_logits(len(classes), multi_label=kind == "sets")
    params = make_head(width, hidden).init(jax.random.key(0), np.zeros((1, backbone.view_width(view))))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), params)
    if kind == "projected":
        params["unit_norm"] = np.ones(())
    bundle.save(
        out,
        head=TrainedHead(hidden, params),
        class_names=classes,
        view=view,
        backbone=bundle.BackboneReference(
            name=backbone.name, revision=backbone.revision, fingerprint=backbone.fingerprint
        ),
        preprocessor_config=backbone.preprocessing.to_config(),
        backbone_copy=backbone if kind == "tuned" else None,
        finetuned=kind == "tuned",
        multi_label=kind == "sets",
        config={},
        metrics={"splits": {}},
    )
    return out


@functools.cache
def embed(backbone: str, view: str, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [num, H, W, 3] of noise, and what the backbone makes of them [num, D]."""
    loaded = load_backbone(backbone)
    images = np.random.default_rng(1).integers(0, 256, (num, *loaded.preprocessing.image_size, 3), np.uint8)
    return images, np.asarray(make_embed_fn(loaded, (view,))(images)[view])


def reference(run: Path, num: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures, their embeddings, and the run's logits of them [num, C], by the program that `predict` runs."""
    classifier = bundle.load(run)
    images, embeddings = embed(classifier.backbone.name, classifier.view, num)
    logits = classifier.head.apply(embeddings)
    return images, embeddings, np.asarray(logits if classifier.multi_label else class_logits(logits))


def files(trained: Path) -> list[Path]:
    return sorted((trained / "images" / "test").rglob("*.png"))


def export(run: Path, form: str, out: Path, *options: str) -> Path:
    assert main(["export", str(run), "--format", form, "--out", str(out), *options]) == 0
    return out


def run_onnx(path: Path, inputs: np.ndarray) -> dict[str, np.ndarray]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    values = session.run(None, {given.name: inputs})
    return dict(zip([output.name for output in session.get_outputs()], values, strict=True))


def run_jax(folder: Path, inputs: np.ndarray) -> dict[str, np.ndarray]:
    program = jax.export.deserialize(bytearray((folder / "classifier.stablehlo").read_bytes()))
    return {name: np.asarray(value) for name, value in program.call(inputs).items()}


RUNNERS = {"onnx": run_onnx, "jax": run_jax}


@pytest.mark.parametrize(("run", "form"), [("clip", "onnx"), ("resnet", "onnx"), ("tuned", "onnx"), ("tuned", "jax")])
def test_images_get_the_probabilities_of_predict(run: str, form: str, trained: Path, tmp_path: Path) -> None:
    classifier = bundle.load(trained / run)
    preprocessing = classifier.load_backbone().preprocessing
    images = np.stack([load_image(path.read_bytes(), preprocessing) for path in files(trained)])
    expected = predict(PredictConfig(run=trained / run, images=(trained / "images" / "test",)))["predictions"]
    probabilities = np.array([line["probabilities"] for line in expected])
    out = export(trained / run, form, tmp_path / "out")
    for part in (slice(0, 1), slice(0, 5), slice(5, 12)):  # any batch size
        found = RUNNERS[form](out, images[part])
        np.testing.assert_allclose(found["probabilities"], probabilities[part], atol=TOLERANCE)
        np.testing.assert_allclose(softmax(found["logits"], axis=1), found["probabilities"], atol=TOLERANCE)


@pytest.mark.parametrize("form", RUNNERS)
@pytest.mark.parametrize("kind", ["linear", "two", "mlp", "sets", "projected"])
def test_every_head_is_exported_with_its_backbone_and_alone(
    kind: str, form: str, tiny_clip: Path, tmp_path: Path
) -> None:
    run = save_random(tmp_path / "run", tiny_clip, kind)
    images, embeddings, expected = reference(run)
    normalise = expit if kind == "sets" else lambda logits: softmax(logits, axis=1)
    whole = RUNNERS[form](export(run, form, tmp_path / "whole"), images)
    alone = RUNNERS[form](export(run, form, tmp_path / "head", "--part", "head"), embeddings)
    for found in (whole, alone):
        np.testing.assert_allclose(found["logits"], expected, atol=2e-5)
        np.testing.assert_allclose(found["probabilities"], normalise(expected), atol=2e-5)
    if kind == "projected":
        zero = RUNNERS[form](tmp_path / "head", np.zeros_like(embeddings))["logits"][0]  # has no direction
        np.testing.assert_array_equal(zero, bundle.load(run).head.params["bias"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_tower_is_itself_in_onnx(case, tmp_path: Path) -> None:
    """Activations, layer types, strides and borders that patches leave, with random weights everywhere."""
    run = save_random(tmp_path / "run", TOWERS / case.name, "linear")
    images, _, expected = reference(run, 3)
    found = run_onnx(export(run, "onnx", tmp_path / "run.onnx"), images)["logits"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_an_onnx_file_says_what_it_takes_and_gives(trained: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(export(trained / "clip", "onnx", tmp_path / "clip.onnx"))
    onnx.checker.check_model(model, full_check=True)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["class_names"]) == ["blue", "green", "red"]
    assert json.loads(facts["preprocessing"]) == bundle.load(trained / "clip").preprocessor_config
    assert facts["input"].startswith("images [batch, 16, 16, 3] uint8, RGB, resized and cropped as preprocessing says")
    assert json.loads(facts["backbone"])["name"] == "backbone-clip"  # not the folders that it lies in
    (given,) = model.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert (given.name, dims) == ("images", ["batch", 16, 16, 3])
    assert [output.name for output in model.graph.output] == ["logits", "probabilities"]
    assert str(trained).encode() not in (tmp_path / "clip.onnx").read_bytes()


def test_a_program_of_jax_runs_anywhere_and_says_what_it_is(trained: Path, tmp_path: Path) -> None:
    folder = export(trained / "clip", "jax", tmp_path / "clip-jax")
    assert sorted(path.name for path in folder.iterdir()) == ["classifier.json", "classifier.stablehlo"]
    facts = json.loads((folder / "classifier.json").read_text())
    assert facts["platforms"] == ["cpu", "cuda", "tpu"]
    assert facts["class_names"] == ["blue", "green", "red"]
    assert facts["jax"] == jax.__version__
    program = jax.export.deserialize(bytearray((folder / "classifier.stablehlo").read_bytes()))
    assert str(program.in_avals[0].shape[0]) == "batch"


def test_a_head_classifies_with_numpy_alone(trained: Path, tmp_path: Path) -> None:
    export(trained / "clip", "safetensors", tmp_path / "clip.safetensors")
    _, embeddings, expected = reference(trained / "clip")
    np.save(tmp_path / "embeddings.npy", embeddings)
    (tmp_path / "numpy_head.py").write_text(Path(numpy_head.__file__).read_text())  # copied to where nothing else is
    code = """
import sys
import numpy as np
for name in ("jax", "jaxlib", "flax", "safetensors", "probe", "scipy", "sklearn"):
    sys.modules[name] = None  # as if it were not installed
from numpy_head import NumpyHead
head = NumpyHead.load("clip.safetensors")
np.save("probabilities.npy", head.probabilities(np.load("embeddings.npy")))
print(*head.class_names)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["blue", "green", "red"]
    np.testing.assert_allclose(np.load(tmp_path / "probabilities.npy"), softmax(expected, axis=1), atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["two", "mlp", "sets", "projected"])
def test_every_head_classifies_with_numpy(kind: str, tiny_clip: Path, tmp_path: Path) -> None:
    run = save_random(tmp_path / "run", tiny_clip, kind)
    _, embeddings, expected = reference(run)
    head = NumpyHead.load(export(run, "safetensors", tmp_path / "head.safetensors", "--part", "head"))
    np.testing.assert_allclose(head.logits(embeddings), expected, atol=2e-5)
    assert head.multi_label == (kind == "sets")
    if kind == "sets":
        np.testing.assert_allclose(head.probabilities(embeddings), expit(expected), atol=2e-5)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 9, b"{}", "cut", "no head"])
def test_the_numpy_loader_refuses_what_is_no_head(damage: bytes | str, trained: Path, tmp_path: Path) -> None:
    path = export(trained / "clip", "safetensors", tmp_path / "clip.safetensors", "--part", "head")
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        path.write_bytes(safetensors.numpy.save({"x": np.zeros(2, np.float32)}, metadata={"probe": "{}"}))
    with pytest.raises(ValueError, match=r"clip\.safetensors: (not a safetensors file|damaged)"):
        NumpyHead.load(path)


def test_weights_keep_their_published_names(trained: Path, tmp_path: Path) -> None:
    path = export(trained / "clip", "safetensors", tmp_path / "clip.safetensors")
    arrays = safetensors.numpy.load(path.read_bytes())
    original = safetensors.numpy.load((trained / "backbone-clip" / "model.safetensors").read_bytes())
    ours = {name.removeprefix("backbone/"): array for name, array in arrays.items() if name.startswith("backbone/")}
    assert ours.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(ours[name], array)


class TestHub:
    """Folders for transformers: the tests that need PyTorch run where it is, and say so where it is not."""

    def classify(self, folder: Path, images: list[Path], tmp_path: Path) -> list[list[str]]:
        """What the card's script, as it is printed there, says of the images."""
        (script,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        (tmp_path / "classify.py").write_text(script)
        command = [sys.executable, tmp_path / "classify.py", folder, *images]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line.split("\t") for line in done.stdout.splitlines()]

    @pytest.mark.parametrize("run", ["clip", "resnet", "tuned"])
    def test_the_script_of_the_card_answers_as_predict_does(self, run: str, trained: Path, tmp_path: Path) -> None:
        pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
        photo = tmp_path / "turned.jpg"  # a camera held upright, and too large a picture
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(files(trained)[0]).resize((120, 90)).save(photo, exif=exif, quality=95)
        images = [*files(trained), photo]
        folder = export(trained / run, "hub", tmp_path / "hub")
        found = self.classify(folder, images, tmp_path)
        expected = predict(PredictConfig(run=trained / run, images=tuple(images)))["predictions"]
        assert [line[1] for line in found] == [line["predicted"] for line in expected]
        for line, ours in zip(found, expected, strict=True):
            assert float(line[2]) == pytest.approx(max(ours["probabilities"]), abs=1e-4)  # as many digits are printed

    @pytest.mark.parametrize("tower", ["tiny_clip", "tiny_resnet"])
    @pytest.mark.parametrize("kind", ["two", "mlp", "sets"])
    def test_every_head_in_pytorch(self, kind: str, tower: str, tmp_path: Path, request, trained: Path) -> None:
        pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
        run = save_random(tmp_path / "run", request.getfixturevalue(tower), kind)
        found = self.classify(export(run, "hub", tmp_path / "hub"), files(trained), tmp_path)
        expected = predict(PredictConfig(run=run, images=tuple(files(trained))))["predictions"]
        for line, ours in zip(found, expected, strict=True):
            assert float(line[2]) == pytest.approx(max(ours["probabilities"]), abs=1e-4)

    def test_the_projection_in_pytorch(self, tiny_clip: Path, tmp_path: Path, trained: Path) -> None:
        pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
        run = save_random(tmp_path / "run", tiny_clip, "projected")
        found = self.classify(export(run, "hub", tmp_path / "hub"), files(trained), tmp_path)
        expected = predict(PredictConfig(run=run, images=tuple(files(trained))))["predictions"]
        for line, ours in zip(found, expected, strict=True):
            assert float(line[2]) == pytest.approx(max(ours["probabilities"]), abs=1e-4)

    def test_a_resnet_is_a_classifier_of_transformers(self, trained: Path, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
        from transformers import ResNetForImageClassification

        folder = export(trained / "resnet", "hub", tmp_path / "hub")
        model, loading = ResNetForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert {name: list(found) for name, found in loading.items() if found} == {}
        assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
        backbone = bundle.load(trained / "resnet").load_backbone()
        images, _, expected = reference(trained / "resnet")
        mean, std = (np.asarray(values) for values in (backbone.preprocessing.mean, backbone.preprocessing.std))
        pixels = torch.from_numpy(((images / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2))
        with torch.no_grad():
            logits = model.eval()(pixels).logits.numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-4)

    def test_the_folder_is_a_backbone_again(self, trained: Path, tmp_path: Path) -> None:
        """Without the projection, which a head on the pooler's output does not read."""
        images, embeddings, _ = reference(trained / "clip")
        again = load_backbone(str(export(trained / "clip", "hub", tmp_path / "hub")))
        assert again.views == ("pooler",)
        np.testing.assert_array_equal(make_embed_fn(again, ("pooler",))(images)["pooler"], embeddings)

    def test_the_card_says_what_is_known_and_nothing_else(self, trained: Path, tmp_path: Path) -> None:
        folder = export(trained / "clip", "hub", tmp_path / "hub")
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == "unknown"
        assert card.data.pipeline_tag == "image-classification"
        figures = json.loads((trained / "clip" / "metrics.json").read_text())["splits"]["test"]
        accuracy = next(r for r in card.data.eval_results if r.dataset_split == "test" and r.metric_type == "accuracy")
        assert accuracy.metric_value == figures["accuracy"]
        assert accuracy.dataset_name == "images"
        low, high = figures["accuracy_interval_95"]
        assert f"| accuracy | {figures['accuracy']:.4f} | {low:.4f} to {high:.4f} |" in card.text
        assert "knows the licence neither of the backbone's weights nor of the" in card.text
        for path in folder.iterdir():
            assert str(trained).encode() not in path.read_bytes()  # where it lies is nobody's business

    def test_names_in_the_card_are_inert(self, tmp_path: Path, tiny_clip: Path) -> None:
        run = save_random(tmp_path / "run", tiny_clip, "linear")
        names = ["<img src=x onerror=alert(1)>", "[a](javascript:b)|`c`", "\u202e\n---\nlicense: mit"]
        loaded = json.loads((run / "classifier.json").read_text())
        (run / "classifier.json").write_text(json.dumps({**loaded, "class_names": names}))
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["classifier.json"] = bundle._sha256(run / "classifier.json")
        (run / "manifest.json").write_text(json.dumps(manifest))
        folder = export(run, "hub", tmp_path / "hub")
        text = (folder / "README.md").read_text()
        for part in ("<img", "](javascript", "|`c`", "\u202e", "\nlicense: mit"):
            assert part not in text
        assert ModelCard.load(folder / "README.md").data.license == "unknown"
        assert json.loads((folder / "config.json").read_text())["id2label"]["0"] == names[0]


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    return err


class TestErrors:
    def test_what_cannot_be_asked_for(self, trained: Path, tmp_path: Path, capsys) -> None:
        run = trained / "clip"
        err = refused(capsys, 2, run, "--format", "tflite")
        assert "invalid choice 'tflite'" in " ".join(err.split())
        assert "not found" in refused(capsys, 3, tmp_path / "nowhere", "--format", "onnx")
        assert "--part must be whole" in refused(capsys, 2, run, "--format", "hub", "--part", "head")
        options = ["--part", "head", "--backbone", "b"]
        assert "--backbone must be left out" in refused(capsys, 2, run, "--format", "jax", *options)
        assert list(tmp_path.iterdir()) == []

    def test_a_vote_of_neighbours_is_refused(self, trained: Path, tmp_path: Path, capsys) -> None:
        run = tmp_path / "knn"
        arguments = ["--head", "knn", "--out", str(run), "--no-report"]
        assert main(["fit-linear", str(trained / "cache"), *arguments]) == 0
        for form in ("onnx", "jax", "safetensors", "hub"):
            assert "vote of the nearest training rows" in refused(capsys, 2, run, "--format", form)
        assert [path.name for path in tmp_path.iterdir()] == ["knn"]

    @pytest.mark.parametrize("form", ["onnx", "jax", "safetensors", "hub"])
    def test_what_stands_there_is_kept_unless_it_is_ours(
        self, form: str, trained: Path, tmp_path: Path, capsys
    ) -> None:
        run, out = trained / "clip", tmp_path / "out"
        export(run, form, out)
        before = {path: path.read_bytes() for path in (out, *out.rglob("*")) if path.is_file()}
        assert "--overwrite" in refused(capsys, 3, run, "--format", form, "--out", out)
        assert before == {path: path.read_bytes() for path in (out, *out.rglob("*")) if path.is_file()}
        export(run, form, out, "--overwrite")
        if form in ("jax", "hub"):
            photos = tmp_path / "photos"
            photos.mkdir()
            (photos / "holiday.jpg").touch()
            assert "something else of yours" in refused(
                capsys, 3, run, "--format", form, "--out", photos, "--overwrite"
            )

    def test_a_full_disk_leaves_nothing(self, trained: Path, tmp_path: Path) -> None:
        code = f"""
import resource, sys
from probe.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for form in ("onnx", "jax", "safetensors", "hub"):
    print(main(["export", {str(trained / "clip")!r}, "--format", form, "--out", "out"]))
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.split() == ["7"] * 4
        assert done.stderr.count("probe: error: out: cannot write") == 4
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_package_is_named(self, trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
        monkeypatch.setitem(sys.modules, "onnx.checker", None)
        err = refused(capsys, 2, trained / "clip", "--format", "onnx", "--out", tmp_path / "out.onnx")
        assert err == "probe: error: --format onnx needs one more package: pip install 'probe-jax[onnx]'\n"
        assert list(tmp_path.iterdir()) == []

    def test_a_backbone_that_is_gone_is_not_needed_for_the_head(self, tmp_path: Path, capsys) -> None:
        checkpoint = write_tiny_clip(tmp_path / "clip")
        run = save_random(tmp_path / "run", checkpoint, "linear")
        checkpoint.rename(tmp_path / "moved")
        err = refused(capsys, 3, run, "--format", "jax")
        assert "--backbone" in err
        assert "--part head" in err
        export(run, "jax", tmp_path / "whole", "--backbone", str(tmp_path / "moved"))
        export(run, "jax", tmp_path / "alone", "--part", "head")

    def test_where_nothing_is_said_it_is_written_beside_the_run(self, trained: Path, tmp_path: Path, capsys) -> None:
        run = save_random(tmp_path / "run", trained / "backbone-clip", "linear")
        for form, name in (
            ("onnx", "run.onnx"),
            ("jax", "run-jax"),
            ("safetensors", "run.safetensors"),
            ("hub", "run-hub"),
        ):
            capsys.readouterr()
            assert main(["export", str(run), "--format", form, "--json"]) == 0
            result = json.loads(capsys.readouterr().out)
            assert result["out"] == str(tmp_path / name)
            assert (tmp_path / name).exists()
