"""`probe embed`: runs the backbone once over every image and caches the embeddings.

A plan lists the images; what no earlier run knows is cut into slices, each of which becomes one sealed shard (see
`probe.share`). A run that was killed continues with the first slice that is not sealed, and makes the bytes that it
would have made.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from probe import bundle, interrupt
from probe.backbones import Backbone, Precision, ViTConfig, load_backbone
from probe.cache import (
    CacheWriter,
    Inputs,
    Manifest,
    Plan,
    check_same,
    load_manifest,
    make_inputs,
    make_manifest,
    newest_complete,
)
from probe.config import EmbedConfig
from probe.creation import NUM_COMPARED, Choice, choose
from probe.embedding import Device, RunBatch, memory_explained
from probe.engines.worker import describe_workers
from probe.errors import ConfigError, InputError
from probe.estimate import describe_estimate, estimate, spread
from probe.images import ImageError, load_image, read_image_file
from probe.machine import count_flops, matmul_rate
from probe.notebook import ROWS_SHOWN, facts, looks, table
from probe.progress import heeds_quiet, say
from probe.share import Share
from probe.sources import Columns, Example, Source, check_labels, display_name, list_names, open_source
from probe.sources.origin import describe_origin
from probe.stages import StageTimes, describe_stages
from probe.storage import is_remote, require_writable

if TYPE_CHECKING:
    from probe.engines.ray import RayWorkers

_SHARD_ROWS_CPU, _SHARD_ROWS = 1024, 16384  # at most: of 768 float32, 3 MB and 50 MB
_SHARD_FLOPS_CPU = 2e12  # of a shard, at which a kill or Ctrl-C costs some ten seconds of two cores' work
_FAILURES_SHOWN, _CLASSES_SHOWN = 20, 10
_LONG_ENOUGH = 5.0  # seconds of running after which it is worth half a second to measure the device's rate
_PROGRAM = 2  # raise it when the towers or the decoder give other numbers for the same weights and images


def _look(summary: dict[str, Any]) -> str:
    """The summary in a notebook."""
    if summary.get("dry_run"):
        return facts(
            "what it would be", {name: value for name, value in summary.items() if isinstance(value, int | str)}
        )
    names = ("cache", "num_images", "num_embedded", "num_failed", "num_computed", "complete")
    shown = facts("cache", {name.removeprefix("num_").replace("_", " "): summary[name] for name in names})
    counts = [(split or "no split", name, num) for split, by in summary["counts"].items() for name, num in by.items()]
    return shown + table("labels", ("split", "class", "images"), counts[:ROWS_SHOWN])


@looks(_look)
@heeds_quiet
def embed(config: EmbedConfig) -> dict[str, Any]:
    """Embeds every image of `config.images` that the cache in `config.out` does not know yet.

    Returns: what there is now and what was done: num_images, num_embedded, num_failed, num_computed,
      complete, …
    Raises: InputError where there is nothing to embed, nothing can be read, or, with on_error="fail", at the
      first unreadable image; FailedImagesError above max_failures; MismatchError if the cache was made in
      another way; StorageError, CorruptError, OutOfMemoryError, Interrupted.
    """
    started = time.monotonic()
    source = _opener(config, config.images)()
    if all(example.labels for example in source.examples):
        check_labels(source)
    _check_out(config)
    examples = spread(source.examples, config.limit)
    inputs = _inputs(source, examples)
    with _workers(config) as workers:
        backbone = load_backbone(config.backbone).with_decode(_decode_rule(config))
        if workers:
            workers.start(f"{backbone.name}@{backbone.revision}" if backbone.revision else backbone.name)
        manifest = _settle(config, backbone, workers.device() if workers else Device.here(), source, examples)
        if config.dry_run:
            with memory_explained(manifest.identity["batch_size"]):
                return estimate(config, manifest, backbone, source, examples, inputs)
        num_dropped = _num_dropped(config, inputs)
        writer = CacheWriter(config.out, manifest)
        plan = writer.plan(inputs, rehash=config.verify_content, retry_failed=config.retry_failed)
        share = Share(config, writer, plan, backbone, source, examples, _opener(config, config.images.absolute()))
        try:
            with memory_explained(manifest.identity["batch_size"]):
                share.run_on(workers) if workers else share.run()
        except interrupt.Interrupted as stop:
            hint = f"{len(writer.sealed(plan))} of {writer.num_shards(plan)} shards are sealed; run it again to go on"
            raise interrupt.Interrupted(stop.signum, hint) from None
    done = plan if plan.complete else writer.complete(plan)
    summary = _summarize(config, writer, done or plan, share.num_computed, time.monotonic() - started)
    summary["num_dropped"] = num_dropped
    summary["left_out"] = source.ignored
    summary["workers"] = workers.summary() if workers else []
    if share.stages is not None and share.run_batch is not None and share.num_computed:
        summary["stages"] = _describe_use(share.stages, share.run_batch, backbone, manifest)
        say(describe_stages(summary["stages"]))
    if summary["complete"] and summary["num_embedded"] == 0:
        raise InputError(
            f"{config.images}: none of {summary['num_images']:,} images could be read: "
            + "; ".join(map(_spell_failure, summary["failures"][:3]))
        )
    return summary


def describe(summary: dict[str, Any]) -> str:
    """The summary as text for people."""
    if summary.get("dry_run"):
        return describe_estimate(summary)
    num_failed = summary["num_failed"]
    lines = []
    if summary["class_names"]:
        names = [display_name(name) for name in summary["class_names"]]
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        lines.append(f"classes ({len(names)}): {shown}")
    lines += _describe_counts(summary["counts"])
    if summary["left_out"]:
        left_out = ", ".join(f"{num:,} {kind or 'without extension'}" for kind, num in summary["left_out"].items())
        lines.append(f"left out: {left_out}")
    if summary["failures"]:
        lines += [f"failed: {_spell_failure(failure)}" for failure in summary["failures"][:_FAILURES_SHOWN]]
        if num_failed > _FAILURES_SHOWN:
            lines.append(f"failed: {num_failed - _FAILURES_SHOWN:,} more, see {Path(summary['cache'], 'failed')}")
    if summary["num_dropped"]:
        lines.append(
            f"note: {summary['num_dropped']:,} images of the previous revision are not among these any more; their "
            "embeddings are kept until `probe cache prune`"
        )
    if not summary["complete"]:
        lines.append(
            f"{summary['num_pending']:,} images are left to other processes; the one that ends last completes the cache"
        )
    rate = f", {summary['images_per_second']:.1f} images/s" if summary["num_computed"] else ""
    lines += describe_workers(summary["workers"])
    lines.append(
        f"{summary['cache']}: {summary['num_embedded']:,} of {summary['num_images']:,} images have embeddings "
        f"({summary['num_computed']:,} computed now in {summary['seconds']:.1f} s{rate}), {num_failed:,} failed"
    )
    return "\n".join(lines)


def _describe_use(stages: StageTimes, run_batch: RunBatch, backbone: Backbone, manifest: Manifest) -> dict[str, Any]:
    """The stage table and, after runs that were long enough for it to mean something, the use of the device."""
    table = stages.to_json()
    if stages.wall_s - stages.compile_s >= _LONG_ENOUGH:
        identity = manifest.identity
        precision = identity["precision"]["name"]
        images = jax.ShapeDtypeStruct((identity["batch_size"], *backbone.preprocessing.image_size, 3), np.uint8)
        flops = count_flops(run_batch, images)
        flops_per_image, rate = flops / identity["batch_size"], matmul_rate(precision) * identity["num_devices"]
        table |= {
            "flops_per_image": flops_per_image,
            "flops_per_second": rate,
            "precision": precision,
            "utilisation": stages.utilisation(flops_per_image, rate),
        }
    return table


def _opener(config: EmbedConfig, images: Path) -> Callable[[], Source]:
    """What opens the images, here or on another host."""
    return functools.partial(open_source, images, columns=_columns(config), image_root=config.image_root)


def _workers(config: EmbedConfig) -> "contextlib.AbstractContextManager[RayWorkers | None]":
    """The workers of another engine; None where this process is the worker."""
    if config.engine == "local":
        return contextlib.nullcontext()
    from probe.engines.ray import RayWorkers

    return RayWorkers(
        address=config.ray_address,
        num_workers=config.workers,
        gpus_per_worker=config.gpus_per_worker,
        num_decoders=config.decode_actors,
    )


def _decode_rule(config: EmbedConfig) -> Literal["exact", "fast"]:
    """How JPEGs are decoded: what the user says, else what an existing cache says, else exactly."""
    found = load_manifest(config.out).names if (config.out / "cache.json").exists() else {}
    rule: Literal["exact", "fast"] = found.get("preprocessor_config", {}).get("decode", "exact")
    return config.decode or rule


def _settle(
    config: EmbedConfig, backbone: Backbone, device: Device, source: Source, examples: list[Example]
) -> Manifest:
    """How embeddings are made: what the cache says, if there is one, where the user leaves it open.

    Raises: MismatchError listing every field in which an existing cache differs.
    """
    found = load_manifest(config.out) if (config.out / "cache.json").exists() else None
    fixed = found.identity if found else {}
    chosen = _choose(config, backbone, fixed, source, examples)
    batch_size = chosen.batch_size
    shard_rows = config.shard_rows or (found.shard_rows if found else _default_shard_rows(backbone, device))
    if found is None or config.shard_rows is not None:
        shard_rows = math.ceil(shard_rows / batch_size) * batch_size  # only the last batch of all is padded
    wanted = make_manifest(
        {
            "backbone_config": {"tower": type(backbone.config).__name__, **dataclasses.asdict(backbone.config)},
            "backbone_fingerprint": backbone.fingerprint,
            "pooling": "pooler_output",
            "preprocessing": backbone.preprocessing.rules(),
            "views": {view: backbone.view_width(view) for view in backbone.views},
            "precision": chosen.precision.to_json(),
            "stored_dtype": config.dtype or fixed.get("stored_dtype", "float32"),
            "batch_size": batch_size,
            "device_kind": device.kind,
            "num_devices": device.num,
            "program": _PROGRAM,
        },
        {
            "backbone": backbone.name,
            "backbone_revision": backbone.revision,
            "preprocessor_config": backbone.preprocessing.to_config(),
            "source": describe_origin(config.images, _columns(config), config.image_root),
        },
        shard_rows,
    )
    if found is not None:
        check_same(found, wanted, config.out)
    return wanted


def _default_shard_rows(backbone: Backbone, device: Device) -> int:
    """Images of a shard, which is what a kill can cost: the same on every machine of a kind."""
    if device.platform != "cpu":
        return _SHARD_ROWS
    image = jax.ShapeDtypeStruct((1, *backbone.preprocessing.image_size, 3), np.uint8)
    flops = count_flops(functools.partial(backbone.apply, backbone.variables), image)
    return max(1, min(_SHARD_ROWS_CPU, int(_SHARD_FLOPS_CPU / flops)))


def _choose(
    config: EmbedConfig, backbone: Backbone, fixed: dict[str, Any], source: Source, examples: list[Example]
) -> Choice:
    """Precision and batch size: as given, else as an existing cache says, else as they are best here."""
    if not fixed:
        measure = config.num_shards == 1 and config.engine == "local"
        precision = config.precision or "auto"
        pictures = _some_pictures(config, source, examples, backbone) if measure and precision == "auto" else None
        started = time.monotonic()
        chosen = choose(backbone, precision, config.batch_size, pictures=pictures, measure=measure)
        if chosen.why:
            took = f"; measured in {time.monotonic() - started:.1f} s" if measure else ""
            say(f"chosen for {config.out}: {chosen.why}{took}")
        return chosen
    batch_size = config.batch_size or fixed["batch_size"]
    recorded = Precision.from_json(fixed.get("precision"))
    if config.precision is None or config.precision == "auto" or config.precision == recorded.name:
        return Choice(recorded, batch_size)
    if config.precision == "int8" and not isinstance(backbone.config, ViTConfig):
        return Choice(recorded, batch_size)  # what `choose` took in its place
    return Choice(Precision(config.precision), batch_size)


def _some_pictures(
    config: EmbedConfig, source: Source, examples: list[Example], backbone: Backbone
) -> np.ndarray | None:
    """A few of the images that can be read, [n, H, W, 3] uint8."""
    pictures: list[np.ndarray] = []
    for _, content in source.iter_bytes(spread(examples, 2 * NUM_COMPARED)):
        with contextlib.suppress(ImageError):
            if not isinstance(content, ImageError) and len(pictures) < NUM_COMPARED:
                data = content if isinstance(content, bytes) else read_image_file(content)[0]
                pictures.append(load_image(data, backbone.preprocessing, max_pixels=config.max_pixels))
    return np.stack(pictures) if pictures else None


def _inputs(source: Source, examples: list[Example]) -> Inputs:
    return make_inputs(
        (example.name for example in examples),
        labels=(example.labels for example in examples),
        splits=(example.split for example in examples),
        groups=(example.group for example in examples),
        sizes=(example.size for example in examples),
        mtimes_ns=(example.mtime_ns for example in examples),
        class_names=source.class_names,
        multi_label=source.multi_label,
    )


def _columns(config: EmbedConfig) -> Columns:
    return Columns(
        path=config.path_column, labels=config.label_column, split=config.split_column, group=config.group_column
    )


def _num_dropped(config: EmbedConfig, inputs: Inputs) -> int:
    """How many images of the newest revision are not among `inputs`.

    Raises: ConfigError if that is because of --limit: to try something out must not narrow a cache in use.
    """
    before = newest_complete(config.out)
    if before is None or before.inputs_digest == inputs.digest():
        return 0
    num_dropped = len(set(before.inputs.names).difference(inputs.names))
    if num_dropped and config.limit is not None:
        raise ConfigError(
            f"--limit {config.limit} would narrow {config.out}, which has {len(before.inputs):,} images: "
            "choose another --out"
        )
    return num_dropped


def _check_out(config: EmbedConfig) -> None:
    """Raises, before anything is loaded: StorageError if nothing could be written; InputError for a folder that is no
    place for a cache."""
    require_writable(config.out)
    if is_remote(config.out) or not config.out.exists():
        return
    if bundle.is_run(config.out):
        raise InputError(f"{config.out} is a run folder, no cache: choose another --out")
    if not is_remote(config.images) and config.images.exists() and config.out.samefile(config.images):
        raise InputError(f"{config.out} holds the images: choose another --out for the cache")


def _summarize(
    config: EmbedConfig, writer: CacheWriter, plan: Plan, num_computed: int, seconds: float
) -> dict[str, Any]:
    names = plan.inputs.names
    return {
        "cache": str(config.out),
        "fingerprint": writer.manifest.fingerprint,
        "complete": plan.complete,
        "num_images": len(plan.inputs),
        "num_embedded": int((plan.shard >= 0).sum()),
        "num_failed": len(plan.failures),
        "num_pending": len(plan.work),
        "num_computed": num_computed,
        "class_names": list(plan.inputs.class_names),
        "counts": plan.inputs.counts(),
        "views": writer.manifest.identity["views"],
        "batch_size": writer.manifest.identity["batch_size"],
        "seconds": round(seconds, 3),
        "images_per_second": round(num_computed / seconds, 3),
        "failures": [
            {"path": os.fsdecode(names[row]), "reason": reason, "detail": detail}
            for row, reason, detail in plan.failures
        ],
    }


def _describe_counts(counts: dict[str, dict[str, int]]) -> list[str]:
    """A line for each split, and one for the classes that it lacks."""
    lines = []
    for split, by_class in counts.items():
        there = {display_name(name): num for name, num in by_class.items() if num}
        missing = [name for name, num in by_class.items() if not num]
        heading = f"{split or 'no split'}: {sum(there.values()):,} labels"
        if len(there) > _CLASSES_SHOWN:
            lines.append(
                f"{heading}, {min(there.values()):,} to {max(there.values()):,} in each of {len(there):,} classes"
            )
        elif there:
            lines.append(f"{heading} ({', '.join(f'{name} {num:,}' for name, num in there.items())})")
        if there and missing:
            where = split or "what has no split"
            lines.append(f"note: {where} has no images of {list_names(missing)}")
    return lines


def _spell_failure(failure: dict[str, str]) -> str:
    return f"{display_name(failure['path'])}: {failure['reason']}: {failure['detail']}"
