"""Training checkpoints: to the bit, whole or not at all, and no flipped byte unnoticed."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import ConfigError, CorruptError, MismatchError, StorageError
from probe.training import checkpoints


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array
    average: dict


def train_state():
    """What a run carries: nested parameters, an optimizer's named tuples, empty states, keys, averages."""
    rng = np.random.default_rng(0)
    params = {
        "backbone": {"kernel": jnp.asarray(rng.standard_normal((5, 3)), jnp.bfloat16), "scale": jnp.float32(2)},
        "head": {"kernel": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32), "bias": jnp.zeros(2)},
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(
        step=jnp.int32(12),
        params=params,
        opt_state=tx.init(params),
        key=jax.random.key(7),
        average=jax.tree.map(lambda leaf: leaf * 0.5, params),
    )


def odd_arrays():
    """What a careless format changes: NaN's payload, minus zero, 64 bits, memory order, no elements, no axes."""
    return {
        "nan": np.array([0x7FC12345, 0xFF800001], np.uint32).view(np.float32),
        "zeros": np.array([-0.0, 0.0]),
        "order": np.random.default_rng(1).permutation(50),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(12, dtype=np.int16)[::3],
        "none": np.zeros((0, 3), np.float32),
        "none on the device": jnp.zeros((2, 0), jnp.int8),
        "scalar": np.asarray(3.5),
        "flags": np.array([True, False]),
        "half": np.ones(3, ml_dtypes.bfloat16) / 3,
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "list": [jnp.uint8(255), (np.float16(0.1),)],
        "a/b": np.ones(1),
        "a.b": np.zeros(1),
    }


def raw(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_same(found, saved):
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(saved), strict=True):
        assert raw(one) == raw(other)
        assert isinstance(one, jax.Array) == isinstance(other, jax.Array)


@pytest.mark.parametrize("make", [train_state, odd_arrays])
def test_a_tree_comes_back_to_the_bit(tmp_path, make):
    tree, record = make(), {"config": "c0ffee", "history": [{"epoch": 1, "loss": 0.1 + 0.2}]}
    path = checkpoints.save(tmp_path / "checkpoints", 12, tree, record)
    found = checkpoints.load(tmp_path / "checkpoints", "last", tree)
    assert_same(found.tree, tree)
    assert (found.path, found.step, found.record) == (path, 12, record)


def test_an_abstract_tree_will_do(tmp_path):
    state = train_state()
    checkpoints.save(tmp_path, 12, state, {})
    found = checkpoints.load(tmp_path, "last", jax.eval_shape(train_state))
    assert_same(found.tree, state)


@settings(deadline=None, max_examples=8)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=5), max_to_keep=st.integers(2, 3))
def test_the_newest_and_the_best_are_kept(tmp_path_factory, flags, max_to_keep):
    folder = tmp_path_factory.mktemp("run")
    for step, best in enumerate(flags):
        checkpoints.save(folder, step, {"x": np.asarray(step)}, {}, best=best, max_to_keep=max_to_keep)
    newest = set(range(len(flags))[-max_to_keep:])
    best = {max(step for step, flag in enumerate(flags) if flag)} if any(flags) else set()
    assert names(folder) == [
        f"{step + 1:06d}-step-{step}{'-best' if flags[step] else ''}" for step in sorted(newest | best)
    ]
    like = {"x": np.asarray(0)}
    assert checkpoints.load(folder, "last", like).tree["x"] == len(flags) - 1
    for step in best:
        assert checkpoints.load(folder, "best", like).tree["x"] == step
    if not best:
        with pytest.raises(CorruptError, match="holds no checkpoint marked best"):
            checkpoints.load(folder, "best", like)


def test_last_is_the_last_saved_whatever_its_step(tmp_path):
    """A run may go back to its best state and go on from there."""
    for step in (10, 20, 10):
        checkpoints.save(tmp_path, step, {"x": np.asarray(step)}, {}, best=step == 10)
    assert checkpoints.load(tmp_path, "last", {"x": np.asarray(0)}).path.name == "000003-step-10-best"


def test_one_checkpoint_is_too_few(tmp_path):
    with pytest.raises(ConfigError, match="keep 2 checkpoints or more"):
        checkpoints.save(tmp_path / "run", 1, {"x": np.ones(1)}, {}, max_to_keep=1)
    assert not (tmp_path / "run").exists()


