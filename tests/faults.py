"""Faults made on purpose, on a process that plans, seals and writes a cache but computes nothing: quick to kill.

    python -m tests.faults kills|disk_full|races COUNT FOLDER
    python -m tests.faults hostile 0 FOLDER

Each prints what happened as JSON. They run in a process of their own that imports the cache once and forks its
victims, so that 200 kills take seconds. Nothing here imports jax, whose threads would make forking unsafe.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from probe.cache import (
    FAILED,
    KNOWN,
    Cache,
    CacheWriter,
    Facts,
    Failure,
    ShardContents,
    known_keys,
    make_inputs,
    make_manifest,
)
from probe.cache.plan import ShardInfo
from probe.cache.shards import shard_view
from probe.errors import CorruptError, ProbeError, StorageError

WIDTH, SHARD_ROWS = 32, 24
IDENTITY = {"views": {"pooler": WIDTH}, "stored_dtype": "float32"}


def content(index: int) -> bytes:
    """Every 17th input is a copy of an earlier one."""
    return b"picture %d" % (index // 2 if index % 17 == 16 else index)


def key_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def embedding_of(data: bytes) -> np.ndarray:
    return np.frombuffer(key_of(data), np.uint8).astype(np.float32)


def run_job(root: Path, num_inputs: int, on_sealed: Callable[[str], None] = lambda what: None) -> None:
    """Plans, seals shard after shard, and completes: `probe embed` without images; every 31st input fails."""
    names = [b"%05d" % index for index in range(num_inputs)]
    inputs = make_inputs(
        names,
        labels=[("ab"[index % 2],) for index in range(num_inputs)],
        splits=["train"] * num_inputs,
        groups=[None] * num_inputs,
        sizes=[10] * num_inputs,
        mtimes_ns=[20] * num_inputs,
        class_names="ab",
        multi_label=False,
    )
    writer = CacheWriter(root, make_manifest(IDENTITY, {}, SHARD_ROWS))
    plan = writer.plan(inputs)
    older, mine = known_keys(plan), set()
    for number in range(writer.num_shards(plan)):
        if (path := writer.find_sealed(plan, number)) is not None:
            facts = writer.load_sidecar(path).facts
            mine |= {key.tobytes() for key in facts.keys[facts.rows >= 0]}
            continue
        rows = writer.shard_rows(plan, number).tolist()
        kept: dict[bytes, np.ndarray] = {}
        fact_rows, failures = [], []
        for row in rows:
            key = key_of(content(row))
            if row % 31 == 30:
                fact_rows.append(FAILED)
                failures.append(Failure(names[row], "format", "made to fail"))
            elif key in mine or key in older:
                fact_rows.append(KNOWN)
            else:
                kept.setdefault(key, embedding_of(content(row)))
                fact_rows.append(list(kept).index(key))
        keys = np.frombuffer(b"".join(key_of(content(row)) for row in rows), np.uint8).reshape(-1, 32)
        facts = Facts([names[r] for r in rows], [10] * len(rows), [20] * len(rows), keys, np.array(fact_rows, np.int32))
        new_keys = np.frombuffer(b"".join(kept), np.uint8).reshape(-1, 32)
        writer.seal(
            plan, number, ShardContents(facts, new_keys, {"pooler": np.stack([*kept.values()])}, tuple(failures)), {}
        )
        mine |= set(kept)
        on_sealed(f"{plan.id}-{number:05d}")
    if not plan.complete:
        writer.complete(plan)


def check_rows(root: Path, num_inputs: int) -> None:
    """Every input that did not fail has its own embedding."""
    cache = Cache.open(root)
    good = [index for index in range(num_inputs) if index % 31 != 30]
    assert list(cache.table.names) == [b"%05d" % index for index in good]
    np.testing.assert_array_equal(cache.embeddings(), [embedding_of(content(index)) for index in good])


def files_of(root: Path) -> dict[str, bytes]:
    """Everything that stands under a final name."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith(".partial-")
    }


def digest_of(root: Path) -> str:
    digest = hashlib.sha256()
    for name, data in files_of(root).items():
        digest.update(json.dumps([name, len(data)]).encode() + data)
    return digest.hexdigest()


