"""Several processes that compute as one (`jax.distributed`): how they meet, what they tell one another, how they end.

The devices of all of them are one mesh, and a program on it is the same program in each. What the host does around it
takes one of three forms, which in a lone process are plain calls:

    on_each(f)   each process does it for its own part, and gets what all of them got, in their order
    on_first(f)  the first one does it alone, writing files for one, and the others get its result
    agreed(x)    the first one's value: what is chosen must not hang on a rounding that differs between two hosts

An error in one of them is an error in all, so that nobody waits for a process that has given up. Whoever leaves without
the others, by a signal or a crash, takes them along: they lose contact, which is an `EngineError`.
"""

import atexit
import collections
import contextlib
import functools
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from probe import interrupt
from probe.errors import ConfigError, EngineError, ProbeError

T = TypeVar("T")

_LEAST_BYTES = 1024  # of a message; its length is then a power of two, so that few programs are compiled
_MOST_BYTES = 1 << 28  # sent at once
_LOST = ("Gloo ", "NCCL", "oordination service", "heartbeat")  # in what jax says of lost contact


class Options(Protocol):
    """What the command line says of the processes, as `FinetuneConfig` has it."""

    @property
    def distributed(self) -> bool: ...
    @property
    def coordinator(self) -> str | None: ...
    @property
    def num_processes(self) -> int | None: ...
    @property
    def process_id(self) -> int | None: ...


class _State:
    is_joined = False
    speaks = True  # for all, also once they have parted
    is_alone = False  # the first process, at what it does alone
    exit_code: int | None = None  # of a process that leaves without waiting for the others


def count() -> int:
    """How many processes there are; 1 in what the first of them does alone."""
    if not _State.is_joined or _State.is_alone:
        return 1
    import jax

    return int(jax.process_count())


def index() -> int:
    """Which one this is, from 0."""
    if count() == 1:
        return 0
    import jax

    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes, and speaks for all."""
    return index() == 0 if _State.is_joined else _State.speaks


@contextlib.contextmanager
def joined(options: Options) -> Iterator[None]:
    """Makes this process one of those that compute as one, if the options say so; before jax has looked for devices, or
    where `jax.distributed` is initialized already.

    The processes end together: who comes to the end of the block waits there for the others. All but the first are
    silent within it, unless they fail.
    Raises: ConfigError if nothing says who the others are; EngineError if they cannot be found, or one of them is lost.
    """
    if not options.distributed:
        yield
        return
    import jax

    is_theirs = jax.distributed.is_initialized()
    if not is_theirs:
        _initialize(options)
    _State.is_joined = True
    _State.speaks = jax.process_index() == 0
    atexit.register(_leave)
    try:
        with _stdout_aside():  # where Gloo would tell of its peers
            barrier()
        with contextlib.nullcontext() if is_first() else _silent():
            yield
            barrier()
        if not is_theirs:
            jax.distributed.shutdown()
    except BaseException as err:
        _State.exit_code = err.exit_code if isinstance(err, ProbeError) else 1
        # jax raises either, by where it meets the error
        if not isinstance(err, jax.errors.JaxRuntimeError | ValueError) or not any(sign in str(err) for sign in _LOST):
            raise
        _State.exit_code = EngineError.exit_code
        raise EngineError(
            f"process {jax.process_index()} of {jax.process_count()} lost contact with another, which has ended: see "
            "what that one says. --resume goes on from the last checkpoint."
        ) from err
    finally:
        _State.is_joined = False


def on_each(function: Callable[[], T]) -> list[T]:
    """What the function returned in each process, in their order; all call this, each does its own part.

    Raises: what it raised in any of them (of several the first).
    """
    if count() == 1:
        return [function()]
    own: T | None = None
    error: BaseException | None = None
    try:
        own = function()
    except Exception as err:
        error = err
    told = error if error is None or isinstance(error, ProbeError) else EngineError(f"process {index()}: {error!r}")
    outcomes = [pickle.loads(message) for message in _exchange(pickle.dumps((own, told)))]  # noqa: S301  # our own
    if error is not None and not isinstance(error, ProbeError):
        raise error
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [value for value, _ in outcomes]


def on_first(function: Callable[[], T]) -> T:
    """What the function returned in the first process, which alone calls it. Raises: what it raised there."""

    def alone() -> Any:
        _State.is_alone = True
        try:
            return function()
        finally:
            _State.is_alone = False

    return on_each(alone if is_first() else lambda: None)[0] if count() > 1 else function()  # type: ignore[return-value]


def agreed(value: T) -> T:
    """The first process's value."""
    return on_first(lambda: value)


