"""What probe-tiny is worth as a backbone: linear probes on it, on the same tower untrained, and on raw pixels.

Every row is `probe`'s own: `fit-linear` on cached features, λ by cross-validation, judged once on the test split.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from data.digits import write_digits
from probe import EmbedConfig, FitLinearConfig, ZeroShotConfig, embed_images, fit_linear, zero_shot_images
from probe.backbones import build_tower, load_backbone, save_backbone
from probe.config import CacheImportConfig
from probe.demo import samples, unpack
from probe.exchange import import_features
from probe.images import load_images
from probe.sources import open_source

NAME = "probe-tiny"
DOGS_CATS = Path(__file__).parents[3] / "shared" / "data" / "dogs_cats"
_FIGURES = ("accuracy", "accuracy_interval_95", "n")


def measure() -> dict[str, Any]:
    """{data set: {features: accuracy, interval and number of test images}} as JSON values."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        unpack(samples(), work / "samples")
        write_digits(work / "digits")
        tiny = load_backbone(NAME)
        pixels = np.zeros((1, tiny.config.image_size, tiny.config.image_size, 3), np.float32)
        variables = build_tower(tiny.config).init(jax.random.key(0), pixels)
        save_backbone(dataclasses.replace(tiny, variables=variables), work / "random")
        sets = {"samples": work / "samples", "digits": work / "digits"}
        sets |= {"dogs_cats": DOGS_CATS} if DOGS_CATS.is_dir() else {}
        results: dict[str, Any] = {}
        for name, images in sets.items():
            results[name] = {
                "probe-tiny": _probe(images, NAME, work / name / "tiny"),
                "random weights": _probe(images, str(work / "random"), work / name / "random"),
                "raw pixels": _raw(images, work / name / "raw"),
            }
        words = zero_shot_images(
            ZeroShotConfig(images=sets["samples"], backbone=NAME, prompts=("{}", "a picture of {}"))
        )
        results["samples"]["zero-shot"] = _pick(words)
        return results


def _probe(images: Path, backbone: str, work: Path) -> dict[str, Any]:
    embed_images(EmbedConfig(images=images, backbone=backbone, out=work / "cache"))
    return _pick(fit_linear(FitLinearConfig(cache=work / "cache", out=work / "run", no_report=True, quiet=True)))


def _raw(images: Path, work: Path) -> dict[str, Any]:
    """Pixels at 16 × 16 as features, more of which are worse on these few images (the digits are 8 × 8)."""
    source = open_source(images)
    tiny = load_backbone(NAME)
    rows, labels, splits, names = [], [], [], []
    for image in load_images(source.iter_bytes(source.examples), tiny.preprocessing):
        if image.pixels is None:
            continue
        rows.append(
            np.asarray(Image.fromarray(image.pixels).resize((16, 16), Image.Resampling.BOX), np.float32).ravel()
        )
        labels.append(image.example.labels[0])
        splits.append(image.example.split or "train")
        names.append(image.example.name.decode())
    work.mkdir(parents=True)
    class_names = sorted(set(labels))
    np.savez(
        work / "raw.npz",
        embeddings=np.stack(rows) / 255,
        labels=np.array([class_names.index(label) for label in labels]),
        class_names=np.array(class_names),
        splits=np.array(splits),
        names=np.array(names),
    )
    import_features(CacheImportConfig(features=work / "raw.npz", out=work / "cache"))
    return _pick(fit_linear(FitLinearConfig(cache=work / "cache", out=work / "run", no_report=True, quiet=True)))


def _pick(metrics: dict[str, Any]) -> dict[str, Any]:
    figures = metrics["splits"].get("test") or metrics["splits"]["val"]
    return {name: figures[name] for name in _FIGURES}
