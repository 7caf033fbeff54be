"""Progress on stderr: a bar on a terminal, a line now and then elsewhere; stdout stays for results."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

_PLAIN_SECONDS = 10  # between two lines where stderr is a file or a pipe


class Progress:
    """Counts `unit`s towards `total` under the heading `verb`, with the rate and the time left.

    with Progress("embedding", total=len(images), unit="images") as progress:
        progress.advance(32)
    """

    def __init__(self, verb: str, *, total: int, unit: str) -> None:
        self._verb, self._total, self._unit = verb, total, unit
        self._done = 0
        self._started = self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._bar = (
            RichProgress(
                TextColumn(verb),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                _RateColumn(unit),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            if console.is_terminal
            else None
        )
        self._task = self._bar.add_task(verb, total=total) if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, num: int) -> None:
        """`num` more units are done."""
        self._done += num
        if self._bar and self._task is not None:
            self._bar.update(self._task, advance=num)
        elif time.monotonic() - self._last_line > _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._print_line()

    def _print_line(self) -> None:
        rate = self._done / (time.monotonic() - self._started)
        left = (self._total - self._done) / rate if rate else float("inf")
        print(
            f"{self._verb}: {self._done:,} of {self._total:,} {self._unit}, "
            f"{rate:.1f} {self._unit}/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: RichTask) -> Text:
        return Text(f"{task.speed:.1f} {self._unit}/s" if task.speed else "")
