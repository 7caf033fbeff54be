"""Ctrl-C and SIGTERM: real processes, real signals, ended within five seconds whatever they are at."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from probe import interrupt

PRELUDE = """
import sys, threading, time
from pathlib import Path
from probe import interrupt, storage
def main(work):
    try:
        print("result", interrupt.run_interruptibly(work), flush=True)
    except interrupt.Interrupted as stop:
        print("stopped in order:", stop, flush=True)
        sys.exit(stop.exit_code)
"""

OBEDIENT = """
def work():
    print("ready", flush=True)
    while True:
        interrupt.check()
        time.sleep(0.01)
main(work)
"""

DEAF = """
def work():
    storage._in_progress.add(Path(sys.argv[1]))
    print("ready", flush=True)
    time.sleep(60)
main(work)
"""

PATIENT = """
interrupt._GRACE_SECONDS = 0.1
def work():
    with interrupt.patiently("saving it"):
        print("ready", flush=True)
        while not interrupt.stop_requested():
            time.sleep(0.01)
        time.sleep(1)
        print("saved", flush=True)
    if len(sys.argv) > 1:
        time.sleep(30)
    interrupt.check()
main(work)
"""

BROKEN_BY_IT = """
def work():
    print("ready", flush=True)
    while not interrupt.stop_requested():
        time.sleep(0.01)
    raise RuntimeError("a pipe broke")
main(work)
"""

FINISHING = """
def work():
    print("ready", flush=True)
    while not interrupt.stop_requested():
        time.sleep(0.01)
    return 7
main(work)
"""

COMPILING = """
import jax, jax.numpy as jnp
def work():
    @jax.jit
    def long_program(x):
        for i in range(4000):  # a minute to compile, and no Python runs in most of it
            x = jnp.sin(x @ x) + i
        return x
    print("ready", flush=True)
    long_program.lower(jnp.ones((8, 8))).compile()
main(work)
"""


def start(script: str, *arguments: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def signalled(process: subprocess.Popen, *signals: signal.Signals) -> tuple[int, str, str, float]:
    started = time.monotonic()
    for signum in signals:
        process.send_signal(signum)
        time.sleep(0.2)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err, time.monotonic() - started


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_verb_that_listens_ends_in_order(signum, code) -> None:
    returncode, out, _, seconds = signalled(start(OBEDIENT), signum)
    assert (returncode, out) == (code, f"stopped in order: stopped by {signum.name}\n")
    assert seconds < 1


def test_one_that_does_not_listen_is_cut_off_with_its_partial_files_removed(tmp_path: Path) -> None:
    partial = tmp_path / ".partial-x"
    partial.write_bytes(b"half")
    returncode, _, err, seconds = signalled(start(DEAF, str(partial)), signal.SIGTERM)
    assert (returncode, err) == (143, "probe: error: stopped by SIGTERM\n")
    assert 3 < seconds < 5
    assert not partial.exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    returncode, _, _, seconds = signalled(start(DEAF, str(tmp_path / "none")), signal.SIGINT, signal.SIGINT)
    assert returncode == 130
    assert seconds < 1


def test_one_that_has_something_to_save_gets_the_time() -> None:
    returncode, out, err, _ = signalled(start(PATIENT), signal.SIGTERM)
    assert (returncode, out) == (143, "saved\nstopped in order: stopped by SIGTERM\n")
    assert err == "stopping: saving it; a second signal ends it at once\n"


def test_patience_has_an_end() -> None:
    returncode, out, err, seconds = signalled(start(PATIENT, "then hang"), signal.SIGTERM)
    assert (returncode, out) == (143, "saved\n")
    assert "stopped by SIGTERM" in err
    assert seconds < 5
    returncode, out, *_ = signalled(start(PATIENT), signal.SIGINT, signal.SIGINT)
    assert (returncode, out) == (130, "")


def test_a_compilation_is_cut_off() -> None:
    process = start(COMPILING)
    time.sleep(0.5)
    returncode, out, _, seconds = signalled(process, signal.SIGINT)
    assert (returncode, out) == (130, "")
    assert seconds < 5


def test_what_breaks_in_stopping_is_no_error_of_its_own() -> None:
    assert signalled(start(BROKEN_BY_IT), signal.SIGINT)[:2] == (130, "stopped in order: stopped by SIGINT\n")


def test_a_result_that_comes_in_time_counts() -> None:
    assert signalled(start(FINISHING), signal.SIGINT)[:2] == (0, "result 7\n")


def test_results_and_errors_pass_through() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert interrupt.run_interruptibly(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interrupt.run_interruptibly(lambda: 1 / 0)
    assert signal.getsignal(signal.SIGINT) == before
    assert not interrupt.stop_requested()
    interrupt.check()
