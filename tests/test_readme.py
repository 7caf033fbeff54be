"""The README's commands and code run as printed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from probe import errors

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
RUN_ELSEWHERE = {  # commands that test_docs does not run, by how they begin or what they have, and what runs them
    r"embed work/|fit-linear work/|predict work/": "test_readme.py::test_the_digits_are_the_next_step",
    r"demo ": "test_readme.py::test_the_first_command_gives_the_table_that_is_shown",
    r"serve ": "test_serve.py::test_the_commands_of_the_readme",
    r".* --engine ray": "test_ray.py::test_the_command_of_the_readme",
    r".* --shard-index": "test_recipes.py::test_the_slurm_array_makes_one_cache",
    r".* --distributed": "test_recipes.py::test_the_slurm_job_trains_on_all_its_tasks",
    r"embed s3://bucket/shards": "test_objects.py::test_archives_on_a_store_are_read_where_they_are",
    r".*s3://": "test_objects.py::test_the_commands_of_the_readme",
}


def readme_commands() -> list[str]:
    """Every command line of the program that the README shows, in its order, in blocks and in lines; a verb alone, or
    with one option's name, is none."""
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```|(?<!`)`([^`]+)`", README, re.DOTALL | re.MULTILINE):
        language, block, span = match.groups()
        lines = [span] if span else [] if language == "python" or "95 % interval" in block else block.splitlines()
        for line in lines:
            shown = re.search(r"(?:^|/|\s)(probe [\w-]+ .*?)(?:  +[a-z].*| &&)?$", " ".join(line.split("\n")))
            if shown and not re.fullmatch(r"probe [\w-]+ --[\w-]+", shown[1]):
                found.append(shown[1])
    return found


def where_it_runs(command: str) -> str | None:
    """The test that runs a command of the README; None if test_docs does."""
    words = command.removeprefix("probe ")
    return next((test for pattern, test in RUN_ELSEWHERE.items() if re.match(pattern, words)), None)


def block_under(heading: str, language: str) -> str:
    """The first code block in `language` below the heading that starts with these words."""
    section = README.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL).group(1)


def run_here(commands: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs a shell block of the README. The environment that runs this test stands for the fresh one."""
    stands_for = {".venv/bin/": f"{shlex.quote(str(BIN))}/", "work": shlex.quote(str(tmp_path / "work"))}
    # In one pass: the paths put in may hold either word.
    commands = re.sub(r"\.venv/bin/|\bwork\b", lambda found: stands_for[found.group()], commands)
    commands = commands.replace("data/digits.py", shlex.quote(str(ROOT / "data" / "digits.py")))
    # With the hub's cache empty and the hub switched off, what is asked of it is an error.
    offline = {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*without_network(), "sh", "-c", commands],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | offline,
    )


def without_network() -> list[str]:
    """What to put before a command so that it runs where there is no network; nothing where that is forbidden."""
    command = ["unshare", "-rn"]
    allowed = shutil.which(command[0]) and not subprocess.run([*command, "true"], capture_output=True).returncode
    return command if allowed else []


def test_the_first_command_gives_the_table_that_is_shown(tmp_path: Path) -> None:
    install, rest = block_under("Try it", "bash").split(" && .venv/bin/probe ", 1)
    assert install == "python3 -m venv .venv && .venv/bin/pip install -q ."
    done = run_here(f".venv/bin/probe {rest}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n$ probe ") == 5
    shown = re.search(r"^```\n(on the test split.*?)^```", README, re.DOTALL | re.MULTILINE).group(1).splitlines()
    got = done.stdout.splitlines()[-len(shown) :]

    def masked(line: str) -> str:
        return re.sub(r"[\d,.]+", "0", re.sub(r" +", " ", line))

    assert list(map(masked, got)) == list(map(masked, shown))
    # Another machine may round another way and lose a picture or two of the 616.
    accuracies = [
        [float(line[34:].split()[0]) for line in lines if re.search(r"\d to \d", line)] for lines in (got, shown)
    ]
    assert len(accuracies[0]) == 4
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.015)


def test_the_digits_are_the_next_step(tmp_path: Path) -> None:
    (block,) = re.findall(r"```\n(\.venv/bin/python data/digits.*?)```", README, re.DOTALL)
    done = run_here(block, tmp_path)
    assert done.returncode == 0, done.stderr
    predictions = (tmp_path / "work" / "predictions.csv").read_text().splitlines()
    assert predictions[0].startswith("path,predicted,")
    hits = [line.split(",")[0].split("/")[-2] == line.split(",")[1] for line in predictions[1:]]
    assert len(hits) == len(list((tmp_path / "work" / "digits" / "test").rglob("*.png")))
    assert sum(hits) / len(hits) > 0.85


def test_commands_that_run_elsewhere_do() -> None:
    commands = readme_commands()
    assert len(commands) > 40
    for pattern, test in RUN_ELSEWHERE.items():
        assert any(where_it_runs(command) == test for command in commands), f"{pattern}: the README has none"
        file, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), test


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("probe/**/*.py")]
    named = {name for page in pages for found in re.findall(r"probe-jax\[([\w,]+)\]", page.read_text())
             for name in found.split(",")}  # fmt: skip
    assert len(named) > 8
    assert named <= extras.keys()


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert 'readme_command "Run the tests"' in script
    assert "pytest" in block_under("Run the tests", "bash")


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
