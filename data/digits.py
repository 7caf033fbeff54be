"""Writes a small real job: the handwritten digits that scikit-learn ships, and a tiny random CLIP tower.

    python data/digits.py work

makes work/digits/{train,test}/{0..9}/*.png (1,797 scans of 8 × 8 pixels: Alpaydin and Kaynak, UCI Machine
Learning Repository, 1998) and work/random-clip, a checkpoint in Hugging Face layout whose weights were never
trained: what the verbs do with it shows that the program works, not how good a pretrained backbone is.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from probe.backbones import Backbone, ViTConfig, build_tower, save_backbone
from probe.images import Preprocessing

TEST_FRACTION = 0.25
TOWER = ViTConfig(
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    projection_dim=None,
)
PREPROCESSING = Preprocessing(
    resize=32, resample=3, crop=(32, 32), rescale_factor=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def write_digits(root: Path) -> None:
    """Writes root/{train,test}/{0..9}/*.png, the test rows drawn at random with a fixed seed."""
    digits = load_digits()
    is_test = np.random.default_rng(0).random(len(digits.target)) < TEST_FRACTION
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / ("test" if is_test[index] else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(folder / f"{index:04d}.png")  # 17 grey levels


def write_random_clip(folder: Path) -> None:
    """Writes a CLIP vision tower that nobody has trained."""
    pixels = np.zeros((1, TOWER.image_size, TOWER.image_size, 3), np.float32)
    variables = build_tower(TOWER).init(jax.random.key(0), pixels)
    save_backbone(Backbone("random-clip", None, TOWER, variables, PREPROCESSING), folder)


def main(out: Path) -> None:
    write_digits(out / "digits")
    write_random_clip(out / "random-clip")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
