"""How long a linear probe takes, ours beside others, in one process and in turn.

    python -m tests.benchmarks.linear [--quick] [--json FILE] [--cache CACHE] [--repeats 3]

Cases:
  one fit      λ = 1 / (0.316·N), to the objective that scikit-learn reaches at tol=1e-6
  path         20 values of λ by 5 folds and the final fit, beside one fit of scikit-learn, CLIP benchmark's search (19
               runs of AdamW with cosine decay; one is run, times 19) and one L-BFGS with line search after another, per
               λ and without folds, as torchgeo-bench has it (every fourth λ is run, at most 300 iterations, times 4)
  growth       the path with twice the rows, the width, the classes
Every program gets the same centred float32 features. Compilation is not timed: programs that compile run once before.
A program that has had 60 s is not repeated further; the table says how often each was timed. The floor of ours is its
floating-point operations by the rates of its two matrix products as measured here. Inputs are the embeddings of a
cache that have a label and are not test rows, else made: a power-law spectrum and a large common mean, as
CLIP's features have.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression

from probe.cache import Cache
from probe.probing.reference import quietly
from probe.probing.solver import Problem

PENALTIES = np.logspace(0, -6, 20)
NUM_FOLDS, NUM_SEARCHED = 5, 19
_ENOUGH_SECONDS = 60
_SEARCHED_STEP, _SEARCHED_ITERATIONS = 4, 300  # of the L-BFGS that takes one λ after another
_CHOICE_ROWS = 10_000


def make_embeddings(num_rows: int, width: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes that overlap, on features of power-law spectrum with a mean as large as their norm's deviation."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    means = 0.35 * rng.standard_normal((num_classes, width), np.float32)
    basis = np.linalg.qr(rng.standard_normal((width, width), np.float32))[0]
    spectrum = (np.arange(1, width + 1) ** -0.75).astype(np.float32)
    rows = ((rng.standard_normal((num_rows, width), np.float32) + means[labels]) * spectrum) @ basis.T
    rows *= 10 / np.sqrt((rows**2).sum(axis=1).mean())
    return rows + 0.35 * rng.standard_normal(width, np.float32), labels


def objective(features: np.ndarray, labels: np.ndarray, kernel: np.ndarray, bias: np.ndarray, penalty: float) -> float:
    """The objective of `probe.probing.solver`, in float64."""
    logits = features.astype(np.float64) @ kernel + bias
    nll = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]
    return float(nll.mean() + penalty / 2 * np.sum(kernel.astype(np.float64) ** 2))


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


_ADAMW_BATCH, _ADAMW_EPOCHS = 64, 10


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


def fit_adamw(features: np.ndarray, labels: np.ndarray, weight_decay: float = 1e-3) -> None:
    """CLIP benchmark's linear layer: AdamW, 10 epochs of batches of 64, rate 0.1 falling as a cosine."""
    steps = len(labels) // _ADAMW_BATCH
    num_steps, num_classes = steps * _ADAMW_EPOCHS, int(labels.max()) + 1
    params = {"kernel": jnp.zeros((features.shape[1], num_classes)), "bias": jnp.zeros(num_classes)}
    data, targets = jnp.asarray(features), jnp.asarray(labels)
    carry = (params, _adamw(num_steps, weight_decay).init(params))
    rng = np.random.default_rng(0)
    for _ in range(_ADAMW_EPOCHS):
        order = jnp.asarray(rng.permutation(len(labels))[: steps * _ADAMW_BATCH].reshape(steps, _ADAMW_BATCH))
        carry = _adamw_epoch(carry, data, targets, order, num_steps=num_steps, weight_decay=weight_decay)
    jax.block_until_ready(carry)


def our_fit(features: np.ndarray, labels: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray, str]:
    """The certified fit, from the features on."""
    solution = Problem(features, labels, int(labels.max()) + 1).fit(penalty)
    return solution.kernel, solution.bias, f"{solution.num_iterations} iterations, converged {solution.converged}"


