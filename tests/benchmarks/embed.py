"""Embedding with CLIP's vision towers, beside PyTorch and ONNX Runtime on the same weights and images.

    python -m tests.benchmarks.embed [--quick] [--json FILE] [--only NAME ...]

Random weights in published shapes; every program with the batch that suits it best; programs take turns of two batches,
the second of which is timed, and medians are compared. Parts, which --only can choose:

    tower     images a second of the tower alone: ViT-B/32 with all peers, B/16 and L/14 with the best of each precision
    files     from JPEG files to embeddings, 500x375 and 4000x3000, and what the feed costs over the tower alone
    growth    seconds of `probe embed` for 1, 2 and 4 times as many images
    start     a process from its start to the first batch, and the most memory that it took
    accuracy  each precision, and --decode fast, beside float32 and exact

`ratio` is the best peer's median ÷ ours on the same work. A peer that cannot be imported, or cannot use the device that
jax uses, is named and left out (`pip install 'probe-jax[bench]'`). Images come from the host's memory and embeddings go
back there; on a GPU that favours ours, which takes 8-bit pixels. --quick takes towers of 2 layers, none of L/14, and
fewer images.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from probe.backbones import (
    Backbone,
    Precision,
    ViTConfig,
    build_tower,
    int8_precision,
    load_backbone,
    make_embed_fn,
    save_backbone,
)
from probe.config import EmbedConfig, FitLinearConfig
from probe.demo import samples
from probe.embed import embed
from probe.images import Preprocessing, load_image
from probe.linear import fit_linear
from probe.machine import count_flops, matmul_rate
from tests.benchmarks.peers import PEERS, THREADS, AbsentError, Run, describe_peers, make_peer

SHARED = Path(__file__).resolve().parents[3] / "shared"
TOWERS = {
    "ViT-B/32": ViTConfig(projection_dim=None),
    "ViT-B/16": ViTConfig(projection_dim=None, patch_size=16),
    "ViT-L/14": ViTConfig(
        projection_dim=None,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
    ),
}
PRECISIONS = ("float32", "bfloat16", "int8")
BATCHES = (8, 16, 32) if jax.default_backend() == "cpu" else (64, 256, 1024)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the result; median_s is of one image where the case does not say otherwise."""

    case: str
    program: str
    median_s: float
    ratio: float | None = None


def make_backbone(config: ViTConfig) -> Backbone:
    """A tower of random weights, drawn on the host: what it costs does not depend on them."""
    side = config.image_size
    rules = Preprocessing.from_config({"image_processor_type": "CLIPImageProcessor", "size": side, "crop_size": side})
    pixels = np.zeros((1, side, side, 3), np.float32)
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        gain = path[-1].key == "scale"
        return np.float32(gain) + np.float32(0.02) * rng.standard_normal(leaf.shape, np.float32)

    shapes = jax.eval_shape(build_tower(config).init, jax.random.key(0), pixels)
    return Backbone("random", None, config, jax.tree_util.tree_map_with_path(draw, shapes), rules)


def make_ours(backbone: Backbone, precision: str) -> Run:
    """Our tower, on uint8 [B, H, W, 3]: it normalises on the device, which peers are spared."""
    chosen = int8_precision(backbone) if precision == "int8" else Precision(precision)
    run = make_embed_fn(backbone, ("pooler",), chosen)
    return lambda images: np.asarray(run(images)["pooler"])


