"""From images to the contents of one shard: pure, idempotent, and the same wherever it runs.

The unit of work of `probe embed`, be it in one process, in several that share a cache, or on a cluster: given
the images of a slice, the compiled backbone, and which content keys are known, it says what the shard holds.
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

import jax
import numpy as np

from probe import interrupt
from probe.backbones import Backbone, Precision, make_embed_fn
from probe.cache import FAILED, KNOWN, Facts, Failure, ShardContents
from probe.errors import InputError, OutOfMemoryError
from probe.images import ImageError, LoadedImage
from probe.sources import Example, display_name
from probe.stages import StageTimes

_BATCHES_IN_FLIGHT = 2  # the device computes one while the next is sent


@dataclasses.dataclass(frozen=True)
class Device:
    """What embeddings are computed on; its kind and number are a part of what a cache is made of."""

    platform: str
    kind: str
    num: int = 1
    """How many of them a batch is divided over."""

    @classmethod
    def here(cls) -> "Device":
        """Those of this process."""
        devices = jax.local_devices()
        return cls(devices[0].platform, devices[0].device_kind, len(devices))


RunBatch = Callable[[np.ndarray], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One image of the work, and the number of the shard that it is for."""

    number: int
    example: Example


def embed_shard(
    images: Iterable[LoadedImage[Item]],
    run_batch: RunBatch,
    *,
    batch_size: int,
    dtype: str,
    is_known: Callable[[bytes], bool],
    on_image: Callable[[], None] = lambda: None,
    on_failure: Callable[[Failure], None] = lambda failure: None,
) -> ShardContents:
    """What one shard holds: a pure function of its images, the backbone and what is known already.

    Args:
      images: one slice of a plan's work, in order.
      run_batch: [batch_size, H, W, 3] uint8 -> {view: [batch_size, D] float32}.
      batch_size: the last batch is padded to it.
      dtype: "float32" or "float16", to store.
      is_known: whether an older shard has the embedding of a content key.
      on_image, on_failure: called for each image when it is read, and for each that has failed.
    """
    shard = ShardInWork(run_batch, batch_size=batch_size, dtype=dtype, on_failure=on_failure)
    for image in images:
        interrupt.check()
        shard.add(image, is_known)
        on_image()
    shard.send_rest()
    return shard.finish()


class ShardInWork:
    """A shard whose images are added one by one, and finished perhaps by another thread.

    When the last batch is sent, the next shard may be begun: the device goes on while this one is fetched, made into
    contents and written.
    """

    def __init__(
        self,
        run_batch: RunBatch,
        *,
        batch_size: int,
        dtype: str,
        on_failure: Callable[[Failure], None] = lambda failure: None,
        stages: StageTimes | None = None,
    ) -> None:
        """Args: as for `embed_shard`; stages: where the time is counted."""
        self._dtype, self._on_failure = dtype, on_failure
        self._read: list[LoadedImage[Item]] = []
        self._rows: list[int] = []
        self._row_of: dict[bytes, int] = {}  # in the order in which they are embedded
        self._failures: dict[bytes, Failure] = {}
        self._batches = _Batches(run_batch, batch_size, stages or StageTimes())
        self._fetched = threading.Event()

    def __contains__(self, key: bytes) -> bool:
        """Whether the image of this key was sent to the device for this shard."""
        return key in self._row_of

    def add(self, image: LoadedImage[Item], is_known: Callable[[bytes], bool]) -> None:
        """The next image; every full batch is sent."""
        if image.failure is not None or image.key is None:
            self._fail(image, *_reason(image.failure))
            self._rows.append(FAILED)
        elif image.key in self._row_of:
            self._rows.append(self._row_of[image.key])
        elif is_known(image.key):
            self._rows.append(KNOWN)
        else:
            assert image.pixels is not None, "only what is known may be skipped"
            self._rows.append(self._row_of.setdefault(image.key, len(self._row_of)))
            self._batches.add(image.pixels)
        self._read.append(dataclasses.replace(image, pixels=None))

    def send_rest(self) -> None:
        """No image follows: sends the last batch, padded."""
        self._batches.send_rest()

    def wait(self) -> None:
        """Until the device has computed all of it, for who has given `finish` to another thread."""
        self._fetched.wait()

    def finish(self) -> ShardContents:
        """Waits for what was sent. Returns: what the shard holds; call it once."""
        read, rows = self._read, self._rows
        try:
            embeddings = self._batches.fetch_all()
        finally:
            self._fetched.set()
        stored, unfit = _as_stored(embeddings, self._dtype)
        kept = np.array([row not in unfit for row in range(len(self._row_of))], bool)
        new_row = np.cumsum(kept) - 1
        for position, (image, row) in enumerate(zip(read, rows, strict=True)):
            if row in unfit:
                self._fail(image, *unfit[row])
                rows[position] = FAILED
            elif row >= 0:
                rows[position] = int(new_row[row])
        facts = Facts(
            names=[image.example.example.name for image in read],
            sizes=[image.size or image.example.example.size for image in read],
            mtimes_ns=[image.mtime_ns or image.example.example.mtime_ns for image in read],
            keys=_as_keys(image.key or bytes(32) for image in read),
            rows=np.array(rows, np.int32),
        )
        return ShardContents(
            facts=facts,
            keys=_as_keys(self._row_of)[kept],
            embeddings={view: array[kept] for view, array in stored.items()},
            failures=tuple(self._failures[name] for name in facts.names if name in self._failures),
        )

    def _fail(self, image: LoadedImage[Item], reason: str, detail: str) -> None:
        failure = Failure(image.example.example.name, reason, detail)
        self._failures[failure.name] = failure
        self._on_failure(failure)


