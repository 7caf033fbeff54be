"""Decoding in worker processes: order, keys, bounds, and workers that hang, die, or outlive nobody."""

import hashlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.images import ImageError, ImageLoader, LoadedImage, Preprocessing, load_image, load_images, workers
from tests.bad_images import PICTURE, cases, encode
from tests.test_images import check_outcome

SMALL = Preprocessing.from_config(
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 20}, "crop_size": 16}
)
# as wide and high as every golden picture, so that nothing is resized or cropped away
WHOLE = Preprocessing(resize=None, resample=3, crop=(30, 40), rescale_factor=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
PNG = encode(PICTURE, "PNG")


def load(contents: list[Any], **options: Any) -> list[LoadedImage[int]]:
    return list(load_images(enumerate(contents), SMALL, **{"num_workers": 2} | options))


_before: set[int] = set()  # processes that earlier tests keep, such as those of a server that a module shares


@pytest.fixture(autouse=True)
def others() -> None:
    _before.clear()
    _before.update(children())


def children() -> list[int]:
    """Processes that this one has started in this test and that still run."""
    tasks = Path("/proc/self/task").glob("*/children")
    started = {pid for task in tasks for pid in map(int, task.read_text().split())} - _before
    return [pid for pid in started if not is_zombie(pid)]


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_order_pixels_and_keys(tmp_path: Path) -> None:
    contents: list[bytes | Path] = []
    for index in range(90):
        data = encode(PICTURE.crop((0, 0, 20 + index % 20, 20 + index % 7)), "PNG")
        path = tmp_path / f"{index}.png"
        path.write_bytes(data)
        contents.append(path if index % 2 else data)
    for expected, image in zip(enumerate(contents), load(contents, num_workers=3, ahead=5), strict=True):
        index, content = expected
        data = content.read_bytes() if isinstance(content, Path) else content
        assert image.example == index
        assert image.failure is None
        assert image.key == hashlib.sha256(data).digest()
        assert image.size == len(data)
        assert image.mtime_ns == (content.stat().st_mtime_ns if isinstance(content, Path) else 0)
        assert image.pixels is not None
        np.testing.assert_array_equal(image.pixels, load_image(data, SMALL))
    assert not children()


@given(outcomes=st.lists(st.sampled_from(["good", "known", "bad"]), max_size=40), ahead=st.integers(1, 9))
@settings(max_examples=6, deadline=None)
def test_what_is_yielded_does_not_depend_on_scheduling(outcomes: list[str], ahead: int) -> None:
    known = {hashlib.sha256(b"known").digest()}
    content = {"good": PNG, "known": b"known", "bad": b"bad"}
    images = load([content[outcome] for outcome in outcomes], skip_keys=known.__contains__, ahead=ahead)
    for outcome, image in zip(outcomes, images, strict=True):
        assert image.key == hashlib.sha256(content[outcome]).digest()
        assert (image.pixels is not None) == (outcome == "good")
        assert (image.failure is not None) == (outcome == "bad")


@given(seed=st.integers(0, 99), num_workers=st.integers(1, 4), ahead=st.integers(1, 20))
@settings(max_examples=4, deadline=None)
def test_the_order_holds_under_random_delays(seed: int, num_workers: int, ahead: int) -> None:
    """Images of 20 to 400 pixels, and workers that wait at random between reading and decoding."""
    rng = random.Random(seed)
    contents = [encode(PICTURE.resize((rng.choice([20, 400]), 30)), "PNG") for _ in range(30)]

    def delay(key: bytes) -> bool:
        time.sleep(rng.choice([0, 0, 0.02]))
        return False

    images = load(contents, skip_keys=delay, num_workers=num_workers, ahead=ahead)
    assert [image.example for image in images] == list(range(30))
    assert [image.key for image in images] == [hashlib.sha256(content).digest() for content in contents]
    assert all(image.decode_s > 0 and image.read_s > 0 for image in images)


def test_bytes_that_wait_for_a_worker_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_AHEAD_BYTES", 3 * len(PNG))
    taken = 0

    def items() -> Iterator[tuple[int, bytes]]:
        nonlocal taken
        for index in range(40):
            taken += 1
            yield index, PNG

    for done, image in enumerate(load_images(items(), SMALL, num_workers=2, ahead=64)):
        assert image.example == done
        assert taken <= done + 1 + 3


def test_processes_can_be_started_before_there_are_images() -> None:
    with ImageLoader(SMALL, num_workers=2) as loader:
        loader.start()
        wait_until(lambda: len(children()) == 2)
        assert [image.failure for image in loader.load(enumerate([PNG] * 9))] == [None] * 9
    assert not children()


def test_a_key_accepted_meanwhile_is_skipped() -> None:
    """A second copy yields no pixels, although it was decoded before its turn came."""
    seen: set[bytes] = set()
    pixels = []
    for image in load_images(enumerate([PNG] * 50), SMALL, num_workers=2, skip_keys=lambda key: key in seen):
        assert image.key is not None
        seen.add(image.key)
        pixels.append(image.pixels is not None)
    assert pixels == [True] + [False] * 49


def test_golden_outcomes_in_workers() -> None:
    golden = cases()
    items = [(case, case.data) for case in golden]
    for image in load_images(items, WHOLE, num_workers=2):
        case = image.example
        assert image.key == hashlib.sha256(case.data).digest()
        if isinstance(case.expected, str) or case.expected.shape == (30, 40, 3):
            check_outcome(case, image.pixels, image.failure)
        else:
            assert image.failure is None


def special_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Paths that are no plain file, each with the reason that it fails for."""
    yield folder / "missing.jpg", "missing"
    yield folder / "file.jpg" / "below.jpg", "missing"
    (folder / "file.jpg").write_bytes(PNG)
    os.mkfifo(folder / "fifo.jpg")
    yield folder / "fifo.jpg", "not-a-file"
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket must be short
        listener.bind("socket.jpg")
        os.chdir(here)
    yield folder / "socket.jpg", "not-a-file"
    (folder / "folder.jpg").mkdir()
    yield folder / "folder.jpg", "not-a-file"
    yield Path("/dev/zero"), "not-a-file"
    (folder / "dangling.jpg").symlink_to("nowhere")
    yield folder / "dangling.jpg", "missing"
    (folder / "loop.jpg").symlink_to("loop.jpg")
    yield folder / "loop.jpg", "unreadable"
    yield folder / ("n" * 256), "unreadable"
    yield folder / "nul\0.jpg", "unreadable"
    yield Path("/proc/self/status"), "changed"  # says that it is empty, and is not: as a file that grows
    with (folder / "huge.jpg").open("wb") as file:
        file.truncate(2 << 30)  # sparse
    yield folder / "huge.jpg", "too-big"


def test_paths_that_are_no_plain_file(tmp_path: Path) -> None:
    special = list(special_files(tmp_path))
    images = load([path for path, _ in special] + [tmp_path / "file.jpg"], timeout_s=5)
    assert [image.failure.reason for image in images[:-1] if image.failure] == [reason for _, reason in special]
    assert all(image.key is None for image in images[:-1])
    assert images[-1].failure is None


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "growing.png"
    path.write_bytes(PNG + bytes(30_000_000))
    command = "import sys\nwith open(sys.argv[1], 'ab', buffering=0) as f:\n while True: f.write(bytes(1000))"
    writer = subprocess.Popen([sys.executable, "-c", command, path])
    try:
        wait_until(lambda: path.stat().st_size > 30_100_000)
        (image,) = load([path])
    finally:
        writer.kill()
        writer.wait()
    assert image.failure is not None
    assert image.failure.reason == "changed"


def test_failures_of_the_source_are_passed_on() -> None:
    images = load([PNG, ImageError("truncated", "the shard ends"), PNG])
    assert [image.failure and image.failure.reason for image in images] == [None, "truncated", None]


@pytest.mark.parametrize(
    ("deaths", "reasons"), [(1, [None, None, None]), (2, [None, "crashed", None]), (9, [None, "crashed", None])]
)
def test_a_killed_worker_costs_one_image(deaths: int, reasons: list[str | None]) -> None:
    """The worker is killed while it waits to be told to decode the second image, once or again and again."""
    victim = b"the second image"
    left = itertools.count(deaths, -1)

    def kill_decoder(key: bytes) -> bool:
        if key == hashlib.sha256(victim + PNG).digest() and next(left) > 0:
            for pid in children():
                os.kill(pid, signal.SIGKILL)
        return False

    images = load([PNG, victim + PNG, PNG], num_workers=1, ahead=1, skip_keys=kill_decoder)
    expected = [reason or ("format" if index == 1 else None) for index, reason in enumerate(reasons)]
    assert [image.failure and image.failure.reason for image in images] == expected
    if deaths > 1:
        assert "killed by signal 9" in str(images[1].failure)


def test_workers_killed_between_images_cost_nothing() -> None:
    def items() -> Iterator[tuple[int, bytes]]:
        for index in range(60):
            if index % 20 == 10:
                for pid in children():
                    os.kill(pid, signal.SIGKILL)
            yield index, PNG

    images = list(load_images(items(), SMALL, num_workers=2, ahead=1))
    assert not [image.failure for image in images if image.failure]
    assert [image.example for image in images] == list(range(60))


def test_a_hanging_worker_costs_one_image() -> None:
    victim = b"a decoder that hangs"

    def stop_decoder(key: bytes) -> bool:
        if key == hashlib.sha256(victim).digest():
            for pid in children():
                os.kill(pid, signal.SIGSTOP)
        return False

    started = time.monotonic()
    images = load([PNG, victim, PNG, PNG], num_workers=1, timeout_s=0.7, skip_keys=stop_decoder)
    assert [image.failure and image.failure.reason for image in images] == [None, "timeout", None, None]
    assert time.monotonic() - started < 10
    assert not children()


def test_a_hang_while_bytes_are_sent() -> None:
    """A worker that does not even read: more bytes than a pipe holds must not block the parent for ever."""

    def items() -> Iterator[tuple[int, bytes]]:
        yield 0, PNG
        wait_until(children)
        time.sleep(1)
        for pid in children():
            os.kill(pid, signal.SIGSTOP)
        yield 1, bytes(5_000_000)
        yield 2, PNG

    images = list(load_images(items(), SMALL, num_workers=1, ahead=1, timeout_s=1.5))
    assert [image.failure and image.failure.reason for image in images] == [None, "timeout", None]


def test_workers_that_cannot_start(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A fault of the installation is no fault of the images."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RuntimeError, match=r"cannot be started: .*No such file"):
        load([PNG])
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [str(Path(np.__file__).parent)])  # where there is no package `probe`
    with pytest.raises(RuntimeError, match="did not start: exit code 1"):
        load([PNG])
    assert "Error" in capfd.readouterr().err


def test_workers_end_when_the_consumer_stops() -> None:
    images = load_images(((i, PNG) for i in itertools.count()), SMALL, num_workers=2)
    assert next(images).failure is None
    assert children()
    images.close()  # type: ignore[attr-defined]
    wait_until(lambda: not children())  # they are killed by now; one that waits for a busy disk dies a little later


def test_no_image_is_read_far_ahead() -> None:
    taken = 0

    def items() -> Iterator[tuple[int, bytes]]:
        nonlocal taken
        for index in itertools.count():
            taken += 1
            yield index, PNG

    images = load_images(items(), SMALL, num_workers=2, ahead=10)
    for _ in range(5):
        next(images)
    assert taken <= 5 + 11
    images.close()  # type: ignore[attr-defined]


SCRIPT = """
import itertools, os, sys
from pathlib import Path
from probe.images import Preprocessing, load_images
small = Preprocessing.from_config({"image_processor_type": "CLIPImageProcessor", "size": 20, "crop_size": 16})
data = Path(sys.argv[1]).read_bytes()
for image in load_images(((i, data) for i in itertools.count()), small, num_workers=2):
    assert image.failure is None, image.failure
    if image.example == 30:
        tasks = Path("/proc/self/task").glob("*/children")
        print(*(pid for task in tasks for pid in task.read_text().split()), flush=True)
"""


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that decodes for ever in a folder of traps, and the ids of its workers."""
    (tmp_path / "image.png").write_bytes(PNG)
    for trap in ("numpy.py", "PIL.py", "json.py", "probe.py"):
        (tmp_path / trap).write_text("raise SystemExit('imported from the working folder')")
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", SCRIPT, "image.png"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )
    assert process.stdout
    line = process.stdout.readline()
    yield process, list(map(int, line.split()))
    process.kill()
    process.communicate()


def test_workers_die_with_a_killed_parent(running: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = running
    assert len(workers) == 2
    process.kill()
    process.wait()
    wait_until(lambda: all(is_zombie(pid) for pid in workers), 30)


def test_ctrl_c_ends_everything_and_workers_say_nothing(running: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = running
    os.killpg(process.pid, signal.SIGINT)
    for pid in workers:
        os.kill(pid, signal.SIGINT)  # and if the terminal does reach them, they leave it to their parent
    _, errors = process.communicate(timeout=30)
    assert errors.count("Traceback") == 1  # the script's own
    assert "KeyboardInterrupt" in errors
    wait_until(lambda: all(is_zombie(pid) for pid in workers), 30)


def test_a_stopped_parent_goes_on(tmp_path: Path) -> None:
    """Ctrl-Z and fg: what was being decoded meanwhile is no timeout."""
    (tmp_path / "image.png").write_bytes(PNG)
    script = SCRIPT.replace("num_workers=2", "num_workers=2, timeout_s=3").replace("== 30", "in (30, 3000)")
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "image.png"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(process.pid, signal.SIGCONT)
    assert process.stdout.readline()
    process.kill()
    _, errors = process.communicate()
    assert errors == ""


def test_workers_import_little() -> None:
    command = "import sys, probe.images.workers; print(*{m.partition('.')[0] for m in sys.modules})"
    modules = set(subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout.split())
    assert {"numpy", "PIL"} <= modules
    assert not modules & {"jax", "flax", "h5py", "transformers", "sklearn", "rich", "tyro", "multiprocessing"}


@pytest.mark.soak
def test_pillow_corpus(tmp_path: Path) -> None:
    """The images of Pillow's own tests, many of them broken on purpose: no crash, no hang, under 300 MB."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "pillow", "-d", tmp_path]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("Pillow's source distribution could not be fetched")
    with tarfile.open(next(tmp_path.glob("pillow-*.tar.gz"))) as sdist:
        contents = {m.name: sdist.extractfile(m) for m in sdist if m.isfile() and "/Tests/images/" in m.name}
        items = [(name, file.read()) for name, file in contents.items() if file]
    outcomes: dict[str, int] = {}
    peak = 0
    for image in load_images(items, SMALL, num_workers=2, timeout_s=10):
        reason = image.failure.reason if image.failure else "ok"
        outcomes[reason] = outcomes.get(reason, 0) + 1
        for pid in children():
            peak = max(peak, peak_memory(pid))
    print(len(items), outcomes, f"{peak >> 20} MB")
    assert len(items) > 1000
    assert outcomes["ok"] > 500
    assert "crashed" not in outcomes
    assert "timeout" not in outcomes
    assert peak < 300 << 20


def peak_memory(pid: int) -> int:
    """Bytes that a process has had in memory at most."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def test_a_loader_keeps_its_processes_from_one_sequence_to_the_next() -> None:
    with ImageLoader(SMALL, num_workers=2) as loader:
        first = list(loader.load(enumerate([PNG] * 8)))
        before = children()
        second = list(loader.load(enumerate([PNG] * 8)))
        assert sorted(children()) == sorted(before)
        assert len(before) == 2
    assert [image.example for image in second] == list(range(8))
    assert all((a.pixels == b.pixels).all() for a, b in zip(first, second, strict=True))
