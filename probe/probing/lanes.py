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

from probe.probing.lbfgs import MEMORY, Pairs, direction, dot, penalised, per_lane
from probe.probing.passes import AnyRows, Lanes, Rows, Sums, evaluate, evaluate_rows, zero_sums

Limits = tuple[Any, Any, Any, Any]  # gap_tolerance, bound_tolerance, target_norm, max_iterations, as `walk` has them
Watch = Callable[[int, int, int], None]  # fits done, of how many, after how many passes

_SECONDS = 0.5  # a program of several passes may take twice as long before the host has its word
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
    """

    weights: Any
    sums: Sums
    direction: Any
    step: Any
    pairs: Pairs
    num_halvings: Any
    num_iterations: Any
    index: Any
    path: Path


def _pull(weights: jax.Array, lanes: Lanes, penalty: jax.Array) -> jax.Array:
    """Gradient of the penalty: λ·(W - prior) with zero for the bias."""
    return penalised(weights - lanes.prior, penalty)


def _objective(weights: jax.Array, loss: jax.Array, lanes: Lanes, penalty: jax.Array) -> jax.Array:
    return jnp.asarray(loss + penalty / 2 * jnp.sum((weights - lanes.prior)[..., :-1] ** 2, axis=(1, 2)))


def _penalty(lanes: Lanes, index: jax.Array) -> jax.Array:
    """λ of each lane, [K]; that of the path's end once a lane is through."""
    last = lanes.penalties.shape[0] - 1
    return jnp.asarray(lanes.penalties[jnp.minimum(index, last), jnp.arange(lanes.penalties.shape[1])])


def _trial_weights(state: State) -> jax.Array:
    """[K, M, D + 1] at which the next pass is due."""
    return jnp.asarray(state.weights + per_lane(state.step) * state.direction)


def _start_state(lanes: Lanes, weights: jax.Array) -> State:
    """All lanes before their first pass, at weights [K, M, D + 1]."""
    num_penalties, num_lanes = lanes.penalties.shape
    none = jnp.zeros((num_penalties, num_lanes), weights.dtype)
    count = jnp.zeros(num_lanes, jnp.int32)
    history = jnp.zeros((num_lanes, MEMORY, *weights.shape[1:]), weights.dtype)
    return State(
        weights=weights,
        sums=zero_sums(weights),
        direction=jnp.zeros_like(weights),
        step=jnp.zeros(num_lanes, weights.dtype),
        pairs=Pairs(history, history, count),
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
    slope_before = dot(state.sums.grad + _pull(state.weights, lanes, penalty), state.direction)
    slope_after = dot(sums.grad + _pull(trial, lanes, penalty), state.direction)
    # Near the optimum the objective's fall drowns in rounding, while slopes are still exact (Hager & Zhang 2005).
    rounding = 8 * float(np.finfo(trial.dtype).eps) * jnp.abs(before)
    flat = (after <= before + rounding) & (jnp.abs(slope_after) <= 0.9 * jnp.abs(slope_before))
    accept = first | (after <= before + 1e-4 * state.step * slope_before) | flat
    accept &= jnp.isfinite(after)
    slot = jnp.where(accept & ~first, state.pairs.num % MEMORY, MEMORY)  # out of range: dropped
    lane = jnp.arange(len(penalty))
    ratio = slope_before / jnp.where(slope_before == slope_after, -1, slope_before - slope_after)
    shorter = state.step * jnp.clip(jnp.nan_to_num(ratio), 0.1, 0.5)  # secant step on the slope, within bounds

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(accept.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    state = dataclasses.replace(
        state,
        pairs=Pairs(
            steps=state.pairs.steps.at[lane, slot].set(trial - state.weights, mode="drop"),
            changes=state.pairs.changes.at[lane, slot].set(sums.grad - state.sums.grad, mode="drop"),
            num=state.pairs.num + (accept & ~first),
        ),
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
    grad = state.sums.grad + _pull(state.weights, lanes, penalty)
    fresh = direction(grad, penalty, state.sums.curvature, state.pairs, lanes)
    chosen = jnp.where(per_lane(stale), fresh, state.direction) * per_lane(moving)
    objective = _objective(state.weights, state.sums.loss, lanes, penalty)
    gap = -dot(grad, chosen) / 2
    norm = jnp.sqrt(dot(grad, grad))
    accepted = state.num_halvings == 0
    # No objective is below 0: a parabola with this value and slope whose least value is 0 has that at objective / gap.
    # Longer steps, such as the first one where many classes lie apart, end where every gradient is flat: a fit of
    # 50,000 x 768 rows of 100 classes took 100 passes with them, and takes 43.
    longest = objective / jnp.maximum(gap, float(np.finfo(gap.dtype).tiny))
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
        direction=chosen,
        step=jnp.where(stale, jnp.minimum(longest, 1), state.step),
        num_iterations=jnp.where(through, 0, state.num_iterations),
        num_halvings=jnp.where(through, 0, state.num_halvings),
    )
    return state, through


def walk(
    rows: AnyRows,
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


def gradient(rows: AnyRows, lanes: Lanes, weights: Any) -> jax.Array:
    """Gradient [K, M, D + 1] of the loss, without the penalty."""
    whole_pass = evaluate_rows if isinstance(rows, Rows) else evaluate
    sums = whole_pass(rows, lanes, jnp.asarray(weights))
    grad: jax.Array = sums.grad
    return grad
