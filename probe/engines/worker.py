"""A worker: makes one shard of a plan after another, wherever it is put, and keeps what is dear warm between them.

To make a shard is idempotent: one that is sealed already is not made again, and two workers that make the same one
write the same bytes. What a shard holds does not depend on the other shards of its plan, so any worker may make any
of them in any order; an image that occurs in two of them is embedded twice, to the same embedding.
"""

import dataclasses
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from probe.backbones import Precision, load_backbone
from probe.cache import CacheWriter, Failure, known_keys, load_manifest, load_plan
from probe.cache.shards import load_sidecar, seal_shard, sealed_numbers
from probe.embedding import Device, Item, embed_shard, made_by, make_run_batch, memory_explained, refuse
from probe.errors import InputError, MismatchError
from probe.images import ImageLoader, LoadedImage, Preprocessing
from probe.sources import Example, Source
from probe.storage import tag_partials


@dataclasses.dataclass(frozen=True)
class Job:
    """What all workers of a run must agree on; it travels to other hosts."""

    cache: Path
    plan_id: str
    plan_file: Path | None
    """The plan, where older revisions know some embeddings."""
    open_source: Callable[[], Source]
    """Opens the images for reading by name; its list of examples is not looked at."""
    num_workers: int | None
    """Processes that decode beside each worker, or in each decode actor; None: one for each CPU that it was given."""
    max_pixels: int
    stop_at_failure: bool


@dataclasses.dataclass(frozen=True)
class Receipt:
    """A shard that is sealed."""

    number: int
    num_images: int
    num_computed: int
    failures: tuple[Failure, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a worker is."""

    device: Device
    host: str
    pid: int


class Feed(Protocol):
    """Where the images of a shard come from, decoded and in order."""

    def images(self, number: int, examples: Sequence[Example]) -> Iterator[LoadedImage[Item]]:
        """Those of shard `number`."""
        ...

    def close(self) -> None:
        """Ends what the feed has started."""
        ...


class LocalFeed:
    """Images that processes beside this one read and decode."""

    def __init__(self, job: Job, preprocessing: Preprocessing) -> None:
        """Opens the images. Raises: InputError if this host does not see them, or the plan."""
        self._source = job.open_source()
        self._loader = ImageLoader(
            preprocessing, num_workers=job.num_workers, max_pixels=job.max_pixels, skip_keys=known_to(job)
        )

    def images(self, number: int, examples: Sequence[Example]) -> Iterator[LoadedImage[Item]]:
        items = ((Item(number, example), content) for example, content in self._source.iter_bytes(examples))
        return self._loader.load(items)

    def close(self) -> None:
        self._loader.close()


def known_to(job: Job) -> Callable[[bytes], bool]:
    """Whether an older revision of the plan knows the embedding of a content key."""
    return known_keys(load_plan(job.plan_file)).__contains__ if job.plan_file else lambda key: False


class ShardWorker:
    """The worker's own side, without any engine: load, begin, then make as often as there are shards."""

    def __init__(self, open_feed: Callable[[Job, Preprocessing], Feed] = LocalFeed) -> None:
        """Args: open_feed: opens what decodes for this worker."""
        self._open_feed = open_feed
        self._feed: Feed | None = None

    def load(self, backbone: str) -> Place:
        """Loads a backbone, as `load_backbone` takes it, with the revision. Raises: what that does."""
        self._backbone = load_backbone(backbone)
        self._place = Place(Device.here(), platform.node(), os.getpid())
        return self._place

    def begin(self, job: Job, tag: str) -> None:
        """Opens the cache and the images, and compiles.

        Args:
          tag: names this worker's unfinished files.
        Raises: InputError if this host does not see the cache; MismatchError if it would make other embeddings than
          those that the cache is made of; OutOfMemoryError.
        """
        tag_partials(tag)
        try:
            manifest = load_manifest(job.cache)
        except InputError as err:
            raise InputError(
                f"{self._place.host} does not see the cache {job.cache}: a run on several hosts needs a file "
                "system that they share, mounted at one path"
            ) from err
        decode = manifest.names["preprocessor_config"].get("decode", "exact")
        self._backbone = self._backbone.with_decode(decode)
        here = {
            "backbone_fingerprint": self._backbone.fingerprint,
            "device_kind": self._place.device.kind,
            "num_devices": self._place.device.num,
        }
        if differences := [
            f"{field} is {manifest.identity[field]} there and {value} here"
            for field, value in here.items()
            if manifest.identity[field] != value
        ]:
            raise MismatchError(
                f"a worker on {self._place.host} would not make what the cache {job.cache} is made of: "
                f"{'; '.join(differences)}. One cache is made by one kind of device with one set of weights."
            )
        self._job, self._manifest = job, manifest
        CacheWriter(job.cache, manifest).sweep()
        self._is_known = known_to(job)
        self._feed = self._open_feed(job, self._backbone.preprocessing)
        self._run_batch = make_run_batch(self._backbone, Precision.from_json(manifest.identity["precision"]))
        blank = np.zeros((manifest.identity["batch_size"], *self._backbone.preprocessing.image_size, 3), np.uint8)
        with memory_explained(manifest.identity["batch_size"]):
            jax.block_until_ready(self._run_batch(blank))

    def make(self, number: int, examples: Sequence[Example]) -> Receipt:
        """Makes shard `number` out of these images and seals it, if no one has.

        Raises: InputError at an unreadable image if the job says so; StorageError; OutOfMemoryError.
        """
        assert self._feed is not None, "begin comes first"
        job, manifest = self._job, self._manifest
        if path := sealed_numbers(job.cache, job.plan_id, number).get(number):
            sidecar = load_sidecar(job.cache, path, manifest.fingerprint)
            return Receipt(number, len(sidecar.facts.names), 0, sidecar.failures)
        with memory_explained(manifest.identity["batch_size"]):
            contents = embed_shard(
                self._feed.images(number, examples),
                self._run_batch,
                batch_size=manifest.identity["batch_size"],
                dtype=manifest.identity["stored_dtype"],
                is_known=self._is_known,
                on_failure=refuse if job.stop_at_failure else lambda failure: None,
            )
        seal_shard(
            job.cache,
            job.plan_id,
            number,
            contents,
            fingerprint=manifest.fingerprint,
            made_by=made_by(self._place.device),
        )
        return Receipt(number, len(examples), len(contents.keys), contents.failures)

    def close(self) -> None:
        """Ends what decodes."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None


def describe_workers(workers: Sequence[dict[str, Any]]) -> list[str]:
    """A table with a line for each worker, as `RayWorkers.summary` tells of them; nothing for none."""
    if not workers:
        return []
    head = ("worker", "host", "pid", "shards", "images", "images/s", "failed", "retries", "ended")
    rows = [
        (
            str(worker["worker"]),
            worker["host"],
            str(worker["pid"]),
            str(worker["num_shards"]),
            f"{worker['num_images']:,}",
            f"{worker['images_per_second']:.1f}",
            str(worker["num_failed"]),
            str(worker["num_retries"]),
            worker["ended"],
        )
        for worker in workers
    ]
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