def test_where_there_is_none(tmp_path):
    assert checkpoints.find(tmp_path / "absent", "last") is None
    with pytest.raises(CorruptError, match=r"absent holds no checkpoint$"):
        checkpoints.load(tmp_path / "absent", "last", {})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def all_files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_every_flipped_byte_is_an_error(tmp_path):
    """Orbax alone lets two flips of three through; ours are spread evenly over the files, which are small."""
    tree = train_state()
    path = checkpoints.save(tmp_path, 12, tree, {"config": "c0ffee"})
    rng = random.Random(0)
    files = all_files(path)
    assert {"SHA256SUMS", "checkpoint.json", "manifest.ocdbt"} <= {file.name for file in files}
    for trial in range(300):
        file = files[trial % len(files)]
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        file.write_bytes(damaged)
        with pytest.raises(CorruptError) as err:
            checkpoints.load(tmp_path, "last", tree)
        assert (file.name if file.name == "SHA256SUMS" else str(file.relative_to(path))) in str(err.value)
        file.write_bytes(content)
    assert_same(checkpoints.load(tmp_path, "last", tree).tree, tree)


def test_files_cut_short_gone_or_added_are_errors(tmp_path):
    tree = {"x": np.arange(9.0)}
    checkpoints.save(tmp_path, 1, tree, {})
    path = checkpoints.save(tmp_path, 2, tree, {})
    original = tmp_path / "original"
    shutil.copytree(path, original)
    for file in all_files(original):
        name = str(file.relative_to(original))
        for damage in ("cut", "gone", "added"):
            target = path / name
            if damage == "cut":
                target.write_bytes(file.read_bytes()[:-1])
            elif damage == "gone":
                target.unlink()
            else:
                (target.parent / "stranger").touch()
            with pytest.raises(CorruptError, match="there are 000001-step-1") as err:
                checkpoints.load(tmp_path, "last", tree)
            word = {"cut": "damaged", "gone": "missing", "added": "unknown"}[damage]
            named = str((target.parent / "stranger").relative_to(path)) if damage == "added" else name
            assert name == "SHA256SUMS" or re.search(f"{word}: {re.escape(named)}\n", str(err.value))
            shutil.rmtree(path)
            shutil.copytree(original, path)
    shutil.rmtree(path)  # what the message tells one to do
    assert checkpoints.load(tmp_path, "last", tree).step == 1


