"""What others fit a linear probe with: scikit-learn, a sequential L-BFGS, and CLIP benchmark's AdamW.

Every program gets the same centred float32 features [N, D] and integer labels [N], and uses as many threads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression

from probe.probing.reference import quietly

NUM_SEARCHED = 19  # runs of AdamW in CLIP benchmark's search of a weight decay
_ADAMW_BATCH, _ADAMW_EPOCHS = 64, 10


def fit_sklearn(features: np.ndarray, labels: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray, str]:
    """scikit-learn's L-BFGS at a tolerance that brings it near the optimum."""
    model = LogisticRegression(C=1 / (penalty * len(labels)), max_iter=1000, tol=1e-6)
    quietly(model.fit, features, labels)
    return model.coef_.T, model.intercept_, f"{model.n_iter_[0]} iterations"


@jax.jit
def _line_search_fit(
    params: Any, features: jax.Array, labels: jax.Array, penalty: Any, tolerance: Any, most: Any
) -> Any:
    tx = optax.lbfgs()

    def value_fn(params: Any) -> jax.Array:
        logits = features @ params["kernel"] + params["bias"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return jnp.asarray(loss + penalty / 2 * jnp.sum(params["kernel"] ** 2))

    value_and_grad = optax.value_and_grad_from_state(value_fn)

    def step(carry: Any) -> Any:
        params, state, count = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, count + 1

    def unfinished(carry: Any) -> jax.Array:
        largest = jnp.max(jnp.abs(optax.tree.get(carry[1], "grad")["kernel"]))
        return (carry[2] == 0) | ((carry[2] < most) & (largest > tolerance))

    return jax.lax.while_loop(unfinished, step, (params, tx.init(params), 0))


def fit_line_search(
    features: np.ndarray, labels: np.ndarray, penalty: float, tolerance: float = 1e-6, most: int = 1000
) -> tuple[np.ndarray, np.ndarray, str]:
    """optax's L-BFGS with its zoom line search (strong Wolfe), from zero."""
    num_classes = labels.max() + 1
    start = {"kernel": jnp.zeros((features.shape[1], num_classes)), "bias": jnp.zeros(num_classes)}
    params, _, count = _line_search_fit(start, features, labels, penalty, tolerance, most)
    return np.asarray(params["kernel"]), np.asarray(params["bias"]), f"{int(count)} iterations"


def _adamw(num_steps: int, weight_decay: float) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(0.1, num_steps), weight_decay=weight_decay)


@functools.partial(jax.jit, static_argnames=("num_steps", "weight_decay"))
def _adamw_epoch(
    carry: Any, features: jax.Array, labels: jax.Array, order: jax.Array, *, num_steps: int, weight_decay: float
) -> Any:
    tx = _adamw(num_steps, weight_decay)

    def step(carry: Any, rows: jax.Array) -> Any:
        params, state = carry

        def loss(params: Any) -> jax.Array:
            logits = features[rows] @ params["kernel"] + params["bias"]
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, order)[0]


def fit_adamw(
    features: np.ndarray, labels: np.ndarray, weight_decay: float = 1e-3, num_epochs: int = _ADAMW_EPOCHS
) -> None:
    """CLIP benchmark's linear layer: AdamW, 10 epochs of batches of 64, rate 0.1 falling as a cosine.

    Args:
      num_epochs: fewer stop early.
    """
    steps = len(labels) // _ADAMW_BATCH
    num_steps, num_classes = steps * _ADAMW_EPOCHS, int(labels.max()) + 1
    params = {"kernel": jnp.zeros((features.shape[1], num_classes)), "bias": jnp.zeros(num_classes)}
    data, targets = jnp.asarray(features), jnp.asarray(labels)
    carry = (params, _adamw(num_steps, weight_decay).init(params))
    rng = np.random.default_rng(0)
    for _ in range(num_epochs):
        order = jnp.asarray(rng.permutation(len(labels))[: steps * _ADAMW_BATCH].reshape(steps, _ADAMW_BATCH))
        carry = _adamw_epoch(carry, data, targets, order, num_steps=num_steps, weight_decay=weight_decay)
    jax.block_until_ready(carry)
