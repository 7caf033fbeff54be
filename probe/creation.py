"""What a new cache leaves open and a measurement settles: the precision, and how many images make a batch.

Both change bits, so they are chosen once, by whoever creates the cache, written into it, and read by all who continue
it. The measurement times one of each kind of stage of the tower, not the whole, and takes a few seconds at most.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from probe.backbones import Backbone, Precision, int8_precision
from probe.backbones.calibration import sample_pictures
from probe.backbones.embedding import make_stages
from probe.backbones.tower import Stage
from probe.backbones.vit import ViTConfig
from probe.devices import by_rows, check_divides, data_mesh, whole
from probe.errors import ConfigError
from probe.machine import memory_bytes

DEFAULT_BATCH_SIZE = 32
LEAST_COSINE = 0.9999  # of bfloat16 to float32, below which `auto` does not take it
NUM_COMPARED = 4  # pictures whose embeddings are compared
_FASTER = 1.05  # times as fast as float32 that bfloat16 must be, to be worth its roundings
_NEAR_BEST = 0.95  # of the best rate is as good: the smaller batch waits and pads less
_IDLE_SECONDS = 5e-4  # per image: what is faster than that waits for images to be decoded, and gains nothing
_PATIENCE_SECONDS = 5.0  # after which no further batch size is tried
_BATCHES_CPU, _BATCHES = (8, 16, 32), (32, 64, 128, 256, 512)
_MEMORY_SHARE = 0.5  # of a device's memory that a batch may take


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen, and why, in words for a person; empty where nothing was left open."""

    precision: Precision
    batch_size: int
    why: str = ""


