"""Embeddings that memory cannot hold: the same optimum from passes over the cache, and a memory that stays small."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from probe import linear
from probe.cache import Cache, write_cache
from probe.config import FitLinearConfig
from probe.errors import ConfigError, NumericalError
from probe.probing.features import Stream, pieces
from probe.probing.scaling import Scaling
from probe.probing.solver import Problem

NAMES = ("ant", "bee", "cat")
LITTLE = 1e-6  # GB


def arrays(num_classes, num_rows=500, width=6):
    """Overlapping classes far from the origin, one feature constant and one large."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, num_rows)
    embeddings = rng.normal(size=(num_rows, width)) + 5
    embeddings[:, 1] += labels
    embeddings[:, 2] *= 100
    embeddings[:, 3] = 7
    return embeddings.astype(np.float32), labels


def stored(folder, embeddings, labels, splits=None):
    """A cache of shards that are no multiple of any chunk."""
    names = NAMES[: labels.max() + 1]
    write_cache(folder, embeddings, labels=labels, class_names=names, splits=splits, shard_rows=70)
    return folder


def stream_of(cache):
    return Stream(functools.partial(cache.blocks, "pooler"), np.arange(len(cache.table)), cache.width())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_stream_gives_each_row_once_in_pieces_of_one_shape(tmp_path, dtype):
    embeddings, labels = arrays(3)
    embeddings = embeddings.astype(dtype)
    stream = stream_of(Cache.open(stored(tmp_path / "cache", embeddings, labels)))
    rows = np.random.default_rng(1).permutation(500)[:400]
    for part, expected in ((stream[rows], embeddings[rows]), (stream[rows][-90:], embeddings[rows[-90:]])):
        found = list(pieces(part, 64))
        assert {len(values) for _, values in found[:-1]} == {64}
        at = np.concatenate([positions for positions, _ in found])
        assert sorted(at.tolist()) == list(range(len(expected)))
        assert part.shape == expected.shape
        values = np.concatenate([values for _, values in found])
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected[at])


