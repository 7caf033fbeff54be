"""What a cluster would come to: the driver's cost with more workers, and a plan's with more images.

    unshare -rn python -m tests.loopback python -m tests.benchmarks.scale [--quick] [--json FILE] [--only PART ...]

Parts, which --only can choose:

    workers   shards whose compute is a sleep of known length, so that a machine of 2 cores shows the scheduling alone
    plans     from 10³ images up, each in a process of its own, with embeddings of width 8 so that nothing but the
              bookkeeping is measured; 10⁸ is extrapolated from the cost of an image between one size and the next
    disk      shards of full size, sealed one after another
    overhead  `probe embed` of --images photos by CLIP ViT-B/32 (random weights), local and on Ray with one worker that
              has all cores, in turn; a run of one batch of each is taken off, and said apart as the start-up

From the first three and from --rate and --width follows what 5 billion images would need, and what limits it. --quick
takes fewer of each, under 2 minutes, which is too few for the overhead to mean much.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from probe.cache import Cache, CacheWriter, Facts, ShardContents, make_inputs, make_manifest
from probe.embedding import Device
from probe.engines.worker import Job, Place, Receipt
from probe.sources import Example

SLEEP = 0.25  # seconds of a shard
SHARD_ROWS = 16384
WIDTH = 8
BATCH = 16
FAR = 10**8
GOAL = 5 * 10**9


class Sleeper:
    """A worker whose shards take `SLEEP` seconds and no CPU."""

    def load(self, backbone: str) -> Place:
        return Place(Device("cpu", "cpu"), "here", os.getpid())

    def begin(self, job: Job, tag: str) -> None:
        pass

    def make(self, number: int, examples: list[Example]) -> Receipt:
        time.sleep(SLEEP)
        return Receipt(number, len(examples), len(examples), ())


def measure_workers(address: str, num_workers: int, shards_each: int) -> dict[str, float]:
    """Seconds until the first shard is done, and then of each worker per shard, beyond the sleep."""
    from probe.engines.ray import RayWorkers

    examples = [Example(b"train/class/%08d.jpg" % row, ("class",), "train", None, 10**5, 1) for row in range(1024)]
    shards = [(number, examples) for number in range(num_workers * shards_each)]
    job = Job(Path(), "", None, list, None, 1, False)  # type: ignore[arg-type]
    started = time.perf_counter()
    with RayWorkers(address=address, num_workers=num_workers, worker=Sleeper) as workers:
        workers.start("")
        times = []
        cpu = time.process_time()
        for _ in workers.make(job, shards, lambda tag: None):
            times.append(time.perf_counter())
        cpu = time.process_time() - cpu
    # All workers run between the first shard of each and the last one of the first to finish.
    full = times[2 * num_workers : -num_workers]
    rate = (len(full) - 1) / (full[-1] - full[0])
    return {
        "workers": num_workers,
        "first_shard_s": times[0] - started,
        "shards_per_s": rate,
        "share_of_ideal": rate * SLEEP / num_workers,
        "driver_cpu_s_per_shard": cpu / len(shards),
    }


def peak_kib() -> int:
    """The most memory that this program had; getrusage would count what its parent had when it forked."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_plan(num_images: int, folder: Path) -> dict[str, float]:
    """Plans, seals and opens a cache of so many images, in this process. Returns seconds, and bytes at the peak."""
    before = peak_kib()
    started = time.perf_counter()
    inputs = make_inputs(
        (b"train/class %03d/%09d.jpg" % (row % 1000, row) for row in range(num_images)),
        labels=((f"class {row % 1000:03d}",) for row in range(num_images)),
        splits=itertools.repeat("train", num_images),
        groups=itertools.repeat(None, num_images),
        sizes=itertools.repeat(10**5, num_images),
        mtimes_ns=itertools.repeat(1, num_images),
        class_names=[f"class {row:03d}" for row in range(1000)],
        multi_label=False,
    )
    identity = {"views": {"pooler": WIDTH}, "stored_dtype": "float16"}
    writer = CacheWriter(folder, make_manifest(identity, {}, SHARD_ROWS))
    plan = writer.plan(inputs)
    planned = time.perf_counter()
    rng = np.random.default_rng(0)
    for number in range(writer.num_shards(plan)):
        rows = writer.shard_rows(plan, number)
        keys = rng.integers(0, 256, (len(rows), 32), np.uint8)
        names = [plan.inputs.names[row] for row in rows]
        facts = Facts(names, [10**5] * len(rows), [1] * len(rows), keys, np.arange(len(rows), dtype=np.int32))
        views = {"pooler": np.zeros((len(rows), WIDTH), np.float16)}
        writer.seal(plan, number, ShardContents(facts, keys, views, ()), {})
        if number == 0:
            first = time.perf_counter()
    sealed = time.perf_counter()
    writer.complete(plan)
    completed = time.perf_counter()
    peak = peak_kib()
    cache = Cache.open(folder)
    opened = time.perf_counter()
    assert len(cache.table) == num_images
    return {
        "images": num_images,
        "plan_s": planned - started,
        "first_shard_s": first - started,
        "shards_per_s": writer.num_shards(plan) / (sealed - planned),
        "complete_s": completed - sealed,
        "open_s": opened - completed,
        "driver_bytes": 1024 * (peak - before),
        "disk_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "files": sum(path.is_file() for path in folder.rglob("*")),
    }


