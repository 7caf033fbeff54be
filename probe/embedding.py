"""From images to the contents of one shard: pure, idempotent, and the same wherever it runs.

The unit of work of `probe embed`, be it in one process, in several that share a cache, or on a cluster: given
the images of a slice, the compiled backbone, and which content keys are known, it says what the shard holds.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from probe import interrupt
from probe.backbones import Backbone, make_embed_fn
from probe.cache import FAILED, KNOWN, Facts, Failure, ShardContents
from probe.errors import OutOfMemoryError
from probe.images import ImageError, LoadedImage
from probe.sources import Example

_BATCHES_IN_FLIGHT = 2  # the device computes one while the next is sent

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
    read: list[LoadedImage[Item]] = []
    rows: list[int] = []
    row_of: dict[bytes, int] = {}  # in the order in which they are embedded
    failures: dict[bytes, Failure] = {}
    batches = _Batches(run_batch, batch_size)
    for image in images:
        interrupt.check()
        if image.failure is not None or image.key is None:
            failure = Failure(image.example.example.name, *_reason(image.failure))
            failures[failure.name] = failure
            rows.append(FAILED)
            on_failure(failure)
        elif image.key in row_of:
            rows.append(row_of[image.key])
        elif is_known(image.key):
            rows.append(KNOWN)
        else:
            assert image.pixels is not None, "only what is known may be skipped"
            rows.append(row_of.setdefault(image.key, len(row_of)))
            batches.add(image.pixels)
        read.append(dataclasses.replace(image, pixels=None))
        on_image()
    embeddings = batches.finish()
    stored, unfit = _as_stored(embeddings, dtype)
    kept = np.array([row not in unfit for row in range(len(row_of))], bool)
    new_row = np.cumsum(kept) - 1
    for position, (image, row) in enumerate(zip(read, rows, strict=True)):
        if row in unfit:
            name = image.example.example.name
            failures[name] = Failure(name, *unfit[row])
            rows[position] = FAILED
            on_failure(failures[name])
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
        keys=_as_keys(row_of)[kept],
        embeddings={view: array[kept] for view, array in stored.items()},
        failures=tuple(failures[name] for name in facts.names if name in failures),
    )


class _Batches:
    """Collects images, sends full batches to the device, and fetches what it has computed meanwhile."""

    def __init__(self, run_batch: RunBatch, batch_size: int) -> None:
        self._run, self._size = run_batch, batch_size
        self._pixels: list[np.ndarray] = []
        self._in_flight: collections.deque[tuple[dict[str, jax.Array], int]] = collections.deque()
        self._fetched: dict[str, list[np.ndarray]] = {}

    def add(self, pixels: np.ndarray) -> None:
        """One more image."""
        self._pixels.append(pixels)
        if len(self._pixels) == self._size:
            self._send()

    def finish(self) -> dict[str, np.ndarray]:
        """{view: [R, D] float32} of all images, in the order in which they were added; empty if there were none."""
        if self._pixels:
            self._send()
        while self._in_flight:
            self._fetch()
        return {view: np.concatenate(parts) for view, parts in self._fetched.items()}

    def _send(self) -> None:
        num = len(self._pixels)
        batch = np.zeros((self._size, *self._pixels[0].shape), np.uint8)  # padding does not change bits
        np.stack(self._pixels, out=batch[:num])
        self._pixels.clear()
        self._in_flight.append((self._run(batch), num))
        if len(self._in_flight) > _BATCHES_IN_FLIGHT:
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


def make_run_batch(backbone: Backbone) -> RunBatch:
    """The compiled program on the backbone's weights, which are sent to the device once."""
    embed_fn = make_embed_fn(backbone, backbone.views)
    return functools.partial(embed_fn, jax.device_put(backbone.variables))


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
