"""Ctrl-C and SIGTERM: the verb is asked to stop, and if it cannot, the process ends all the same.

A verb runs in a thread of its own and asks now and then whether to stop; the main thread only waits, so that
a signal is answered at once whatever the verb is in (a compilation can take a minute and hears nothing). What
ends within `_GRACE_SECONDS` ends in good order; the rest is cut off, which a cache survives by construction. A training
asks for more time (`patiently`): its last steps are in no file yet.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from probe.errors import ProbeError
from probe.storage import remove_partials

T = TypeVar("T")

_GRACE_SECONDS = 4.0  # from the first signal to the end
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(ProbeError):  # noqa: N818  # named as KeyboardInterrupt is: it is no error
    """The user, or the system, ended the run."""

    def __init__(self, signum: int, hint: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (f": {hint}" if hint else ""))
        self.signum, self.hint = signum, hint
        self.exit_code = 128 + signum  # as shells count: 130 for SIGINT, 143 for SIGTERM

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int, str]]:
        return Interrupted, (self.signum, self.hint)  # what it is made of, where it goes to another process


class _State:
    signum: int | None = None  # the signal that asked to stop
    is_patient: bool = False
    before_stop: str = ""


def stop_requested() -> bool:
    """Whether the verb should end: for loops that have something to put in order first."""
    return _State.signum is not None


def requested_by() -> int | None:
    """The signal that asked the verb to end, if one did."""
    return _State.signum


def check() -> None:
    """Raises: Interrupted if the verb should end."""
    if _State.signum is not None:
        raise Interrupted(_State.signum)


@contextlib.contextmanager
def patiently(what: str) -> Iterator[None]:
    """Within it the verb, which checks often, may take its time to stop; only a second signal ends it at once.

    Args:
      what: it has to do before it stops, for the line on stderr: "saving a checkpoint".
    """
    _State.is_patient, _State.before_stop = True, what
    try:
        yield
    finally:
        _State.is_patient = False


def run_interruptibly(function: Callable[[], T]) -> T:
    """Calls `function` in a thread and returns what it returns, or raises what it raises.

    SIGINT or SIGTERM asks it to stop (see `check`); after 4 s, or at a second signal, the process ends
    without it, with exit code 130 or 143. Outside the main thread, where no signal arrives, the call is a
    plain one.
    Raises: Interrupted if it stopped in time.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            results.append(function())
        except BaseException as err:  # carried over to the main thread, whatever it is
            errors.append(err)
        finally:
            done.set()

    with _signals_heard():
        threading.Thread(target=work, name="verb", daemon=True).start()
        deadline = None
        while not done.wait(0.05):  # short: how late a signal is heard where waiting cannot be interrupted
            if _State.signum is None:
                continue
            if deadline is None and _State.is_patient:
                print(f"stopping: {_State.before_stop}; a second signal ends it at once", file=sys.stderr)
            if deadline is None or _State.is_patient:
                deadline = time.monotonic() + _GRACE_SECONDS
            if time.monotonic() > deadline:
                _end_now(_State.signum)
        signum = _State.signum
    if results:
        return results[0]
    if signum is not None and not isinstance(errors[0], ProbeError):
        raise Interrupted(signum) from errors[0]  # whatever broke, broke in stopping
    raise errors[0]


@contextlib.contextmanager
def _signals_heard() -> Iterator[None]:
    def hear(signum: int, _frame: object) -> None:
        if _State.signum is not None:
            _end_now(signum)
        _State.signum = signum

    before = {signum: signal.signal(signum, hear) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _State.signum = None


def _end_now(signum: int) -> NoReturn:
    remove_partials()
    os.write(2, f"probe: error: stopped by {signal.Signals(signum).name}\n".encode())
    sys.stdout.flush()
    os._exit(128 + signum)
