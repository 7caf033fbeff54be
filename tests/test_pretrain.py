"""The program that makes probe-tiny, on a few made-up pictures: what it draws, that it learns, goes on and is read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from probe.backbones import load_backbone, load_text_encoder, make_embed_fn
from probe.backbones.vit import ViTConfig

pytest.importorskip("resvg_py")  # of the extras `pretrain` and `test`

from data.pretrain.augment import SIZE as IMAGE_SIZE
from data.pretrain.batches import Recipe, Sampler
from data.pretrain.captions import load_tokenizer, save_tokenizer, tokenize, train_tokenizer
from data.pretrain.export import export
from data.pretrain.fetch import packages
from data.pretrain.pairs import SIZE, Concept, draw_svg, is_held_out, load_pairs, name_stem
from data.pretrain.report import README
from data.pretrain.report import text as report_text
from data.pretrain.train import PROJECTION, train
from data.pretrain.transfer import measure

TINY = ViTConfig(
    hidden_size=16,
    intermediate_size=32,
    projection_dim=PROJECTION,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=IMAGE_SIZE,
    patch_size=16,
)
RECIPE = Recipe(num_steps=4, decay_steps=1, warmup_steps=1, emoji_per_batch=6, icons_per_batch=4, glyphs_per_batch=2)
WORDS = ("cat", "dog", "house", "tree", "sun", "moon", "boat", "fish", "red car", "blue car", "hat", "key")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with 12 concepts in two designs, each of one colour, and one concept that is held out."""
    root = tmp_path_factory.mktemp("pretrain")
    rng = np.random.default_rng(0)
    kinds = ["emoji"] * 6 + ["icon"] * 4 + ["glyph"] * 2
    concepts = [
        Concept(kind, name, (f"the {name}",) if kind == "glyph" else (f"{name}s",), "Things")
        for kind, name in zip(kinds, WORDS, strict=True)
    ]
    concepts.append(Concept("emoji", "secret", ("hidden",), "Things", held_out=True))
    colours = rng.integers(0, 256, (len(concepts), 3))
    images = np.full((2 * len(concepts), SIZE, SIZE, 4), 255, np.uint8)
    images[..., :3] = np.tile(colours, (2, 1))[:, None, None]
    pairs = root / "pairs"
    pairs.mkdir()
    np.save(pairs / "images.npy", images)
    np.savez(
        pairs / "pairs.npz",
        concept_of=np.tile(np.arange(len(concepts)), 2),
        design_of=np.repeat([0, 1], len(concepts)),
        monochrome=np.zeros(len(images), bool),
    )
    content = {"concepts": [dataclasses.asdict(concept) for concept in concepts], "designs": ["noto", "fxemoji"]}
    (pairs / "pairs.json").write_text(json.dumps(content))
    save_tokenizer(train_tokenizer(concepts), root / "tokenizer")
    return root


