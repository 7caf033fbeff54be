"""Nearest neighbours among embeddings: near duplicates, and rows that are like nothing else.

Distances are 1 - cosine of features standardised by all rows. A copy that was resized or encoded again is nearer than
anything else by a gap: its distance was at most 0.31 of that to the next image, where the nearest pair of 800
different photos had 0.58 (ResNet-50, copies at 60 % of the size or JPEG quality 30). Of copies at 30 % of the size 4 of
20 are found so, and of drawings pairs that a person tells apart at once: where the images are there, `copies` decides.
"""

import numpy as np

NUM_NEIGHBOURS = 10
_GAP = 0.5  # between the two figures above
_BLOCK_ELEMENTS = 40_000_000  # of distances in memory at a time, 160 MB
_OUTLIER_DEVIATIONS = 4.0


def nearest(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest other rows of each row, exactly, in time N²·D.

    Args:
      embeddings: [N, D] float32, N > 1.
    Returns: indices and distances [N, K], ascending; K is 10, or N - 1 if that is less.
    """
    features = embeddings - embeddings.mean(axis=0)
    deviation = features.std(axis=0)
    features /= np.where(deviation > 0, deviation, 1)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    features = (features / np.where(norms > 0, norms, 1)).astype(np.float32)
    num_rows = len(features)
    k = min(NUM_NEIGHBOURS, num_rows - 1)
    indices = np.empty((num_rows, k), np.int64)
    distances = np.empty((num_rows, k), np.float32)
    step = max(1, _BLOCK_ELEMENTS // num_rows)
    for start in range(0, num_rows, step):
        block = 1 - features[start : start + step] @ features.T
        rows = np.arange(len(block))
        block[rows, start + rows] = np.inf
        found = np.argpartition(block, k - 1, axis=1)[:, :k]
        order = np.argsort(block[rows[:, None], found], axis=1, kind="stable")
        indices[start : start + step] = found[rows[:, None], order]
        distances[start : start + step] = np.maximum(block[rows[:, None], indices[start : start + step]], 0)
    return indices, distances


def near_duplicates(indices: np.ndarray, distances: np.ndarray) -> list[tuple[int, int, float]]:
    """Pairs that lie together before a gap: (row, other, likeness from 0.5 to 1, where 1 is no distance at all).

    A row's first j neighbours are its duplicates if the next one is more than twice as far as they are.
    """
    pairs: dict[tuple[int, int], float] = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(distances[:, 1:] > 0, distances[:, :-1] / distances[:, 1:], 1)
    gaps = ratios < _GAP
    for row in np.flatnonzero(gaps.any(axis=1)):
        last = int(np.flatnonzero(gaps[row])[-1])
        for j in range(last + 1):
            other = int(indices[row, j])
            likeness = 1 - float(distances[row, j] / distances[row, last + 1])
            pair = (min(int(row), other), max(int(row), other))
            pairs[pair] = max(pairs.get(pair, 0.0), likeness)
    return [(a, b, score) for (a, b), score in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]


def outliers(distances: np.ndarray) -> list[tuple[int, float]]:
    """(row, deviations above the median) of rows far from their neighbours, the farthest first.

    Far is a mean distance to the ten nearest of more than 4 robust deviations above the median.
    """
    mean = distances.mean(axis=1)
    spread = 1.4826 * np.median(np.abs(mean - np.median(mean)))
    if spread == 0:
        return []
    scores = (mean - np.median(mean)) / spread
    rows = np.flatnonzero(scores > _OUTLIER_DEVIATIONS)
    return [(int(row), float(scores[row])) for row in rows[np.argsort(-scores[rows], kind="stable")]]


def clusters(pairs: list[tuple[int, int]], num_rows: int) -> np.ndarray:
    """[N] the least row of what each row is joined to by pairs, itself where it is alone."""
    root = np.arange(num_rows)

    def find(row: int) -> int:
        while root[row] != row:
            root[row] = root[root[row]]
            row = int(root[row])
        return row

    for a, b in pairs:
        low, high = sorted((find(a), find(b)))
        root[high] = low
    return np.array([find(row) for row in range(num_rows)])