def measure_sealing(folder: Path, num_shards: int, width: int) -> dict[str, float]:
    """Shards of full size on this disk, one after another: hashed, written, synchronised."""
    rng = np.random.default_rng(0)
    names = [b"train/class/%08d.jpg" % row for row in range(SHARD_ROWS)]
    inputs = make_inputs(
        (b"%d/" % number + name for number in range(num_shards) for name in names),
        labels=itertools.repeat((), num_shards * SHARD_ROWS),
        splits=itertools.repeat(None, num_shards * SHARD_ROWS),
        groups=itertools.repeat(None, num_shards * SHARD_ROWS),
        sizes=itertools.repeat(10**5, num_shards * SHARD_ROWS),
        mtimes_ns=itertools.repeat(1, num_shards * SHARD_ROWS),
        class_names=[],
        multi_label=False,
    )
    identity = {"views": {"pooler": width}, "stored_dtype": "float16"}
    writer = CacheWriter(folder, make_manifest(identity, {}, SHARD_ROWS))
    plan = writer.plan(inputs)
    seconds = []
    for number in range(num_shards):
        keys = rng.integers(0, 256, (SHARD_ROWS, 32), np.uint8)
        own = [plan.inputs.names[row] for row in writer.shard_rows(plan, number)]
        facts = Facts(own, [10**5] * SHARD_ROWS, [1] * SHARD_ROWS, keys, np.arange(SHARD_ROWS, dtype=np.int32))
        views = {"pooler": rng.standard_normal((SHARD_ROWS, width), np.float32).astype(np.float16)}
        started = time.perf_counter()
        writer.seal(plan, number, ShardContents(facts, keys, views, ()), {})
        seconds.append(time.perf_counter() - started)
    return {"sealed_shards": num_shards, "seal_s": statistics.median(seconds), "most_s": max(seconds)}


def make_inputs_of_overhead(folder: Path, num_images: int) -> None:
    """A checkpoint, so many photos, and a folder with the first batch of them."""
    from probe.backbones import save_backbone
    from tests.benchmarks.embed import TOWERS, make_backbone, write_photos

    save_backbone(make_backbone(TOWERS["ViT-B/32"]), folder / "checkpoint")
    (folder / "few").mkdir()
    for path in write_photos(folder / "photos", 500, 375, num_images)[:BATCH]:
        (folder / "few" / path.name).symlink_to(path)


