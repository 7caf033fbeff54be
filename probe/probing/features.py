"""Features that lie in memory, or that a cache gives anew for each pass because memory cannot hold them.

Several processes may divide the rows between them: then the pieces of each are its own rows alone, and what it makes
of them has to be joined with what the others make of theirs (`gathered`, `completed`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from probe import distributed

T = TypeVar("T")

Blocks = Iterator[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """[N, D] features that stay in a cache: `shape`, `len` and `[rows]` are an array's, values come from `pieces`.

    read: gives (positions among the rows asked for, [m, D] embeddings) in any order, as `Cache.blocks`. rows: [N] of
    the cache. width: D. transform: what makes float32 [m, D] features of embeddings. divided: each process has a part
    of the rows. fits: memory can hold the features of that part, for who passes over them again and again.
    """

    read: Callable[[np.ndarray], Blocks]
    rows: np.ndarray
    width: int
    transform: Callable[[np.ndarray], np.ndarray] | None = None
    divided: bool = False
    fits: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.width

    def __getitem__(self, which: np.ndarray | slice) -> "Stream":
        return dataclasses.replace(self, rows=self.rows[which])

    def pieces(self, num_rows: int) -> Blocks:
        """All own rows once, as (positions, float32 [num_rows, D]); the last piece may be shorter."""
        at, rows, filled = np.empty(num_rows, np.int64), np.empty((num_rows, self.width), np.float32), 0
        own = self.own
        for of_own, block in self.read(self.rows if own is None else self.rows[own]):
            positions, start = of_own if own is None else own[of_own], 0
            while start < len(positions):  # one shape whatever the blocks: one compiled program
                end = min(start + num_rows - filled, len(positions))
                to = slice(filled, filled + end - start)
                at[to], rows[to] = positions[start:end], block[start:end]
                start, filled = end, to.stop
                if filled == num_rows:
                    yield at, self._transformed(rows)
                    at, rows, filled = np.empty_like(at), np.empty_like(rows), 0
        if filled:
            yield at[:filled], self._transformed(rows[:filled])

    @property
    def own(self) -> np.ndarray | None:
        """Positions of the rows that `pieces` gives, which lie side by side in the cache; None if all."""
        if not self.divided:
            return None
        return np.argsort(self.rows, kind="stable")[distributed.share(len(self.rows))]

    def _transformed(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.transform is None else self.transform(rows)


Features = np.ndarray | Stream


def pieces(features: Features, num_rows: int = 512) -> Blocks:
    """(positions, [at most num_rows, D]) until each row has come once; a stream's are in the order of the cache."""
    if isinstance(features, Stream):
        yield from features.pieces(num_rows)
        return
    for start in range(0, len(features), num_rows):
        part = features[start : start + num_rows]
        yield np.arange(start, start + len(part)), part


def gathered(features: Features, made: T) -> list[T]:
    """What each process has made of its pieces, in their order; of features that are not divided, this one alone."""
    if isinstance(features, Stream) and features.divided:
        return distributed.on_each(lambda: made)
    return [made]


def completed(features: Features, values: np.ndarray) -> np.ndarray:
    """Values [N, …] of all rows, where each process has filled in those of its own pieces; changed in place."""
    if isinstance(features, Stream) and (own := features.own) is not None:
        for at, part in gathered(features, (own, values[own])):
            values[at] = part
    return values


def is_divided(features: Features) -> bool:
    """Whether several processes have a part of the rows each."""
    return isinstance(features, Stream) and features.divided


def held(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Positions [n] and features [n, D] of all pieces, in memory."""
    if isinstance(features, np.ndarray):
        return np.arange(len(features)), features
    own = np.arange(len(features)) if features.own is None else features.own
    at, values, num = np.empty(len(own), np.int64), np.empty((len(own), features.width), np.float32), 0
    for positions, part in pieces(features):
        at[num : num + len(part)], values[num : num + len(part)] = positions, part
        num += len(part)
    return at, values
