"""`probe doctor`: what this machine can do, what bounds an embedding run on it, and what would make it faster.

Everything is measured here and now, in some seconds, on the devices that jax finds. Nothing is written.
"""

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import features

from probe.backbones import Backbone, Precision, ViTConfig, int8_precision, load_backbone
from probe.compiled import why_not_kept
from probe.config import DoctorConfig
from probe.embedding import make_run_batch
from probe.errors import InputError
from probe.estimate import spread
from probe.images import ImageError, Preprocessing, load_images
from probe.machine import PRECISIONS, count_flops, matmul_rate
from probe.sources import open_source

_PACKAGES = ("probe-jax", "jax", "jaxlib", "flax", "numpy", "pillow", "h5py")
_DECODED = 192  # images, of which the first are not counted: workers start meanwhile
_STARTING = 64
_BATCH = 8
_COMPARED = 16  # images, at most, whose embeddings are compared
_ACCELERATORS = {  # what a driver leaves -> what jax needs
    "/dev/nvidia0": "pip install -U 'jax[cuda13]'",
    "/dev/kfd": "pip install -U 'jax[rocm7-local]'",
    "/dev/accel0": "pip install -U 'jax[tpu]'",
}
_SINGLE_THREADED = ("xla_cpu_multi_thread_eigen=false", "intra_op_parallelism_threads=1")


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """How fast sample images are read and decoded by as many workers as there are cores."""

    num_workers: int
    images_per_second: float
    read_ms: float  # of one image, by one worker
    decode_ms: float
    what: str


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Measures this machine.

    Returns: versions, devices, cores, operations_per_second by precision, decoding, warnings, and for a backbone its
      flops_per_image, images_per_second (the bound of each precision, and "decoding") and the differences between
      precisions.
    Raises: InputError if the backbone or the images cannot be used.
    """
    backbone = load_backbone(config.backbone) if config.backbone else None
    paths, what = _samples(config)
    rates = {precision: matmul_rate(precision) for precision in _precisions()}
    result: dict[str, Any] = {
        "versions": _versions(),
        "devices": [
            {"kind": device.device_kind, "platform": device.platform, "memory_bytes": _memory(device)}
            for device in jax.devices()
        ],
        "num_cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "operations_per_second": rates,
    }
    decoding, pixels = _measure_decoding(paths, what, backbone)
    result["decoding"] = dataclasses.asdict(decoding)
    if backbone is not None:
        run_batch = make_run_batch(backbone)
        images = jax.ShapeDtypeStruct((_BATCH, *backbone.preprocessing.image_size, 3), np.uint8)
        flops = count_flops(run_batch, images) / _BATCH
        num_devices = len(jax.local_devices())
        result["backbone"] = {
            "name": backbone.name,
            "flops_per_image": flops,
            "images_per_second": {name: rates[name] * num_devices / flops for name in _precisions(backbone)},
            "differences": _differences(backbone, pixels[:_COMPARED]),
        }
    result["warnings"] = _warnings(result, decoding)
    return result


def describe(result: dict[str, Any]) -> str:
    """The measurements as text for people."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [versions]
    for device in result["devices"]:
        memory = f", {device['memory_bytes'] / 2**30:.1f} GiB" if device["memory_bytes"] else ""
        lines.append(f"device: {device['kind']} ({device['platform']}{memory})")
    lines.append(f"cores: {result['usable_cores']} usable of {result['num_cores']}")
    for precision, rate in result["operations_per_second"].items():
        lines.append(f"matrix products, {precision}: {rate / 1e9:,.0f} GFLOP/s")
    decoding = result["decoding"]
    lines.append(
        f"decoding: {decoding['images_per_second']:,.0f} images/s with {decoding['num_workers']} workers "
        f"({decoding['read_ms']:.2f} ms to read and {decoding['decode_ms']:.2f} ms to decode one; {decoding['what']})"
    )
    if backbone := result.get("backbone"):
        lines.append(f"{backbone['name']}: {backbone['flops_per_image'] / 1e9:.2f} GFLOP an image, so at most")
        for precision, bound in backbone["images_per_second"].items():
            slower = " (decoding is slower)" if decoding["images_per_second"] < bound else ""
            lines.append(f"  {precision}: {bound:,.1f} images/s{slower}")
        for precision, difference in backbone["differences"].items():
            lines.append(
                f"{precision} beside float32 on {difference['num_images']} images: cosine {difference['cosine']:.6f} "
                f"at least, differing by {difference['max_abs']:.2g} at most"
            )
    else:
        lines.append("with --backbone B: how many images a second that allows, and what each precision changes")
    lines += [f"warning: {warning}" for warning in result["warnings"]] or ["nothing here will be slow"]
    return "\n".join(lines)


def _precisions(backbone: Backbone | None = None) -> tuple[str, ...]:
    """Those that the device has, and the backbone: tf32 is there on a GPU alone, int8 for towers of blocks."""
    found = PRECISIONS if jax.devices()[0].platform != "gpu" else (PRECISIONS[0], "tf32", *PRECISIONS[1:])
    has_int8 = backbone is None or isinstance(backbone.config, ViTConfig)
    return found if has_int8 else tuple(name for name in found if name != "int8")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return versions | {"libjpeg": str(features.version("libjpeg_turbo") or features.version("jpg"))}


def _memory(device: jax.Device) -> int | None:
    statistics = device.memory_stats() if device.platform != "cpu" else None
    return int(statistics["bytes_limit"]) if statistics and "bytes_limit" in statistics else None


