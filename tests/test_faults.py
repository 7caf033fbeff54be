"""What a crash, a full disk, bit rot, a hostile file or a twin process can do to a cache: nothing.

pytest tests/test_faults.py            the counts below
pytest tests/test_faults.py -m soak    ten times as many
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from probe.cache import Cache, verify_cache
from probe.config import EmbedConfig
from probe.embed import embed
from probe.errors import ProbeError, StorageError
from tests.conftest import write_image_folder
from tests.disk import CrashState, Disk, crash_states
from tests.faults import digest_of, files_of, run_job

ROOT = Path(__file__).parents[1]
NUM_INPUTS = 72  # three shards
MORE_INPUTS = 110  # two more, in a second revision
FIRST_RUN = "the first run"
MANY = [pytest.param(1, id="once"), pytest.param(10, id="ten times", marks=pytest.mark.soak)]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: a kill leaves what was written, synced or not, so it shows the same."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


def inflict(what: str, count: int, folder: Path) -> dict:
    """Runs a part of tests/faults.py in a process that may fork."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", what, str(count), str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    print(what, done.stdout)
    return json.loads(done.stdout)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("times", MANY)
def test_kill_9_at_any_instant_loses_nothing(times: int, folder: Path) -> None:
    result = inflict("kills", 200 * times, folder)
    assert result["kills"] >= 200 * times
    assert result["digests"] == 1


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("times", MANY)
def test_a_full_disk_is_a_clear_error_and_the_run_resumes(times: int, folder: Path) -> None:
    assert inflict("disk_full", 60 * times, folder) == {"runs": 60 * times, "refused": 60 * times}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("times", MANY)
def test_four_processes_on_one_cache_make_the_bytes_of_one(times: int, folder: Path) -> None:
    result = inflict("races", 20 * times, folder)
    assert result["killed"] > 5 * times


def test_hostile_files_are_refused_at_once(folder: Path) -> None:
    assert inflict("hostile", 0, folder)["files"] >= 15


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fsync, for tests that resume thousands of times and whose crashes are made up."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("times", MANY)
def test_every_crash_state_resumes_to_the_same_bytes(times: int, folder: Path, unsynced: None) -> None:
    """SQLite's method: replay the diary of every write, torn, and with unsynced operations dropped."""
    disk = Disk(folder / "straight")
    with disk.installed():
        run_job(folder / "straight", NUM_INPUTS, disk.acknowledge)
        disk.acknowledge(FIRST_RUN)
        run_job(folder / "straight", MORE_INPUTS, disk.acknowledge)
    reference = files_of(folder / "straight")
    counts: Counter[str] = Counter()
    checked = set()
    for index, state in enumerate(crash_states(disk.diary, num_power_losses=2000 * times, seed=0)):
        counts[state.kind] += 1
        left = tuple(sorted(state.files.items())), state.folders, state.acknowledged
        if left not in checked:
            checked.add(left)
            check_crash_state(state, reference, folder / str(index))
    print(dict(counts), "states,", len(checked), "distinct")
    assert counts["prefix"] > 100
    assert len(checked) > 150 * times  # few operations wait for an fsync at any time, so many states are equal


def check_crash_state(state: CrashState, reference: dict[str, bytes], root: Path) -> None:
    for name in sorted(state.folders):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, data in state.files.items():
        (root / name).write_bytes(data)
    whole = files_of(root)
    assert stands_whole(state, reference), state.kind
    for shard in state.acknowledged - {FIRST_RUN}:
        assert any(shard in name and name.endswith(".json") for name in whole), (state.kind, shard)
        assert any(shard in name and name.endswith(".h5") for name in whole), (state.kind, shard)
    if FIRST_RUN not in state.acknowledged:
        run_job(root, NUM_INPUTS)
    run_job(root, MORE_INPUTS)
    assert files_of(root) == reference
    shutil.rmtree(root)


def test_the_replay_would_catch_a_writer_that_does_not_sync(folder: Path, unsynced: None) -> None:
    disk = Disk(folder / "straight")
    with disk.installed():
        run_job(folder / "straight", NUM_INPUTS)
    reference = files_of(folder / "straight")
    forgetful = [operation for operation in disk.diary if operation.kind != "sync"]
    for diary, is_safe in ((disk.diary, True), (forgetful, False)):
        states = crash_states(diary, num_power_losses=100, seed=0)
        wrong = [state for state in states if not stands_whole(state, reference)]
        assert bool(wrong) != is_safe


def stands_whole(state: CrashState, reference: dict[str, bytes]) -> bool:
    return all(reference[name] == data for name, data in state.files.items() if ".partial-" not in name)


@pytest.mark.parametrize("persistent", [False, True])
def test_any_operation_may_fail(persistent: bool, folder: Path, unsynced: None) -> None:
    """The n-th open, write, fsync, rename or mkdir fails, for every n of a job of three shards."""
    disk = Disk(folder / "straight")
    with disk.installed():
        run_job(folder / "straight", NUM_INPUTS)
    reference = files_of(folder / "straight")
    assert disk.num_operations > 60
    for index in range(disk.num_operations):
        root = folder / str(index)
        failing = Disk(root, fail_at=index, persistent=persistent)
        with failing.installed(), pytest.raises(StorageError, match="No space left on device"):
            run_job(root, NUM_INPUTS)
        assert {name: data for name, data in files_of(root).items() if reference.get(name) != data} == {}
        assert not list(root.rglob(".partial-*"))
        run_job(root, NUM_INPUTS)
        assert files_of(root) == reference
        shutil.rmtree(root)
    print(disk.num_operations, "operations")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("times", MANY)
