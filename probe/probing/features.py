"""Features that lie in memory, or that a cache gives anew for each pass because memory cannot hold them."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

Blocks = Iterator[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """[N, D] features that stay in a cache: `shape`, `len` and `[rows]` are an array's, values come from `pieces`.

    read: gives (positions among the rows asked for, [m, D] embeddings) in any order, as `Cache.blocks`. rows: [N] of
    the cache. width: D. transform: what makes float32 [m, D] features of embeddings.
    """

    read: Callable[[np.ndarray], Blocks]
    rows: np.ndarray
    width: int
    transform: Callable[[np.ndarray], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.width

    def __getitem__(self, which: np.ndarray | slice) -> "Stream":
        return dataclasses.replace(self, rows=self.rows[which])

    def pieces(self, num_rows: int) -> Blocks:
        """All rows once, as (positions, float32 [num_rows, D]); the last piece may be shorter."""
        at, rows, filled = np.empty(num_rows, np.int64), np.empty((num_rows, self.width), np.float32), 0
        for positions, block in self.read(self.rows):
            start = 0
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