def our_path(features: np.ndarray, labels: np.ndarray, max_iterations: int = 300) -> tuple[str, float]:
    """The whole path by cross-validation, and the final fit at the λ of least loss.

    Returns: what it took in words, and the GFLOP of each of its two matrix products (float64 counted twice).
    """
    folds = np.arange(len(labels)) % NUM_FOLDS
    num_classes = int(labels.max()) + 1
    problem = Problem(features, labels, num_classes, folds=folds)
    path = problem.path(PENALTIES.tolist(), range(NUM_FOLDS), max_iterations=max_iterations)
    best = int(path.nll.mean(axis=1).argmin())
    start = path.heads[best].mean(axis=0)
    solution = problem.fit(float(PENALTIES[best]), start=start, max_iterations=max_iterations)
    passes = int(path.num_iterations.sum(axis=0).max())
    gflop = 2e-9 * features.size * num_classes * (NUM_FOLDS * passes + 2 * solution.num_iterations)
    note = f"{passes} + {solution.num_iterations} passes, λ number {best}"
    return note + ("" if path.converged.all() else ", NOT ALL CONVERGED"), gflop


def choice_by_tolerance(features: np.ndarray, labels: np.ndarray) -> None:
    """Shows that the accuracy of the fits that choose does not change the choice."""
    folds = np.arange(len(labels)) % NUM_FOLDS
    problem = Problem(features, labels, int(labels.max()) + 1, folds=folds)
    paths = {t: problem.path(PENALTIES.tolist(), range(NUM_FOLDS), tolerance=t) for t in (1e-4, 1e-5, 1e-7)}
    finest = paths[1e-7]
    print("\nfits that choose, by tolerance: λ of least loss, of most accuracy, largest change of loss, of accuracy")
    for tolerance, path in paths.items():
        losses, accuracies = path.nll.mean(axis=1), path.accuracy.mean(axis=1)
        change = np.abs(losses / finest.nll.mean(axis=1) - 1).max()
        moved = np.abs(accuracies - finest.accuracy.mean(axis=1)).max()
        print(f"  {tolerance:.0e}  number {losses.argmin()}  number {accuracies.argmax()}  {change:.2%}  {moved:.4f}")


def product_rate() -> tuple[float, float]:
    """GFLOP/s of the two matrix products of a pass, 2,048 x 768 by 500 columns."""
    rows, kernel = jnp.ones((2048, 768)), jnp.ones((768, 500))
    rates = []
    for function, a, b in ((jax.jit(jnp.matmul), rows, kernel), (jax.jit(lambda x, r: x.T @ r), rows, rows @ kernel)):
        function(a, b).block_until_ready()
        start = time.perf_counter()
        for _ in range(20):
            function(a, b).block_until_ready()
        rates.append(20 * 2e-9 * 2048 * 768 * 500 / (time.perf_counter() - start))
    return rates[0], rates[1]


def measure(
    programs: dict[str, Callable[[], Any]], repeats: int, *, compiled: bool = True
) -> dict[str, tuple[float, int, Any]]:
    """Median seconds, how often each program was timed, and its last result; they take turns.

    Args:
      compiled: whether the first round compiles, and does not count.
    """
    results = {name: program() for name, program in programs.items()} if compiled else {}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            if sum(seconds[name]) < _ENOUGH_SECONDS:
                start = time.perf_counter()
                results[name] = program()
                seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(taken), len(taken), results[name]) for name, taken in seconds.items()}