def fork(work: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """Runs `work` in a child, which is given a way to acknowledge: (its pid, where to read acknowledgements)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    os.close(reading)
    code = 1
    try:
        work(lambda what: os.write(writing, what.encode() + b"\n") and None)
        code = 0
    except ProbeError as err:
        os.write(writing, b"error " + str(err).encode().replace(b"\n", b" ") + b"\n")
        code = err.exit_code
    finally:
        os._exit(code)


def finish(pid: int, reading: int) -> tuple[int, list[str]]:
    """Waits for a child: (its wait status, what it acknowledged)."""
    with os.fdopen(reading) as file:
        lines = file.read().splitlines()
    return os.waitpid(pid, 0)[1], lines


def straight(folder: Path, num_inputs: int) -> tuple[dict[str, bytes], float]:
    """The files of a run that nothing disturbed, and its seconds."""
    started = time.monotonic()
    run_job(folder / "straight", num_inputs)
    seconds = time.monotonic() - started
    check_rows(folder / "straight", num_inputs)
    return files_of(folder / "straight"), seconds


def check_whole(root: Path, reference: dict[str, bytes], acknowledged: list[str]) -> None:
    """What stands under a final name is whole and right, and what was acknowledged is there."""
    files = files_of(root)
    wrong = [name for name, data in files.items() if reference.get(name) != data]
    assert not wrong, f"torn or unlike: {wrong}"
    for what in acknowledged:
        assert any(what in name and name.endswith(".json") for name in files), f"lost: {what}"


def kills(count: int, folder: Path) -> dict[str, Any]:
    """`count` kill -9 at random instants, each followed by a run that continues, to the end, again and again."""
    num_inputs, rng = 240, random.Random(0)
    reference, seconds = straight(folder, num_inputs)
    result: dict[str, Any] = {"kills": 0, "jobs": 0, "partial_files": 0}
    digests = set()
    while result["kills"] < count:
        root, acknowledged = folder / f"job{result['jobs']}", []
        while True:
            pid, reading = fork(lambda sealed, root=root: run_job(root, num_inputs, sealed))
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            status, lines = finish(pid, reading)
            acknowledged += lines
            check_whole(root, reference, acknowledged)
            if not os.WIFSIGNALED(status):
                assert status == 0, lines
                break
            result["kills"] += 1
        check_rows(root, num_inputs)
        digests.add(digest_of(root))
        result["jobs"] += 1
        result["partial_files"] += len(list(root.rglob(".partial-*")))
        shutil.rmtree(root)
    return result | {"digests": len(digests | {digest_of(folder / "straight")})}


def disk_full(count: int, folder: Path) -> dict[str, Any]:
    """`count` runs in which no file may grow beyond a random length: a clear error, nothing torn, and it resumes."""
    num_inputs, rng = 72, random.Random(0)
    reference, _ = straight(folder, num_inputs)
    largest = max(map(len, reference.values()))
    result = {"runs": count, "refused": 0}
    for run in range(count):
        root, limit = folder / f"full{run}", rng.randrange(0, largest)

        def work(sealed: Callable[[str], None], root: Path = root, limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            run_job(root, num_inputs, sealed)

        status, lines = finish(*fork(work))
        assert os.WIFEXITED(status), f"died of signal {os.WTERMSIG(status)}"
        assert os.WEXITSTATUS(status) == StorageError.exit_code, lines
        assert "File too large" in lines[-1], lines
        assert "Free some space" in lines[-1], lines
        check_whole(root, reference, lines[:-1])
        assert not list(root.rglob(".partial-*"))
        run_job(root, num_inputs)
        assert files_of(root) == reference
        result["refused"] += 1
        shutil.rmtree(root)
    return result


def races(count: int, folder: Path) -> dict[str, Any]:
    """`count` rounds of four processes on one cache, one of them killed every second round."""
    num_inputs, rng = 120, random.Random(0)
    reference, seconds = straight(folder, num_inputs)
    num_killed = 0
    for turn in range(count):
        root = folder / f"race{turn}"

        def work(sealed: Callable[[str], None], root: Path = root, pause: float = rng.uniform(0, seconds / 4)) -> None:
            time.sleep(pause * (os.getpid() % 4))
            run_job(root, num_inputs, lambda what: (sealed(what), time.sleep(0.001 * (os.getpid() % 3)))[0])

        children = [fork(work) for _ in range(4)]
        if turn % 2:
            time.sleep(rng.uniform(0, seconds))
            os.kill(children[rng.randrange(4)][0], signal.SIGKILL)
        for pid, reading in children:
            status, lines = finish(pid, reading)
            assert status == 0 or os.WIFSIGNALED(status), lines
            num_killed += os.WIFSIGNALED(status)
            check_whole(root, reference, [line for line in lines if line])
        assert files_of(root) == reference
        shutil.rmtree(root)
    return {"rounds": count, "killed": num_killed, "digests": 1}


def hostile(_: int, folder: Path) -> dict[str, Any]:
    """Every HDF5 file that means harm is refused within 1 s and 200 MB, before its data is read."""
    (folder / "secret.txt").write_bytes(b"TOP-SECRET-" * 50)
    with h5py.File(folder / "other.h5", "w") as file:
        file["secret"] = np.full((16, 8), 7, np.float32)
    report = {}
    for name, (make, expected) in hostile_files(folder).items():
        path = folder / f"{name}.h5"
        with h5py.File(path, "w") as file:
            make(file)
        if name == "truncated":
            os.truncate(path, path.stat().st_size // 2)
        image = path.read_bytes()
        info = ShardInfo(path.name, hashlib.sha256(image).hexdigest(), len(image), 16)

        def work(say: Callable[[str], None], image: bytes = image, info: ShardInfo = info) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
            signal.alarm(10)
            started = time.monotonic()
            try:
                shard_view(image, folder, info, "pooler", 8)
                outcome = "accepted"
            except CorruptError as err:
                outcome = str(err)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            say(json.dumps({"outcome": outcome, "seconds": time.monotonic() - started, "peak_mb": peak}))

        status, lines = finish(*fork(work))
        assert status == 0, f"{name}: died, wait status {status}: {lines}"
        report[name] = json.loads(lines[0])
        assert expected in report[name]["outcome"], (name, expected, report[name])
        assert report[name]["seconds"] < 1, (name, report[name])
        assert report[name]["peak_mb"] < 200, (name, report[name])
    return {
        "files": len(report),
        "max_seconds": max(found["seconds"] for found in report.values()),
        "max_peak_mb": max(found["peak_mb"] for found in report.values()),
    }


def hostile_files(folder: Path) -> dict[str, tuple[Callable[[h5py.File], object], str]]:
    """How each file is made, and a part of the reason for which it must be refused."""
    good = np.ones((16, 8), np.float32)
    at = "embeddings/pooler"

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((16, 8), np.float32)
        layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "secret", (16, 8))
        file.create_virtual_dataset(at, layout)

    def huge_chunks(file: h5py.File) -> None:
        file.create_dataset(at, (1 << 22, 8), np.float32, chunks=(1 << 22, 8), compression="gzip")

    def bomb(file: h5py.File) -> None:
        data = file.create_dataset(at, (1 << 20, 64), np.float32, chunks=(1 << 16, 64), compression=9)
        for start in range(0, 1 << 20, 1 << 16):
            data[start : start + (1 << 16)] = 0

    def loop(file: h5py.File) -> None:
        group = file.create_group("embeddings")
        group["pooler"] = group

    return {
        "external link": (lambda f: f.__setitem__(at, h5py.ExternalLink(str(folder / "other.h5"), "secret")), "link"),
        "external group": (
            lambda f: f.__setitem__("embeddings", h5py.ExternalLink(str(folder / "other.h5"), "/")),
            "link (ExternalLink)",
        ),
        "soft link": (lambda f: (f.__setitem__("x", good), f.__setitem__(at, h5py.SoftLink("/x"))), "link (SoftLink)"),
        "dangling link": (lambda f: f.__setitem__(at, h5py.SoftLink("/nowhere")), "link (SoftLink)"),
        "external storage": (
            lambda f: f.create_dataset(at, (16, 8), np.float32, external=[(str(folder / "secret.txt"), 0, 512)]),
            "stored outside",
        ),
        "virtual": (virtual, "is virtual"),
        "huge shape": (lambda f: f.create_dataset(at, (1 << 40, 8), np.float32, chunks=(1024, 8)), "would take"),
        "nothing stored": (lambda f: f.create_dataset(at, (1 << 22, 8), np.float32, chunks=(1024, 8)), "stores only 0"),
        "huge chunks": (huge_chunks, "has chunks of"),
        "gzip bomb": (bomb, "stores only"),
        "loop": (loop, "is a group"),
        "not finite": (lambda f: f.__setitem__(at, np.where(np.eye(16, 8) > 0, np.nan, good)), "not finite"),
        "infinite": (lambda f: f.__setitem__(at, good * np.float32(np.inf)), "not finite"),
        "variable length": (lambda f: f.create_dataset(at, (16,), h5py.vlen_dtype(np.float32)), "type object"),
        "compound": (lambda f: f.__setitem__(at, np.zeros((16, 8), [("a", "f4"), ("b", "i4")])), "elements of type"),
        "references": (lambda f: f.create_dataset(at, (16, 8), h5py.ref_dtype), "elements of type"),
        "foreign filter": (lambda f: f.create_dataset(at, data=good, compression="lzf"), "needs filters"),
        "lossy filter": (lambda f: f.create_dataset(at, data=good, scaleoffset=2), "needs filters"),
        "three dimensions": (lambda f: f.__setitem__(at, good[None]), "3 dimensions"),
        "unlike its manifest": (lambda f: f.__setitem__(at, good[:, :4]), "where (16, 8) is meant"),
        "integers": (lambda f: f.__setitem__(at, good.astype(np.int32)), "int32 where float32 float16 is meant"),
        "missing": (lambda f: f.__setitem__("key", good), "is missing"),
        "truncated": (lambda f: f.__setitem__(at, good), "not a readable HDF5 file"),
    }


if __name__ == "__main__":
    what, count, folder = sys.argv[1:]
    print(
        json.dumps(
            {"kills": kills, "disk_full": disk_full, "races": races, "hostile": hostile}[what](int(count), Path(folder))
        )
    )
