"""Requests that arrive together are answered together: a bounded room, and a queue that is emptied in batches."""

import asyncio
import concurrent.futures
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class BusyError(Exception):
    """The room is full. `retry_after_s`: when there is likely to be place again, in whole seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class Room:
    """Those whose request is under way, from its first byte to its answer: so much memory is taken, and no more."""

    def __init__(self, limit: int) -> None:
        self.limit, self.num_inside, self.num_refused = limit, 0, 0

    @contextlib.contextmanager
    def place(self, seconds_each: Callable[[], float] = lambda: 0.0) -> Iterator[None]:
        """Takes one place. Raises: BusyError where there is none, `seconds_each` being what one inside takes."""
        if self.num_inside >= self.limit:
            self.num_refused += 1
            raise BusyError(max(1, math.ceil(self.num_inside * seconds_each())))
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1


class Batcher(Generic[T, R]):
    """Gathers items into batches for a function that takes several, and gives each caller its own result.

    A batch leaves when it is full, when nobody else is on the way, or `wait_s` after its first item; while the function
    is busy with one, the next gathers.
    """

    def __init__(
        self,
        function: Callable[[list[T]], Sequence[R]],
        *,
        batch_size: int,
        wait_s: float,
        num_expected: Callable[[], int],
    ) -> None:
        """
        Args:
          function: up to batch_size items -> their results, in a thread of its own, one call at a time.
          num_expected: how many are under way, those in the batch included: it is for the rest that a batch waits.
        """
        self._function, self._size, self._wait_s, self._num_expected = function, batch_size, wait_s, num_expected
        self._queue: asyncio.Queue[tuple[T, asyncio.Future[R]]] = asyncio.Queue()
        self.num_items = self.num_batches = 0
        self.seconds_per_item = 0.0
        """What an item of the last batch took of the function's time."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Batches are made within it; leave it when no one waits for a result any more."""
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="step") as thread:
            task = asyncio.create_task(self._run(thread))
            try:
                yield
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def __call__(self, item: T) -> R:
        """One item's result. Raises: what the function raised on the batch that it was in."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((item, future))
        return await future

    async def _run(self, thread: concurrent.futures.Executor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [(item, future) for item, future in await self._gather() if not future.done()]  # who left is done
            if not batch:
                continue
            started = loop.time()
            try:
                results = await loop.run_in_executor(thread, self._function, [item for item, _ in batch])
                assert len(results) == len(batch)
            except Exception as err:  # it is theirs who wait
                for _, future in batch:
                    if not future.done():
                        future.set_exception(err)
                continue
            self.num_items += len(batch)
            self.num_batches += 1
            self.seconds_per_item = (loop.time() - started) / len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)

    async def _gather(self) -> list[tuple[T, asyncio.Future[R]]]:
        batch = [await self._queue.get()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                while len(batch) < self._size and (self._queue.qsize() or self._num_expected() > len(batch)):
                    batch.append(await self._queue.get())
        return batch
