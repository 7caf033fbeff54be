"""The convex solver behind the linear head, with its certificate.

Minimises over weights W [D, K] and biases b [K]

    mean_i CE(x_i W + b, y_i) + (λ/2)·‖W‖²,        λ = 1 / (C·N) in scikit-learn's terms,

where CE is the cross-entropy of a softmax, or of one logit for two classes. The bias is free of the penalty.
Softmax biases are known only up to a constant: theirs sum to zero here, so that the optimum is unique and can
be compared.

Everything is float64: near the optimum the objective changes by less than float32 can tell, and λ may be
1e-12 of the loss's curvature.
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from probe.heads import num_logits


@dataclasses.dataclass(frozen=True)
class Solution:
    """A linear head, and the evidence that it is the optimum.

    kernel: [D, K] float64; bias: [K] float64; K = 1 for two classes.
    penalty: λ. objective: nats per example, penalty included.
    gradient_norm, initial_gradient_norm: Euclidean, at this head and at zero.
    converged: gradient_norm <= tolerance · initial_gradient_norm.
    """

    kernel: np.ndarray
    bias: np.ndarray
    penalty: float
    objective: float
    gradient_norm: float
    initial_gradient_norm: float
    num_iterations: int
    converged: bool

    @property
    def params(self) -> dict[str, np.ndarray]:
        return {"kernel": self.kernel, "bias": self.bias}

    def certificate(self) -> dict[str, float | int | bool]:
        """The evidence as JSON values."""
        return {
            "objective": self.objective,
            "gradient_norm": self.gradient_norm,
            "initial_gradient_norm": self.initial_gradient_norm,
            "num_iterations": self.num_iterations,
            "converged": self.converged,
        }


def solve_path(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    penalties: Sequence[float],
    *,
    tolerance: float = 1e-7,
    max_iterations: int = 1000,
) -> list[Solution]:
    """Solves for each λ in turn; each starts where the one before it ended, so let them fall.

    Args:
      features: [N, D], well scaled: L-BFGS sees them as they are.
      labels: [N] integers below num_classes.
      penalties: values of λ, positive.
      tolerance: how far the gradient norm must fall below its value at zero.
    """
    with jax.enable_x64(True):  # pinned to these calls: the rest of the program stays in float32
        data = (jnp.asarray(features, jnp.float64), jnp.asarray(labels, jnp.int32))
        outputs = num_logits(num_classes)
        params = {"kernel": jnp.zeros((features.shape[1], outputs)), "bias": jnp.zeros(outputs)}
        initial = float(_objective_and_norm(params, *data, 1.0)[1])  # at zero the penalty has no gradient
        solutions = []
        for penalty in penalties:
            params, count = _minimise(params, *data, float(penalty), tolerance * initial, max_iterations)
            objective, norm = _objective_and_norm(params, *data, float(penalty))
            solutions.append(_solution(params, penalty, objective, norm, initial, int(count), tolerance))
    return solutions


def solve_with_sklearn(
    features: np.ndarray, labels: np.ndarray, num_classes: int, penalty: float, *, tolerance: float = 1e-7
) -> Solution:
    """scikit-learn's LogisticRegression on the same objective. Arguments as in `solve_path`."""
    features = np.asarray(features, np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the certificate says it
        model = LogisticRegression(
            C=1 / (penalty * len(labels)), solver="newton-cholesky", tol=tolerance * 0.01, max_iter=1000
        ).fit(features, labels)
    kernel, bias = np.zeros((features.shape[1], num_logits(num_classes))), np.zeros(num_logits(num_classes))
    kernel[:], bias[:] = model.coef_.T, model.intercept_
    with jax.enable_x64(True):
        data = (jnp.asarray(features), jnp.asarray(labels, jnp.int32))
        params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        initial = float(_objective_and_norm(jax.tree.map(jnp.zeros_like, params), *data, penalty)[1])
        objective, norm = _objective_and_norm(params, *data, penalty)
    return _solution(params, penalty, objective, norm, initial, int(model.n_iter_.max()), tolerance)


def _objective(params: Any, features: jax.Array, labels: jax.Array, penalty: jax.Array) -> jax.Array:
    logits = features @ params["kernel"] + params["bias"]
    if logits.shape[1] == 1:
        losses = optax.sigmoid_binary_cross_entropy(logits[:, 0], labels)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.asarray(jnp.mean(losses) + penalty / 2 * jnp.sum(params["kernel"] ** 2))


@jax.jit
def _objective_and_norm(
    params: Any, features: jax.Array, labels: jax.Array, penalty: jax.Array
) -> tuple[jax.Array, jax.Array]:
    objective, grads = jax.value_and_grad(_objective)(params, features, labels, penalty)
    return objective, optax.tree.norm(grads)


@functools.partial(jax.jit, static_argnames="max_iterations")
def _minimise(
    params: Any,
    features: jax.Array,
    labels: jax.Array,
    penalty: jax.Array,
    target_norm: jax.Array,
    max_iterations: int,
) -> tuple[Any, jax.Array]:
    """L-BFGS until the gradient norm is at the target: (params, iterations)."""
    tx = optax.lbfgs(memory_size=20)

    def value_fn(params: Any) -> jax.Array:
        return _objective(params, features, labels, penalty)

    value_and_grad = optax.value_and_grad_from_state(value_fn)

    def step(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        params, state, count = carry
        value, grads = value_and_grad(params, state=state)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, count + 1

    def unfinished(carry: tuple[Any, Any, Any]) -> jax.Array:
        _, state, count = carry
        norm = optax.tree.norm(optax.tree.get(state, "grad"))
        return jnp.asarray((count == 0) | ((count < max_iterations) & (norm > target_norm)))

    params, _, count = jax.lax.while_loop(unfinished, step, (params, tx.init(params), jnp.int32(0)))
    if params["bias"].shape[0] > 1:
        params = {**params, "bias": params["bias"] - params["bias"].mean()}
    return params, count


def _solution(
    params: Any,
    penalty: float,
    objective: Any,
    norm: Any,
    initial: float,
    num_iterations: int,
    tolerance: float,
) -> Solution:
    return Solution(
        kernel=np.asarray(params["kernel"]),
        bias=np.asarray(params["bias"]),
        penalty=float(penalty),
        objective=float(objective),
        gradient_norm=float(norm),
        initial_gradient_norm=initial,
        num_iterations=num_iterations,
        converged=float(norm) <= tolerance * initial,
    )