def normalise(images: np.ndarray, backbone: Backbone) -> np.ndarray:
    """What peers are given: [B, 3, H, W] float32."""
    rules = backbone.preprocessing
    pixels = images.astype(np.float32) * np.float32(rules.rescale_factor)
    pixels = (pixels - np.float32(rules.mean)) / np.float32(rules.std)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each row, [N]."""
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def random_images(num: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, size, size, 3), np.uint8)


class Bench:
    """The rows so far, and what several parts need."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.rows: list[Row] = []
        self.absent: dict[str, str] = {}
        self.batch: dict[str, int] = {}  # program -> the batch that suited it on B/32
        self.best_peer: dict[str, str] = {}  # precision -> program, on B/32

    def tower(self, name: str) -> Backbone:
        config = dataclasses.replace(TOWERS[name], **({"num_hidden_layers": 2} if self.quick else {}))
        return make_backbone(config)

    def checkpoint(self, backbone: Backbone) -> Path:
        folder = self.folder / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        save_backbone(backbone, folder)
        return folder

    def peer(self, program: str, folder: Path, backbone: Backbone) -> Run | None:
        try:
            return make_peer(program, folder, backbone)
        except AbsentError as err:
            self.absent[program] = str(err)
            return None

    def add(self, case: str, program: str, median_s: float) -> None:
        self.rows.append(Row(case, program, median_s))

    # tower

    def measure_towers(self) -> None:
        for name in [*TOWERS][:2] if self.quick else TOWERS:
            self._measure_tower(name, [*PEERS] if name == "ViT-B/32" else [*self.best_peer.values()])

    def _measure_tower(self, name: str, peers: list[str]) -> None:
        backbone = self.tower(name)
        folder, size = self.checkpoint(backbone), backbone.config.image_size
        if self.quick:
            peers = [peer for peer in peers if "compile" not in peer]
        programs: dict[str, tuple[str, Run, bool]] = {}  # program -> (precision, run, whether it takes uint8)
        for precision in PRECISIONS:
            programs[f"probe {precision}"] = (precision, make_ours(backbone, precision), True)
        for peer in peers:
            if (run := self.peer(peer, folder, backbone)) is not None:
                programs[peer] = (PEERS[peer], run, False)
        images = random_images(max(BATCHES), size)
        pixels = normalise(images, backbone)
        reference, failed = None, []
        for program, (_, run, is_uint8) in programs.items():
            try:
                answer = run(images[:8] if is_uint8 else pixels[:8])  # also compiles
            except Exception as err:  # a compiler that is not there
                self.absent[program] = f"{type(err).__name__}: {str(err)[:100]}"
                failed.append(program)
                continue
            reference = answer if reference is None else reference
            assert cosine(answer, reference).min() > 0.9, (program, cosine(answer, reference).min())
            self.batch[program] = self._best_batch(program, run, images if is_uint8 else pixels, name)
        for program in failed:
            del programs[program]
        seconds: dict[str, list[float]] = {program: [] for program in programs}
        repeats = 3 if self.quick else {"ViT-B/32": 9, "ViT-B/16": 5, "ViT-L/14": 3}[name]
        for _ in range(repeats):
            for program, (_, run, is_uint8) in programs.items():
                num = self.batch[program]
                batch = images[:num] if is_uint8 else pixels[:num]
                run(batch)  # else threads of the program before may still spin, and its data fill the caches
                seconds[program].append(seconds_of(lambda run=run, batch=batch: run(batch)) / num)
        for program, (precision, _, is_uint8) in programs.items():
            median = statistics.median(seconds[program])
            self.add(f"{name} tower, {precision}", program, median)
            if not is_uint8:
                best = self.best_peer.get(precision)
                if best is None or (name == "ViT-B/32" and median < statistics.median(seconds[best])):
                    self.best_peer[precision] = program
        self._print_roofs(name, backbone, seconds)

    def _best_batch(self, program: str, run: Run, inputs: np.ndarray, name: str) -> int:
        """By one run of each size after the one that compiles; compiled PyTorch keeps the size of plain PyTorch."""
        if name != "ViT-B/32":
            return min(self.batch.get(program, BATCHES[0]), BATCHES[0 if name == "ViT-L/14" else 1])
        if self.quick:
            return BATCHES[0]
        if "compile" in program:
            num = self.batch[program.replace(".compile", "")]
            run(inputs[:num])
            return num
        rates = {}
        for num in BATCHES:
            run(inputs[:num])
            rates[num] = num / min(seconds_of(lambda num=num: run(inputs[:num])) for _ in range(2))
        return max(rates, key=rates.__getitem__)

    def _print_roofs(self, name: str, backbone: Backbone, seconds: dict[str, list[float]]) -> None:
        size = backbone.config.image_size
        fn: Any = lambda images: (  # noqa: E731
            backbone.apply(backbone.variables, images).pooler_output
        )
        flops = count_flops(fn, jax.ShapeDtypeStruct((1, size, size, 3), np.uint8))
        print(f"{name}: {flops / 1e9:.2f} GFLOP an image")
        for precision in PRECISIONS:
            rate = matmul_rate(precision)
            mine = 1 / statistics.median(seconds[f"probe {precision}"])
            print(
                f"  {precision}: matrix products {rate / 1e9:,.0f} GFLOP/s, so {rate / flops:,.1f} images/s at most; "
                f"{mine:,.1f} reached ({mine * flops / rate:.0%})"
            )

    # files

    def measure_files(self) -> None:
        backbone = self.tower("ViT-B/32")
        folder, size = self.checkpoint(backbone), backbone.config.image_size
        batch_size = 16 if self.quick else None  # None: measured, as for any new cache
        for width, height, num in ((500, 375, 64 if self.quick else 384), (4000, 3000, 8 if self.quick else 48)):
            files = write_photos(self.folder / f"{width}x{height}", width, height, num)
            peers = [*self.best_peer.values()] or ["torch", "onnxruntime", "onnxruntime int8"]
            runs = {peer: run for peer in peers if (run := self.peer(peer, folder, backbone)) is not None}
            for peer, run in runs.items():
                self._embed_by_peer(run, files[:4], backbone, self.batch.get(peer, 8))  # which compiles it
            ours = {precision: make_ours(backbone, precision) for precision in PRECISIONS}
            seconds: dict[str, list[float]] = {}
            overheads: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
            for _ in range(1 if self.quick else 3):
                for precision, run in ours.items():
                    table, computed = self._embed_by_probe(folder, files[0].parent, precision, batch_size=batch_size)
                    running = (table["seconds"] - table["waited"]["compile"]) / num
                    images = random_images(computed, size)
                    run(images)
                    alone = statistics.median(seconds_of(lambda run=run, x=images: run(x)) / computed for _ in range(5))
                    seconds.setdefault(f"probe {precision}", []).append(running)
                    overheads[precision].append(running / alone - 1)
                for peer, run in runs.items():
                    started = time.perf_counter()
                    self._embed_by_peer(run, files, backbone, self.batch.get(peer, 8))
                    seconds.setdefault(peer, []).append((time.perf_counter() - started) / num)
            for program, each in seconds.items():
                precision = PEERS.get(program) or program.split()[1]
                self.add(f"files {width}x{height} to embeddings, {precision}", program, statistics.median(each))
            for precision, each in overheads.items():
                print(
                    f"files {width}x{height}, {precision}: {statistics.median(each):+.1%} over the tower alone "
                    f"(of {', '.join(f'{x:+.1%}' for x in each)})"
                )

    def _embed_by_probe(self, checkpoint: Path, images: Path, precision: str, **options: Any) -> tuple[Any, int]:
        out = self.folder / "cache"
        shutil.rmtree(out, ignore_errors=True)
        summary = embed(EmbedConfig(images=images, backbone=str(checkpoint), out=out, precision=precision, **options))
        return summary["stages"], summary["batch_size"]

    def _embed_by_peer(self, run: Run, files: list[Path], backbone: Backbone, batch: int) -> np.ndarray:
        """Batches of images that as many threads as there are cores decode ahead: what one would write by hand."""

        def load(path: Path) -> np.ndarray:
            return load_image(path.read_bytes(), backbone.preprocessing)

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            images = ahead(pool, load, files, 4 * batch)
            answers = []
            while chunk := list(itertools.islice(images, batch)):
                padded = np.stack(chunk + [chunk[-1]] * (batch - len(chunk)))
                answers.append(run(normalise(padded, backbone))[: len(chunk)])
        return np.concatenate(answers)

    # growth

    def measure_growth(self) -> None:
        folder = self.checkpoint(self.tower("ViT-B/32"))
        base = 16 if self.quick else 96
        first = None
        for times in (1, 2, 4):
            files = write_photos(self.folder / f"growth{times}", 500, 375, times * base)
            table, _ = self._embed_by_probe(folder, files[0].parent, PRECISIONS[0], batch_size=16)
            running = table["seconds"] - table["waited"]["compile"]
            first = first or running
            self.add(f"growth: {times * base} images, in all", "probe float32", running)
            print(f"growth: {times}× images, {running:.2f} s, {running / first:.2f}× the time")

    # start

    def measure_start(self) -> None:
        """A process that loads the checkpoint and embeds one batch of 32 files: from its start to its end."""
        backbone = self.tower("ViT-B/32")
        folder = self.checkpoint(backbone)
        images = write_photos(self.folder / "start", 500, 375, 32)[0].parent
        children = [f"probe {precision}" for precision in PRECISIONS] + ["torch", "torch bfloat16", "onnxruntime"]
        if self.quick:
            children = ["probe float32", "torch", "onnxruntime"]
        seconds: dict[str, list[float]] = {}
        memory: dict[str, list[float]] = {}
        for _ in range(1 if self.quick else 3):
            for program in children:
                shutil.rmtree(self.folder / "cache", ignore_errors=True)
                command = [sys.executable, "-m", "tests.benchmarks.embed", "--child", program, str(folder)]
                started = time.perf_counter()
                done = subprocess.run(
                    [*command, str(images), str(self.folder / "cache")], capture_output=True, text=True
                )
                if done.returncode:
                    self.absent[program] = done.stderr.strip().splitlines()[-1]
                    continue
                seconds.setdefault(program, []).append(time.perf_counter() - started)
                memory.setdefault(program, []).append(float(done.stdout.splitlines()[-1]))
        for program, each in seconds.items():
            precision = PEERS.get(program) or program.split()[1]
            self.add(f"start to first batch, the process, {precision}", program, statistics.median(each))
            print(f"peak memory, {program}: {statistics.median(memory[program]):,.0f} MB (start: {min(each):.1f} s)")

    # accuracy

    def measure_accuracy(self) -> None:
        real = [SHARED / "models" / "resnet50-thin"] if (SHARED / "models").is_dir() else []
        photos = sorted((SHARED / "data").glob("dogs_cats/test/*/*.jpg"))[:: 20 if self.quick else 2]
        emoji = unpack_samples(self.folder / "emoji")[:: 10 if self.quick else 2]
        large = write_photos(self.folder / "large", 4000, 3000, 4 if self.quick else 16)
        self._measure_precisions("ViT-B/32, random weights", self.tower("ViT-B/32"), photos or large)
        self._measure_precisions("probe-tiny, trained, sample images", load_backbone("probe-tiny"), emoji)
        for folder in [Path("probe-tiny"), *real]:
            backbone = load_backbone(str(folder))
            if photos:
                self._measure_precisions(f"{folder.name}, trained, photos", backbone, photos)
            self._measure_decoding(f"{folder.name}, trained", backbone, large)
            if photos and not self.quick:
                self._measure_probe(backbone)

    def _measure_precisions(self, name: str, backbone: Backbone, files: list[Path]) -> None:
        images = load(files, backbone.preprocessing)
        outputs = {precision: batched(make_ours(backbone, precision), images) for precision in precisions_of(backbone)}
        exact = outputs.pop("float32")
        for precision, rounded in outputs.items():
            cosines, worst = cosine(exact, rounded), np.abs(rounded - exact).max() / np.abs(exact).max()
            print(
                f"accuracy, {name}: {precision} to float32: cosine {cosines.min():.6f} at least, "
                f"{cosines.mean():.6f} on average, {worst:.4f} of the largest value at most; {len(images)} images"
            )

    def _measure_decoding(self, name: str, backbone: Backbone, large: list[Path]) -> None:
        exact, fast = (load(large, backbone.with_decode(rule).preprocessing) for rule in ("exact", "fast"))
        run = make_ours(backbone, "float32")
        cosines, difference = cosine(batched(run, exact), batched(run, fast)), np.abs(exact.astype(int) - fast).mean()
        print(
            f"accuracy, {name}: --decode fast on 4000x3000: cosine {cosines.min():.6f} at least, "
            f"{cosines.mean():.6f} on average; pixels differ by {difference:.3f} grey levels"
        )

    def _measure_probe(self, backbone: Backbone) -> None:
        """The linear probe's accuracy on the development photos, from embeddings of each precision."""
        name, first = Path(backbone.name).name, None
        for precision in precisions_of(backbone):
            cache, run = self.folder / f"{name}-{precision}", self.folder / f"run-{name}-{precision}"
            images = SHARED / "data" / "dogs_cats"
            embed(EmbedConfig(images=images, backbone=backbone.name, out=cache, precision=precision))
            test = fit_linear(FitLinearConfig(cache=cache, out=run))["splits"]["test"]
            low, high = test["accuracy_interval_95"]
            first = first or test["accuracy"]
            print(
                f"accuracy, linear probe on {name}, {precision}: {test['accuracy']:.3f} of {test['n']} test photos "
                f"({low:.3f} to {high:.3f}), {test['accuracy'] - first:+.3f} from float32"
            )


