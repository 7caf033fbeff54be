"""The convex solver behind the linear head, with its certificate.

Minimises over weights W [D, M] and biases b [M]

    Σ_i r_i·CE(x_i W + b, y_i) / Σ_i r_i + (λ/2)·‖W‖²,        λ = 1 / (C·Σ r_i) in scikit-learn's terms,

where r_i is the weight of row i and CE the cross-entropy of a softmax over M classes or, for M = 1, of one sigmoid.
Biases are free of the penalty, and a `prior` makes it (λ/2)·‖W - prior‖². Softmax biases are known only up to a
constant; theirs sum to zero here, so that the optimum is unique and can be compared. How it is done:
`probe.probing.lanes`.

Paths run in float32, which is enough to rank λ. The final fit ends in float64, since near the optimum the objective
changes by less than float32 can tell: float32's gradient leads there, and float64 proves it. Features are stored once,
in float32, or streamed (`probe.probing.passes`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probe.heads import num_logits
from probe.probing.features import Features, Stream, gathered, held, is_divided, pieces
from probe.probing.lanes import Path, Watch, gradient, walk
from probe.probing.passes import NOTHING, AnyRows, DividedRows, Lanes, Rows, StreamedRows
from probe.probing.separation import check_not_separated
from probe.probing.solution import FoldPath, Solution

_CHUNK = 1024  # rows whose logits for 500 columns (2 MB) stay in the cache: 377 GFLOP/s; 310 with 4,096
_STREAMED = 512  # rows at a time where memory is short: with 1,024 features a pass in float64 takes some 30 MB
_LARGE = 500_000_000  # multiplications of a product from which a pass in float64 takes a fiftieth of compiling
_IN_FLOAT32 = 200  # iterations of a final fit after which float64 must take over
_MARGIN = 0.5  # of the gradient tolerance that is left to float32's rounding, so that float64 has but to confirm it
_PROVEN = 1e-6  # share of the objective by which a converged fit may be above the optimum, proven by its gradient


class Problem:
    """Rows and classes of which heads are fitted: on the device once for all folds and all λ, or streamed."""

    def __init__(
        self,
        features: Features,
        labels: np.ndarray,
        num_classes: int,
        *,
        weights: np.ndarray | None = None,
        folds: np.ndarray | None = None,
        standardise_folds: bool = False,
        prior: np.ndarray | None = None,
    ) -> None:
        """Args:
        features: [N, D], centred, stored in float32, or a stream of them. labels: [N] integers, or [N, C] bool: several
          labels a row.
        num_classes: C. weights: [N], 0 for a row that nothing trains on (default: 1).
        folds: [N] integers; a row is judged by the lane that leaves its fold out and trains all others (default: 0);
          rows of a fold that no lane leaves out, such as -1, train every lane.
        standardise_folds: each lane divides the features by the deviations of its own rows, and its penalty is on
          the weights of what that gives; heads that go in and come out act on the features as they are.
        prior: [D, M], weights that the penalty pulls to in place of 0, whose columns sum to 0 if there are several;
          neither with several labels a row nor with standardise_folds.
        """
        assert prior is None or not (labels.ndim == 2 or standardise_folds)
        num_rows, self._width = features.shape
        self._weights = np.ones(num_rows) if weights is None else weights
        self._folds = np.zeros(num_rows, np.int32) if folds is None else folds
        self._features, self._standardise_folds = features, standardise_folds
        self._prior = np.zeros((1, 1, 1)) if prior is None else np.pad(prior.T, ((0, 0), (0, 1)))[None]
        self._multi_label = labels.ndim == 2
        self._num_outputs = 1 if self._multi_label else num_logits(num_classes)
        self._num_labels = num_classes if self._multi_label else 1
        if self._num_outputs == 1 and not self._multi_label:
            labels = labels[:, None]
        self._labels = labels
        chunk = min(_CHUNK, 1 << max(6, (num_rows - 1).bit_length()))
        rows: Rows | StreamedRows
        if isinstance(features, Stream) and not features.fits:
            chunk = min(chunk, _STREAMED)
            rows = StreamedRows(features, labels, self._weights, self._folds, chunk)
        else:
            at, own = held(features)
            rows = Rows(
                features=_chunked(own, chunk, np.float32),
                labels=_chunked(labels[at], chunk, np.int32),
                weights=_chunked(self._weights[at], chunk, np.float32),
                folds=_chunked(self._folds[at], chunk, np.int32),
            )
        self._rows: AnyRows = DividedRows(rows) if is_divided(features) else rows
        fold_sums: dict[int, np.ndarray] = {}
        second_moment = np.zeros((self._width, self._width))
        for at, values in pieces(features, chunk):
            part, by = values.astype(np.float32), self._weights[at].astype(np.float32)
            short = chunk - len(part)  # one shape, one program
            second_moment += _second_moment(np.pad(part, ((0, short), (0, 0))), np.pad(by, (0, short)))
            if standardise_folds:
                self._add_to_folds(fold_sums, part.astype(np.float64), self._folds[at], self._weights[at] > 0)
        second_moment = np.sum(gathered(features, second_moment), axis=0)
        self._fold_sums: dict[int, np.ndarray] = {}
        for sums in gathered(features, fold_sums):
            for fold, of_fold in sums.items():
                self._fold_sums[fold] = self._fold_sums.get(fold, 0) + of_fold
        self._eigenvalues, self._eigenvectors = np.linalg.eigh(second_moment / self._weights.sum())
        self.mean_variance = float(self._eigenvalues.mean())

    def path(
        self,
        penalties: Sequence[float],
        left_out: Sequence[int],
        *,
        start: np.ndarray | None = None,
        tolerance: float = 1e-5,
        max_iterations: int = 300,
        watch: Watch | None = None,
    ) -> FoldPath:
        """Fits a head for each λ and each fold left out, in float32.

        Args:
          penalties: L values of λ for all rows, falling; a lane that trains on fewer rows holds C, not λ.
          left_out: F folds, or NOTHING.
          start: [F, D + 1, M or C], heads to start from.
          tolerance: of the gap to the optimum, as a share of the objective. On three sets of 4,000 x 128 x 20, 1e-5
            picks of 20 λ the one that 1e-7 picks, by loss and by accuracy, and moves no held-out loss by more than
            0.2 % (on 2,000 x 64 x 10 by 1.2 %, at the least λ alone, which nothing picks); 1e-4 takes half the passes,
            picked a neighbour in two of the six, and moves losses by up to 0.8 %. On sets of 400 rows 1e-5 may pick
            the neighbour where the two losses are within a tenth of their standard error, and so tie.
          watch: told now and then how many fits are done.
        """
        ratio = self._ratios(left_out)
        lanes = self._lanes(np.asarray(penalties, np.float64)[:, None], np.asarray(left_out), ratio, np.float32)
        num_folds, num_lanes = len(left_out), lanes.penalties.shape[1]
        weights = np.zeros((num_lanes, self._num_outputs, self._width + 1), np.float32)
        if start is not None:
            scale = np.divide(1, ratio, out=np.zeros_like(ratio), where=ratio > 0)
            weights = np.concatenate([self._as_lanes(_scaled(one, by)) for one, by in zip(start, scale, strict=True)])
        limits = (
            np.float32(tolerance),
            np.float32(np.inf),
            np.full(num_lanes, np.inf, np.float32),
            np.int32(max_iterations),
        )
        found: Path = jax.tree.map(np.asarray, walk(self._rows, lanes, weights.astype(np.float32), *limits, watch))
        count = np.array([np.sum((self._folds == fold) & (self._weights > 0)) for fold in left_out])

        def per_fold(values: np.ndarray) -> np.ndarray:
            return values.reshape(len(penalties), num_folds, self._num_labels)

        heads = found.weights.reshape(len(penalties), num_folds, -1, self._width + 1).swapaxes(2, 3)
        least = np.maximum(count, 1)
        return FoldPath(
            heads=_scaled(heads, ratio.astype(np.float32)),
            nll=per_fold(found.held_nll).sum(axis=2) / least,
            accuracy=per_fold(found.held_correct).mean(axis=2) / least,
            count=count,
            num_iterations=per_fold(found.num_iterations).max(axis=2),
            converged=np.asarray(per_fold(found.converged).all(axis=2)),
        )

    def fit(
        self,
        penalty: float,
        *,
        start: np.ndarray | None = None,
        gap_tolerance: float = 1e-9,
        gradient_tolerance: float = 1e-6,
        max_iterations: int = 2000,
        watch: Watch | None = None,
        by_float32: bool | None = None,
    ) -> Solution:
        """Fits one head to all rows, to a certified optimum in float64.

        Args:
          penalty: λ. start: [D + 1, M or C] head to start from, bias last.
          gap_tolerance: of the gap to the optimum, as a share of the objective.
          gradient_tolerance: of the gradient's norm, as a share of its norm at zero.
          watch: told now and then how many passes there were.
          by_float32: whether float32 makes the way to where only float64 can tell the difference, in passes of half the
            cost or less (default: where that saves more than a second program takes to compile).
        Raises: NumericalError if λ is 0 and the classes can be separated.
        """
        weights = self._as_lanes(
            np.zeros((self._width + 1, self._num_labels * self._num_outputs)) if start is None else start
        )
        if penalty == 0:
            check_not_separated(self._features, self._labels, self._weights > 0, weights)
        initial = self._norms_at_zero(weights)
        target = gradient_tolerance * initial
        if by_float32 is None:
            by_float32 = len(self._labels) * self._width * self._num_outputs * self._num_labels >= _LARGE
        num_before = 0
        if by_float32:
            most = min(max_iterations, _IN_FLOAT32)
            near = self._descend(weights, penalty, gap_tolerance, _MARGIN * target, most, np.float32, watch)
            weights, num_before = near.weights, int(near.num_iterations.max())

        def watch_rest(num_done: int, num_fits: int, num_passes: int) -> None:
            if watch is not None:
                watch(num_done, num_fits, num_before + num_passes)

        most = max_iterations - num_before
        path = self._descend(weights, penalty, gap_tolerance, target, most, np.float64, watch_rest)
        if penalty == 0:
            check_not_separated(self._features, self._labels, self._weights > 0, path.weights)
        return self._solution(path, penalty, initial, num_before)

    def certify(self, kernel: np.ndarray, bias: np.ndarray, penalty: float, num_iterations: int) -> Solution:
        """Judges a head that came from elsewhere by our objective, gradient and estimate of the gap.

        Args:
          kernel: [D, M or C]; bias: [M or C]; penalty: λ; num_iterations: what its solver says it took.
        """
        weights = self._as_lanes(np.concatenate([kernel, bias[None]]))
        # The gap is what our preconditioner makes of the gradient, which may be some times too much or too
        # little.
        initial = self._norms_at_zero(weights)
        path = self._descend(weights, penalty, 1e-6, 1e-5 * initial, 0, np.float64)
        return self._solution(path, penalty, initial, num_iterations)

    def _norms_at_zero(self, weights: np.ndarray) -> np.ndarray:
        """[K] norm of each lane's gradient at zero. Args: weights: of the lanes, whose shape counts."""
        lanes = self._lanes_of_all(0.0, np.float32)
        at_zero = np.asarray(gradient(self._rows, lanes, np.zeros(weights.shape, np.float32)), np.float64)
        return np.asarray(np.sqrt(np.sum(at_zero**2, axis=(1, 2))))

    def _descend(
        self,
        weights: np.ndarray,
        penalty: float,
        gap_tolerance: float,
        target_norm: np.ndarray,
        max_iterations: int,
        dtype: Any,
        watch: Watch | None = None,
    ) -> Path:
        """At most `max_iterations` further from the lanes' weights, on all rows; without the path's axis of λ."""
        with jax.enable_x64(dtype == np.float64):  # for these calls: the rest of the program stays in float32
            lanes = self._lanes_of_all(penalty, dtype)
            limits = dtype(gap_tolerance), dtype(_PROVEN), target_norm.astype(dtype), np.int32(max_iterations)
            path = walk(self._rows, lanes, weights.astype(dtype), *limits, watch)
        first: Path = jax.tree.map(lambda leaf: np.asarray(leaf)[0], path)
        return first

    def _lanes_of_all(self, penalty: float, dtype: Any) -> Lanes:
        return self._lanes(np.array([[penalty]]), np.array([NOTHING]), np.ones((1, self._width)), dtype)

    def _solution(self, path: Path, penalty: float, initial: np.ndarray, num_before: int) -> Solution:
        """What the lanes found, as one. Args: initial: [K] norms at zero; num_before: iterations that led to there."""
        head = path.weights.reshape(-1, self._width + 1).T
        if self._num_outputs > 1:  # the optimum is centred; what is left of it are rounding errors
            head = head - head.mean(axis=1, keepdims=True)
        return Solution(
            kernel=head[:-1],
            bias=head[-1],
            penalty=penalty,
            objective=float(path.objective.sum()),
            gap=float(path.gap.sum()),
            gap_bound=float(np.sum(path.gradient_norm**2)) / (2 * penalty) if penalty else None,
            gradient_norm=float(np.sqrt(np.sum(path.gradient_norm**2))),
            initial_gradient_norm=float(np.sqrt(np.sum(initial**2))),
            num_iterations=num_before + int(path.num_iterations.max()),
            converged=bool(path.converged.all()),
        )

    def _as_lanes(self, head: np.ndarray) -> np.ndarray:
        """[D + 1, M or C] with the bias last, as the weights of the lanes that train on all rows."""
        return head.T[:, None] if self._multi_label else head.T[None]

    def _add_to_folds(
        self, sums: dict[int, np.ndarray], features: np.ndarray, folds: np.ndarray, used: np.ndarray
    ) -> None:
        """Adds number, sums and sums of squares of the rows that train, by fold, each [D]."""
        for fold in np.unique(folds).tolist():
            part = features[used & (folds == fold)]
            more = np.stack([np.full(self._width, len(part)), part.sum(axis=0), (part**2).sum(axis=0)])
            sums[fold] = sums.get(fold, 0) + more

    def _ratios(self, left_out: Sequence[int]) -> np.ndarray:
        """[F, D] by what a lane multiplies the features, to have them divided by its own rows' deviations."""
        if not self._standardise_folds:
            return np.ones((len(left_out), self._width))
        total = np.sum(list(self._fold_sums.values()), axis=0)

        def deviations(count: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
            return np.asarray(np.sqrt(np.maximum(second / count - (first / count) ** 2, 0)))

        every = deviations(*total)
        own = np.stack([deviations(*(total - self._fold_sums.get(int(fold), 0))) for fold in left_out])
        return np.asarray(np.divide(1, own, out=np.zeros_like(own), where=own > 1e-6 * every))

    def _lanes(self, penalties: np.ndarray, left_out: np.ndarray, ratio: np.ndarray, dtype: Any) -> Lanes:
        """One lane per fold left out and label; labels of a fold stand side by side."""
        totals = np.array([self._weights[self._folds != fold].sum() for fold in left_out])
        penalties = penalties * self._weights.sum() / totals  # C is held: 1 / (λ · total)
        repeat = functools.partial(np.repeat, repeats=self._num_labels)
        return Lanes(
            fold=jnp.asarray(repeat(left_out), jnp.int32),
            label=jnp.asarray(np.tile(np.arange(self._num_labels), len(left_out)), jnp.int32),
            total=jnp.asarray(repeat(totals), dtype),
            ratio=jnp.asarray(repeat(ratio, axis=0), dtype),
            penalties=jnp.asarray(repeat(penalties, axis=1), dtype),
            prior=jnp.asarray(self._prior, dtype),
            eigenvalues=jnp.asarray(np.maximum(self._eigenvalues, 0), dtype),
            eigenvectors=jnp.asarray(self._eigenvectors, dtype),
        )


@jax.jit
def _second_moment(features: jax.Array, weights: jax.Array) -> jax.Array:
    """[D, D], the sum over rows of weight · x xᵀ."""
    return jnp.matmul((features * weights[:, None]).T, features, precision="highest")


def _scaled(heads: np.ndarray, by: np.ndarray) -> np.ndarray:
    """[…, D + 1, M] with the kernel's rows multiplied by [D] or […, D]; the bias stays."""
    return np.concatenate([heads[..., :-1, :] * by[..., None], heads[..., -1:, :]], axis=-2)


def _chunked(values: np.ndarray, chunk: int, dtype: Any) -> jax.Array:
    """[N, …] -> [n, chunk, …], filled up with zeros."""
    num_chunks = -(-len(values) // chunk)
    padded = np.zeros((num_chunks * chunk, *values.shape[1:]), dtype)
    padded[: len(values)] = values
    return jnp.asarray(padded.reshape(num_chunks, chunk, *values.shape[1:]))
