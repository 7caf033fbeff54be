"""Progress on stderr: a bar on a terminal or in a notebook, a line now and then elsewhere; stdout stays for results.

Nothing of it is said within a verb whose config asks for quiet; what a user must know, as an image that could not be
read, does not come through here.
"""

import contextvars
import functools
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

from probe.notebook import Bar, in_notebook

_PLAIN_SECONDS = 10  # between two lines where stderr is a file or a pipe
_NOTEBOOK_SECONDS = 0.2  # between two looks of a notebook's bar
_quiet = contextvars.ContextVar("quiet", default=False)


class _Config(Protocol):
    @property
    def quiet(self) -> bool: ...


C = TypeVar("C", bound=_Config)
R = TypeVar("R")


def heeds_quiet(verb: Callable[[C], R]) -> Callable[[C], R]:
    """The verb, saying nothing of its progress where its config has `quiet`."""

    @functools.wraps(verb)
    def run(config: C) -> R:
        token = _quiet.set(config.quiet or _quiet.get())
        try:
            return verb(config)
        finally:
            _quiet.reset(token)

    return run


def is_quiet() -> bool:
    """Whether the verb that runs was asked to say nothing of its progress."""
    return _quiet.get()


def say(line: str) -> None:
    """A line on stderr about how the work goes, unless it is to be quiet."""
    if not is_quiet():
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Counts `unit`s towards `total`, if that is known, under the heading `verb`, with the rate and the time left.

    with Progress("embedding", total=len(images), unit="images") as progress:
        progress.advance(32)
    """

    def __init__(self, verb: str, *, total: int | None, unit: str) -> None:
        self._verb, self._total, self._unit = verb, total, unit
        self._done, self._note = 0, ""
        self._started = self._last_line = time.monotonic()
        self._num_lines = 0
        self._is_quiet = is_quiet()
        console = Console(stderr=True)
        self._bar = (
            RichProgress(
                TextColumn(verb),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                _RateColumn(unit),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            if console.is_terminal and not self._is_quiet
            else None
        )
        self._task = self._bar.add_task(verb, total=total, note="") if self._bar else None
        self._in_cell = Bar() if in_notebook() and not self._is_quiet else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self._in_cell:
            self._in_cell.show(self._line(), self._share())
        elif kind is None and self._num_lines:  # who has seen a line sees the last one, too
            self._print_line()

    def note(self, text: str) -> None:
        """What stands beside the rate from now on, as how many have failed."""
        self._note = text
        if self._bar and self._task is not None:
            self._bar.update(self._task, note=text)

    def advance(self, num: int) -> None:
        """`num` more units are done."""
        self._done += num
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=num)
        elif self._in_cell:
            if time.monotonic() - self._last_line > _NOTEBOOK_SECONDS:
                self._last_line = time.monotonic()
                self._in_cell.show(self._line(), self._share())
        elif not self._is_quiet and time.monotonic() - self._last_line > _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._print_line()

    def _print_line(self) -> None:
        self._num_lines += 1
        print(self._line(), file=sys.stderr, flush=True)

    def _share(self) -> float | None:
        return min(self._done / self._total, 1.0) if self._total else None

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        rate = self._done / max(seconds, 1e-9)
        of, left = "", ""
        if self._total is not None:
            of = f" of {self._total:,}"
            left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
            left = f", done in {seconds:.0f} s" if self._done >= self._total else left
        note = f"; {self._note}" if self._note else ""
        return f"{self._verb}: {self._done:,}{of} {self._unit}, {rate:.1f} {self._unit}/s{left}{note}"


class Stages:
    """Progress of work whose parts follow one another: a new heading ends the bar of the one before.

    with Stages() as report:
        report("choosing λ", 12, 85, "fits")
    """

    def __init__(self) -> None:
        self._verb, self._done = "", 0
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, error, trace)
            self._progress = None

    def __call__(self, verb: str, num_done: int, total: int | None, unit: str) -> None:
        """`num_done` of `total` units are done under this heading; None if nobody knows how many there are."""
        if self._progress is None or verb != self._verb or num_done < self._done:
            self.__exit__(None, None, None)
            self._progress = Progress(verb, total=total, unit=unit).__enter__()
            self._verb, self._done = verb, 0
        self._progress.advance(num_done - self._done)
        self._done = num_done


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: RichTask) -> Text:
        return Text(f"{task.speed:.1f} {self._unit}/s" if task.speed else "")