def measure_overhead(folder: Path, num_images: int, precision: str, rounds: int) -> list[dict[str, Any]]:
    """Seconds of `probe embed` in a process of its own, local and on Ray, beyond those of a run of one batch."""
    make = ["--make", str(folder), "--images", str(num_images)]
    subprocess.run([sys.executable, "-m", "tests.benchmarks.scale", *make], check=True)  # jax stays out of this process
    options = ["--backbone", str(folder / "checkpoint"), "--precision", precision, "--batch-size", str(BATCH), "--json"]
    engines = {"local": ["--engine", "local"], "ray": ["--engine", "ray", "--workers", "1"]}

    def seconds(images: str, engine: str) -> float:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        words = ["embed", str(folder / images), "--out", str(folder / "cache"), *options, *engines[engine]]
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "probe.cli", *words], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["num_failed"] == 0
        return time.perf_counter() - started

    for engine in engines:  # which compiles the programs, for those of the others to be found
        seconds("few", engine)
    starts: dict[str, list[float]] = {engine: [] for engine in engines}
    works: dict[str, list[float]] = {engine: [] for engine in engines}
    for turn in range(rounds):
        for engine in list(engines)[:: 1 if turn % 2 else -1]:
            start = seconds("few", engine)
            starts[engine].append(start)
            works[engine].append(seconds("photos", engine) - start)
            show({"round": turn, f"{engine}_start_s": start, f"{engine}_work_s": works[engine][-1]})
    work, start = ({engine: statistics.median(each) for engine, each in of.items()} for of in (works, starts))
    ratios = [ray / local for ray, local in zip(works["ray"], works["local"], strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"Ray beside the local run, {num_images:,} images: {ratio - 1:+.1%} (rounds: "
        f"{', '.join(f'{x - 1:+.1%}' for x in ratios)}), {work['local']:.1f} s and {work['ray']:.1f} s; "
        f"start-up apart: {start['ray']:.1f} s, of which {start['ray'] - start['local']:.1f} s are Ray's"
    )
    case = f"{num_images:,} images of ViT-B/32, {precision}"
    return [
        {"case": case, "program": "local", "median_s": work["local"], "ratio": None},
        {"case": case, "program": "ray", "median_s": work["ray"], "ratio": ratio},
        {"case": "start-up, and one batch", "program": "local", "median_s": start["local"], "ratio": None},
        {"case": "start-up, and one batch", "program": "ray", "median_s": start["ray"], "ratio": None},
    ]


def extrapolate(plans: list[dict[str, float]], what: str) -> tuple[float, float, float]:
    """`what` at 10⁸ images by the cost of one image more between sizes: by the last two, the least and the most."""
    costs = [(b[what] - a[what]) / (b["images"] - a["images"]) for a, b in itertools.pairwise(plans)][-3:]
    guesses = [plans[-1][what] + cost * (FAR - plans[-1]["images"]) for cost in costs]
    return guesses[-1], min(guesses), max(guesses)


def spell_goal(
    workers: list[dict[str, float]], plans: list[dict[str, float]], sealing: dict[str, float], rate: float, width: int
) -> list[str]:
    """What 5 billion images need, out of measured figures."""
    cpu = statistics.median(figures["driver_cpu_s_per_shard"] for figures in workers)
    shard_s = SHARD_ROWS / rate
    num_shards = -(-GOAL // SHARD_ROWS)
    memory = extrapolate(plans, "driver_bytes")[0]
    facts = plans[-1]["disk_bytes"] / plans[-1]["images"] - 2 * WIDTH
    days = GOAL / rate / 86400
    return [
        f"one driver: {cpu * 1e3:.1f} ms of its CPU a shard, so {shard_s / cpu:,.0f} workers at {rate:,.0f} images/s "
        "each keep one core of it busy",
        f"this disk: {sealing['seal_s'] * 1e3:.0f} ms a shard of {SHARD_ROWS:,} × {width} float16, so "
        f"{shard_s / sealing['seal_s']:,.0f} workers keep it busy; each reads {rate * 1e5 / 1e6:,.0f} MB/s of photos "
        "of 100 kB",
        f"so that what limits first is {'the driver' if cpu > sealing['seal_s'] else 'the file system'}",
        f"5·10⁹ images at {rate:,.0f} images/s a worker: {days:,.0f} worker-days; with 256 hosts of one "
        f"worker {days / 256 * 24:,.0f} h",
        f"bytes: {GOAL * (2 * width + facts) / 1e12:.1f} TB ({2 * width} of float16 and {facts:.0f} of facts an image)",
        f"files: {2 * num_shards:,} ({num_shards:,} shards of {SHARD_ROWS:,} and their sidecars)",
        f"a plan of 10⁸ needs {memory / 1e9:.0f} GB in the driver, so that is the unit: {GOAL // FAR} caches",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under 2 minutes")
    parts = ("workers", "plans", "disk", "overhead")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="some parts only")
    parser.add_argument("--images", type=int, help="of the overhead; if not given: 2,000, or 128 with --quick")
    parser.add_argument("--precision", default="float32", help="of the overhead")
    parser.add_argument("--rounds", type=int, help="of the overhead; if not given: 3, or 1 with --quick")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--rate", type=float, default=20.0, help="images/s of one worker")
    parser.add_argument("--width", type=int, default=768, help="of an embedding")
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)  # what a process of its own runs
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)  # likewise
    arguments = parser.parse_args()
    if arguments.make:
        make_inputs_of_overhead(arguments.make, arguments.images)
        return
    with tempfile.TemporaryDirectory() as name:
        if arguments.plan:
            print(json.dumps(measure_plan(arguments.plan, Path(name))))
            return
        os.environ.setdefault("RAY_TMPDIR", name)
        cases: list[dict[str, Any]] = []
        if "overhead" in arguments.only:
            num_images = arguments.images or (128 if arguments.quick else 2000)
            rounds = arguments.rounds or (1 if arguments.quick else 3)
            cases += measure_overhead(Path(name), num_images, arguments.precision, rounds)
        workers = measure_all_workers(12 if arguments.quick else 40) if "workers" in arguments.only else []
        plans = measure_all_plans(6 if arguments.quick else 8) if "plans" in arguments.only else []
        sealing = {}
        if "disk" in arguments.only:
            sealing = measure_sealing(Path(name, "sealed"), 3 if arguments.quick else 10, arguments.width)
            show(sealing)
            cases.append({"case": "a shard", "program": "disk", "median_s": sealing["seal_s"], "ratio": None})
    if workers and plans and sealing:
        print(*spell_goal(workers, plans, sealing, arguments.rate, arguments.width), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(cases + to_cases(workers, plans), indent=1))


