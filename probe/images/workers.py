"""Decoding in worker processes: ordered, bounded, and no image can take another one down with it.

Owns the processes and what is said over their pipes. A worker is a plain `python` started with `subprocess`
(not `multiprocessing`: forking a process that runs jax deadlocks, spawning re-imports the user's script). It
reads a file or gets its bytes, hashes them, decodes, and answers; it imports numpy and Pillow only. One that
dies or hangs is replaced: a death is tried once more, then the image has failed; a hang is not tried again.

    request   flags u8, size u32, then a path or the bytes of an image
    reply     status u8, SHA-256 [32], size i64, mtime_ns i64, seconds of reading and of decoding f64,
              payload size u32, then pixels or a JSON text
    asking    the first reply is the key alone; one byte back says whether to go on to a second reply

A worker dies with its parent: at the end of its standard input or, stuck inside a decoder, by an alarm.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
from PIL import AvifImagePlugin

from probe.images.decoder import MAX_PIXELS, ImageError
from probe.images.files import MAX_BYTES, read_image_file, too_many_bytes
from probe.images.preprocessing import Preprocessing, load_image

T = TypeVar("T")

_REQUEST = struct.Struct("<BI")
_REPLY = struct.Struct("<B32sqqddI")
_SETTINGS = struct.Struct("<I")
_IS_PATH, _ASK = 1, 2
_PIXELS, _FAILED, _UNREAD, _KEY = range(4)
# The parent's sys.path, and nothing of the working folder: a numpy.py beside the photos is not for us.
_BOOT = "import sys; sys.path[:] = sys.argv[1:]; from probe.images.workers import serve; serve()"
_START_SECONDS = 120.0  # to import numpy and Pillow, from a slow network disk too
_ALARM_GRACE = 5.0  # seconds after the parent's own limit, should there be no parent any more
_AHEAD_BYTES = 256 << 20  # of images given as bytes that wait for a worker
_ASK_MEMORY = 16  # images decoded since the last skipped one, after which workers no longer ask first


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedImage(Generic[T]):
    """What became of one image: pixels, a failure, or neither because its key was to be skipped."""

    example: T
    key: bytes | None  # SHA-256 of the file's bytes, 32 bytes; None if they could not be read
    pixels: np.ndarray | None  # [H, W, 3] uint8
    failure: ImageError | None
    size: int = 0  # bytes that were hashed
    mtime_ns: int = 0  # of the file that was hashed; 0 if bytes were given
    read_s: float = 0.0  # that a worker took to read and hash it
    decode_s: float = 0.0  # that it took to decode, resize and crop it


def load_images(
    items: Iterable[tuple[T, bytes | Path | ImageError]],
    preprocessing: Preprocessing,
    *,
    num_workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    skip_keys: Callable[[bytes], bool] = lambda key: False,
    timeout_s: float = 30.0,
    ahead: int = 64,
) -> Iterator[LoadedImage[T]]:
    """Decodes images in worker processes and yields them in the order of `items`.

    Args:
      items: (anything, what to load); an ImageError is passed on as that image's failure.
      num_workers: processes; None: one per core.
      max_pixels: width x height that is still decoded.
      skip_keys: an image whose key it accepts is hashed and yielded without pixels. It is asked here when the
        image's turn comes, and perhaps before in another thread: a key once accepted must stay so.
      timeout_s: for reading and decoding one image.
      ahead: images that are read ahead of the one yielded (at least four per worker).
    Raises: RuntimeError if no worker can be started. A bad image raises nothing: see `LoadedImage.failure`.
    """
    with ImageLoader(
        preprocessing, num_workers=num_workers, max_pixels=max_pixels, skip_keys=skip_keys, timeout_s=timeout_s
    ) as loader:
        yield from loader.load(items, ahead=ahead)


class ImageLoader:
    """Worker processes that stay warm from one sequence of images to the next, for who loads several."""

    def __init__(
        self,
        preprocessing: Preprocessing,
        *,
        num_workers: int | None = None,
        max_pixels: int = MAX_PIXELS,
        skip_keys: Callable[[bytes], bool] = lambda key: False,
        timeout_s: float = 30.0,
    ) -> None:
        """Args: as for `load_images`. Processes are started when there is work for them."""
        self._num_workers = num_workers or os.cpu_count() or 1
        self._skip_keys = skip_keys
        self._pool = _Pool(self._num_workers, preprocessing, max_pixels, timeout_s, skip_keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begins to start the processes, for who has something else to do before there are images."""
        self._pool.start()

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()

    def submit(self, example: T, content: bytes | Path | ImageError) -> concurrent.futures.Future[LoadedImage[T]]:
        """One image, for who waits in another way than in order; the caller bounds how many are under way."""
        return self._pool.submit(example, content)

    def load(
        self, items: Iterable[tuple[T, bytes | Path | ImageError]], *, ahead: int = 64
    ) -> Iterator[LoadedImage[T]]:
        """As `load_images`, with these processes."""
        pending: collections.deque[tuple[concurrent.futures.Future[LoadedImage[T]], int]] = collections.deque()
        ahead, held = max(ahead, 4 * self._num_workers), 0  # images, and bytes of those that were given as bytes

        def next_image() -> LoadedImage[T]:
            nonlocal held
            future, num_bytes = pending.popleft()
            held -= num_bytes
            return self._settle(future.result())

        for example, content in items:
            num_bytes = len(content) if isinstance(content, bytes) else 0
            held += num_bytes
            pending.append((self._pool.submit(example, content), num_bytes))
            while len(pending) > ahead or held > _AHEAD_BYTES:
                yield next_image()
        while pending:
            yield next_image()

    def _settle(self, image: LoadedImage[T]) -> LoadedImage[T]:
        if image.key is not None and self._skip_keys(image.key):
            return dataclasses.replace(image, pixels=None, failure=None)
        assert image.failure or image.pixels is not None, "skip_keys took back a key it had accepted"
        return image


