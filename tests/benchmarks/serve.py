"""Requests a second, and how long each takes, on loopback: requests answered together against one at a time.

    python -m tests.benchmarks.serve [--quick] [--json FILE] [--backbone B] [--images DIR] [--batch-size N]

`probe serve` runs in a process of its own, once with its batch and once with batches of one, and clients ask each in
turn: each client is a thread with one connection, which sends its next image when it has the answer to the last. All
of one process of clients, on the same machine as the server. `ratio` is requests a second, as a multiple of those with
batches of one at the same number of clients.
"""

import argparse
import contextlib
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from probe.demo import samples, unpack


@contextlib.contextmanager
def server(run: Path, batch_size: int | None) -> Iterator[str]:
    """Its address."""
    options = [] if batch_size is None else ["--batch-size", str(batch_size)]
    line = [sys.executable, "-m", "probe.cli", "serve", str(run), "--port", "0", "--queue", "512", "--json", *options]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        try:
            yield urllib.parse.urlsplit(json.loads(process.stdout.readline())["url"]).netloc
        finally:
            process.terminate()
            process.stdout.read()


def load(address: str, images: list[bytes], num_clients: int, seconds: float) -> tuple[float, np.ndarray]:
    """Asks for so long. Returns: requests a second, and the seconds that each took."""
    took: list[list[float]] = [[] for _ in range(num_clients)]
    start = threading.Barrier(num_clients + 1)
    end = 0.0

    def ask(client: int) -> None:
        connection = http.client.HTTPConnection(address, timeout=120)
        connection.connect()
        start.wait()
        number = client
        while (began := time.perf_counter()) < end:
            connection.request("POST", "/predict", images[number % len(images)])
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 200, body
            took[client].append(time.perf_counter() - began)
            number += num_clients
        connection.close()

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(num_clients)]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    end = began + seconds
    start.wait()
    for thread in threads:
        thread.join()
    latencies = np.concatenate(took)
    return len(latencies) / (time.perf_counter() - began), latencies


def prepare(root: Path, backbone: str, images: Path | None) -> tuple[Path, Path]:
    """A run, and the folder of images that it was trained on."""
    if images is None:
        images = root / "emoji"
        unpack(samples(), images)
    probe = [sys.executable, "-m", "probe.cli"]
    embed = ["embed", str(images), "--backbone", backbone, "--precision", "float32", "--out", str(root / "cache")]
    fit = ["fit-linear", str(root / "cache"), "--no-report", "--out", str(root / "run")]
    for command in (embed, fit):
        subprocess.run([*probe, *command], check=True, capture_output=True)
    return root / "run", images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two numbers of clients, two seconds each, in one round")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--backbone", default="probe-tiny")
    parser.add_argument("--images", type=Path, help="class folders (if not given: the samples of this package)")
    parser.add_argument("--batch-size", type=int, help="if not given: what probe serve takes")
    parser.add_argument("--clients", type=int, nargs="+", help="at once")
    options = parser.parse_args()
    levels = options.clients or ((1, 16) if options.quick else (1, 2, 4, 8, 16, 32, 64))
    seconds, rounds = (2.0, 1) if options.quick else (3.0, 3)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        run, images = prepare(Path(folder), options.backbone, options.images)
        paths = [path for path in sorted(images.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
        sent = [path.read_bytes() for path in paths[:: max(1, len(paths) // 200)]]
        print(f"{len(sent)} images of {statistics.mean(map(len, sent)) / 1000:.0f} kB, {options.backbone}")
        print("clients  batches   requests/s   p50 ms   p95 ms   p99 ms   ratio")
        with server(run, options.batch_size) as batched, server(run, 1) as single:
            programs = {"probe serve": batched, "probe serve --batch-size 1": single}
            for address in programs.values():
                load(address, sent, 4, 1.0)  # workers started, files of the machine warm
            for num_clients in levels:
                rates: dict[str, list[float]] = {name: [] for name in programs}
                latencies: dict[str, list[np.ndarray]] = {name: [] for name in programs}
                for _ in range(rounds):
                    for name, address in programs.items():
                        rate, took = load(address, sent, num_clients, seconds)
                        rates[name].append(rate)
                        latencies[name].append(took)
                ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
                for name in programs:
                    p50, p95, p99 = np.quantile(np.concatenate(latencies[name]), [0.5, 0.95, 0.99])
                    rate, of_one = statistics.median(rates[name]), name.endswith(" 1")
                    print(
                        f"{num_clients:7}  {'of one' if of_one else 'shared'} {rate:13.1f} {1e3 * p50:8.1f} "
                        f"{1e3 * p95:8.1f} {1e3 * p99:8.1f} {1.0 if of_one else ratio:7.2f}"
                    )
                    lines.append(
                        {
                            "case": f"{num_clients} clients",
                            "program": name,
                            "median_s": float(p50),
                            "p95_s": float(p95),
                            "p99_s": float(p99),
                            "requests_per_s": rate,
                            "ratio": 1.0 if of_one else ratio,
                        }
                    )
    if options.json:
        options.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()
