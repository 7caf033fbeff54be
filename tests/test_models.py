"""The bundled model: it loads by name as any checkpoint does, here and in transformers, and knows what it is shown."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import probe
from probe.backbones import Precision, int8_precision, load_backbone, load_text_encoder, make_embed_fn
from probe.backbones.checkpoint import BUNDLED
from probe.demo import samples
from probe.errors import InputError
from tests.parity import TOLERANCE, relative_error
from tests.test_inference import cosines

MODELS = Path(probe.__file__).parent / "models"
TEXTS = ["banana", "a picture of a cat", "flag: Japan", "grinning face with big eyes, an emoji", ""]


def sample_images() -> dict[str, np.ndarray]:
    """Test images of the samples by their names, as the model's preprocessing makes them, uint8."""
    backbone = load_backbone("probe-tiny")
    with zipfile.ZipFile(samples()) as archive:
        names = [name for name in archive.namelist() if name.startswith("test/")][::10]
        pictures = {name: Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names}
    size = backbone.preprocessing.image_size
    return {
        name: np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)) for name, picture in pictures.items()
    }


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_is_the_checkpoint_in_its_folder(name: str) -> None:
    by_name, by_folder = load_backbone(name), load_backbone(MODELS / name)
    assert (by_name.name, by_name.revision) == (name, None)
    assert by_name.fingerprint == by_folder.fingerprint
    assert by_name.views == ("pooler", "projected")
    files = [path for path in (MODELS / name).iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert load_text_encoder(name).name == name


def test_a_bundled_model_has_no_revisions() -> None:
    with pytest.raises(InputError, match="probe-tiny: a bundled model has no revisions"):
        load_backbone("probe-tiny", revision="main")


def test_a_folder_of_that_name_comes_first(tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe-tiny").symlink_to(tiny_clip)
    monkeypatch.chdir(tmp_path)
    assert load_backbone("probe-tiny").fingerprint == load_backbone(tiny_clip).fingerprint


def test_its_tokenizer_marks_start_and_end_and_cuts_what_is_too_long() -> None:
    encoder = load_text_encoder("probe-tiny")
    config = encoder.config
    tokens = encoder.tokenize([*TEXTS, "very " * 100])
    assert tokens.shape == (6, config.max_position_embeddings)
    start = config.vocab_size - 2
    assert (tokens[:, 0] == start).all()
    assert ((tokens == config.eos_token_id).sum(axis=1) >= 1).all()
    np.testing.assert_array_equal(tokens[4, 1:], config.eos_token_id)  # the empty text, then padding
    np.testing.assert_array_equal(encoder.tokenize(["A  BANANA"]), encoder.tokenize(["a banana"]))


def test_a_text_does_not_depend_on_those_beside_it() -> None:
    encoder = load_text_encoder("probe-tiny")
    together = encoder.encode(TEXTS * 30)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(together[:5], together[-5:])
    np.testing.assert_array_equal(together[1:2], encoder.encode(TEXTS[1:2]))
    assert encoder.encode([]).shape == (0, encoder.config.projection_dim)


def test_transformers_gives_the_same_logits() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: its classes cannot load anything")
    import transformers

    folder = MODELS / "probe-tiny"
    model = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    pixels = np.stack(list(sample_images().values()))[:8]
    inputs = processor(images=[Image.fromarray(image) for image in pixels], return_tensors="pt")
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(input_ids=tokens["input_ids"], pixel_values=inputs["pixel_values"]).logits_per_image.numpy()
    backbone, encoder = load_backbone(folder), load_text_encoder(folder)
    images = np.asarray(make_embed_fn(backbone, ("projected",))(pixels)["projected"])
    images = images / np.linalg.norm(images, axis=1, keepdims=True)
    assert relative_error(encoder.logit_scale * images @ encoder.encode(TEXTS).T, theirs) < TOLERANCE


def test_it_names_pictures_of_a_design_that_it_never_saw() -> None:
    backbone, encoder = load_backbone("probe-tiny"), load_text_encoder("probe-tiny")
    pictures = sample_images()
    names = [Path(path).stem.replace("-", " ") for path in pictures]
    images = np.stack(list(pictures.values()))
    found = np.asarray(make_embed_fn(backbone, ("projected",))(images)["projected"])
    cosines = found / np.linalg.norm(found, axis=1, keepdims=True) @ encoder.encode(names).T
    hits = (cosines.argmax(axis=1) == np.arange(len(names))).mean()
    assert hits > 5 / len(names)  # one in 60 or so by chance; what it really finds is in data/pretrain/README.md


def test_rounding_moves_embeddings_of_trained_weights_a_little() -> None:
    """On pictures of a design that it never saw; trained activations are less even than those of random weights."""
    backbone, pictures = load_backbone("probe-tiny"), np.stack(list(sample_images().values()))
    exact = make_embed_fn(backbone, backbone.views)(pictures)
    for precision, least in ((Precision("bfloat16"), 0.9999), (int8_precision(backbone), 0.999)):
        rounded = make_embed_fn(backbone, backbone.views, precision)(pictures)
        found = {view: cosines(rounded[view], exact[view]).min() for view in backbone.views}
        print(f"{precision.name}: {found}, {len(pictures)} pictures")
        assert min(found.values()) >= least