class _Pool:
    """Threads that each own one worker process and do nothing but wait for it."""

    def __init__(
        self,
        num_workers: int,
        preprocessing: Preprocessing,
        max_pixels: int,
        timeout_s: float,
        skip_keys: Callable[[bytes], bool],
    ) -> None:
        self._settings = json.dumps([preprocessing.to_config(), max_pixels, timeout_s]).encode()
        self._shape = (*preprocessing.image_size, 3)
        self._timeout_s = timeout_s
        self._skip_keys = skip_keys
        self._since_skip = 0  # a hint, shared without a lock
        self._num_workers = num_workers
        self._threads = concurrent.futures.ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
        self._mine = threading.local()  # .worker, of this thread
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()  # of _workers and _closed
        self._closed = False

    def submit(self, example: T, content: bytes | Path | ImageError) -> concurrent.futures.Future[LoadedImage[T]]:
        return self._threads.submit(self._load, example, content)

    def start(self) -> None:
        for _ in range(self._num_workers):
            self._threads.submit(self._worker)  # one that fails will fail again, and be heard, when there is work

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.end()

    def _load(self, example: T, content: bytes | Path | ImageError) -> LoadedImage[T]:
        failure = content if isinstance(content, ImageError) else None
        if isinstance(content, bytes) and len(content) > MAX_BYTES:
            failure = too_many_bytes(len(content))
        attempts = 2
        while failure is None:
            assert not isinstance(content, ImageError)
            try:
                return self._exchange(self._worker(), example, content)
            except TimeoutError:
                self._discard()
                failure = ImageError("timeout", f"not decoded within {self._timeout_s:g} s")
            except OSError:  # the pipe is broken: the worker is gone
                status = self._discard()
                attempts -= 1
                if attempts == 0:
                    failure = ImageError("crashed", f"its decoder crashed twice ({_describe_exit(status)})")
        return LoadedImage(example, None, None, failure)

    def _exchange(self, worker: "_Worker", example: T, content: bytes | Path) -> LoadedImage[T]:
        """One request and its reply. Raises: TimeoutError, or another OSError if the worker is gone."""
        deadline = time.monotonic() + self._timeout_s
        flags, payload = (_IS_PATH, os.fsencode(content)) if isinstance(content, Path) else (0, content)
        if self._since_skip < _ASK_MEMORY:
            flags |= _ASK
        worker.send(_REQUEST.pack(flags, len(payload)), deadline)
        worker.send(payload, deadline)
        status, key, *facts, length = worker.receive_struct(_REPLY, deadline)
        if status == _KEY:
            skip = self._skip_keys(key)
            worker.send(bytes([not skip]), deadline)
            self._since_skip = 0 if skip else self._since_skip + 1
            if skip:
                return LoadedImage(example, key, None, None, *facts)
            status, key, *facts, length = worker.receive_struct(_REPLY, deadline)
        elif status == _PIXELS and self._skip_keys(key):
            self._since_skip = 0  # that decode was for nothing: ask again for a while
        if status == _PIXELS:
            pixels = np.empty(self._shape, np.uint8)
            worker.receive_into(pixels.data.cast("B"), deadline)
            return LoadedImage(example, key, pixels, None, *facts)
        text = bytearray(length)
        worker.receive_into(memoryview(text), deadline)
        failure = ImageError(*json.loads(text))
        return LoadedImage(example, key if status == _FAILED else None, None, failure, *facts)

    def _worker(self) -> "_Worker":
        """This thread's worker, started where there is none.

        Raises: OSError if it was killed at once; RuntimeError if it does not start.
        """
        worker: _Worker | None = getattr(self._mine, "worker", None)
        if worker is not None:
            return worker
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool of decoding workers is closed")
            try:
                worker = self._mine.worker = _Worker()
            except OSError as err:
                raise RuntimeError(f"a decoding worker cannot be started: {err}") from err
            self._workers.add(worker)
        deadline = time.monotonic() + _START_SECONDS
        try:
            worker.send(_SETTINGS.pack(len(self._settings)) + self._settings, deadline)
            worker.receive_struct(_SETTINGS, deadline)
        except OSError as err:
            status = self._discard()
            if status is not None and status < 0 and not isinstance(err, TimeoutError):
                raise
            reason = f"{_describe_exit(status)}; it says why above"
            raise RuntimeError(f"a decoding worker did not start: {reason}") from err
        return worker

    def _discard(self) -> int | None:
        """Ends this thread's worker, if there is one, and returns its exit code."""
        worker: _Worker | None = self._mine.worker
        self._mine.worker = None
        if worker is None:
            return None
        with self._lock:
            self._workers.discard(worker)
        return worker.end()


