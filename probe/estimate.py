"""`probe embed --dry-run`: how much work there is, and how long it would take."""

import time
from typing import Any

import jax
import numpy as np

from probe.backbones import Backbone, Precision
from probe.cache import Inputs, Manifest, draft_plan
from probe.config import EmbedConfig
from probe.embedding import Item, embed_shard, make_run_batch
from probe.images import load_images
from probe.sources import Example, Source

_SAMPLE_BATCHES = 4  # that are computed to measure the rate
_FACT_BYTES = 250  # per image, in plan and sidecar, besides its name


def estimate(
    config: EmbedConfig,
    manifest: Manifest,
    backbone: Backbone,
    source: Source,
    examples: list[Example],
    inputs: Inputs,
) -> dict[str, Any]:
    """What a run would do, from a few batches that are computed and thrown away.

    Args:
      examples: what the run is about, in the order of `inputs`.
    Returns: num_images, and of those still to be embedded num_pending, num_bytes to read, images_per_second, minutes,
      and disk_bytes to write.
    """
    plan = draft_plan(config.out, inputs, rehash=config.verify_content, retry_failed=config.retry_failed)
    batch_size = manifest.identity["batch_size"]
    row_bytes = sum(manifest.identity["views"].values()) * np.dtype(manifest.identity["stored_dtype"]).itemsize
    work = [examples[row] for row in plan.work]
    sample = spread(work, _SAMPLE_BATCHES * batch_size)
    rate = None
    if sample:
        run_batch = make_run_batch(backbone, Precision.from_json(manifest.identity["precision"]))
        jax.device_get(run_batch(np.zeros((batch_size, *backbone.preprocessing.image_size, 3), np.uint8)))
        items = ((Item(0, example), content) for example, content in source.iter_bytes(sample))
        started = time.monotonic()
        images = load_images(
            items, backbone.preprocessing, num_workers=config.num_workers, max_pixels=config.max_pixels
        )
        embed_shard(images, run_batch, batch_size=batch_size, dtype="float32", is_known=lambda key: False)
        rate = len(sample) / (time.monotonic() - started)
    return {
        "dry_run": True,
        "cache": str(config.out),
        "num_images": len(inputs),
        "num_pending": len(work),
        "num_bytes": sum(example.size for example in work),
        "images_per_second": rate,
        "minutes": len(work) / rate / 60 if rate else 0.0,
        "disk_bytes": sum(row_bytes + _FACT_BYTES + len(example.name) for example in work),
    }


def describe_estimate(estimate: dict[str, Any]) -> str:
    """The estimate as text for people."""
    if not estimate["num_pending"]:
        return f"{estimate['cache']}: all {estimate['num_images']:,} images are known: nothing would be computed"
    return (
        f"{estimate['cache']}: {estimate['num_pending']:,} of {estimate['num_images']:,} images "
        f"({estimate['num_bytes'] / 1e6:,.1f} MB) would be embedded in some {estimate['minutes']:,.1f} minutes "
        f"({estimate['images_per_second']:,.1f} images/s, measured on a few) and take "
        f"{estimate['disk_bytes'] / 1e6:,.1f} MB of disk. Nothing was written."
    )


def spread(examples: list[Example], limit: int | None) -> list[Example]:
    """At most `limit` examples, evenly over all, so that every class has its share."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[index * len(examples) // limit] for index in range(limit)]
