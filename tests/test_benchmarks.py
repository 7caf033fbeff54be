"""Every benchmark's --quick runs to its end and writes the lines that it promises; what they say is not judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted(
    path.stem for path in (Path(__file__).parent / "benchmarks").glob("*.py") if "--quick" in path.read_text()
)


def test_all_benchmarks_have_a_quick_run():
    assert BENCHMARKS == ["cache", "embed", "finetune", "linear", "report", "scale", "serve"]


@pytest.mark.soak
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_quick_run_writes_its_lines(name, tmp_path):
    table = tmp_path / "table.json"
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--quick", "--json", table]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    lines = json.loads(table.read_text())
    assert lines
    for line in lines:
        assert {"case", "program", "median_s", "ratio"} <= line.keys()
        assert line["median_s"] > 0
        assert line["ratio"] is None or line["ratio"] > 0