class Ear:
    """Hears of a signal that asks any of the processes to stop: in all of them after the same step.

    Each step sends what this process has heard along with the work of the devices, and looks at what all had heard
    some steps before, which costs no wait.
    """

    def __init__(self, num_steps_late: int) -> None:
        self._num_steps_late = num_steps_late
        self._sent: collections.deque[Any] = collections.deque()

    def signal(self) -> int | None:
        """The signal's number, or None: called after each step."""
        heard = interrupt.requested_by()
        if count() == 1:
            return heard
        self._sent.append(_greatest(heard or 0))
        if len(self._sent) <= self._num_steps_late:
            return None
        return int(self._sent.popleft()) or None


def barrier() -> None:
    """Waits until all processes are here."""
    if count() > 1:
        _exchange(b"")


def total(tree: Any) -> Any:
    """The sums of all processes' arrays, leaf by leaf, added up by the runtime: the same bits in each of them."""
    if count() == 1:
        return tree
    import jax
    import numpy as np

    from probe.devices import put_rows

    mesh, program = _sums_of_all()
    num_own, num_all = jax.local_device_count(), jax.device_count()

    def place(leaf: Any) -> Any:
        value = np.asarray(leaf)
        rows = np.zeros((num_own, *value.shape), value.dtype)
        rows[0] = value
        return put_rows(rows, mesh, num_all)

    return jax.tree.map(np.asarray, program(jax.tree.map(place, tree)))


def share(num_rows: int) -> slice:
    """The rows that this process has of so many: parts that follow one another, as equal as can be."""
    num, own = count(), index()
    return slice(num_rows * own // num, num_rows * (own + 1) // num)


@functools.cache
def _greatest_of_all() -> tuple[Any, Any]:
    """The mesh of all devices, and the program that finds the greatest of a number on each."""
    import jax

    from probe.devices import data_mesh, whole

    mesh = data_mesh(jax.devices())
    return mesh, jax.jit(lambda values: values.max(), out_shardings=whole(mesh))


@functools.cache
def _sums_of_all() -> tuple[Any, Any]:
    """The mesh of all devices, and the program that adds up what lies on them, leaf by leaf."""
    import jax

    from probe.devices import data_mesh, whole

    mesh = data_mesh(jax.devices())
    return mesh, jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.sum(axis=0), tree), out_shardings=whole(mesh))


def _greatest(value: int) -> Any:
    """The greatest of all processes' numbers, as an array that is being computed."""
    import jax
    import numpy as np

    from probe.devices import put_rows

    mesh, program = _greatest_of_all()
    return program(put_rows(np.full(jax.local_device_count(), value, np.int32), mesh, jax.device_count()))


def _exchange(message: bytes) -> list[bytes]:
    """Every process's message, in their order."""
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    lengths = process_allgather(np.array(divmod(len(message), _MOST_BYTES), np.int32))
    sizes = [int(high) * _MOST_BYTES + int(low) for high, low in np.asarray(lengths).reshape(-1, 2)]
    parts: list[list[bytes]] = [[] for _ in sizes]
    for start in range(0, max(sizes), _MOST_BYTES):
        longest = min(max(sizes) - start, _MOST_BYTES)
        buffer = np.zeros(max(_LEAST_BYTES, 1 << (longest - 1).bit_length()), np.uint8)
        own = np.frombuffer(message[start : start + _MOST_BYTES], np.uint8)
        buffer[: len(own)] = own
        received = np.asarray(process_allgather(buffer)).reshape(len(sizes), -1)
        for number, size in enumerate(sizes):
            parts[number].append(received[number, : max(0, min(size - start, _MOST_BYTES))].tobytes())
    return [b"".join(part) for part in parts]


def _initialize(options: Options) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `probe.interrupt`
    address = options.coordinator
    local = address is not None and address.rpartition(":")[0] in ("127.0.0.1", "localhost")
    try:
        jax.distributed.initialize(
            address,
            options.num_processes,
            options.process_id,
            coordinator_bind_address=address if local else None,  # nobody else has to hear of it
        )
    except ValueError as err:
        raise ConfigError(
            f"--distributed: no Slurm, Open MPI or Kubernetes has started this process, as far as jax can see ({err}). "
            "Give --coordinator, --num-processes and --process-id, or use `probe launch`."
        ) from err
    except RuntimeError as err:
        raise EngineError(f"--distributed: the other processes cannot be found at {address}: {err}") from err


def _leave() -> None:
    """Ends a process that failed: jax's own way waits for the others, who may wait for this one."""
    if _State.exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_State.exit_code)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


@contextlib.contextmanager
def _stdout_aside() -> Iterator[None]:
    sys.stdout.flush()
    kept = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)