def precisions_of(backbone: Backbone) -> tuple[str, ...]:
    return PRECISIONS if isinstance(backbone.config, ViTConfig) else PRECISIONS[:2]  # int8 has no convolutions


def load(files: list[Path], rules: Preprocessing) -> np.ndarray:
    return np.stack([load_image(path.read_bytes(), rules) for path in files])


def unpack_samples(folder: Path) -> list[Path]:
    """The package's sample images that are for testing."""
    with zipfile.ZipFile(samples()) as archive:
        archive.extractall(folder)
    return sorted(folder.glob("test/*/*.png"))


def batched(run: Run, images: np.ndarray, size: int = 16) -> np.ndarray:
    padded = np.concatenate([images, images[: -len(images) % size]]) if len(images) >= size else images
    return np.concatenate([run(padded[start : start + size]) for start in range(0, len(padded), size)])[: len(images)]


def ahead(pool: Any, load: Callable[[Path], np.ndarray], files: list[Path], num: int) -> Iterator[np.ndarray]:
    pending: list[Any] = []
    for path in files:
        pending.append(pool.submit(load, path))
        if len(pending) > num:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()


def write_photos(root: Path, width: int, height: int, num: int) -> list[Path]:
    """JPEGs of quality 90 without classes: the development photos, where they are, with grain; else clouds."""
    sources = sorted((SHARED / "data").glob("dogs_cats/test/*/*.jpg"))
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    distinct = []
    for index in range(min(num, 48 if width < 1000 else 8)):
        if sources:
            picture = Image.open(sources[index % len(sources)]).convert("RGB")
        else:
            picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 5, (height, width, 1)).astype(np.int16)
        distinct.append(Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)))
    files = []
    for index in range(num):
        files.append(root / f"{index:05d}.jpg")
        distinct[index % len(distinct)].save(files[-1], quality=90, comment=str(index).encode())  # no two alike
    return files


