"""What one process does of a plan: images decoded ahead, batches on the device, shards sealed in a thread.

Images are decoded in worker processes while the device computes and a thread writes: nobody waits for the disk. What
is sealed already, by an earlier run or meanwhile by another process, is not made again.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from probe import interrupt
from probe.backbones import Backbone, Precision
from probe.cache import CacheWriter, Failure, Plan, known_keys
from probe.config import EmbedConfig
from probe.embedding import Device, Item, RunBatch, ShardInWork, made_by, make_run_batch, refuse
from probe.engines.worker import Job
from probe.errors import FailedImagesError
from probe.images import ImageError, ImageLoader, LoadedImage
from probe.progress import Progress
from probe.sources import Example, Source, display_name
from probe.stages import StageTimes

if TYPE_CHECKING:
    from probe.engines.ray import RayWorkers

_AHEAD = 64  # images that are decoded ahead, at least


class Share:
    """The shards of a plan that one process is to make: by itself, in order, or through the workers of an engine."""

    def __init__(
        self,
        config: EmbedConfig,
        writer: CacheWriter,
        plan: Plan,
        backbone: Backbone,
        source: Source,
        examples: list[Example],
        open_elsewhere: Callable[[], Source],
    ) -> None:
        """
        Args:
          examples: of the plan's inputs, in their order.
          open_elsewhere: opens the source on another host, where the source itself does not say how.
        """
        self._config, self._writer, self._plan = config, writer, plan
        self._backbone, self._source, self._examples = backbone, source, examples
        self._open_elsewhere = open_elsewhere
        self._numbers = range(config.shard_index, writer.num_shards(plan), config.num_shards)
        self._older = known_keys(plan)
        self._mine: set[bytes] = set()  # keys in this process's own earlier shards of this plan
        self._num_failed = 0
        self._counting = threading.Lock()  # of _num_failed, for images fail in two threads
        self._finishing: ShardInWork | None = None  # the shard before, whose last batches are being computed
        self._sealing: Future[None] | None = None  # its way to the disk
        self._progress: Progress | None = None  # of the work under way
        self._beside = {"workers": "", "failed": "", "sealed": ""}  # what is told beside the rate
        self.num_computed = 0
        self.run_batch: RunBatch | None = None
        self.stages: StageTimes | None = None  # where the time went, if there was anything to do

    def run(self) -> None:
        """Makes every shard of this share that is not sealed yet."""
        self._count_known_failures()
        sealed = self._writer.sealed(self._plan)
        todo = [number for number in self._numbers if number not in sealed]
        total = sum(len(self._writer.shard_rows(self._plan, number)) for number in todo)
        if not total:
            for number in self._numbers:
                self._learn(number)
            return
        precision = Precision.from_json(self._writer.manifest.identity["precision"])
        batch_size = self._writer.manifest.identity["batch_size"]
        loader = ImageLoader(
            self._backbone.preprocessing,
            num_workers=self._config.num_workers,
            max_pixels=self._config.max_pixels,
            skip_keys=self._is_known,
        )
        with self._telling(total) as progress, ThreadPoolExecutor(1) as disk:
            next_number = iter(self._numbers)
            with loader:  # which ends its processes, whatever happens
                loader.start()  # they import NumPy while the weights go to the device
                self.run_batch = run_batch = make_run_batch(self._backbone, precision)
                made_here = made_by(Device.here())
                self.stages = stages = StageTimes()
                # while one batch is fetched the next is decoded
                images = loader.load(self._items(stages), ahead=max(_AHEAD, 2 * batch_size))
                for number, slice_of_images in itertools.groupby(stages.waited(images), _number):
                    for earlier in next_number:
                        if earlier == number:
                            break
                        self._learn(earlier)
                    shard = ShardInWork(
                        run_batch,
                        batch_size=batch_size,
                        dtype=self._writer.manifest.identity["stored_dtype"],
                        on_failure=self._count,
                        stages=stages,
                    )
                    for image in slice_of_images:
                        interrupt.check()
                        stages.files_s += image.read_s
                        stages.decode_s += image.decode_s
                        shard.add(image, self._is_certainly_known)
                        progress.advance(1)
                    shard.send_rest()
                    self._await_sealing(stages)
                    self._finishing = shard
                    self._sealing = disk.submit(self._finish, shard, number, made_here, stages)
            for later in next_number:
                self._learn(later)
            self._await_sealing(stages)
        stages.stop()

    def _finish(self, shard: ShardInWork, number: int, made_here: dict[str, str], stages: StageTimes) -> None:
        """What is left to do for a shard once all is sent: done in a thread, while the next one is computed."""
        contents = shard.finish()
        self._mine.update(key.tobytes() for key in contents.keys)
        self.num_computed += len(contents.keys)
        with stages.timed("write_s"):
            self._writer.seal(self._plan, number, contents, made_here)
        if self._config.num_shards > 1:
            num_sealed, num_shards = len(self._writer.sealed(self._plan)), self._writer.num_shards(self._plan)
            self._tell(sealed=f"{num_sealed:,} of {num_shards:,} shards of all processes are sealed")

    def _await_sealing(self, stages: StageTimes) -> None:
        """Waits until the shard before is on the disk: a full one is heard of here, at most one shard late."""
        if self._sealing is None or self._finishing is None:
            return
        with stages.timed("device_wait_s"):
            self._finishing.wait()
        with stages.timed("write_wait_s"):
            self._sealing.result()
        self._sealing = self._finishing = None

    def _is_certainly_known(self, key: bytes) -> bool:
        """As `_is_known`; but of a key in the shard that is being finished it is not known yet, so that is awaited."""
        if self._sealing is not None and self._finishing is not None and key in self._finishing:
            self._sealing.result()
        return self._is_known(key)

    def run_on(self, workers: "RayWorkers") -> None:
        """Has workers make every shard that is not sealed yet, in any order."""
        self._count_known_failures()
        sealed = self._writer.sealed(self._plan)
        for path in sealed.values():
            for failure in self._writer.load_sidecar(path).failures:
                self._count(failure)
        todo = {number: self._writer.shard_rows(self._plan, number) for number in self._numbers if number not in sealed}
        if not todo:
            return
        job = Job(
            cache=self._config.out.absolute(),
            plan_id=self._plan.id,
            plan_file=self._writer.plan_file(self._plan).absolute() if len(self._older) else None,
            open_source=self._source.opener() or self._open_elsewhere,
            num_workers=self._config.num_workers,
            max_pixels=self._config.max_pixels,
            stop_at_failure=self._config.on_error == "fail",
        )
        shards = ((number, [self._examples[row] for row in rows]) for number, rows in todo.items())
        with self._telling(sum(map(len, todo.values()))) as progress:
            for receipt in workers.make(job, shards, self._writer.sweep):
                self.num_computed += receipt.num_computed
                for failure in receipt.failures:
                    self._count(failure)
                self._tell(workers=workers.describe())
                progress.advance(receipt.num_images)

    @contextlib.contextmanager
    def _telling(self, num_images: int) -> Iterator[Progress]:
        """Progress over so many images, with what `_tell` was told beside it."""
        with Progress("embedding", total=num_images, unit="images") as progress:
            self._progress = progress
            try:
                self._tell()
                yield progress
            finally:
                self._progress = None

    def _tell(self, **facts: str) -> None:
        """Brings up to date what stands beside the rate: of the workers, of failures, of all processes on one cache."""
        self._beside |= facts
        if (progress := self._progress) is not None:
            progress.note(", ".join(filter(None, self._beside.values())))

    def _items(self, stages: StageTimes) -> Iterator[tuple[Item, bytes | Path | ImageError]]:
        for number in self._numbers:
            if self._writer.find_sealed(self._plan, number) is None:  # it may be, by now, by another process
                examples = [self._examples[row] for row in self._writer.shard_rows(self._plan, number)]
                contents = self._source.iter_bytes(examples)
                while True:
                    with stages.timed("files_s"):  # out of an archive they are read here
                        found = next(contents, None)
                    if found is None:
                        break
                    example, content = found
                    yield Item(number, example), content

    def _learn(self, number: int) -> None:
        """Takes note of what a shard of this share holds that an earlier run, or another process, sealed."""
        path = self._writer.find_sealed(self._plan, number)
        assert path is not None, "passed over only because it was sealed"
        sidecar = self._writer.load_sidecar(path)
        self._mine.update(key.tobytes() for key in sidecar.facts.keys[sidecar.facts.rows >= 0])
        for failure in sidecar.failures:
            self._count(failure)

    def _is_known(self, key: bytes) -> bool:
        return key in self._mine or key in self._older

    def _count_known_failures(self) -> None:
        """Those that the plan took over from earlier revisions."""
        for row, reason, detail in self._plan.failures:
            self._count(Failure(self._plan.inputs.names[row], reason, detail))

    def _count(self, failure: Failure) -> None:
        """Raises: InputError or FailedImagesError if this is one failure too many."""
        with self._counting:
            self._num_failed += 1
            self._tell(failed=f"{self._num_failed:,} failed")
        if self._config.on_error == "fail":
            refuse(failure)
        if self._config.max_failures is not None and self._num_failed > self._config.max_failures:
            raise FailedImagesError(
                f"{self._num_failed} images have failed, and --max-failures is {self._config.max_failures}; the last "
                f"is {display_name(failure.name)} ({failure.reason}: {failure.detail}). What was sealed so far is kept."
            )


def _number(image: LoadedImage[Item]) -> int:
    return image.example.number
