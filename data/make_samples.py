"""Makes data/samples/emoji.zip: the design of emoji that probe-tiny never saw, in class folders by Unicode group.

    python -m data.make_samples ARCHIVES

ARCHIVES is a folder for the packages' archives (`python -m data.pretrain` keeps its own there). In the zip file:
{train,val,test}/GROUP/NAME.png, 72 × 72 pixels, on white. All variants of a name (a running man, woman and person)
are in one split, so that test asks about things that train does not show; those names whose pictures probe-tiny saw
in no design are all in test, listed as `held_out_names` in data/samples/emoji.json. Pictures that face right are left
out: they are the mirror images of others, under names of their own.
"""

import hashlib
import io
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from data.pretrain.fetch import packages
from data.pretrain.pairs import Concept, emoji_pictures, name_stem, read_emoji

OUT = Path(__file__).with_name("samples")
TEST_PERCENT, VAL_PERCENT = 25, 13  # of the names that are not held out
_MIRRORED = "facing right"  # ends the name of a mirror image
_COLOURS = 64  # of a picture's palette


def split_of(concept: Concept) -> str:
    """train, val or test, by the emoji's name without person and skin."""
    if concept.held_out:
        return "test"
    draw = int(hashlib.sha256(f"samples {name_stem(concept.name)}".encode()).hexdigest(), 16) % 100
    return "test" if draw < TEST_PERCENT else "val" if draw < TEST_PERCENT + VAL_PERCENT else "train"


def png(picture: np.ndarray) -> bytes:
    """[H, W, 4] uint8 RGBA -> a PNG file of it on white, with a palette."""
    white = Image.new("RGBA", (picture.shape[1], picture.shape[0]), "white")
    flat = Image.alpha_composite(white, Image.fromarray(picture)).convert("RGB")
    file = io.BytesIO()
    flat.quantize(_COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def main(archives: Path) -> None:
    (package,) = packages("held out")
    files: dict[str, bytes] = {}
    seen: set[bytes] = set()
    held_out = []
    for concept, picture in emoji_pictures(package, archives, read_emoji(archives)):
        if concept.name.endswith(_MIRRORED):
            continue
        name = re.sub(r"[^a-z0-9]+", "-", concept.name.replace("#", "hash").replace("*", "star")).strip("-")
        path = f"{split_of(concept)}/{concept.group.lower()}/{name}.png"
        if path in files:
            raise ValueError(f"{path}: two emoji have this name")
        content = png(picture)
        if content in seen:  # some flags are those of another country
            continue
        seen.add(content)
        files[path] = content
        if concept.held_out:
            held_out.append(path)
    OUT.mkdir(exist_ok=True)
    with zipfile.ZipFile(OUT / "emoji.zip", "w") as archive:
        for path, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(path), content)  # always of the same date: the same bytes each time
    counts = {split: sum(path.startswith(f"{split}/") for path in files) for split in ("train", "val", "test")}
    source = {"package": package.name, "version": package.version, "licence": package.licence, "author": package.author}
    facts = {"source": source, "images": counts, "held_out_names": sorted(held_out)}
    (OUT / "emoji.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{counts}, {(OUT / 'emoji.zip').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
