"""How embeddings become the features that a head is fitted on, and how that is undone in its weights."""

import dataclasses
import functools
from typing import Any, Literal, overload

import numpy as np

from probe.heads import Params, fold_scaling
from probe.probing.features import Features, Stream, gathered, pieces

Kind = Literal["standard", "l2", "none"]
_CONSTANT = 1e-6  # a deviation below this share of the mean is float32's rounding, not a feature


@dataclasses.dataclass(frozen=True)
class Scaling:
    """x becomes (x - mean) / scale, or (x/‖x‖ - mean) / scale where `unit_norm`.

    mean, scale: [D] float64; scale 0 marks a constant feature, which becomes 0. Features are centred whatever the
    kind: the bias is free, so that only the numbers' conditioning changes.
    """

    unit_norm: bool
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, embeddings: Features, kind: Kind) -> "Scaling":
        """From the statistics of [N, D] embeddings, the fitted rows alone, in one pass (Chan et al. 1983)."""
        nothing: _Moments = 0, np.zeros(embeddings.shape[1]), np.zeros(embeddings.shape[1])
        own = nothing
        for _, part in pieces(embeddings):
            rows = unit_rows(part) if kind == "l2" else part
            squares = len(rows) * rows.var(axis=0, dtype=np.float64)
            own = _merged(own, (len(rows), rows.mean(axis=0, dtype=np.float64), squares))
        count, mean, squares = functools.reduce(_merged, gathered(embeddings, own), nothing)
        if kind != "standard":
            return cls(kind == "l2", mean, np.ones_like(mean))
        deviation = np.sqrt(squares / count)
        return cls(False, mean, np.where(deviation > _CONSTANT * np.abs(mean), deviation, 0))

    @overload
    def apply(self, embeddings: np.ndarray) -> np.ndarray: ...
    @overload
    def apply(self, embeddings: Features) -> Features: ...
    def apply(self, embeddings: Features) -> Features:
        """[N, D] float32 features, computed in float64 and rounded once; of a stream, as they are read."""
        if isinstance(embeddings, Stream):
            return dataclasses.replace(embeddings, transform=self.apply)
        rows = unit_rows(embeddings) if self.unit_norm else embeddings
        scaled = rows - self.mean
        scaled /= np.where(self.scale > 0, self.scale, np.inf)
        return np.asarray(scaled, np.float32)

    def fold(self, params: Params) -> Params:
        """Parameters that do to raw embeddings what `params` do to features."""
        folded = fold_scaling(params, self.mean, self.scale)
        return {**folded, "unit_norm": np.ones((), np.float32)} if self.unit_norm else folded


_Moments = tuple[int, np.ndarray, np.ndarray]  # number of rows, their mean, and their squared distances from it, [D]


def _merged(some: _Moments, others: _Moments) -> _Moments:
    if not others[0]:
        return some
    shift, share = others[1] - some[1], others[0] / (some[0] + others[0])
    squares = some[2] + (others[2] + some[0] * share * shift**2)
    return some[0] + others[0], some[1] + share * shift, squares


def unit_rows(embeddings: np.ndarray) -> np.ndarray:
    """[N, D] divided by each row's norm, in float64; a row of zeros stays."""
    rows = np.asarray(embeddings, np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    divided: Any = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return np.asarray(divided)
