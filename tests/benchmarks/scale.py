"""What a cluster would come to: the driver's cost with more workers, and a plan's with more images.

    unshare -rn python -m tests.loopback python -m tests.benchmarks.scale [--quick] [--json FILE]

Workers: shards whose compute is a sleep of known length, so that a machine of 2 cores shows the scheduling alone.
Plans: from 10³ images up, each in a process of its own, with embeddings of width 8 so that nothing but the bookkeeping
is measured; 10⁸ is extrapolated from the cost of an image between one size and the next.
The last part works out what 5 billion images would need from these figures and those of --rate and --width.
"""

import argparse
import itertools
import json
import os
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


def extrapolate(plans: list[dict[str, float]], what: str) -> tuple[float, float, float]:
    """`what` at 10⁸ images by the cost of one image more between sizes: by the last two, the least and the most."""
    costs = [(b[what] - a[what]) / (b["images"] - a["images"]) for a, b in itertools.pairwise(plans)][-3:]
    guesses = [plans[-1][what] + cost * (FAR - plans[-1]["images"]) for cost in costs]
    return guesses[-1], min(guesses), max(guesses)


def spell_goal(workers: list[dict[str, float]], plans: list[dict[str, float]], rate: float, width: int) -> list[str]:
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
        f"5·10⁹ images at {rate:,.0f} images/s a worker: {days:,.0f} worker-days; with 256 workers "
        f"{days / 256 * 24:,.0f} h",
        f"bytes: {GOAL * (2 * width + facts) / 1e12:.1f} TB ({2 * width} of float16 and {facts:.0f} of facts an image)",
        f"files: {2 * num_shards:,} ({num_shards:,} shards of {SHARD_ROWS:,} and their sidecars)",
        f"a plan of 10⁸ needs {memory / 1e9:.0f} GB in the driver, so that is the unit: {GOAL // FAR} caches",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 10⁵ images, and fewer shards")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--rate", type=float, default=20.0, help="images/s of one worker")
    parser.add_argument("--width", type=int, default=768, help="of an embedding")
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)  # what a process of its own runs
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if arguments.plan:
            print(json.dumps(measure_plan(arguments.plan, Path(name))))
            return
        os.environ.setdefault("RAY_TMPDIR", name)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 8, "include_dashboard": False, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        workers = []
        for num_workers in (1, 2, 4, 8):
            workers.append(measure_workers(cluster.address, num_workers, 12 if arguments.quick else 40))
            show(workers[-1])
        cluster.shutdown()
    plans = []
    for power in range(3, 6 if arguments.quick else 8):
        command = [sys.executable, "-m", "tests.benchmarks.scale", "--plan", str(10**power)]
        plans.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        show(plans[-1])
    for what in ("plan_s", "first_shard_s", "complete_s", "open_s", "driver_bytes", "disk_bytes"):
        guess, low, high = extrapolate(plans, what)
        print(f"10⁸ images, extrapolated: {what} {guess:,.4g} ({low:,.4g} to {high:,.4g})")
    print(*spell_goal(workers, plans, arguments.rate, arguments.width), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(to_cases(workers, plans), indent=1))


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