def test_a_batch_is_that_of_its_step_and_shows_nothing_twice_or_held_out(work: Path) -> None:
    pairs, tokenizer = load_pairs(work / "pairs"), load_tokenizer(work / "tokenizer")
    sampler = Sampler(pairs, tokenizer, RECIPE)
    images, tokens = sampler.batch(3)
    again = Sampler(pairs, tokenizer, RECIPE).batch(3)
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(tokens, again[1])
    assert images.shape == (12, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert not np.array_equal(images, sampler.batch(4)[0])
    assert len(np.unique(tokens, axis=0)) == len(tokens)
    said = " ".join(tokenizer.decode_batch(np.concatenate([sampler.batch(step)[1] for step in range(20)]).tolist()))
    said = said.replace("</w>", " ")
    assert "red car" in said
    assert "secret" not in said
    assert "hidden" not in said


@pytest.fixture(scope="module")
def params(work: Path) -> Any:
    """What four steps without a break make."""
    trained = train(work, RECIPE, TINY)
    (work / "train").rename(work / "whole")
    return trained


def test_training_goes_on_to_the_bit(work: Path, params: Any) -> None:
    train(work, dataclasses.replace(RECIPE, num_steps=2), TINY)
    continued = train(work, RECIPE, TINY)
    jax.tree.map(np.testing.assert_array_equal, params, continued)


def test_what_is_exported_is_read_as_any_checkpoint(work: Path, params: Any) -> None:
    tokenizer = load_tokenizer(work / "tokenizer")
    export(params, tokenizer, work / "model", TINY)
    backbone = load_backbone(work / "model")
    images = np.random.default_rng(0).integers(0, 256, (2, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    assert np.asarray(make_embed_fn(backbone, ("projected",))(images)["projected"]).shape == (2, PROJECTION)
    kernel = backbone.variables["params"]["visual_projection"]["kernel"]
    np.testing.assert_array_equal(kernel, np.asarray(params["vision"]["visual_projection"]["kernel"], np.float16))
    texts = ["a picture of Red  Cats", "fish's hat, 2 keys"]
    assert load_text_encoder(work / "model").encode(texts).shape == (2, PROJECTION)
    theirs = AutoTokenizer.from_pretrained(work / "model")(texts, padding="max_length")["input_ids"]
    np.testing.assert_array_equal(tokenize(tokenizer, texts), theirs)


def test_variants_of_a_name_are_held_out_together() -> None:
    for name in ("running", "detective", "firefighter", "pilot"):
        variants = [f"{person} {name}" for person in ("man", "woman", "person")]
        assert {name_stem(variant) for variant in variants} == {name}
        assert len({is_held_out(variant) for variant in variants}) == 1


def test_a_drawing_lies_in_the_middle_and_an_empty_one_is_none() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} 10" width="{w}" height="10">{body}</svg>'
    picture = draw_svg(svg.format(w=20, body='<rect width="20" height="10" fill="red"/>'))
    assert picture is not None
    seen = picture[..., 3] > 0
    assert seen[SIZE // 2].all()
    assert not seen[[0, -1]].any()
    assert draw_svg(svg.format(w=10, body="")) is None
    assert draw_svg("no picture") is None


def test_the_readme_of_the_model_is_what_was_measured() -> None:
    """A figure of each table, as `report.py` writes them."""
    figures = {"pictures": 2, "names": 2, "top_1": 0.5, "top_5": 1.0, "median_rank": 1, "top_1_by_chance": 0.5}
    metrics = {
        "curve": [{"step": 50, "loss": 1.5, "accuracy": 0.25, "rate": 1e-3, "seconds": 120.0}],
        "parameters": {"vision": 1000, "text": 500},
        "batch_size": 8,
        "pictures": 10,
        "retrieval": {"seen names": figures},
        "transfer": {"digits": {"probe-tiny": {"accuracy": 0.9, "accuracy_interval_95": [0.8, 0.95], "n": 40}}},
    }
    lines = report_text(metrics).splitlines()
    assert "| 50 | 1.500 | 25.0% | 1.0e-03 |" in lines
    assert "| seen names | 2 | 2 | 50.0% | 100.0% | 1 | 50.00% |" in lines
    assert "| digits | probe-tiny | 0.900 | 0.800 to 0.950 | 40 |" in lines


def test_the_readme_names_every_package_with_its_author_and_licence() -> None:
    text = README.read_text()
    for package in packages():
        link = f"[`{package.name}`](https://www.npmjs.com/package/{package.name}) {package.version}"
        assert f"| {link} | {package.author} | {package.licence} |" in text


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_probe_tiny_is_worth_more_than_chance_and_pixels() -> None:
    """On the samples and on the digits, by more than the intervals."""
    for name, rows in measure().items():
        if name in ("samples", "digits"):
            low, _ = rows["probe-tiny"]["accuracy_interval_95"]
            assert low > rows["random weights"]["accuracy_interval_95"][1], name
            assert low > rows["raw pixels"]["accuracy_interval_95"][1], name
