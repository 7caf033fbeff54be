"""What the convex solver gives: a head with the evidence that it is the optimum, or a path of heads that rank λ."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Solution:
    """A linear head, and the evidence that it is the optimum.

    kernel: [D, M] float64; bias: [M] float64; M = 1 for two classes.
    penalty: λ. objective: nats per example, penalty included. gap: estimate of how far it is above the
    optimum.
    gradient_norm, initial_gradient_norm: Euclidean, at this head and at zero.
    gap_bound: what the gradient proves of it, ‖g‖² / 2λ, None at λ = 0; biases, which have no penalty, aside.
    converged: gap, bound and gradient norm are within the tolerances.
    """

    kernel: np.ndarray
    bias: np.ndarray
    penalty: float
    objective: float
    gap: float
    gap_bound: float | None
    gradient_norm: float
    initial_gradient_norm: float
    num_iterations: int
    converged: bool

    @property
    def params(self) -> dict[str, np.ndarray]:
        return {"kernel": self.kernel, "bias": self.bias}

    def certificate(self) -> dict[str, float | int | bool]:
        """The evidence as JSON values."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name not in ("kernel", "bias", "penalty")}


@dataclasses.dataclass(frozen=True)
class FoldPath:
    """Heads for L values of λ and F folds left out, good enough to rank λ.

    heads: [L, F, D + 1, M or C] float32, bias last. nll, accuracy: [L, F] means over the rows of the fold, in nats and
    as a share (with several labels a row: of all answers; nll sums over labels). count: [F] rows of the fold.
    num_iterations, converged: [L, F].
    """

    heads: np.ndarray
    nll: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    num_iterations: np.ndarray
    converged: np.ndarray

    def first(self, num: int) -> "FoldPath":
        """The path of the first `num` values of λ."""
        every = (getattr(self, field.name) for field in dataclasses.fields(self))
        return FoldPath(*(values if values is self.count else values[:num] for values in every))

    def then(self, other: "FoldPath") -> "FoldPath":
        """This path and that of further values of λ, for the same folds."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self))
        return FoldPath(*(a if a is self.count else np.concatenate([a, b]) for a, b in pairs))