def measure_all_workers(shards_each: int) -> list[dict[str, float]]:
    """1, 2, 4 and 8 workers on one cluster."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 8, "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    figures = []
    for num_workers in (1, 2, 4, 8):
        figures.append(measure_workers(cluster.address, num_workers, shards_each))
        show(figures[-1])
    cluster.shutdown()
    return figures


def measure_all_plans(end: int) -> list[dict[str, float]]:
    """10³ images, and ten times as many up to below 10^end, and what follows for 10⁸."""
    plans = []
    for power in range(3, end):
        command = [sys.executable, "-m", "tests.benchmarks.scale", "--plan", str(10**power)]
        plans.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        show(plans[-1])
    for what in ("plan_s", "first_shard_s", "complete_s", "open_s", "driver_bytes", "disk_bytes"):
        guess, low, high = extrapolate(plans, what)
        print(f"10⁸ images, extrapolated: {what} {guess:,.4g} ({low:,.4g} to {high:,.4g})")
    return plans


def show(row: dict[str, float]) -> None:
    print("  ".join(f"{what} {figure:,.4g}" for what, figure in row.items()), flush=True)


def to_cases(workers: list[dict[str, float]], plans: list[dict[str, float]]) -> list[dict[str, Any]]:
    """As the other benchmarks write them: the ratio is to the sleep alone, or to a tenth of the images."""
    cases: list[dict[str, Any]] = [
        {
            "case": f"{row['workers']} workers",
            "program": "ray",
            "median_s": row["workers"] / row["shards_per_s"],
            "ratio": 1 / row["share_of_ideal"],
        }
        for row in workers
    ]
    for before, row in zip([None, *plans], plans, strict=False):
        for what in ("plan_s", "complete_s", "open_s"):
            ratio = row[what] / before[what] if before else None
            cases.append({"case": f"{row['images']:,} images", "program": what, "median_s": row[what], "ratio": ratio})
    return cases


if __name__ == "__main__":
    main()
