"""StageTimes: where the time of `probe embed` goes, which stage bounds it, and how much of the device it uses.

One thread moves images from stage to stage and is, at any time, either waiting for one of them or at work itself, so
that what it waited adds up, with its own work, to the time that the run took:

    files    reading, in the workers or, from archives, in that thread itself
    decode   decoding, resizing and cropping, in the workers
    device   sending batches to it and waiting for what it computes
    write    waiting for the shard before to be on the disk
    compile  making the program, once

Files and decode are done by the same workers; what was waited for them is divided as their own time is.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_LITTLE = 0.05  # share of the time below which a stage is not said to bound anything


@dataclasses.dataclass
class StageTimes:
    """Seconds, as they are counted while a run lasts; add nothing after `stop`."""

    files_s: float = 0.0  # worker-seconds of reading
    decode_s: float = 0.0  # worker-seconds of decoding
    write_s: float = 0.0  # seconds of the thread that writes
    compile_s: float = 0.0
    images_wait_s: float = 0.0  # waited for workers
    device_wait_s: float = 0.0
    write_wait_s: float = 0.0
    num_images: int = 0  # computed
    num_batches: int = 0
    num_dry: int = 0  # batches before which the device had nothing left to do
    wall_s: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.perf_counter()
        self._last: Any = None  # what the device was given last

    @contextlib.contextmanager
    def timed(self, field: str) -> Iterator[None]:
        """Adds the time within to a field."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, field, getattr(self, field) + time.perf_counter() - started)

    def waited(self, images: Iterable[T]) -> Iterator[T]:
        """The same images; the time until each is there is waiting for workers."""
        iterator = iter(images)
        while True:
            started = time.perf_counter()
            try:
                image = next(iterator)
            except StopIteration:
                return
            finally:
                self.images_wait_s += time.perf_counter() - started
            yield image

    def sending(self) -> None:
        """Called just before a batch is sent: notes whether the device has run out of work."""
        if self._last is not None and self._last.is_ready():
            self.num_dry += 1

    def sent(self, output: Any, num_images: int) -> None:
        """Called just after: `output` is one of the arrays that the device will fill."""
        self._last = output
        self.num_batches += 1
        self.num_images += num_images

    def stop(self) -> None:
        """The run is over."""
        self.wall_s = time.perf_counter() - self._started
        self._last = None

    def seconds(self) -> dict[str, float]:
        """Seconds waited for each stage, and "program" for this program's own work; they sum to `wall_s`."""
        worked = self.files_s + self.decode_s
        share = self.files_s / worked if worked else 0.0
        waits = {
            "files": self.images_wait_s * share,
            "decode": self.images_wait_s * (1 - share),
            "device": self.device_wait_s,
            "write": self.write_wait_s,
            "compile": self.compile_s,
        }
        return {**waits, "program": max(0.0, self.wall_s - sum(waits.values()))}

    def bound(self) -> str:
        """The stage that was waited for longest: what to make faster, once the program is compiled."""
        running = {stage: seconds for stage, seconds in self.seconds().items() if stage != "compile"}
        stage = max(running, key=running.__getitem__)
        return stage if running[stage] > _LITTLE * self.wall_s else "none"

    def utilisation(self, flops_per_image: float, flops_per_second: float) -> float:
        """Share of the device's measured rate of matrix products that the run made use of, compilation left out."""
        running = max(self.wall_s - self.compile_s, 1e-9)
        return self.num_images * flops_per_image / running / flops_per_second

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "seconds": round(self.wall_s, 3),
            "waited": {stage: round(seconds, 3) for stage, seconds in self.seconds().items()},
            "worked": {
                "files": round(self.files_s, 3),
                "decode": round(self.decode_s, 3),
                "write": round(self.write_s, 3),
            },
            "bound_by": self.bound(),
            "num_batches": self.num_batches,
            "num_dry_batches": self.num_dry,
        }


_ADVICE = {
    "files": "reading files bounds this run: a local disk, or more --num-workers for a slow network one, would help",
    "decode": "decoding bounds this run: more cores, or --decode fast for large JPEGs, would help",
    "device": "the device bounds this run, as it should",
    "write": "writing bounds this run: --out on a faster disk would help",
    "program": "the program itself bounds this run: the images are tiny, or the cores are taken by others",
    "none": "nothing bounds this run: it was over as soon as the program was compiled",
}


def describe_stages(stages: dict[str, Any]) -> str:
    """The table, from what `to_json` gave and, if they were measured, "flops_per_image" and "utilisation"."""
    lines = ["stage      waited s   share   worked s"]
    for stage, seconds in stages["waited"].items():
        worked = stages["worked"].get(stage)
        share = seconds / stages["seconds"] if stages["seconds"] else 0.0
        lines.append(
            f"{stage:<9}{seconds:10.2f}{share:8.1%}" + (f"{worked:11.2f}" if worked is not None else " " * 10 + "-")
        )
    lines.append(f"{'total':<9}{stages['seconds']:10.2f}")
    lines.append(_ADVICE[stages["bound_by"]])
    if stages.get("utilisation") is not None:
        lines.append(
            f"{stages['flops_per_image'] / 1e9:.2f} GFLOP an image: {stages['utilisation']:.0%} of the "
            f"{stages['flops_per_second'] / 1e9:,.0f} GFLOP/s that {stages['precision']} matrix products reach here"
        )
    if dry := stages["num_dry_batches"]:
        lines.append(f"the device ran out of work before {dry:,} of {stages['num_batches']:,} batches")
    return "\n".join(lines)
