"""Many regularised logistic regressions side by side, each down its own path of λ: the heart of `probe.probing.solver`.

All lanes (`probe.probing.passes`) share the passes over the rows, and each walks at its own pace: when it has converged
it records what it found and goes on to the next λ from there, so no column waits for another.

Each lane runs L-BFGS. Its initial Hessian is α·S + λI, with S the second moment of the features (one D × D
eigendecomposition) and α the mean of p(1 - p): Böhning's bound with the curvature that the data have in place of the
worst one. Gradient differences are stored without the penalty, whose part λ·s is exact, so that what was learned at
one λ serves the next, and the gradient at the next λ needs no pass. Passes over 6,000 × 256 rows of 20 classes, for 17
values of λ over 8 decades, until the gradient's norm is 1e-3 (1e-5) of that at zero: 85 (246) like this, 155 (426)
with Böhning's own constant for α, 93 (426) with an α per class, 81 (226) with a Kronecker factor over classes, 166
(461) for Newton-CG under that. Starting at a point extrapolated along the path gains as many passes as it costs.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from probe.probing.passes import Lanes, Rows, StreamedRows, Sums, evaluate, zero_sums

Limits = tuple[Any, Any, Any, Any]  # gap_tolerance, bound_tolerance, target_norm, max_iterations, as `walk` has them
Watch = Callable[[int, int, int], None]  # fits done, of how many, after how many passes

_SECONDS = 0.5  # a program of several passes may take twice as long before the host has its word
_MEMORY = 10  # L-BFGS pairs; 5 take 1.2 times the passes at 1e-6, 20 take 0.85 times
_MAX_HALVINGS = 15  # of one line search, before a lane gives up at its λ


@struct.dataclass
class Path:
    """What the lanes found at each λ, all [L, K] but `weights` [L, K, M, D + 1], whose last column is the bias.

    gap: estimate of objective - optimum, half the Newton decrement that L-BFGS sees. held_nll [nats] and
    held_correct: sums over the rows of the lane's fold.
    """

    weights: Any
    objective: Any
    gradient_norm: Any
    gap: Any
    num_iterations: Any
    converged: Any
    held_nll: Any
    held_correct: Any


@struct.dataclass
class State:
    """Where all lanes are between two passes.

    weights, sums: of the last accepted point. step, direction: the trial is weights + step · direction.
    steps, changes [K, m, M, D + 1]: the last moves and what the data's gradient changed by."""

    weights: Any
    sums: Sums
    direction: Any
    step: Any
    steps: Any
    changes: Any
    num_pairs: Any
    num_halvings: Any
    num_iterations: Any
    index: Any
    path: Path


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner products per lane: [K, M, D + 1] -> [K]."""
    return jnp.asarray(jnp.sum(a * b, axis=(1, 2)))


def _per_lane(values: jax.Array) -> jax.Array:
    return values[:, None, None]


def _penalised(weights: jax.Array, penalty: jax.Array) -> jax.Array:
    """What the penalty adds to the change of the gradient over a step: λ times it, with zero for the bias."""
    return jnp.asarray((weights * _per_lane(penalty)).at[..., -1].set(0))


def _pull(weights: jax.Array, lanes: Lanes, penalty: jax.Array) -> jax.Array:
    """Gradient of the penalty: λ·(W - prior) with zero for the bias."""
    return _penalised(weights - lanes.prior, penalty)


def _objective(weights: jax.Array, loss: jax.Array, lanes: Lanes, penalty: jax.Array) -> jax.Array:
    return jnp.asarray(loss + penalty / 2 * jnp.sum((weights - lanes.prior)[..., :-1] ** 2, axis=(1, 2)))


def _penalty(lanes: Lanes, index: jax.Array) -> jax.Array:
    """λ of each lane, [K]; that of the path's end once a lane is through."""
    last = lanes.penalties.shape[0] - 1
    return jnp.asarray(lanes.penalties[jnp.minimum(index, last), jnp.arange(lanes.penalties.shape[1])])


def _precondition(lanes: Lanes, curvature: jax.Array, penalty: jax.Array, vectors: jax.Array) -> jax.Array:
    """(α·S + λI)⁻¹ applied to [K, M, D + 1]."""
    limits = np.finfo(vectors.dtype)
    tiny = float(limits.tiny) ** 0.5
    # Directions that hold nothing but rounding errors must not be blown up.
    least = float(limits.eps) * lanes.eigenvalues[-1]
    diagonal = curvature[:, None] * jnp.maximum(lanes.eigenvalues, least) + penalty[:, None] + tiny
    rotated = jnp.matmul(vectors[..., :-1], lanes.eigenvectors, precision="highest") / diagonal[:, None]
    kernel = jnp.matmul(rotated, lanes.eigenvectors.T, precision="highest")
    bias = vectors[..., -1:] / (_per_lane(curvature) + tiny)
    return jnp.concatenate([kernel, bias], axis=-1)


