"""How long a report takes, and how large it is: 10,000 test images in 100 classes, with a cache and the images there.

    python -m tests.benchmarks.report [--quick] [--json FILE]

The images are JPEGs of 500 × 375, of which there are 200 different ones under 10,000 names, so that those on the page
are decoded one by one; embeddings are 768 wide. `ratio` is the time as a share of the 20 s that are asked for.
"""

import argparse
import hashlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from probe.cache import Cache, write_cache
from probe.reporting.page import write_report
from probe.sources.origin import describe_origin
from tests.runs import make_answers, save_run

SECONDS_ASKED = 20.0
NUM_CLASSES, WIDTH, NUM_DIFFERENT = 100, 768, 200


def prepare(root: Path, num_rows: int) -> Path:
    """A run with its cache and its images."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(NUM_DIFFERENT):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375))
        noise = rng.normal(0, 12, (375, 500, 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        pictures.append(file.getvalue())
    names, keys = [], []
    (root / "images").mkdir()
    for i in range(num_rows):
        content = pictures[i % NUM_DIFFERENT] + i.to_bytes(4, "big")  # after the end of the picture
        names.append(b"%05d.jpg" % i)
        (root / "images" / os.fsdecode(names[-1])).write_bytes(content)
        keys.append(hashlib.sha256(content).digest())
    classes = tuple(f"class {c:03d}" for c in range(NUM_CLASSES))
    answers = make_answers(
        num_rows, classes, names=names, keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32), skill=4.5
    )
    centres = rng.normal(size=(NUM_CLASSES, WIDTH))
    embeddings = (centres[answers.labels] + rng.normal(size=(num_rows, WIDTH))).astype(np.float32)
    write_cache(root / "cache", embeddings, names=names, keys=answers.keys)
    reference = Cache.open(root / "cache").reference
    return save_run(root / "run", answers, cache=reference, source=describe_origin(root / "images"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1,000 rows, once")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    num_rows, repeats = (1_000, 1) if options.quick else (10_000, 3)
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(Path(folder), num_rows)
        seconds = []
        before = time.process_time() + sum(os.times()[2:4])  # and that of the processes that decode
        for _ in range(repeats):
            start = time.perf_counter()
            result = write_report(run)
            seconds.append(time.perf_counter() - start)
        processor = time.process_time() + sum(os.times()[2:4])
    median = statistics.median(seconds)
    print(
        f"{num_rows:,} rows: {median:.2f} s, {result['bytes'] / 1e6:.2f} MB, {result['num_points']:,} points, "
        f"{result['num_thumbnails']:,} pictures; {(processor - before) / repeats:.1f} s of processor time"
    )
    lines = [
        {"case": f"report of {num_rows} rows", "program": "probe", "median_s": median, "ratio": median / SECONDS_ASKED},
        {"case": f"report of {num_rows} rows, bytes", "program": "probe", "bytes": result["bytes"]},
    ]
    if options.json:
        options.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
