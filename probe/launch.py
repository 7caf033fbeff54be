"""`probe launch`: runs `finetune` or `fit-linear` as several processes here, and starts them anew if one dies.

jax ends all of them when one is lost (`probe.distributed`), so that going on is the work of a parent: it says which one
died and of what, ends the rest, and starts them again with --resume, from the last checkpoint. Output is that of the
first process; the others are silent, and what they say all the same, as they die, goes to stderr behind their number.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from probe import interrupt
from probe.config import LaunchConfig
from probe.errors import EngineError

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0  # for the others to say what is wrong, where one ended by an error that all of them have
_MENDABLE = range(2, 10)  # exit codes of what would happen again
_START = """
import ctypes, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: however the parent ends, no process is left behind
from probe.cli import main
sys.exit(main())
"""


def launch(config: LaunchConfig) -> dict[str, Any]:
    """Runs the processes to their end.

    Returns: their number, and what each restart was for.
    Raises: EngineError if one died once too often, or ended by an error that a user can mend: then with its exit code;
      Interrupted at a signal, which the processes get as well.
    """
    command, deaths = list(config.command), list[str]()
    out = _out(command)
    was_free = out is not None and not out.exists()
    with interrupt.patiently("waiting for the processes to save what they have"):
        while True:
            number, code = _run(command, config.n)
            if code == 0:
                return {"num_processes": config.n, "restarts": deaths}
            if (signum := interrupt.requested_by()) is not None:
                raise interrupt.Interrupted(signum)
            death = f"process {number} {_cause(code)}"
            if code in _MENDABLE or code > 128 or len(deaths) == config.max_restarts:
                told = f"after {len(deaths)} restarts " if deaths else ""
                failure = EngineError(f"{told}{death}, which ended all {config.n}")
                failure.exit_code = code if code in _MENDABLE or code > 128 else EngineError.exit_code
                raise failure
            deaths.append(death)
            where = "from the last checkpoint" if _has_checkpoints(command) else "from the start"
            print(f"probe launch: {death}: {where}, restart {len(deaths)} of {config.max_restarts}", file=sys.stderr)
            # A process may have died after the run was saved: what stands there by now is ours.
            again = "--resume" if _has_checkpoints(command) else "--overwrite" if was_free else None
            if again is not None and again not in command:
                command.append(again)


def describe(_result: dict[str, Any]) -> str:
    """Nothing: the first process has said it."""
    return ""


def _run(command: Sequence[str], num_processes: int) -> tuple[int, int]:
    """Which process was the first to fail, and its exit code as `subprocess` has it; or 0, 0 once all are done."""
    with _started(command, num_processes) as processes:
        forwarded = False
        while True:
            signum = interrupt.requested_by()
            if signum is not None and not forwarded:
                for process in processes:
                    process.send_signal(signum)
                forwarded = True
            codes = {number: process.poll() for number, process in enumerate(processes)}
            failed = {number: code for number, code in codes.items() if code}
            if failed and not forwarded:
                number = min(failed, key=lambda number: _is_consequence(failed[number]))
                if failed[number] > 0:
                    _wait(processes, _GRACE_SECONDS)
                return number, failed[number]
            if None not in codes.values():
                return min(failed.items(), default=(0, 0))
            time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _started(command: Sequence[str], num_processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes, which at the end of the block are none any more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    processes: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    blamed = threading.Event()
    try:
        for number in range(num_processes):
            place = ["--distributed", "--coordinator", coordinator]
            place += ["--num-processes", str(num_processes), "--process-id", str(number)]
            first = number == 0
            process = subprocess.Popen(  # noqa: S603  # ourselves
                [sys.executable, "-c", _START, *command, *place],
                env={"JAX_LOCAL_DEVICE_IDS": str(number), **os.environ},  # of the GPUs, if there are any, one for each
                stdin=subprocess.DEVNULL,
                stdout=None if first else subprocess.DEVNULL,
                stderr=None if first else subprocess.PIPE,
                start_new_session=True,  # Ctrl-C comes to us, who pass it on, once
            )
            processes.append(process)
            if process.stderr is not None:
                readers.append(threading.Thread(target=_tell, args=(number, process.stderr, blamed), daemon=True))
                readers[-1].start()
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                blamed.set()  # what they say in dying is no news
                process.kill()
        for process in processes:
            process.wait()
        for reader in readers:
            reader.join()


def _tell(number: int, lines: IO[bytes], blamed: threading.Event) -> None:
    """Passes on what a process says."""
    with lines:
        for line in lines:
            if not blamed.is_set():
                print(f"process {number}: {line.decode(errors='replace').rstrip()}", file=sys.stderr, flush=True)


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(_POLL_SECONDS)


def _is_consequence(code: int) -> bool:
    """Whether a process ended because another did."""
    return code in (EngineError.exit_code, -signal.SIGABRT)


def _cause(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _out(command: Sequence[str]) -> Path | None:
    """The run folder that the command names."""
    words = [part for word in command for part in (word.split("=", 1) if word.startswith("--out=") else [word])]
    return Path(words[words.index("--out") + 1]) if "--out" in words[:-1] else None


def _has_checkpoints(command: Sequence[str]) -> bool:
    """Whether what is run again goes on where it was."""
    words = " ".join(word.replace("_", "-").replace("=", " ") for word in command)
    return command[0] == "finetune" and "--checkpoint-every 0" not in words