class _Batches:
    """Collects images, sends full batches to the device, and fetches what it has computed meanwhile."""

    def __init__(self, run_batch: RunBatch, batch_size: int, stages: StageTimes) -> None:
        self._run, self._size, self._stages = run_batch, batch_size, stages
        self._pixels: list[np.ndarray] = []
        self._in_flight: collections.deque[tuple[dict[str, jax.Array], int]] = collections.deque()
        self._fetched: dict[str, list[np.ndarray]] = {}

    def add(self, pixels: np.ndarray) -> None:
        """One more image."""
        self._pixels.append(pixels)
        if len(self._pixels) == self._size:
            self._send()

    def send_rest(self) -> None:
        """Sends what is left over, padded."""
        if self._pixels:
            self._send()

    def fetch_all(self) -> dict[str, np.ndarray]:
        """{view: [R, D] float32} of all images in the order in which they were added; empty if there were none."""
        while self._in_flight:
            self._fetch()
        return {view: np.concatenate(parts) for view, parts in self._fetched.items()}

    def _send(self) -> None:
        num = len(self._pixels)
        batch = np.zeros((self._size, *self._pixels[0].shape), np.uint8)  # padding does not change bits
        np.stack(self._pixels, out=batch[:num])
        self._pixels.clear()
        self._stages.sending()
        with self._stages.timed("device_wait_s" if self._stages.num_batches else "compile_s"):
            outputs = self._run(batch)
        self._stages.sent(next(iter(outputs.values())), num)
        self._in_flight.append((outputs, num))
        if len(self._in_flight) > _BATCHES_IN_FLIGHT:
            with self._stages.timed("device_wait_s"):
                self._fetch()

    def _fetch(self) -> None:
        outputs, num = self._in_flight.popleft()
        for view, array in outputs.items():
            self._fetched.setdefault(view, []).append(np.asarray(array)[:num])


def _reason(failure: ImageError | None) -> tuple[str, str]:
    return (failure.reason, str(failure)) if failure is not None else ("unread", "its bytes could not be read")


def _as_stored(
    embeddings: dict[str, np.ndarray], dtype: str
) -> tuple[dict[str, np.ndarray], dict[int, tuple[str, str]]]:
    """Embeddings in the type that is stored, and (reason, detail) for each row that cannot be."""
    unfit: dict[int, tuple[str, str]] = {}
    stored = {}
    for view, array in embeddings.items():
        for row in np.flatnonzero(~np.isfinite(array).all(axis=1)).tolist():
            unfit.setdefault(row, ("non-finite", f"its {view} embedding holds values that are not finite"))
        with np.errstate(over="ignore"):
            stored[view] = array.astype(dtype, copy=False)
        for row in np.flatnonzero(~np.isfinite(stored[view]).all(axis=1)).tolist():
            unfit.setdefault(row, ("overflow", f"its {view} embedding exceeds 65504, the greatest float16"))
    return stored, unfit


def _as_keys(keys: Iterable[bytes]) -> np.ndarray:
    """[n, 32] uint8."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)


def make_run_batch(backbone: Backbone, precision: Precision | None = None) -> RunBatch:
    """The compiled program of all views; see `make_embed_fn`."""
    return make_embed_fn(backbone, backbone.views, precision)


def made_by(device: Device) -> dict[str, str]:
    """What a shard's sidecar says about its making."""
    return {
        **{package: importlib.metadata.version(package) for package in ("probe-jax", "jax", "jaxlib", "pillow")},
        "device": device.kind,
        "host": platform.node(),
    }


def refuse(failure: Failure) -> NoReturn:
    """Raises: InputError about an image that could not be read."""
    name = display_name(failure.name)
    raise InputError(f"{name}: {failure.reason}: {failure.detail}. Mend it, or pass --on-error skip.")


@contextlib.contextmanager
def memory_explained(batch_size: int) -> Iterator[None]:
    """Turns what jax raises when the device's memory is full, at once or when results are fetched, into advice.

    Raises: OutOfMemoryError.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as err:
        if "RESOURCE_EXHAUSTED" not in str(err):
            raise
        raise OutOfMemoryError(
            f"{jax.devices()[0].device_kind}: a batch of {batch_size} images does not fit into its memory. The batch "
            "size belongs to the cache, since it changes bits: choose a smaller --batch-size and another --out, or a "
            "device with more memory."
        ) from err