def test_sums_can_be_checked_without_this_program(tmp_path):
    path = checkpoints.save(tmp_path, 1, {"x": np.arange(9.0)}, {})
    checker = shutil.which("sha256sum")
    if checker is None:
        pytest.skip("there is no sha256sum here")
    subprocess.run([checker, "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=path, check=True)


def test_another_run_is_refused_with_both_sides(tmp_path):
    saved = {"head": {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}, "step": np.int32(1)}
    path = checkpoints.save(tmp_path, 1, saved, {"config": "aa", "data": "bb", "classes": ["cat"]})
    like = {
        "head": {"kernel": np.zeros((3, 4), np.float32), "scale": np.zeros(2, np.float32)},
        "step": np.int64(1),
    }
    with pytest.raises(MismatchError) as err:
        checkpoints.load(tmp_path, "last", like, expect={"data": "b2", "config": "aa", "device": "cpu"})
    assert str(err.value).splitlines() == [
        f"{path} belongs to another run:",
        "  record data: the checkpoint has bb, this run b2",
        "  record device: the checkpoint has none, this run cpu",
        "  array head/bias: the checkpoint has float32[2], this run none",
        "  array head/kernel: the checkpoint has float32[3,2], this run float32[3,4]",
        "  array head/scale: the checkpoint has none, this run float32[2]",
        "  array step: the checkpoint has int32[], this run int64[]",
    ]
    assert checkpoints.load(tmp_path, "last", saved, expect={"classes": ("cat",)}).step == 1


# Real processes. Importing jax takes longer than a save, so one process imports it and forks the writers: before
# any backend is up, which keeps that safe.
WRITERS = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np
from probe.training.checkpoints import save
from probe.errors import StorageError

def tree(step):
    return {"w": np.random.default_rng(step).standard_normal((3, 20000)), "step": np.asarray(step)}

def write(folder, first, last, limit):
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for step in range(first, last):
        try:
            save(folder, step, tree(step), {"step": step}, best=step % 3 == 0)
            print(step, flush=True)
        except StorageError as err:
            print("StorageError", err, flush=True)

for line in sys.stdin:
    folder, *numbers, twins = line.split()
    children = []
    for _ in range(int(twins)):
        children.append(os.fork())
        if not children[-1]:
            write(Path(folder), *map(int, numbers))
            os._exit(0)
    print("children", *children, flush=True)
    for child in children:
        os.waitpid(child, 0)
    print("done", flush=True)
"""
LIKE = {"w": np.zeros((3, 20000)), "step": np.asarray(0)}


@pytest.fixture(scope="module")
def writers():
    process = subprocess.Popen(
        [sys.executable, "-c", WRITERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    yield process
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


def start(writers, folder, first, last, *, limit=0, twins=1):
    print(folder, first, last, limit, twins, file=writers.stdin, flush=True)
    lines = iter(writers.stdout.readline, "")
    seen = []
    for line in lines:
        if line.startswith("children"):
            return [int(pid) for pid in line.split()[1:]], lines, seen
        seen.append(line)
    raise AssertionError("the writers' process ended")


def until_done(lines):
    seen = []
    for line in lines:
        if line == "done\n":
            return seen
        seen.append(line)
    raise AssertionError("the writers' process ended")


def assert_whole(found):
    np.testing.assert_array_equal(found.tree["w"], np.random.default_rng(found.step).standard_normal((3, 20000)))
    assert found.tree["step"] == found.step == found.record["step"]


def test_kill_at_any_moment_leaves_the_last_checkpoint_whole(tmp_path, writers):
    rng = random.Random(0)
    acknowledged, caught_at_work = -1, 0
    for _ in range(15):
        (child,), lines, seen = start(writers, tmp_path, acknowledged + 1, 10**6)
        seen += [next(lines)]  # after its first save it is killed at some point of a later one
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        seen += until_done(lines)
        acknowledged = max(acknowledged, *map(int, seen))
        partials = list(tmp_path.glob(".partial-*"))
        caught_at_work += bool(partials)
        assert len(partials) <= 2  # one being written, or one being removed: older ones were swept
        last = checkpoints.load(tmp_path, "last", LIKE)
        assert last.step in (acknowledged, acknowledged + 1)
        assert_whole(last)
        assert_whole(checkpoints.load(tmp_path, "best", LIKE))
        acknowledged = last.step
    assert caught_at_work >= 5
    checkpoints.save(tmp_path, 10**6, LIKE, {})
    assert not list(tmp_path.glob(".partial-*"))


def test_a_full_disk_is_a_storage_error_and_costs_nothing_older(tmp_path, writers):
    *_, lines, _ = start(writers, tmp_path, 0, 1)
    until_done(lines)
    before = names(tmp_path)
    *_, lines, seen = start(writers, tmp_path, 1, 2, limit=20000)
    (message,) = seen + until_done(lines)
    assert message.startswith(
        f"StorageError {tmp_path / '000002-step-1'}: cannot write: File too large. Free some space"
    )
    assert names(tmp_path) == before
    assert_whole(checkpoints.load(tmp_path, "last", LIKE))


def test_twins_wait_for_each_other(tmp_path, writers):
    *_, lines, seen = start(writers, tmp_path, 0, 4, twins=2)
    assert sorted(map(int, seen + until_done(lines))) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert checkpoints.find(tmp_path, "last").name == "000008-step-3-best"
    assert_whole(checkpoints.load(tmp_path, "last", LIKE))
    assert_whole(checkpoints.load(tmp_path, "best", LIKE))


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot keep checkpoints here: Not a directory"):
        checkpoints.save(tmp_path / "file" / "checkpoints", 1, {"x": np.ones(1)}, {})


def test_arrays_come_back_under_another_sharding(tmp_path):
    """Saved over eight devices, read on one, and the other way round."""
    code = """
import sys
from pathlib import Path
import jax, numpy as np
from probe.training import checkpoints
folder = Path(sys.argv[1])
mesh = jax.make_mesh((8,), ("data",))
split = jax.NamedSharding(mesh, jax.P("data"))
w = np.arange(32, dtype=np.float32).reshape(16, 2)
tree = {"w": jax.device_put(w, split), "keys": jax.device_put(jax.random.split(jax.random.key(0), 8), split)}
checkpoints.save(folder, 1, tree, {})
unsplit = {"w": jax.numpy.zeros((16, 2)), "keys": jax.random.split(jax.random.key(0), 8)}
one = checkpoints.load(folder, "last", unsplit)
assert len(one.tree["w"].devices()) == 1
np.testing.assert_array_equal(one.tree["w"], w)
checkpoints.save(folder, 2, one.tree, {})
again = checkpoints.load(folder, "last", tree)
for name in tree:
    assert again.tree[name].sharding == split, again.tree[name].sharding
np.testing.assert_array_equal(again.tree["w"], w)
np.testing.assert_array_equal(jax.random.key_data(again.tree["keys"]), jax.random.key_data(tree["keys"]))
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], env=os.environ | flags, check=True)