@pytest.mark.parametrize("kind", ["standard", "l2", "none"])
def test_one_pass_gives_the_statistics_of_all_rows(tmp_path, kind):
    embeddings, labels = arrays(3)
    stream = stream_of(Cache.open(stored(tmp_path / "cache", embeddings, labels)))
    streamed, whole = Scaling.of(stream, kind), Scaling.of(embeddings, kind)
    np.testing.assert_allclose(streamed.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(streamed.scale, whole.scale, rtol=1e-12)
    rows = np.asarray(embeddings, np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) if kind == "l2" else rows
    np.testing.assert_allclose(whole.mean, rows.mean(axis=0), rtol=1e-13)
    if kind == "standard":
        np.testing.assert_allclose(whole.scale, np.where(np.arange(6) == 3, 0, rows.std(axis=0)), rtol=1e-12)


def test_same_optimum_as_in_memory(tmp_path):
    embeddings, labels = arrays(3)
    stream = stream_of(Cache.open(stored(tmp_path / "cache", embeddings, labels)))
    folds = np.arange(500) % 4
    weights = np.where(np.arange(500) % 7 == 0, 0, 1 + np.arange(500) % 3).astype(float)
    scaling = Scaling.of(embeddings, "standard")
    streamed, whole = (
        Problem(
            scaling.apply(values),
            labels,
            3,
            weights=weights,
            folds=folds,
            standardise_folds=True,
        )
        for values in (stream, embeddings)
    )
    for penalty in (1.0, 1e-3, 1e-6):
        ours, theirs = streamed.fit(penalty), whole.fit(penalty)
        assert ours.converged
        assert theirs.converged
        assert ours.objective == pytest.approx(theirs.objective, rel=1e-9)
        assert ours.initial_gradient_norm == pytest.approx(theirs.initial_gradient_norm, rel=1e-9)
    paths = [problem.path([1.0, 1e-2], [0, 1, 2, 3]) for problem in (streamed, whole)]
    np.testing.assert_allclose(paths[0].nll, paths[1].nll, rtol=1e-3)  # within the path's own tolerance
    np.testing.assert_array_equal(paths[0].count, paths[1].count)


def test_several_labels_a_row_are_streamed_too(tmp_path):
    embeddings, labels = arrays(3)
    stream = stream_of(Cache.open(stored(tmp_path / "cache", embeddings, labels)))
    sets = np.stack([labels == 0, labels > 0, embeddings[:, 0] > 5.5], axis=1)
    scaling = Scaling.of(embeddings, "standard")
    streamed, whole = (
        Problem(scaling.apply(values), sets, 3).fit(1e-3, start=np.zeros((7, 3))) for values in (stream, embeddings)
    )
    assert streamed.converged
    assert streamed.objective == pytest.approx(whole.objective, rel=1e-9)


def test_without_a_penalty_separable_classes_are_refused(tmp_path):
    embeddings, labels = arrays(2)
    embeddings[:, 0] += 100 * labels
    stream = stream_of(Cache.open(stored(tmp_path / "cache", embeddings, labels)))
    with pytest.raises(NumericalError, match="Give a λ above 0"):
        Problem(Scaling.of(stream, "standard").apply(stream), labels, 2).fit(0.0)


@pytest.mark.parametrize(
    ("num_classes", "given_val", "options"),
    [(2, False, {}), (3, False, {"scalings": ("l2", "standard")}), (3, True, {"no_refit": True})],
    ids=["folds", "search", "val"],
)
def test_the_verb_chooses_and_fits_the_same(tmp_path, num_classes, given_val, options):
    embeddings, labels = arrays(num_classes)
    splits = [("test", "val" if given_val else "train", "train", "train")[row % 4] for row in range(500)]
    cache = stored(tmp_path / "cache", embeddings, labels, splits)
    streamed, whole = (
        linear.fit_linear(
            FitLinearConfig(
                cache=cache, out=tmp_path / name, max_memory=memory, penalties=(1.0, 0.1, 1e-2, 1e-3), **options
            )
        )
        for name, memory in (("streamed", LITTLE), ("whole", 1.0))
    )
    assert "read anew for each pass" in streamed["warnings"][0]
    assert "baseline" in whole
    assert "baseline" not in streamed
    assert streamed["penalty"] == whole["penalty"]
    assert streamed["scaling"] == whole["scaling"]
    assert streamed["solution"]["converged"]
    assert streamed["solution"]["objective"] == pytest.approx(whole["solution"]["objective"], rel=1e-9)
    for split, figures in whole["splits"].items():
        assert streamed["splits"][split]["n"] == figures["n"]
        assert streamed["splits"][split]["nll"] == pytest.approx(figures["nll"], rel=1e-3)
    assert linear.describe(streamed)


@pytest.mark.parametrize(
    "options",
    [{"head": "knn"}, {"head": "mlp"}, {"solver": "ridge"}, {"solver": "sklearn"}, {"shots": (1,)}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_what_cannot_be_streamed_is_refused(tmp_path, options):
    cache = stored(tmp_path / "cache", *arrays(3))
    with pytest.raises(ConfigError, match="--head linear and --solver lbfgs, without --shots"):
        linear.fit_linear(FitLinearConfig(cache=cache, out=tmp_path / "run", max_memory=LITTLE, **options))
    with pytest.raises(ConfigError, match="--max-memory"):
        FitLinearConfig(cache=cache, out=tmp_path / "run", max_memory=0.0)


SOLVE = """
import functools, sys
from pathlib import Path
import numpy as np
from probe.cache import Cache
from probe.probing.features import Stream
from probe.probing.scaling import Scaling
from probe.probing.solver import Problem
from tests.test_streaming import cap_memory

def fit(folder, in_memory=False):
    cache = Cache.open(Path(folder))
    stream = Stream(functools.partial(cache.blocks, "pooler"), np.arange(len(cache.table)), cache.width())
    rows = cache.embeddings() if in_memory else stream
    return Problem(Scaling.of(rows, "standard").apply(rows), cache.table.labels, 2).fit(1.0)

small, large, _, room = sys.argv[1:]
fit(small)  # what libraries and compiled programs take is not counted
cap_memory(int(room))
print("converged", fit(large).converged)
try:
    fit(large, in_memory=True)
except MemoryError:
    print("in memory it does not fit")
"""

FIT_LINEAR = """
import sys
from pathlib import Path
from probe.config import FitLinearConfig
from probe.linear import fit_linear
from tests.test_streaming import cap_memory

def fit(cache, memory):
    options = dict(penalties=(1.0, 0.1), folds=2, max_memory=memory, overwrite=True, quiet=True)
    return fit_linear(FitLinearConfig(cache=Path(cache), out=Path(out), **options))

small, large, out, room = sys.argv[1:]
fit(small, 1e-6)
cap_memory(int(room))
print("converged", fit(large, 1e-6)["solution"]["converged"])
try:
    fit(large, 1e3)
except MemoryError:
    print("in memory it does not fit")
"""


def cap_memory(room):
    """Lets this process allocate `room` bytes more than it has."""
    import resource
    from pathlib import Path

    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(line.split()[1]) + room,) * 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the cap is Linux's")
@pytest.mark.parametrize(
    ("program", "num_rows", "width", "share"),
    [
        pytest.param(SOLVE, 2**17, 256, 0.5, id="solver"),
        # the bootstrap of 100,000 rows takes some 100 MB, whatever their width
        pytest.param(FIT_LINEAR, 100_000, 1024, 0.4, id="fit-linear", marks=pytest.mark.soak),
    ],
)
def test_memory_stays_far_below_the_size_of_the_cache(tmp_path, program, num_rows, width, share):
    rng = np.random.default_rng(0)
    for name, num in (("small", 5000), ("large", num_rows)):
        embeddings, labels = rng.standard_normal((num, width), np.float32), np.arange(num) % 2
        embeddings[:, 0] += labels
        write_cache(tmp_path / name, embeddings, labels=labels, class_names=NAMES[:2], shard_rows=2048)
    folders = (str(tmp_path / name) for name in ("small", "large", "run"))
    command = [sys.executable, "-c", program, *folders, str(int(embeddings.nbytes * share))]
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}  # else each thread reserves memory that it never touches
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert "converged True" in done.stdout, done.stderr
    assert "in memory it does not fit" in done.stdout, done.stderr
