"""The README's commands and code run as printed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from probe import errors

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def block_under(heading: str, language: str) -> str:
    """The first code block in `language` below the heading that starts with these words."""
    section = README.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL).group(1)


def test_first_command_runs_and_classifies_digits(tmp_path: Path) -> None:
    command = block_under("Try it", "bash")
    install, rest = re.split(r"&& (?=\.venv/bin/python data)", command)
    assert install.strip() == "python3 -m venv .venv && .venv/bin/pip install -q ."
    # The environment that runs this test stands for the fresh one; `work` for the folder that the reader gets. In one
    # pass: the paths put in may hold either word.
    stands_for = {".venv/bin/": f"{shlex.quote(str(BIN))}/", "work": shlex.quote(str(tmp_path / "work"))}
    rest = re.sub(r"\.venv/bin/|work", lambda found: stands_for[found.group()], rest)
    done = subprocess.run(rest, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    predictions = (tmp_path / "work" / "predictions.csv").read_text().splitlines()
    assert predictions[0].startswith("path,predicted,")
    hits = [line.split(",")[0].split("/")[-2] == line.split(",")[1] for line in predictions[1:]]
    assert len(hits) == len(list((tmp_path / "work" / "digits" / "test").rglob("*.png")))
    assert sum(hits) / len(hits) > 0.8


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert 'readme_command "Run the tests"' in script
    assert "pytest" in block_under("Run the tests", "bash")


def test_the_guide_shown_is_the_guide_that_runs() -> None:
    assert (
        block_under("The steps of Flax's transfer-learning guide", "python")
        == (ROOT / "tests" / "guide_script.py").read_text()
    )


def test_exit_codes_are_those_of_the_program() -> None:
    rows = [line.split("|")[1:3] for line in errors.__doc__.splitlines() if line.startswith("| ")]
    shown = [line.split("|")[1:3] for line in README.splitlines() if re.match(r"\| (code|\d+)", line)]
    assert [[cell.strip() for cell in row] for row in shown] == [[cell.strip() for cell in row] for row in rows]


def test_every_verb_stands_in_the_readme() -> None:
    for line in subprocess.run(
        [BIN / "probe", "--help"], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if match := re.search(r"• (\S+)", line):
            assert f"probe {match[1]} " in README
