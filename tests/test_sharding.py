"""Eight devices, forced upon the host: the same losses as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from probe.errors import ConfigError
from probe.training.sharding import Placement

SCRIPT = Path(__file__).with_name("sharded_run.py")


def test_eight_devices_give_the_losses_of_one(tiny_clip):
    one, eight, divided = (
        subprocess.run(
            [sys.executable, str(SCRIPT), str(tiny_clip), *options],
            env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={num}", "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for num, options in ((1, []), (8, []), (8, ["--fsdp"]))
    )
    assert [lines[0] for lines in (one, eight, divided)] == ["1 devices", "8 devices", "8 devices"]
    for lines in (eight, divided):
        for line, expected in zip(lines[2:], one[2:], strict=True):
            assert float(line) == pytest.approx(float(expected), rel=1e-5)
    # Divided parameters and moments take a device less than an eighth more than their eighth.
    assert int(divided[1]) < int(eight[1]) / 4


def test_rows_that_cannot_be_divided_are_an_error(monkeypatch):
    monkeypatch.setattr("jax.devices", lambda: ["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"a batch of 16 rows cannot be divided over 3 devices: .* a multiple of 3"):
        Placement.over_all_devices(16)