def with_ratios(rows: list[Row]) -> list[Row]:
    best: dict[str, float] = {}
    for row in rows:
        if not row.program.startswith("probe"):
            best[row.case] = min(row.median_s, best.get(row.case, row.median_s))
    return [
        dataclasses.replace(row, ratio=best[row.case] / row.median_s)
        if row.program.startswith("probe") and row.case in best
        else row
        for row in rows
    ]


def run_child(program: str, checkpoint: Path, images: Path, out: Path) -> None:
    """One batch of 32 files by one program, in a process of its own; prints the most memory it took, in MB."""
    bench = Bench(out.parent, quick=False)
    files = sorted(images.rglob("*.jpg"))
    if program.startswith("probe"):
        bench._embed_by_probe(checkpoint, images, program.split()[1], batch_size=32)
    else:
        backbone = load_backbone(checkpoint)
        bench._embed_by_peer(make_peer(program, checkpoint, backbone), files, backbone, 32)
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under 2 minutes")
    parser.add_argument("--json", type=Path, help="write the table here")
    parts = ("tower", "files", "growth", "start", "accuracy")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="some parts only")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child[0], *map(Path, args.child[1:]))
        return
    started = time.perf_counter()
    print(
        f"Python {platform.python_version()}, jax {jax.__version__}, {jax.device_count()} × "
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores; ours: {', '.join(PRECISIONS)}, {THREADS} threads"
    )
    print(f"peers: {describe_peers()}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.quick)
        steps = {
            "tower": bench.measure_towers,
            "files": bench.measure_files,
            "growth": bench.measure_growth,
            "start": bench.measure_start,
            "accuracy": bench.measure_accuracy,
        }
        for part in parts:
            if part in args.only:
                steps[part]()
    rows = with_ratios(bench.rows)
    for row in rows:
        ratio = f"  {row.ratio:.2f} × the best peer" if row.ratio is not None else ""
        print(f"{row.case:<46}{row.program:<24}{row.median_s * 1e3:11.2f} ms{1 / row.median_s:10.1f} /s{ratio}")
    for program, why in bench.absent.items():
        print(f"left out: {program}: {why}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
