"""`probe embed --engine ray`: whatever dies, the cache ends with the bytes of the local run.

pytest -m cluster tests/test_ray.py
"""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probe.cache import Cache
from probe.config import EmbedConfig
from probe.errors import ConfigError
from tests.faults import files_of
from tests.loopback import alone
from tests.test_readme import readme_commands

pytest.importorskip("ray", reason="Ray is not installed: pip install 'probe-jax[ray]'")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
NUM_SHARDS, SHARD_ROWS = 40, 8


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> tuple[Path, list[str]]:
    """The cache of a local run over 40 shards of large photos, and the command that made it but for --out."""
    root = tmp_path_factory.mktemp("ray")
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(16):
        buffer = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        small.resize((1500, 1500), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=50)
        pictures.append(buffer.getvalue())
    for index in range(NUM_SHARDS * SHARD_ROWS - 1):
        path = root / "images" / "ab"[index % 2] / f"{index:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[index % 16] + b"%d" % index)  # behind its end: other bytes, the same picture
    (root / "images" / "a" / "000.jpg").write_bytes(b"no picture")
    made = ["--batch-size", "8", "--precision", "float32", "--shard-rows", str(SHARD_ROWS)]
    options = ["--backbone", str(tiny_clip), *made, "--json"]
    command = [str(Path(sys.executable).parent / "probe"), "embed", str(root / "images"), *options]
    subprocess.run([*command, "--out", root / "cache"], cwd=ROOT, check=True, capture_output=True)
    return root / "cache", command


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # sockets lie in it, whose paths must be short
        yield os.environ | {"RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}


def descendants(pid: int) -> dict[int, str]:
    """The processes below one: pid → command line, where Ray says what it does."""
    parents, lines = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return {child: lines[child] for child in below - {pid}}


def kill_at_work(driver: subprocess.Popen[str], doing: str, most: int) -> list[int]:
    """Waits for a driver, and kills processes below it that are `doing` something. Returns: those killed."""
    killed: list[int] = []
    while driver.poll() is None:
        at_work = [pid for pid, line in descendants(driver.pid).items() if line.startswith(doing)]
        if at_work and len(killed) < most:
            killed.append(at_work[len(killed) % len(at_work)])
            os.kill(killed[-1], signal.SIGKILL)
            time.sleep(0.5)
        time.sleep(0.02)  # a shard is made in less than a second: who looks seldom finds nobody at it
    return killed


def test_workers_and_a_driver_killed_while_they_work_change_no_byte(
    job: tuple[Path, list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    local, command = job
    cache = tmp_path / "cache"
    command = alone(*command, "--out", str(cache), "--engine", "ray", "--workers", "2", "--num-workers", "1")
    driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while driver.poll() is None and len(list(cache.glob("shards/*/*.json"))) < 5:
        time.sleep(0.1)
    below = descendants(driver.pid)
    driver.kill()
    driver.communicate()
    workers = [pid for pid, line in below.items() if "Agent" not in line]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.1)
    for pid in below.keys() - set(workers):  # Ray 2.60 leaves its two agents behind
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    driver = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killed = kill_at_work(driver, "ray::ShardWorker.make", 5)
    output, errors = driver.communicate()
    assert driver.returncode == 0, errors
    summary = json.loads(output)
    assert len(killed) >= 3
    assert sum(bool(worker["ended"]) for worker in summary["workers"]) == len(killed)
    assert sum(worker["num_retries"] for worker in summary["workers"]) >= 1
    assert summary["num_failed"] == 1
    assert not list(cache.rglob(".partial-*"))
    assert files_of(cache) == files_of(local)


def test_decode_actors_feed_a_worker_and_may_die(
    job: tuple[Path, list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    """Of its last option, --shard-rows, a shard gets several blocks of images, which several actors decode."""
    _, command = job
    command = [*command, "--shard-rows", "64"]
    subprocess.run([*command, "--out", str(tmp_path / "local")], cwd=ROOT, check=True, capture_output=True)
    options = ["--engine", "ray", "--workers", "1", "--decode-actors", "2", "--num-workers", "1"]
    script = [sys.executable, "-m", "tests.ray_faults", "talkative", *command[1:], "--out", str(tmp_path / "cache")]
    driver = subprocess.Popen(
        alone(*script, *options), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killed = kill_at_work(driver, "ray::Decoder.decode", 3)
    output, errors = driver.communicate()
    assert driver.returncode == 0, errors
    assert len(killed) == 3
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "local")
    (worker,) = json.loads(output)["workers"]
    assert (worker["num_shards"], worker["num_images"], worker["ended"]) == (5, 319, "")
    assert (worker["num_failed"], worker["num_retries"]) == (1, 0)
    last = [line for line in errors.splitlines() if line.startswith("embedding: ")][-1]
    assert re.match(r"embedding: 319 of 319 images, [\d.]+ images/s, done in \d+ s; 1 worker, 1 failed", last), last


def test_decode_actors_without_room_are_refused(environment: dict[str, str]) -> None:
    done = subprocess.run(
        alone(sys.executable, "-m", "tests.ray_faults", "few_cpus"),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "the cluster has 2 CPUs, and 1 workers with 2 decode actors each want 3" in done.stdout, done.stderr


def test_a_node_that_dies_costs_the_shards_in_its_hands(
    job: tuple[Path, list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    local, command = job
    cache = tmp_path / "cache"
    done = subprocess.run(
        alone(
            *(sys.executable, "-m", "tests.ray_faults", "lost_node", str(cache)),
            *(*command, "--out", str(cache), "--engine", "ray", "--workers", "2", "--num-workers", "1"),
        ),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    workers = json.loads(done.stdout.splitlines()[-1])["workers"]
    assert sum(bool(worker["ended"]) for worker in workers) >= 1
    assert files_of(cache) == files_of(local)


def test_the_command_of_the_readme(
    image_folder: Path, tiny_clip: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """As printed, on a cluster that only says that it has a GPU."""
    (command,) = [command for command in readme_commands() if "--engine ray" in command]
    assert "--ray-address auto --gpus-per-worker 1" in command
    image_folder.rename(tmp_path / "photos")
    words = shlex.split(command.replace("--backbone B", f"--backbone {tiny_clip}"))
    words[0] = str(Path(sys.executable).parent / "probe")
    done = subprocess.run(
        alone(sys.executable, "-m", "tests.ray_faults", "with_a_gpu", *words),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(Cache.open(tmp_path / "cache").table) == 48


def test_a_shard_that_ends_its_workers_is_named(environment: dict[str, str]) -> None:
    done = subprocess.run(
        alone(sys.executable, "-m", "tests.ray_faults", "bad_shard"),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "shard 3 failed 4 times, the last time on here: ActorDiedError" in done.stdout
    assert "from picture-3 to picture-3" in done.stdout


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    options = {"images": tmp_path, "backbone": "b", "out": tmp_path / "cache"}
    with pytest.raises(ConfigError, match="--workers must be left out without --engine ray, got 2"):
        EmbedConfig(**options, workers=2)
    with pytest.raises(ConfigError, match="--decode-actors must be left out without --engine ray, got 2"):
        EmbedConfig(**options, decode_actors=2)
    with pytest.raises(ConfigError, match="--num-shards must be left out with --engine ray, got 3"):
        EmbedConfig(**options, engine="ray", num_shards=3)