def test_every_flipped_bit_and_every_truncation_is_detected(times: int, folder: Path) -> None:
    root, rng = folder / "cache", random.Random(0)
    run_job(root, NUM_INPUTS)
    files = files_of(root)
    before = Cache.open(root).embeddings()
    seen_by_reader = 0
    for turn in range(300 * times):
        name = rng.choice(sorted(files))
        damaged = bytearray(files[name])
        if turn % 5:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(damaged)) :]
        (root / name).write_bytes(damaged)
        found = verify_cache(root)
        assert any(Path(name).name in fault for fault in found.damage.values()), (name, found.damage)
        try:  # the reader meets what it needs, and what it does not notice has not changed anything
            np.testing.assert_array_equal(Cache.open(root).embeddings(), before)
        except ProbeError:
            seen_by_reader += 1
        (root / name).write_bytes(files[name])
    print(300 * times, "changes,", seen_by_reader, "met by the reader")
    assert not verify_cache(root).damage
    assert seen_by_reader > 50 * times


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("times", MANY)
def test_kill_9_of_probe_embed(times: int, tiny_clip: Path, tmp_path: Path) -> None:
    write_image_folder(tmp_path / "images", {"": 80})
    (tmp_path / "images/red/bad.png").write_bytes(b"no image")
    fields = {
        "images": tmp_path / "images",
        "backbone": str(tiny_clip),
        "batch_size": 4,
        "precision": "float32",
        "shard_rows": 8,
        "num_workers": 1,
    }
    embed(EmbedConfig(**fields, out=tmp_path / "straight"))
    expected, rng, num_kills, num_jobs = digest_of(tmp_path / "straight"), random.Random(0), 0, 0
    while num_kills < 15 * times:
        root = tmp_path / f"job{num_jobs}"
        while not list(root.glob("plan/*[!n].h5")):  # a complete plan
            process = subprocess.Popen(
                [sys.executable, "-m", "probe.cli", "embed", *command_line(fields | {"out": root})],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            if wait_for_progress(process, root):
                time.sleep(rng.uniform(0, 0.4))
                process.kill()
            _, err = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), err
            num_kills += process.returncode == -signal.SIGKILL
        assert digest_of(root) == expected
        num_jobs += 1
    print(num_kills, "kills of probe embed,", num_jobs, "jobs")


LIMITED = """
import resource, sys
from probe.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


def test_a_full_disk_ends_probe_embed_with_one_line(tiny_clip: Path, tmp_path: Path) -> None:
    fields = {
        "images": write_image_folder(tmp_path / "images", {"": 10}),
        "backbone": str(tiny_clip),
        "batch_size": 4,
        "precision": "float32",
    }
    arguments = ["embed", *command_line(fields | {"out": tmp_path / "cache"})]
    done = subprocess.run([sys.executable, "-c", LIMITED, "5000", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == StorageError.exit_code
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("probe: error: ")
    assert "File too large. Free some space" in lines[0]
    assert not list(tmp_path.rglob(".partial-*"))
    assert embed(EmbedConfig(**fields, out=tmp_path / "cache"))["num_embedded"] == 30


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_probe_embed_and_keeps_what_is_sealed(signum: int, tiny_clip: Path, tmp_path: Path) -> None:
    fields = {"images": write_image_folder(tmp_path / "images", {"": 300}), "backbone": str(tiny_clip)}
    fields |= {"out": tmp_path / "cache", "batch_size": 4, "precision": "float32", "shard_rows": 4, "num_workers": 1}
    process = subprocess.Popen(
        [sys.executable, "-m", "probe.cli", "embed", *command_line(fields)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("cache/shards/*/*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    started = time.monotonic()
    process.send_signal(signum)
    _, err = process.communicate()
    assert time.monotonic() - started < 5
    assert process.returncode == 128 + signum
    assert err.count("\n") == 1
    assert "shards are sealed; run it again to go on" in err
    sealed = len(list(tmp_path.glob("cache/shards/*/*.h5")))
    assert sealed > 0
    assert embed(EmbedConfig(**fields))["num_computed"] == 900 - 4 * sealed


def wait_for_progress(process: subprocess.Popen, root: Path) -> bool:
    """Waits until the process has begun to write: most of its life it only starts. False if it ended."""
    before = len(list(root.rglob("*")))
    while process.poll() is None:
        if len(list(root.rglob("*"))) > before:
            return True
        time.sleep(0.005)
    return False


def command_line(fields: dict) -> list[str]:
    fields = dict(fields)
    return [str(fields.pop("images")), *(str(x) for k, v in fields.items() for x in (f"--{k.replace('_', '-')}", v))]