def report(case: str, medians: dict[str, float], notes: dict[str, str]) -> list[dict[str, Any]]:
    """Prints a table and returns its lines; our ratio is the best peer's median by ours."""
    peers = [median for name, median in medians.items() if name != "probe"]
    print(f"\n{case}")
    lines = []
    for name, median in medians.items():
        ratio = min(peers) / median if name == "probe" and peers else None
        lines.append({"case": case, "program": name, "median_s": median, "ratio": ratio})
        print(f"  {name:34} {median:9.3f} s  {'' if ratio is None else f'{ratio:6.2f} x':9}  {notes.get(name, '')}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under 2 minutes")
    parser.add_argument("--json", type=Path, help="write the lines as a list of {case, program, median_s, ratio}")
    parser.add_argument("--cache", type=Path, help="take the embeddings of this cache")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds of each case")
    options = parser.parse_args()
    num_rows, width, num_classes = (2_000, 64, 10) if options.quick else (50_000, 768, 100)
    repeats = 1 if options.quick else options.repeats
    if options.cache:
        cache = Cache.open(options.cache)
        used = (cache.table.labels >= 0) & (cache.table.splits != "test")
        features, labels = cache.embeddings()[used], cache.table.labels[used]
        num_rows, width, num_classes = *features.shape, len(cache.class_names)
    else:
        features, labels = make_embeddings(num_rows, width, num_classes)
    features = features - features.mean(axis=0)
    penalty = 1 / (0.316 * num_rows)
    forward, backward = product_rate()
    print(
        f"{num_rows:,} x {width} x {num_classes}; {os.cpu_count()} CPU threads for every program; {jax.devices()[0]}; "
        f"load {os.getloadavg()[0]:.1f} at the start"
    )
    print(f"matrix products run at {forward:.0f} and {backward:.0f} GFLOP/s here")

    def floor(gflop: float) -> str:
        return f"floor {gflop / forward + gflop / backward:.2f} s of {2 * gflop:,.0f} GFLOP"

    fits: dict[str, Callable[[], Any]] = {
        "probe": lambda: our_fit(features, labels, penalty),
        "L-BFGS with strong Wolfe (optax)": lambda: fit_line_search(features, labels, penalty),
    }
    theirs: dict[str, Callable[[], Any]] = {"scikit-learn, tol 1e-6": lambda: fit_sklearn(features, labels, penalty)}
    found = measure(fits, repeats) | measure(theirs, repeats, compiled=False)
    values = {name: objective(features, labels, *result[:2], penalty) for name, (_, _, result) in found.items()}
    notes = {
        name: f"timed {times} x, objective {values[name] / min(values.values()) - 1:+.1e}, {result[2]}"
        for name, (_, times, result) in found.items()
    }
    medians = {name: median for name, (median, _, _) in found.items()}
    lines = report("one fit", medians, notes)

    ours, times, (note, gflop) = measure({"probe": lambda: our_path(features, labels)}, repeats)["probe"]
    single = measure({"adamw": lambda: fit_adamw(features, labels)}, 1)["adamw"][0]
    start = time.perf_counter()
    for value in PENALTIES[::_SEARCHED_STEP]:
        fit_line_search(features, labels, float(value), most=_SEARCHED_ITERATIONS)
    sequential = _SEARCHED_STEP * (time.perf_counter() - start)
    path = {
        "probe": ours,
        "scikit-learn, a single fit": medians["scikit-learn, tol 1e-6"],
        "AdamW, 19 runs (CLIP benchmark)": NUM_SEARCHED * single,
        "L-BFGS after L-BFGS, no folds": sequential,
    }
    notes = {
        "probe": f"timed {times} x, {note}, {floor(gflop)}",
        "AdamW, 19 runs (CLIP benchmark)": "1 run, times 19",
        "L-BFGS after L-BFGS, no folds": f"{len(PENALTIES[::_SEARCHED_STEP])} of 20 λ, times {_SEARCHED_STEP}",
    }
    lines += report("path of 20 λ by 5 folds and final fit", path, notes)

    for what, size in (
        ("rows", (num_rows * 2, width, num_classes)),
        ("width", (num_rows, width * 2, num_classes)),
        ("classes", (num_rows, width, num_classes * 2)),
    ):
        if options.cache:
            break
        more, targets = make_embeddings(*size)
        more -= more.mean(axis=0)
        our_path(more, targets, max_iterations=1)  # compiles
        grown, _, (note, gflop) = measure(
            {"probe": lambda more=more, targets=targets: our_path(more, targets)}, 1, compiled=False
        )["probe"]
        notes = {"probe": f"{grown / ours:.2f} times, {note}, {floor(gflop)}"}
        lines += report(f"the same, twice the {what}", {"probe": grown}, notes)

    choice_by_tolerance(features[:_CHOICE_ROWS], labels[:_CHOICE_ROWS])
    if options.json:
        options.json.write_text(json.dumps(lines, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
