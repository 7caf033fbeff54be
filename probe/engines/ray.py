"""Shards on a Ray cluster: an actor for each worker, which keeps the compiled backbone warm.

Ray places workers and notices when they die; nothing else is asked of it. What counts as done stands sealed in the
cache, so neither its object store nor its own retries hold anything that a run needs: a worker or host that dies costs
the shard in its hands, which another one makes; a driver that dies is started again with the same command.

A worker has one shard in its hands at a time: memory is bounded by the number of workers, and a death tells which
shard it may have been the fault of.

Where asked for, actors that need no device decode for a worker, on any host, and send it pixels through the object
store: a few blocks each, no more than the worker has room for. They are the worker's own and end with it; one that dies
is started anew by Ray, which has it decode again what had not arrived.

The only importer of ray.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Self

from probe import interrupt
from probe.embedding import Device, Item
from probe.engines.worker import Job, LocalFeed, Place, Receipt, ShardWorker
from probe.errors import ConfigError, EngineError, ProbeError, StorageError
from probe.images import LoadedImage, Preprocessing
from probe.sources import Example, display_name

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone

try:
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError
except ImportError as missing:
    raise ConfigError("--engine ray needs Ray: pip install 'probe-jax[ray]'") from missing

_ATTEMPTS = 4  # at one shard, all but the first behind the others, before it is taken to be at fault
_START_ATTEMPTS = 3  # per worker asked for, one after another without a single success
_PATIENCE_SECONDS = 600.0  # without any worker, before the cluster is said to have no room
_POLL_SECONDS = 0.5  # how late an interruption is noticed
_OBJECT_STORE_BYTES = 100 << 20  # of a cluster of our own, beside blocks of pixels: only lists of names travel
_BLOCK_IMAGES = 16  # that a decode actor sends at once: 2.4 MB of 224 x 224
_BLOCKS_AHEAD = 2  # of each decode actor: it decodes one while the other is fetched or waits
_BLOCK_BYTES = 16 << 20  # of the object store, for each of these

Shard = tuple[int, Sequence[Example]]  # its number, and the images that it is made from
Sweep = Callable[[str], None]


@dataclasses.dataclass(eq=False)
class _Worker:
    """A worker as the driver sees it: `awaited` is what `doing` will give."""

    number: int
    actor: Any
    tag: str
    awaited: Any
    doing: Literal["load", "loaded", "begin", "idle", "make"] = "load"
    place: Place | None = None
    shard: Shard | None = None
    since: float = 0.0
    num_shards: int = 0
    num_images: int = 0
    num_failed: int = 0
    num_retries: int = 0
    busy_seconds: float = 0.0
    ended: str = ""

    def ask(self, doing: Literal["begin", "make"], *args: Any) -> None:
        """Sends it off to work."""
        self.doing, self.awaited = doing, getattr(self.actor, doing).remote(*args)
        self.since = time.monotonic()

    def settle(self, result: Any) -> None:
        """Takes note of what it has done."""
        self.awaited = None
        if self.doing == "load":
            self.doing, self.place = "loaded", result
            return
        if self.doing == "make":
            self.num_shards += 1
            self.num_images += result.num_images
            self.num_failed += len(result.failures)
            self.busy_seconds += time.monotonic() - self.since
        self.doing, self.shard = "idle", None

    def describe(self) -> dict[str, Any]:
        """Its line in the summary."""
        return {
            "worker": self.number,
            "host": self.place.host if self.place else "",
            "pid": self.place.pid if self.place else 0,
            "num_shards": self.num_shards,
            "num_images": self.num_images,
            "images_per_second": round(self.num_images / self.busy_seconds, 3) if self.busy_seconds else 0.0,
            "num_failed": self.num_failed,
            "num_retries": self.num_retries,
            "ended": self.ended,
        }


class Decoder:
    """An actor that decodes for a worker elsewhere: it needs CPUs only."""

    def __init__(self, job: Job, preprocessing: Preprocessing) -> None:
        self._job, self._preprocessing = job, preprocessing
        self._feed: LocalFeed | None = None

    def decode(self, number: int, examples: Sequence[Example]) -> list[LoadedImage[Item]]:
        """These images of shard `number`; none: makes ready. Raises: InputError if this host does not see them."""
        if self._feed is None:
            self._feed = LocalFeed(self._job, self._preprocessing)
        return list(self._feed.images(number, examples))


class RemoteFeed:
    """Images that decode actors send, in order; a `Feed` for a worker that is an actor itself."""

    def __init__(self, num_decoders: int, job: Job, preprocessing: Preprocessing) -> None:
        """Starts the actors. Raises: EngineError if the cluster has no room for them; what opening the images does."""
        actor = ray.remote(Decoder).options(
            num_cpus=1, max_restarts=-1, max_task_retries=_ATTEMPTS - 1, scheduling_strategy="SPREAD"
        )
        self._decoders = [actor.remote(job, preprocessing) for _ in range(num_decoders)]
        for ready in [decoder.decode.remote(0, []) for decoder in self._decoders]:
            _fetch(ready, timeout=_PATIENCE_SECONDS)

    def images(self, number: int, examples: Sequence[Example]) -> Iterator[LoadedImage[Item]]:
        sent: collections.deque[Any] = collections.deque()
        turns = itertools.cycle(self._decoders)
        for start in range(0, len(examples), _BLOCK_IMAGES):
            if len(sent) == _BLOCKS_AHEAD * len(self._decoders):
                yield from _fetch(sent.popleft())
            sent.append(next(turns).decode.remote(number, examples[start : start + _BLOCK_IMAGES]))
        while sent:
            yield from _fetch(sent.popleft())

    def close(self) -> None:
        for decoder in self._decoders:
            _kill(decoder)


def _fetch(block: Any, timeout: float | None = None) -> list[LoadedImage[Item]]:
    """What a decode actor sends. Raises: what it did, of ours; EngineError after `timeout` seconds; RayError."""
    try:
        return list(ray.get(block, timeout=timeout))
    except GetTimeoutError as err:
        raise EngineError(
            f"no decode actor has started for {timeout:.0f} s: the cluster has no CPU free for each. See `ray status`, "
            "or ask for fewer --decode-actors."
        ) from err
    except RayTaskError as err:
        if isinstance(err.cause, ProbeError):
            raise err.cause from None
        raise


class RayWorkers:
    """Workers on a cluster, for one run.

    with RayWorkers(num_workers=8, gpus_per_worker=1) as workers:
        workers.start("openai/clip-vit-base-patch32")
        for receipt in workers.make(job, shards, sweep): ...
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        num_workers: int | None = None,
        gpus_per_worker: float | None = None,
        num_decoders: int | None = None,
        worker: type = ShardWorker,
    ) -> None:
        """Connects; before the process uses jax, since a cluster of its own is forked off it.

        Args:
          address: "auto", host:port, or None for RAY_ADDRESS, else for a cluster on this machine alone.
          num_workers: None: one a node, or as many as the GPUs allow.
          gpus_per_worker: GPUs for each; None: none.
          num_decoders: decode actors for each; None: it decodes by itself.
          worker: what has the methods of `ShardWorker`.
        Raises: EngineError if there is no cluster at the address, it has fewer GPUs than one worker wants, or fewer
          CPUs than all decode actors do.
        """
        _connect(address or os.environ.get("RAY_ADDRESS") or "local", num_workers or 1, num_decoders or 0)
        cluster = ray.cluster_resources()
        if gpus_per_worker is not None and cluster.get("GPU", 0) < gpus_per_worker:
            ray.shutdown()
            raise EngineError(f"the cluster has {cluster.get('GPU', 0):g} GPUs, and a worker wants {gpus_per_worker:g}")
        if num_workers is None and gpus_per_worker is not None:
            num_workers = int(cluster["GPU"] / gpus_per_worker)
        self._wanted = num_workers or sum(node["Alive"] for node in ray.nodes())
        num_cpus = int(cluster.get("CPU", 1))
        self._num_cpus = max(1, num_cpus // self._wanted) if num_decoders is None else 1
        if num_decoders is not None and num_cpus < self._wanted * (1 + num_decoders):
            ray.shutdown()
            raise EngineError(
                f"the cluster has {num_cpus} CPUs, and {self._wanted} workers with {num_decoders} decode actors each "
                f"want {self._wanted * (1 + num_decoders)}: ask for fewer of either"
            )
        self._arguments = [] if num_decoders is None else [functools.partial(RemoteFeed, num_decoders)]
        self._backbone = ""
        self._actor = ray.remote(worker).options(
            num_cpus=self._num_cpus, num_gpus=gpus_per_worker or 0, max_restarts=0, scheduling_strategy="SPREAD"
        )
        self._workers: list[_Worker] = []
        self._ended: list[_Worker] = []
        self._failed_starts = 0
        self._attempts: collections.Counter[int] = collections.Counter()
        self._again: collections.deque[Shard] = collections.deque()
        self._sweep: Sweep = lambda tag: None
        self._last_sign = time.monotonic()  # of a worker that lives

    def start(self, backbone: str) -> None:
        """Asks for the workers, which load `backbone` (as `load_backbone` takes it, on every host) meanwhile."""
        self._backbone = backbone
        while len(self._workers) < self._wanted:
            self._start_one()

    def __enter__(self) -> Self:
        self._stdout = contextlib.redirect_stdout(sys.stderr)  # where Ray would tell of dead workers
        self._stdout.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the workers, and the cluster if it is our own."""
        for worker in self._workers:
            _kill(worker.actor)
        ray.shutdown()
        self._stdout.__exit__(None, None, None)

    def device(self) -> Device:
        """What the first worker that has loaded the backbone computes on.

        Raises: what loading it does; EngineError if no worker starts.
        """
        while True:
            for worker in self._workers:
                if worker.place is not None:
                    return worker.place.device
            for worker in self._wait():
                self._hear(worker)

    def make(self, job: Job, shards: Iterable[Shard], sweep: Sweep) -> Iterator[Receipt]:
        """Has every shard made, and yields the receipts as they come.

        Args:
          shards: taken one by one, when a worker is free.
          sweep: removes the unfinished files that bear a tag, whose worker is dead.
        Raises: what `ShardWorker` does; EngineError if a shard ends its workers again and again, or none starts.
        """
        job = dataclasses.replace(job, num_workers=job.num_workers or self._num_cpus)
        self._sweep = sweep
        self._attempts.clear()
        waiting = iter(shards)
        while True:
            for worker in self._workers:
                if worker.doing == "loaded":
                    worker.ask("begin", job, worker.tag)
                elif worker.doing == "idle":
                    worker.shard = next(waiting, None) or (self._again.popleft() if self._again else None)
                    if worker.shard is not None:
                        worker.num_retries += self._attempts[worker.shard[0]] > 0
                        worker.ask("make", *worker.shard)
            if all(worker.shard is None for worker in self._workers) and not self._again:
                if (shard := next(waiting, None)) is None:
                    return
                self._again.append(shard)
            for worker in self._wait():
                if (receipt := self._hear(worker)) is not None:
                    yield receipt

    def summary(self) -> list[dict[str, Any]]:
        """What each worker did, those that have ended too."""
        return [worker.describe() for worker in sorted(self._ended + self._workers, key=lambda worker: worker.number)]

    def describe(self) -> str:
        """All of them in a few words, for a line of progress."""
        everyone = self._ended + self._workers
        counts = (
            (sum(worker.doing in ("idle", "make") for worker in self._workers), "worker", "workers"),
            (len(self._ended), "lost", "lost"),
            (sum(worker.num_retries for worker in everyone), "shard tried again", "shards tried again"),
        )
        told = [f"{num:,} {one if num == 1 else many}" for num, one, many in counts if num]
        return ", ".join(told)

    def _start_one(self) -> None:
        actor = self._actor.remote(*self._arguments)
        number = len(self._ended) + len(self._workers)
        self._workers.append(_Worker(number, actor, f"{uuid.uuid4().hex[:8]}-", actor.load.remote(self._backbone)))

    def _wait(self) -> list[_Worker]:
        """The workers that have something to tell, perhaps none. Raises: Interrupted; EngineError."""
        interrupt.check()
        by_reference = {worker.awaited: worker for worker in self._workers if worker.awaited is not None}
        done, _ = ray.wait(list(by_reference), num_returns=1, timeout=_POLL_SECONDS)
        if done:
            done, _ = ray.wait(list(by_reference), num_returns=len(by_reference), timeout=0)
        if any(worker.doing in ("idle", "make") for worker in self._workers) or done:
            self._last_sign = time.monotonic()
        elif time.monotonic() - self._last_sign > _PATIENCE_SECONDS:
            raise EngineError(
                f"no worker has started for {_PATIENCE_SECONDS:.0f} s: the cluster has no room for "
                f"{self._num_cpus} CPUs and what else a worker wants. See `ray status`, or ask for more --workers."
            )
        return [by_reference[reference] for reference in done]

    def _hear(self, worker: _Worker) -> Receipt | None:
        """Takes what a worker has to tell: a receipt, or that it is ready, has failed or is dead."""
        try:
            result = ray.get(worker.awaited)
        except RayTaskError as err:
            cause = err.cause
            if isinstance(cause, StorageError) and worker.shard is not None:  # its host's own disk may be the matter
                shard = worker.shard
                worker.awaited, worker.doing, worker.shard = None, "idle", None
                self._blame(shard, worker, str(cause))
            elif isinstance(cause, ProbeError):
                raise cause from None
            else:
                self._lose(worker, f"{type(cause).__name__}: {cause}")
            return None
        except RayError as err:
            self._lose(worker, type(err).__name__)
            return None
        made = worker.doing == "make"
        if worker.doing != "load":
            self._failed_starts = 0
        worker.settle(result)
        return result if made else None

    def _lose(self, worker: _Worker, why: str) -> None:
        """Replaces a worker that is dead or no longer to be trusted, and takes the shard out of its hands."""
        _kill(worker.actor)
        worker.ended, worker.awaited = why, None
        self._workers.remove(worker)
        self._ended.append(worker)
        self._sweep(worker.tag)
        if worker.shard is not None:
            self._blame(worker.shard, worker, why)
        else:
            self._failed_starts += 1
            if self._failed_starts > _START_ATTEMPTS * self._wanted:
                raise EngineError(f"{self._failed_starts} workers in a row did not start; the last one: {why}")
        self._start_one()

    def _blame(self, shard: Shard, worker: _Worker, why: str) -> None:
        number, examples = shard
        self._attempts[number] += 1
        if self._attempts[number] >= _ATTEMPTS:
            host = worker.place.host if worker.place else "?"
            raise EngineError(
                f"shard {number} failed {_ATTEMPTS} times, the last time on {host}: {why}. It is made from "
                f"{len(examples):,} images, from {display_name(examples[0].name)} to "
                f"{display_name(examples[-1].name)}. Other shards that are sealed are kept."
            )
        self._again.append(shard)


def _connect(address: str, num_workers: int, num_decoders: int) -> None:
    own: dict[str, Any] = {
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES + num_workers * num_decoders * _BLOCKS_AHEAD * _BLOCK_BYTES,
        # who asks for more workers than cores gets them
        "num_cpus": max(os.cpu_count() or 1, num_workers * (1 + num_decoders)),
    }
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **(own if address == "local" else {}))
    except (ConnectionError, RayError, RuntimeError, ValueError) as err:
        raise EngineError(f"no Ray cluster at {address}: {err}") from err


def _kill(actor: Any) -> None:
    with contextlib.suppress(RayError, ValueError):
        ray.kill(actor)