def choose(
    backbone: Backbone,
    precision: str,
    batch_size: int | None,
    *,
    pictures: np.ndarray | None = None,
    measure: bool = True,
) -> Choice:
    """Settles what the user left open: `precision` "auto", and a batch size of None.

    auto is bfloat16 if that is faster here and its embeddings of `pictures` have a cosine of at least LEAST_COSINE to
    those of float32, else float32; never int8.

    Args:
      pictures: some of those to embed, [n, H, W, 3] uint8; synthetic ones if there are none.
      measure: else "auto" is float32 and the batch size the default one: for processes that must agree without
        talking to each other.
    Raises: ConfigError for a precision that device or backbone do not have, or a batch that the devices cannot divide.
    """
    mesh_size = len(jax.local_devices())
    if batch_size is not None:
        check_divides(batch_size, mesh_size, "--batch-size")
    default = DEFAULT_BATCH_SIZE * mesh_size // math.gcd(DEFAULT_BATCH_SIZE, mesh_size)
    if precision == "tf32" and jax.devices()[0].platform != "gpu":
        raise ConfigError(f"--precision tf32: only GPUs have it, and this is {jax.devices()[0].device_kind}")
    notes = []
    candidates: list[Precision] = []
    if precision == "int8" and isinstance(backbone.config, ViTConfig):
        candidates = [int8_precision(backbone)]
        if candidates[0].in_bfloat16:
            notes.append(f"int8, with {', '.join(candidates[0].in_bfloat16)} left in bfloat16")
    elif precision == "int8":
        notes.append("int8 has no convolutions")
        candidates = [Precision("float32"), Precision("bfloat16")]
    elif precision == "auto":
        candidates = [Precision("float32"), Precision("bfloat16")]
    else:
        candidates = [Precision(precision)]  # type: ignore[arg-type]  # the config has checked it
    if not measure:
        if len(candidates) > 1 or batch_size is None:
            notes.append("not measured, since several processes create this cache and must agree")
        return Choice(candidates[0], batch_size or default, "; ".join(notes))
    sizes = [batch_size] if batch_size is not None else _sizes(mesh_size)
    if len(candidates) > 1:
        trial = batch_size or sizes[len(sizes) // 2]
        chosen, note = _faster_of(
            backbone, candidates, trial, pictures=_or_synthetic(pictures, backbone) if precision == "auto" else None
        )
        notes.append(note)
    else:
        chosen = candidates[0]
    if len(sizes) > 1:
        rates = _rates(backbone, chosen, sizes)
        best = max(rates.values())
        batch_size = min(size for size, rate in rates.items() if rate >= _NEAR_BEST * best)
        notes.append(f"batches of {batch_size}, {rates[batch_size]:,.0f} images/s ({_spell(rates)})")
    return Choice(chosen, sizes[0] if batch_size is None else batch_size, "; ".join(notes))


def _sizes(mesh_size: int) -> list[int]:
    sizes = _BATCHES_CPU if jax.devices()[0].platform == "cpu" else _BATCHES
    return sorted({math.ceil(size / mesh_size) * mesh_size for size in sizes})


def _faster_of(
    backbone: Backbone, candidates: Sequence[Precision], batch_size: int, *, pictures: np.ndarray | None
) -> tuple[Precision, str]:
    """Float32 or bfloat16, and why; the embeddings of `pictures` must be near, where there are any."""
    exact, rounded = candidates
    slow = _seconds(make_stages(backbone, backbone.views, exact), backbone, batch_size)
    if slow / batch_size < _IDLE_SECONDS:
        return exact, f"float32, which is {batch_size / slow:,.0f} images/s here: more than are decoded meanwhile"
    fast = _seconds(make_stages(backbone, backbone.views, rounded), backbone, batch_size)
    if slow < _FASTER * fast:
        return exact, f"float32: bfloat16 is {slow / fast:.2f} times as fast here"
    cosine = 1.0 if pictures is None else least_cosine(backbone, exact, rounded, pictures)
    if not cosine >= LEAST_COSINE:  # NaN is not near, either
        return exact, f"float32: bfloat16 is {slow / fast:.2f} times as fast, but its cosine to float32 is {cosine:.6f}"
    told = "" if pictures is None else f", cosine to it at least {cosine:.6f} on {len(pictures)} images"
    return rounded, f"bfloat16: {slow / fast:.2f} times as fast as float32 here{told}"


def _rates(backbone: Backbone, precision: Precision, sizes: list[int]) -> dict[int, float]:
    """Images/s of each batch size, up to the first that takes too much memory or comes too late."""
    stages = make_stages(backbone, backbone.views, precision)
    rates: dict[int, float] = {}
    started = time.monotonic()
    for size in sizes:
        if rates and time.monotonic() - started > _PATIENCE_SECONDS:
            break
        try:
            rates[size] = size / _seconds(stages, backbone, size)
        except _TooLargeError:
            break
        except jax.errors.JaxRuntimeError as err:
            if "RESOURCE_EXHAUSTED" not in str(err):
                raise
            break
        if rates[size] > 1 / _IDLE_SECONDS and DEFAULT_BATCH_SIZE in sizes:
            return {DEFAULT_BATCH_SIZE: rates[size]}
    return rates or {len(jax.local_devices()): 1.0}  # even the smallest is too large: one image a device


class _TooLargeError(Exception):
    """A batch that would take more than its share of the device's memory."""


def _seconds(stages: list[Stage], backbone: Backbone, batch_size: int) -> float:
    """What a batch takes: each kind of stage is timed once, and counted as often as the tower has it."""
    mesh = data_mesh(jax.local_devices())
    hidden: Any = np.zeros((batch_size, *backbone.preprocessing.image_size, 3), np.uint8)
    hidden = jax.device_put(hidden, by_rows(mesh))
    known: dict[Any, tuple[float, Any]] = {}
    total = 0.0
    for stage in stages:
        shapes = jax.tree.map(lambda leaf: (np.shape(leaf), str(leaf.dtype)), (stage.weights, hidden))
        kind = (stage.apply, str(shapes))
        if kind not in known:
            weights = jax.device_put(stage.weights, whole(mesh))
            compiled = jax.jit(stage.apply).lower(weights, hidden).compile()
            _check_memory(compiled, stages)
            output = jax.block_until_ready(compiled(weights, hidden))
            times = []
            for _ in range(2):
                started = time.perf_counter()
                jax.block_until_ready(compiled(weights, hidden))
                times.append(time.perf_counter() - started)
            known[kind] = min(times), output
        seconds, hidden = known[kind]
        total += seconds
    return total


def _check_memory(compiled: Any, stages: list[Stage]) -> None:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return
    needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    needed += sum(leaf.nbytes for stage in stages for leaf in jax.tree.leaves(stage.weights))
    statistics = jax.devices()[0].memory_stats() or {}
    memory = statistics.get("bytes_limit") or memory_bytes()
    if needed > _MEMORY_SHARE * memory:
        raise _TooLargeError


def least_cosine(backbone: Backbone, exact: Precision, rounded: Precision, pictures: np.ndarray) -> float:
    """The smallest cosine between the embeddings of two precisions, over pictures and views; NaN where one has none."""
    outputs = []
    for precision in (exact, rounded):
        hidden: Any = pictures
        for stage in make_stages(backbone, backbone.views, precision):
            hidden = jax.jit(stage.apply)(stage.weights, hidden)
        outputs.append({view: np.asarray(rows, np.float64) for view, rows in hidden.items()})
    ours, theirs = outputs
    with np.errstate(invalid="ignore"):  # what is not finite has no cosine: NaN, which np.min hands on
        cosines = [
            (ours[view] * theirs[view]).sum(axis=1)
            / np.linalg.norm(ours[view], axis=1)
            / np.linalg.norm(theirs[view], axis=1)
            for view in ours
        ]
    return float(np.min(cosines))


def _or_synthetic(pictures: np.ndarray | None, backbone: Backbone) -> np.ndarray:
    if pictures is not None and len(pictures):
        return pictures
    return sample_pictures(NUM_COMPARED, backbone.preprocessing.image_size)


def _spell(rates: dict[int, float]) -> str:
    return ", ".join(f"{size}: {rate:,.0f}" for size, rate in rates.items())