def _usable_cores() -> int:
    """Cores that this process may use: by its affinity and by the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _samples(config: DoctorConfig) -> tuple[list[Path | bytes], str]:
    """Images to measure with: the user's, else the two photos that scikit-learn brings."""
    if config.images is None:
        package = importlib.util.find_spec("sklearn.datasets")
        assert package is not None
        assert package.origin is not None
        photos = sorted((Path(package.origin).parent / "images").glob("*.jpg"))
        return list(photos), "two photos of 640 × 427; --images has others measured"
    source = open_source(config.images, labelled=False)
    examples = spread(source.examples, _DECODED)
    contents = [content for _, content in source.iter_bytes(examples) if not isinstance(content, ImageError)]
    if not contents:
        raise InputError(f"{config.images}: none of its images can be read")
    return contents, f"{len(contents)} images of {config.images}"


def _measure_decoding(
    contents: list[Path | bytes], what: str, backbone: Backbone | None
) -> tuple[_Decoding, np.ndarray]:
    """Returns: the rate, and [N, H, W, 3] uint8, the images that could be decoded, each once.

    Raises: InputError if none could be.
    """
    preprocessing = (
        backbone.preprocessing
        if backbone
        else Preprocessing.from_config({"image_processor_type": "CLIPImageProcessor"})
    )
    num_workers = _usable_cores()
    items = enumerate(itertools.islice(itertools.cycle(contents), _DECODED))
    pixels: dict[int, np.ndarray] = {}
    reading = decoding = 0.0
    started, failure = time.perf_counter(), None
    for image in load_images(items, preprocessing, num_workers=num_workers, ahead=_STARTING // 2):
        if image.example == _STARTING:
            started = time.perf_counter()
        if image.example > _STARTING:
            reading, decoding = reading + image.read_s, decoding + image.decode_s
        if image.pixels is not None and image.example < len(contents):
            pixels[image.example] = image.pixels
        failure = failure or image.failure
    seconds, counted = time.perf_counter() - started, _DECODED - _STARTING - 1
    if not pixels:
        raise InputError(f"none of the sample images can be decoded: {failure}")
    measured = _Decoding(num_workers, counted / seconds, 1e3 * reading / counted, 1e3 * decoding / counted, what)
    return measured, np.stack([*pixels.values()])


def _differences(backbone: Backbone, pixels: np.ndarray) -> dict[str, dict[str, float]]:
    """How far the embeddings of each other precision are from those of float32.

    Args:
      pixels: [N, H, W, 3] uint8.
    """
    precisions = [
        int8_precision(backbone) if name == "int8" else Precision(name)  # type: ignore[arg-type]
        for name in _precisions(backbone)
    ]
    num_devices = len(jax.local_devices())
    images = np.concatenate([pixels, np.repeat(pixels[:1], -len(pixels) % num_devices, axis=0)])
    embeddings = {
        precision.name: np.asarray(make_run_batch(backbone, precision)(images)["pooler"])[: len(pixels)]
        for precision in precisions
    }
    exact = embeddings.pop("float32")
    found: dict[str, dict[str, float]] = {}
    for name, rounded in embeddings.items():
        norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1)
        found[name] = {
            "num_images": len(pixels),
            "max_abs": float(np.abs(rounded - exact).max()),
            "cosine": float(((exact * rounded).sum(axis=1) / np.maximum(norms, 1e-30)).min()),
        }
    return found


def _warnings(result: dict[str, Any], decoding: _Decoding) -> list[str]:
    """What will be slow, and what can be done about it."""
    found = []
    platforms = {device["platform"] for device in result["devices"]}
    rates = result["operations_per_second"]
    if platforms == {"cpu"}:
        for trace, remedy in _ACCELERATORS.items():
            if Path(trace).exists():
                chosen = os.environ.get("JAX_PLATFORMS")
                because = f"JAX_PLATFORMS is {chosen!r}: unset it" if chosen else f"install its support: {remedy}"
                found.append(f"{trace} says that there is an accelerator, but jax does not use it; {because}")
        jax_version = tuple(int(part) for part in jax.__version__.split(".")[:2])
        if rates["int8"] < 1.2 * rates["bfloat16"] and jax_version < (0, 12):
            found.append(
                f"int8 is no faster than bfloat16 with jax {jax.__version__}: jax 0.12, which needs Python 3.12, has "
                "fast int8 products on CPUs that can do them"
            )
        if rates["bfloat16"] < 1.2 * rates["float32"]:
            found.append("bfloat16 is no faster than float32 on this CPU, which has no instructions for it")
        if any(flag in os.environ.get("XLA_FLAGS", "") for flag in _SINGLE_THREADED):
            found.append("XLA_FLAGS keeps jax to one thread: unset it")
    if result["usable_cores"] < (result["num_cores"] or 1):
        found.append(
            f"only {result['usable_cores']} of {result['num_cores']} cores may be used (taskset, or the quota of a "
            "container): ask for more"
        )
    if decoding.read_ms > max(1.0, decoding.decode_ms):
        found.append(
            f"reading an image takes {decoding.read_ms:.1f} ms, longer than decoding it: copy the images to a local "
            "disk, pack them into tar shards, or give more --num-workers"
        )
    if backbone := result.get("backbone"):
        fastest = max(backbone["images_per_second"].values())
        if decoding.images_per_second < 1.1 * fastest:
            found.append(
                f"decoding reaches {decoding.images_per_second:,.0f} images/s, and the device could take "
                f"{fastest:,.0f}: more cores, or --decode fast for large JPEGs, would help"
            )
    if (why := why_not_kept()) is not None:
        found.append(f"compiled programs are not kept, so that every run compiles anew: {why}")
    return found
