"""Runs a command where the only network is a loopback device: unshare -rn python -m tests.loopback COMMAND…

Ray takes the machine's own address even when it is told 127.0.0.1; here there is no other.
"""

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys

import pytest

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def alone(*command: str) -> list[str]:
    """The command that runs `command` so; skips the test where that is not allowed."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here, to run without a network")
    tried = subprocess.run(["unshare", "-rn", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"a network namespace of one's own is not allowed here: {tried.stderr.strip()}")
    return ["unshare", "-rn", sys.executable, "-m", "tests.loopback", *command]


def bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("16xh", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


if __name__ == "__main__":
    bring_up_loopback()
    os.execvp(sys.argv[1], sys.argv[1:])
