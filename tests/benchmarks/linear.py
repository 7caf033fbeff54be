"""How long a linear probe takes, ours beside others, in one process and in turn.

    python -m tests.benchmarks.linear [--quick] [--json FILE] [--cache CACHE] [--repeats 3]

Cases:
  one fit      λ = 1 / (0.316·N), to the objective that scikit-learn reaches at tol=1e-6
  path         20 values of λ by 5 folds and the final fit, beside that one fit of scikit-learn, CLIP benchmark's search
               (19 runs of AdamW with cosine decay; one is run, times 19) and one L-BFGS with line search after another,
               per λ and without folds, as torchgeo-bench has it (every fourth λ is run, at most 300 iterations, and
               counted four times)
  growth       the path with twice the rows, the width, the classes, beside one fit of scikit-learn

Every program gets the same centred float32 features. Compilation is not timed: programs that compile run briefly
before. Programs take turns; one that has had 60 s is not repeated further, and the table says how often each was timed.
The floor of ours is its floating-point operations by the rates of its two matrix products, as measured here. Objectives
are those of float64, as shares above the least of the row's case. Inputs are the embeddings of a cache that have a
label and are not test rows, else made: a power-law spectrum and a large common mean, as CLIP's features have.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probe.cache import Cache
from probe.probing.solver import Problem, Solution
from tests.benchmarks.linear_peers import NUM_SEARCHED, fit_adamw, fit_line_search, fit_sklearn

PENALTIES = np.logspace(0, -6, 20)
NUM_FOLDS = 5
_ENOUGH_SECONDS = 60
_SEARCHED_STEP, _SEARCHED_ITERATIONS = 4, 300  # of the L-BFGS that takes one λ after another
_CHOICE_ROWS = 10_000
_ROWS = 1_024  # at a time, in our passes
_SKLEARN = "scikit-learn, tol 1e-6"
_SINGLE = "scikit-learn, a single fit"


class Program(NamedTuple):
    """run: what is timed. compile: what must run before, so that compilation is not."""

    run: Callable[[], Any]
    compile: Callable[[], Any] = lambda: None


class Timing(NamedTuple):
    """median: seconds of `times` runs. result: of the last one."""

    median: float
    times: int
    result: Any


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


def our_fit(features: np.ndarray, labels: np.ndarray, penalty: float, max_iterations: int = 2000) -> Solution:
    """The certified fit, from the features on."""
    return Problem(features, labels, int(labels.max()) + 1).fit(penalty, max_iterations=max_iterations)


def passes_of(solution: Solution) -> int:
    """Passes in float32 of a fit: each iteration, the start, the gradient at zero, and one in float64, as two."""
    return solution.num_iterations + 4


def our_path(features: np.ndarray, labels: np.ndarray, max_iterations: int = 300) -> tuple[str, int]:
    """The whole path by cross-validation, and the final fit at the λ of least loss.

    Returns: what it took in words, and passes times lanes.
    """
    folds = np.arange(len(labels)) % NUM_FOLDS
    problem = Problem(features, labels, int(labels.max()) + 1, folds=folds)
    path = problem.path(PENALTIES.tolist(), range(NUM_FOLDS), max_iterations=max_iterations)
    best = int(path.nll.mean(axis=1).argmin())
    start = path.heads[best].mean(axis=0)
    solution = problem.fit(float(PENALTIES[best]), start=start, max_iterations=max_iterations)
    passes = int(path.num_iterations.sum(axis=0).max())
    note = f"{passes} + {solution.num_iterations} iterations, λ number {best}"
    if not (path.converged.all() and solution.converged):
        note += ", NOT ALL CONVERGED"
    return note, NUM_FOLDS * passes + passes_of(solution)


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


def product_rates(num_columns: int, width: int) -> tuple[float, float]:
    """GFLOP/s of the two matrix products of a pass: logits of 1,024 rows, and the gradient of `num_columns` heads."""
    rng = np.random.default_rng(0)
    kernel, rows, residuals = (
        jnp.asarray(rng.standard_normal(shape, np.float32))
        for shape in ((num_columns, width), (_ROWS, width), (num_columns, _ROWS))
    )
    rates = []
    for function, left in ((jax.jit(lambda w, x: w @ x.T), kernel), (jax.jit(jnp.matmul), residuals)):
        function(left, rows).block_until_ready()
        start = time.perf_counter()
        for _ in range(20):
            function(left, rows).block_until_ready()
        rates.append(20 * 2e-9 * _ROWS * width * num_columns / (time.perf_counter() - start))
    return rates[0], rates[1]


def floor(features: np.ndarray, num_classes: int, num_lanes: int, passes: int) -> str:
    """What matrix products alone take. Args: num_lanes: heads side by side; passes: times lanes."""
    forward, backward = product_rates(num_lanes * num_classes, features.shape[1])
    gflop = 2e-9 * features.size * num_classes * passes
    return (
        f"floor {gflop / forward + gflop / backward:.2f} s: {2 * gflop:,.0f} GFLOP at {forward:.0f} and "
        f"{backward:.0f} GFLOP/s"
    )


def measure(programs: dict[str, Program], repeats: int) -> dict[str, Timing]:
    """Times all programs, which take turns."""
    for program in programs.values():
        program.compile()
    results: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            if sum(seconds[name]) < _ENOUGH_SECONDS:
                start = time.perf_counter()
                results[name] = program.run()
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(taken), len(taken), results[name]) for name, taken in seconds.items()}


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


def above(objectives: dict[str, float]) -> dict[str, str]:
    """In words, how far each is above the least of them."""
    least = min(objectives.values())
    return {name: f"objective {value / least - 1:+.1e}" for name, value in objectives.items()}


def one_fit(features: np.ndarray, labels: np.ndarray, repeats: int) -> tuple[list[dict[str, Any]], float]:
    """The first case, and the median of scikit-learn."""
    penalty, num_classes = 1 / (0.316 * len(labels)), int(labels.max()) + 1
    sequential = "L-BFGS with strong Wolfe (optax)"
    found = measure(
        {
            "probe": Program(
                lambda: our_fit(features, labels, penalty),
                lambda: our_fit(features, labels, penalty, max_iterations=1),
            ),
            sequential: Program(
                lambda: fit_line_search(features, labels, penalty),
                lambda: fit_line_search(features, labels, penalty, most=1),
            ),
            _SKLEARN: Program(lambda: fit_sklearn(features, labels, penalty)),
        },
        repeats,
    )
    solution: Solution = found["probe"].result
    fitted = {"probe": (solution.kernel, solution.bias)} | {n: found[n].result[:2] for n in (sequential, _SKLEARN)}
    objectives = above({name: objective(features, labels, *head, penalty) for name, head in fitted.items()})
    details = {
        "probe": f"{solution.num_iterations} iterations, converged {solution.converged}, "
        + floor(features, num_classes, 1, passes_of(solution))
    } | {name: found[name].result[2] for name in (sequential, _SKLEARN)}
    notes = {name: f"timed {found[name].times} x, {objectives[name]}, {details[name]}" for name in found}
    lines = report("one fit", {name: timing.median for name, timing in found.items()}, notes)
    return lines, found[_SKLEARN].median


def whole_path(features: np.ndarray, labels: np.ndarray, repeats: int, single: float) -> list[dict[str, Any]]:
    """The second case. Args: single: seconds of one fit of scikit-learn."""
    num_classes, tried = int(labels.max()) + 1, [float(penalty) for penalty in PENALTIES[::_SEARCHED_STEP]]

    def one_by_one(values: list[float], most: int = _SEARCHED_ITERATIONS) -> list[Any]:
        return [fit_line_search(features, labels, penalty, most=most) for penalty in values]

    sequential = "L-BFGS after L-BFGS, no folds"
    found = measure(
        {
            "probe": Program(lambda: our_path(features, labels), lambda: our_path(features, labels, max_iterations=1)),
            "adamw": Program(lambda: fit_adamw(features, labels), lambda: fit_adamw(features, labels, num_epochs=1)),
            sequential: Program(lambda: one_by_one(tried), lambda: one_by_one(tried[:1], most=1)),
        },
        repeats,
    )
    problem, excess = Problem(features, labels, num_classes), []
    for penalty, (kernel, bias, _) in zip(tried, found[sequential].result, strict=True):
        best = problem.fit(penalty, start=np.concatenate([kernel, bias[None]])).objective
        excess.append(objective(features, labels, kernel, bias, penalty) / best - 1)
    note, passes = found["probe"].result
    medians = {
        "probe": found["probe"].median,
        _SINGLE: single,
        f"AdamW, {NUM_SEARCHED} runs (CLIP benchmark)": NUM_SEARCHED * found["adamw"].median,
        sequential: _SEARCHED_STEP * found[sequential].median,
    }
    notes = {
        "probe": f"timed {found['probe'].times} x, {note}, {floor(features, num_classes, NUM_FOLDS, passes)}",
        f"AdamW, {NUM_SEARCHED} runs (CLIP benchmark)": f"1 run, timed {found['adamw'].times} x, times {NUM_SEARCHED}",
        sequential: f"{len(tried)} of 20 λ, timed {found[sequential].times} x, times {_SEARCHED_STEP}, objectives "
        + ", ".join(f"{value:+.0e}" for value in excess),
    }
    return report("path of 20 λ by 5 folds and final fit", medians, notes)


def growth(size: tuple[int, int, int], ours: float) -> list[dict[str, Any]]:
    """The third case, with each part of the size doubled in turn. Args: ours: seconds of our path at that size."""
    lines: list[dict[str, Any]] = []
    for axis, what in enumerate(("rows", "width", "classes")):
        grown = [value * (2 if axis == i else 1) for i, value in enumerate(size)]
        features, labels = make_embeddings(*grown)
        features -= features.mean(axis=0)
        penalty = 1 / (0.316 * len(labels))
        programs = {
            "probe": Program(
                functools.partial(our_path, features, labels), functools.partial(our_path, features, labels, 1)
            ),
            _SINGLE: Program(functools.partial(fit_sklearn, features, labels, penalty)),
        }
        found = measure(programs, 1)
        note, passes = found["probe"].result
        bound = floor(features, grown[2], NUM_FOLDS, passes)
        notes = {"probe": f"{found['probe'].median / ours:.2f} times that of half the {what}, {note}, {bound}"}
        medians = {name: timing.median for name, timing in found.items()}
        lines += report(f"path, twice the {what}", medians, notes)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, once, under 2 minutes")
    parser.add_argument("--json", type=Path, help="write the lines as a list of {case, program, median_s, ratio}")
    parser.add_argument("--cache", type=Path, help="take the embeddings of this cache; they do not grow")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds of each case")
    options = parser.parse_args()
    size = (10_000, 256, 20) if options.quick else (50_000, 768, 100)
    repeats = 1 if options.quick else options.repeats
    if options.cache:
        cache = Cache.open(options.cache)
        used = (cache.table.labels >= 0) & (cache.table.splits != "test")
        features, labels = cache.embeddings()[used], cache.table.labels[used]
        size = *features.shape, len(cache.class_names)
    else:
        features, labels = make_embeddings(*size)
    features = features - features.mean(axis=0)
    print(
        f"{size[0]:,} x {size[1]} x {size[2]}; {os.cpu_count()} CPU threads for every program; {jax.devices()[0]}; "
        f"load {os.getloadavg()[0]:.1f} at the start"
    )
    lines, single = one_fit(features, labels, repeats)
    of_path = whole_path(features, labels, repeats, single)
    lines += of_path
    if not options.cache:
        lines += growth(size, of_path[0]["median_s"])
    choice_by_tolerance(features[:_CHOICE_ROWS], labels[:_CHOICE_ROWS])
    if options.json:
        options.json.write_text(json.dumps(lines, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
