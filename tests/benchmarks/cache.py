"""What the cache costs: opening, streaming and planning at a million rows, and its share of `probe embed`.

    python -m tests.benchmarks.cache [--quick] [--json FILE]

--quick takes a tenth of the rows. The figures asked for: a million rows of 768 float16 open in under 1 s and stream at
400 MB/s or more, verified; planning a million paths takes under 30 s and 1 GB; hashing, sealing and verifying take
less than 3 % of the wall time of embedding with ViT-B/32.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from probe.cache import Cache, CacheWriter, make_inputs, make_manifest, write_cache
from probe.cache.hdf5 import build_image
from probe.cache.plan import ShardInfo
from probe.cache.shards import shard_view
from probe.storage import atomic_write_bytes

WIDTH = 768
IMAGE_BYTES = 100_000  # of a file: a photo of 500 x 375 as JPEG
CLASSES = tuple(f"class {index:03d}" for index in range(1000))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds it took."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def measure_reading(folder: Path, num_rows: int) -> dict[str, float]:
    """Opens and streams a synthetic cache."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((16384, WIDTH)).astype(np.float16)
    embeddings = np.concatenate([block] * (num_rows // len(block) + 1))[:num_rows]
    keys = rng.integers(0, 256, (num_rows, 32), np.uint8)
    names = [b"%s/%08d.jpg" % (CLASSES[row % 1000].encode(), row) for row in range(num_rows)]
    labels = np.arange(num_rows) % 1000
    said = {"names": names, "labels": labels, "class_names": CLASSES, "splits": ["train"] * num_rows}
    _, written = timed(lambda: write_cache(folder, embeddings, keys=keys, **said))
    cache, opened = timed(lambda: Cache.open(folder))
    total, streamed = timed(lambda: sum(len(chunk) for chunk in cache.chunks()))
    assert total == num_rows
    again, trusted = timed(lambda: sum(len(chunk) for chunk in Cache.open(folder, verify=False).chunks()))
    assert again == num_rows
    megabytes = num_rows * WIDTH * 2 / 1e6
    return {
        "rows": num_rows,
        "write_s": written,
        "open_s": opened,
        "stream_verified_mb_per_s": megabytes / streamed,
        "stream_unverified_mb_per_s": megabytes / trusted,
    }


def measure_planning(folder: Path, num_paths: int) -> dict[str, float]:
    """Plans paths without keys, in a process of its own so that its peak memory can be read."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.cache", "--plan", str(num_paths), "--json", str(folder / "plan.json")],
        check=True,
        capture_output=True,
    )
    assert not done.stdout
    figures: dict[str, float] = json.loads((folder / "plan.json").read_text())
    return figures


def plan_paths(num_paths: int) -> dict[str, float]:
    """What `probe embed` does between listing a folder and reading the first image."""
    from probe.sources import Example

    examples = [
        Example(
            b"train/%s/%08d.jpg" % (CLASSES[row % 1000].encode(), row), (CLASSES[row % 1000],), "train", None, row, row
        )
        for row in range(num_paths)
    ]

    def plan() -> None:
        inputs = make_inputs(
            (example.name for example in examples),
            labels=(example.labels for example in examples),
            splits=(example.split for example in examples),
            groups=(example.group for example in examples),
            sizes=(example.size for example in examples),
            mtimes_ns=(example.mtime_ns for example in examples),
            class_names=CLASSES,
            multi_label=False,
        )
        with tempfile.TemporaryDirectory() as folder:
            writer = CacheWriter(Path(folder, "cache"), make_manifest({"views": {}}, {}, 16384))
            assert len(writer.plan(inputs).work) == num_paths

    _, seconds = timed(plan)
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory before exec
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    return {"paths": num_paths, "plan_s": seconds, "peak_mb": peak}


def measure_relabelling(folder: Path, num_rows: int) -> dict[str, float]:
    """The Monday loop on the cache that `measure_reading` wrote: every label changes, nothing is computed."""
    cache = Cache.open(folder)
    inputs = cache.plan.inputs
    changed = make_inputs(
        inputs.names,
        labels=((CLASSES[0],) for _ in range(num_rows)),
        splits=("train" for _ in range(num_rows)),
        groups=(None for _ in range(num_rows)),
        sizes=inputs.size.tolist(),
        mtimes_ns=inputs.mtime_ns.tolist(),
        class_names=CLASSES,
        multi_label=False,
    )
    manifest = make_manifest(cache.identity, {}, 16384)
    plan, seconds = timed(lambda: CacheWriter(folder, manifest).plan(changed))
    assert plan.complete
    return {"relabel_s": seconds}


def measure_share(folder: Path, num_batches: int) -> dict[str, float]:
    """Hashing, sealing and verifying per image, against embedding it with ViT-B/32 in float32."""
    import jax

    from probe.backbones import VisionTower, ViTConfig

    tower = VisionTower(ViTConfig())
    images = np.zeros((32, 224, 224, 3), np.float32)
    variables = jax.jit(tower.init)(jax.random.key(0), images[:1])
    run = jax.jit(lambda variables, images: tower.apply(variables, images).pooler_output)
    run(variables, images).block_until_ready()
    _, embedding = timed(lambda: [run(variables, images).block_until_ready() for _ in range(num_batches)])
    embed_s = embedding / num_batches / len(images)

    data = np.random.default_rng(0).bytes(IMAGE_BYTES)
    _, hashing = timed(lambda: [hashlib.sha256(data).digest() for _ in range(1024)])
    rows = np.random.default_rng(0).standard_normal((1024, WIDTH)).astype(np.float32)
    keys = np.zeros((1024, 32), np.uint8)

    def seal() -> bytes:
        image = build_image({"key": keys, "embeddings/pooler": rows})
        hashlib.sha256(image).hexdigest()
        atomic_write_bytes(folder / "shard.h5", image)
        return image

    image, sealing = timed(seal)

    def verify() -> None:
        read = (folder / "shard.h5").read_bytes()
        info = ShardInfo("shard.h5", hashlib.sha256(read).hexdigest(), len(read), len(rows))
        shard_view(read, folder, info, "pooler", WIDTH)

    _, verifying = timed(verify)
    assert len(image) > rows.nbytes
    cost_s = (hashing + sealing + verifying) / 1024
    return {
        "embed_images_per_s": 1 / embed_s,
        "hash_us_per_image": hashing / 1024 * 1e6,
        "seal_us_per_image": sealing / 1024 * 1e6,
        "verify_us_per_image": verifying / 1024 * 1e6,
        "share_percent": 100 * cost_s / (cost_s + embed_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument(
        "--json", type=Path, help="write those in seconds there, as a list of {case, program, median_s, ratio}"
    )
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)  # what `measure_planning` runs
    arguments = parser.parse_args()
    if arguments.plan:
        arguments.json.write_text(json.dumps(plan_paths(arguments.plan)))
        return
    num_rows = 100_000 if arguments.quick else 1_000_000
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures |= measure_reading(folder / "cache", num_rows)
        figures |= measure_relabelling(folder / "cache", num_rows)
        figures |= measure_planning(folder, num_rows)
        figures |= measure_share(folder, 1 if arguments.quick else 4)
    for what, figure in figures.items():
        print(f"{what:28s} {figure:12,.2f}")
    if arguments.json:
        seconds = {what: figure for what, figure in figures.items() if re.search(r"(?<!_per)_s$", what)}
        lines = [
            {"case": what, "program": "probe", "median_s": taken, "ratio": None} for what, taken in seconds.items()
        ]
        arguments.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