def _direction(state: State, lanes: Lanes) -> jax.Array:
    """The L-BFGS step of each lane at its λ, by the two-loop recursion."""
    penalty = _penalty(lanes, state.index)
    lane = jnp.arange(len(penalty))

    def pair(age: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        slot = (state.num_pairs - 1 - age) % _MEMORY
        step = state.steps[lane, slot]
        change = state.changes[lane, slot] + _penalised(step, penalty)
        product = _dot(step, change)
        usable = (age < state.num_pairs) & (product > 0)
        return step, change, jnp.where(usable, 1 / jnp.where(usable, product, 1), 0)

    def newest_first(age: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        vector, factors = carry
        step, change, inverse = pair(age)
        factor = inverse * _dot(step, vector)
        return vector - _per_lane(factor) * change, factors.at[age].set(factor)

    def oldest_first(i: jax.Array, vector: jax.Array) -> jax.Array:
        step, change, inverse = pair(_MEMORY - 1 - i)
        factor = inverse * _dot(change, vector)
        return vector + _per_lane(factors[_MEMORY - 1 - i] * (inverse > 0) - factor) * step

    grad = state.sums.grad + _pull(state.weights, lanes, penalty)
    factors = jnp.zeros((_MEMORY, len(penalty)), grad.dtype)
    vector, factors = jax.lax.fori_loop(0, _MEMORY, newest_first, (grad, factors))
    _, change, inverse = pair(jnp.int32(0))
    preconditioned = _precondition(lanes, state.sums.curvature, penalty, change)
    product = inverse * _dot(change, preconditioned)  # yᵀ H y / yᵀ s: how far H is from this pair's curvature
    scale = jnp.where(product > 0, 1 / jnp.where(product > 0, product, 1), 1)
    vector = _per_lane(scale) * _precondition(lanes, state.sums.curvature, penalty, vector)
    return jnp.negative(jax.lax.fori_loop(0, _MEMORY, oldest_first, vector))


def _trial_weights(state: State) -> jax.Array:
    """[K, M, D + 1] at which the next pass is due."""
    return jnp.asarray(state.weights + _per_lane(state.step) * state.direction)


def _start_state(lanes: Lanes, weights: jax.Array) -> State:
    """All lanes before their first pass, at weights [K, M, D + 1]."""
    num_penalties, num_lanes = lanes.penalties.shape
    none = jnp.zeros((num_penalties, num_lanes), weights.dtype)
    count = jnp.zeros(num_lanes, jnp.int32)
    history = jnp.zeros((num_lanes, _MEMORY, *weights.shape[1:]), weights.dtype)
    return State(
        weights=weights,
        sums=zero_sums(weights),
        direction=jnp.zeros_like(weights),
        step=jnp.zeros(num_lanes, weights.dtype),
        steps=history,
        changes=history,
        num_pairs=count,
        num_halvings=count,
        num_iterations=count - 1,  # the first pass accepts the start as it is
        index=count,
        path=Path(
            weights=jnp.zeros((num_penalties, *weights.shape), weights.dtype),
            objective=none,
            gradient_norm=none,
            gap=none,
            num_iterations=none.astype(jnp.int32),
            converged=none.astype(bool),
            held_nll=none,
            held_correct=none,
        ),
    )


def _advance(
    state: State,
    sums: Sums,
    lanes: Lanes,
    limits: Limits,
) -> State:
    """What follows from the sums at the trial: lanes accept it or shorten their step, and go on where converged."""
    penalty = _penalty(lanes, state.index)
    trial, first = _trial_weights(state), state.num_iterations < 0
    before = _objective(state.weights, state.sums.loss, lanes, penalty)
    after = _objective(trial, sums.loss, lanes, penalty)
    slope_before = _dot(state.sums.grad + _pull(state.weights, lanes, penalty), state.direction)
    slope_after = _dot(sums.grad + _pull(trial, lanes, penalty), state.direction)
    # Near the optimum the objective's fall drowns in rounding, while slopes are still exact (Hager & Zhang 2005).
    rounding = 8 * float(np.finfo(trial.dtype).eps) * jnp.abs(before)
    flat = (after <= before + rounding) & (jnp.abs(slope_after) <= 0.9 * jnp.abs(slope_before))
    accept = first | (after <= before + 1e-4 * state.step * slope_before) | flat
    accept &= jnp.isfinite(after)
    slot = jnp.where(accept & ~first, state.num_pairs % _MEMORY, _MEMORY)  # out of range: dropped
    lane = jnp.arange(len(penalty))
    ratio = slope_before / jnp.where(slope_before == slope_after, -1, slope_before - slope_after)
    shorter = state.step * jnp.clip(jnp.nan_to_num(ratio), 0.1, 0.5)  # secant step on the slope, within bounds

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(accept.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    state = dataclasses.replace(
        state,
        steps=state.steps.at[lane, slot].set(trial - state.weights, mode="drop"),
        changes=state.changes.at[lane, slot].set(sums.grad - state.sums.grad, mode="drop"),
        num_pairs=state.num_pairs + (accept & ~first),
        weights=choose(trial, state.weights),
        sums=jax.tree.map(choose, sums, state.sums),
        num_iterations=state.num_iterations + accept,
        num_halvings=jnp.where(accept, 0, state.num_halvings + 1),
        step=jnp.where(accept, 1, shorter),
    )
    stale = accept | (state.num_halvings > _MAX_HALVINGS)
    state, _ = jax.lax.while_loop(
        lambda carry: jnp.any(carry[1]), lambda carry: _record(*carry, lanes, limits), (state, stale)
    )
    return state


def _record(
    state: State,
    stale: jax.Array,
    lanes: Lanes,
    limits: Limits,
) -> tuple[State, jax.Array]:
    """Gives the stale lanes a direction; those that are through with their λ write down what they found and take the
    next, which makes them stale once more. Returns the state, and which lanes these are."""
    gap_tolerance, bound_tolerance, target_norm, max_iterations = limits
    penalty = _penalty(lanes, state.index)
    num_penalties = lanes.penalties.shape[0]
    moving = state.index < num_penalties
    direction = jnp.where(_per_lane(stale), _direction(state, lanes), state.direction) * _per_lane(moving)
    grad = state.sums.grad + _pull(state.weights, lanes, penalty)
    objective = _objective(state.weights, state.sums.loss, lanes, penalty)
    gap = -_dot(grad, direction) / 2
    norm = jnp.sqrt(_dot(grad, grad))
    accepted = state.num_halvings == 0
    # W alone is λ-strongly convex, so the optimum is at most ‖g‖² / 2λ below, whatever L-BFGS believes.
    bounded = (penalty == 0) | (norm**2 <= 2 * penalty * bound_tolerance * objective)
    converged = accepted & (gap <= gap_tolerance * objective) & (norm <= target_norm) & bounded
    through = stale & moving & (converged | ~accepted | (state.num_iterations >= max_iterations))
    slot = jnp.where(through, state.index, num_penalties)  # out of range: dropped
    found = Path(
        weights=state.weights,
        objective=objective,
        gradient_norm=norm,
        gap=gap,
        num_iterations=state.num_iterations,
        converged=converged,
        held_nll=state.sums.held_nll,
        held_correct=state.sums.held_correct,
    )
    lane = jnp.arange(len(penalty))
    state = dataclasses.replace(
        state,
        path=jax.tree.map(lambda every, one: every.at[slot, lane].set(one, mode="drop"), state.path, found),
        index=state.index + through,
        direction=direction,
        step=jnp.where(stale, 1, state.step),
        num_iterations=jnp.where(through, 0, state.num_iterations),
        num_halvings=jnp.where(through, 0, state.num_halvings),
    )
    return state, through


def walk(
    rows: Rows | StreamedRows,
    lanes: Lanes,
    start: Any,
    gap_tolerance: Any,
    bound_tolerance: Any,
    target_norm: Any,
    max_iterations: Any,
    watch: Watch | None = None,
) -> Path:
    """All lanes down their paths.

    Args:
      start: [K, M, D + 1]. gap_tolerance: of the gap that L-BFGS sees, and bound_tolerance of the one that is proven,
        as shares of the objective. target_norm: [K] of the gradient. max_iterations: at one λ.
      watch: told now and then how many of the L × K fits are done.
    """
    limits = gap_tolerance, bound_tolerance, target_norm, max_iterations
    state = _start(lanes, jnp.asarray(start))
    at_once, num_passes = 1, 0
    while (np.asarray(state.index) < lanes.penalties.shape[0]).any():
        started = time.monotonic()
        if isinstance(rows, Rows):
            state = _some_passes(rows, lanes, state, limits, at_once)
        else:
            state = _after_pass(state, evaluate(rows, lanes, _trial(state)), lanes, limits)
        num_passes += at_once
        if watch is not None:
            watch(int(np.asarray(state.index).sum()), lanes.penalties.size, num_passes)
        if isinstance(rows, Rows) and time.monotonic() - started < _SECONDS:
            at_once *= 2
    path: Path = state.path
    return path


@jax.jit
def _some_passes(rows: Rows, lanes: Lanes, state: State, limits: Limits, num: Any) -> State:
    """At most `num` passes in one program: the host has a word in between, for an interrupt or to tell of progress."""

    def one_pass(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, left = carry
        return _advance(state, evaluate(rows, lanes, _trial_weights(state)), lanes, limits), left - 1

    def unfinished(carry: tuple[State, jax.Array]) -> jax.Array:
        return jnp.any(carry[0].index < lanes.penalties.shape[0]) & (carry[1] > 0)

    last: State = jax.lax.while_loop(unfinished, one_pass, (state, jnp.asarray(num, jnp.int32)))[0]
    return last


_start = jax.jit(_start_state)
_trial = jax.jit(_trial_weights)
_after_pass = jax.jit(_advance)


def gradient(rows: Rows | StreamedRows, lanes: Lanes, weights: Any) -> jax.Array:
    """Gradient [K, M, D + 1] of the loss, without the penalty."""
    sums = _whole_pass(rows, lanes, weights) if isinstance(rows, Rows) else evaluate(rows, lanes, jnp.asarray(weights))
    grad: jax.Array = sums.grad
    return grad


_whole_pass = jax.jit(evaluate)
