"""Writes a small real job: the handwritten digits that scikit-learn ships, as pictures in class folders.

    python data/digits.py work

makes work/digits/{train,test}/{0..9}/*.png (1,797 scans of 8 × 8 pixels: Alpaydin and Kaynak, UCI Machine
Learning Repository, 1998).
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TEST_FRACTION = 0.25


def write_digits(root: Path) -> None:
    """Writes root/{train,test}/{0..9}/*.png, the test rows drawn at random with a fixed seed."""
    digits = load_digits()
    is_test = np.random.default_rng(0).random(len(digits.target)) < TEST_FRACTION
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / ("test" if is_test[index] else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(folder / f"{index:04d}.png")  # 17 grey levels


def main(out: Path) -> None:
    write_digits(out / "digits")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