class _Worker:
    """The parent's end of one process. Every wait has a deadline, as `time.monotonic` counts."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-W", "ignore", "-c", _BOOT, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # Ctrl-C is for the parent, which then ends its workers
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin
        assert self._process.stdout
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        for descriptor in (self._to, self._from):
            os.set_blocking(descriptor, False)
            with contextlib.suppress(OSError, AttributeError):  # Linux: an image in one piece, not in three
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, 1 << 18)

    def send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._to, view) :]
            except BlockingIOError:
                _wait(self._to, select.POLLOUT, deadline)

    def receive_into(self, view: memoryview, deadline: float) -> None:
        while view:
            try:
                num_bytes = os.readv(self._from, [view])
            except BlockingIOError:
                _wait(self._from, select.POLLIN, deadline)
                continue
            if num_bytes == 0:
                raise ConnectionResetError("the worker is gone")
            view = view[num_bytes:]

    def receive_struct(self, layout: struct.Struct, deadline: float) -> tuple[Any, ...]:
        data = bytearray(layout.size)
        self.receive_into(memoryview(data), deadline)
        return layout.unpack(data)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int | None:
        """Kills the process if it is still there. Returns: its exit code; None if it does not die."""
        for patience_s in (0.2, 2.0):  # one that crashes may be busy dying; one stuck in the kernel stays
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()
        return self._process.returncode


def _describe_exit(code: int | None) -> str:
    return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    # A parent that was stopped (Ctrl-Z) finds its deadline past but the answer there: look at least once.
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def serve() -> None:
    """The worker's side: answers requests on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the cores are taken: there is a worker for each
    (length,) = _SETTINGS.unpack(requests.read(_SETTINGS.size))
    config, max_pixels, timeout_s = json.loads(requests.read(length))
    preprocessing = Preprocessing.from_config(config)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # whatever a decoder prints, it neither reaches the pipe nor the screen
        os.dup2(nowhere, descriptor)

    def reply(status: int, key: bytes, facts: tuple[float, ...], payload: bytes | memoryview = b"") -> None:
        replies.write(_REPLY.pack(status, key, *facts, len(payload)))
        replies.write(payload)
        replies.flush()

    replies.write(_SETTINGS.pack(0))
    replies.flush()
    while header := requests.read(_REQUEST.size):
        flags, length = _REQUEST.unpack(header)
        content = requests.read(length)
        signal.setitimer(signal.ITIMER_REAL, timeout_s + _ALARM_GRACE)
        key, status, size, mtime_ns, started, read_s = bytes(32), _UNREAD, 0, 0, time.perf_counter(), 0.0
        try:
            data, mtime_ns = read_image_file(content) if flags & _IS_PATH else (content, 0)
            key, status, size = hashlib.sha256(data).digest(), _FAILED, len(data)
            read_s = time.perf_counter() - started
            if flags & _ASK:
                reply(_KEY, key, (size, mtime_ns, read_s, 0.0))
                if requests.read(1) != b"\1":
                    continue
            started = time.perf_counter()
            pixels = load_image(data, preprocessing, max_pixels=max_pixels)
        except ImageError as err:
            payload: bytes | memoryview = json.dumps([err.reason, str(err)]).encode()
        except MemoryError:
            payload = json.dumps(["memory", "not enough memory to decode it"]).encode()
        else:
            status, payload = _PIXELS, pixels.data.cast("B")
        signal.setitimer(signal.ITIMER_REAL, 0)
        last_s = time.perf_counter() - started
        reply(status, key, (size, mtime_ns, *((last_s, 0.0) if status == _UNREAD else (read_s, last_s))), payload)
