"""The pages in docs/: what they show is run, and where they point there is something. pytest -m pages"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import probe
from probe.cli import main
from tests.checkpoints import write_tiny_resnet
from tests.conftest import write_image_folder
from tests.test_readme import readme_commands, where_it_runs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
STAND_INS = {"openai/clip-vit-base-patch32": "probe-tiny", "microsoft/resnet-50": "resnet"}
SAME = ["--backbone", "probe-tiny", "--batch-size", "8", "--precision", "float32"]
READMES_STAND_INS = {
    "openai/clip-vit-base-patch32": "probe-tiny",
    "B": "probe-tiny",
    "DIR": "photos",
    "IMAGES": "photos",
    "FORM": "safetensors",
    "N": "2",
}
MALICIOUS = "<img src=x onerror=alert(1)>"


def blocks(page: str, language: str) -> list[str]:
    """The page's code in a language, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def run_notebook(cells: list[str], folder: Path) -> list[list[dict]]:
    """The outputs of each cell, run one after the other in a kernel of this Python whose folder this is."""
    pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    (folder / "cells.json").write_text(json.dumps(cells))
    code = """
import json, sys
import nbclient, nbformat
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in json.load(open("cells.json"))])
nbclient.NotebookClient(notebook, kernel_name="python3", timeout=240).execute()
json.dump([cell.outputs for cell in notebook.cells], open("outputs.json", "w"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "outputs.json").read_text())


def html_of(outputs: list[dict]) -> str:
    return "".join("".join(output["data"].get("text/html", "")) for output in outputs if "data" in output)


def text_of(outputs: list[dict]) -> str:
    return "".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout")


def test_the_python_page_runs_in_a_notebook(tmp_path: Path) -> None:
    """Cell by cell, as printed. A class with a malicious name is among those of the photos."""
    photos = write_image_folder(tmp_path / "photos", {"train": 20, "test": 6})
    for split in ("train", "test"):
        (photos / split / "green").rename(photos / split / MALICIOUS)
    outputs = run_notebook(blocks("python.md", "python"), tmp_path)
    embedded, fitted, printed, predicted, compared, opened, scored, backbone, exported, refused = outputs
    assert re.search(
        r"<progress max='1' value='1.0000'.*</progress> embedding: 78 of 78 images, .*done in", html_of(embedded)
    )
    assert "<td style='text-align:left'>embedded</td><td style='text-align:left'>78</td>" in html_of(embedded)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["splits"]["test"]
    low, high = metrics["accuracy_interval_95"]
    assert f"{metrics['accuracy']:.4f} ({low:.4f} to {high:.4f})" in html_of(fitted)
    assert f"test accuracy {metrics['accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}, 18 images" in text_of(
        printed
    )
    assert "18 of 18 predictions" in html_of(predicted)
    assert "exact McNemar p = " in html_of(compared)
    assert "pooler [" in html_of(opened)
    assert float(text_of(scored).split()[0]) > 0.9
    assert re.match(r"\(1, \d+\)", text_of(backbone))
    assert "probe-tiny" in html_of(backbone)
    assert text_of(exported).strip() in ("blue", "red", MALICIOUS)
    assert text_of(refused).startswith("run exists already: choose another --out")
    everything = "".join(map(html_of, outputs))
    assert "&lt;img src=x onerror=alert(1)&gt;" in everything
    assert "<img" not in everything
    told = "".join("".join(output["text"]) for cell in outputs for output in cell if output.get("name") == "stderr")
    assert "embedding: " not in told  # progress is in the bars


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, and a ResNet; caches that a page makes stay for the next, which then continues them."""
    root = tmp_path_factory.mktemp("desk")
    write_image_folder(root / "photos", {"train": 12, "val": 8, "test": 6})
    write_tiny_resnet(root / "resnet")
    return root


@pytest.mark.pages
@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md") if path.name != "python.md"))
def test_every_command_of_a_page_runs(page: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, but that small backbones stand for those of the Hub, and few reports are drawn."""
    monkeypatch.chdir(desk)
    if tables := blocks(page, "csv"):
        Path("labels.csv").write_text(tables[0])
    commands = "".join(blocks(page, "bash")).splitlines()
    assert commands
    for command in commands:
        words = [STAND_INS.get(word, word) for word in shlex.split(command)]
        assert words[0] == "probe"
        if words[1:3] == ["cache", "merge"] and not Path("shared-copy").exists():
            shutil.copytree("cache", "shared-copy")
        if words[1] in ("fit-linear", "finetune") and page != "reading-the-report.md":
            words.append("--no-report")
        assert main(words[1:]) == 0, command
    for path in desk.iterdir():  # runs, which the next page makes again
        if path.is_dir() and (path / "classifier.json").exists():
            shutil.rmtree(path)
        elif path.suffix == ".csv":
            path.unlink()


def as_run(command: str) -> list[str]:
    """The words of a command of the README, with what is here for what it calls B, IMAGES and so on."""
    words = shlex.split(command)[1:]
    if "…" in words:
        at = words.index("…")
        words[at : at + 1] = ["photos", "--backbone", "B", "--out", "tuned"]
    for at, word in enumerate(words):
        words[at] = "cache" if words[at - 1 : at + 1] == ["--cache", "DIR"] else READMES_STAND_INS.get(word, word)
    if "finetune" in words:
        words += ["--epochs", "1", "--batch-size", "8"]
    if {"fit-linear", "finetune"} & set(words):
        words.append("--no-report")
    writes = ("fit-linear", "finetune", "launch", "predict", "export", "audit")
    return [*words, "--overwrite"] if words[0] in writes else words


@pytest.mark.pages
@pytest.mark.timeout(900)
def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as printed but for names that stand for others; test_readme says which run elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    write_image_folder(tmp_path / "photos", {"train": 12, "test": 6})
    for name, split in {"a": "train", "b": ""}.items():  # so that no two have one path
        write_image_folder(tmp_path / f"photos-{name}", {split: 4}, seed=1)
        assert main(["embed", f"photos-{name}", *SAME, "--out", name]) == 0
    assert main(["embed", "photos", *SAME, "--out", "cache"]) == 0
    shutil.copytree("photos", "more-photos")
    (tmp_path / ".local/share/bash-completion/completions").mkdir(parents=True)
    commands = [command for command in readme_commands() if where_it_runs(command) is None]
    verbs = {command.split()[1] for command in commands}
    assert verbs >= {"embed", "fit-linear", "finetune", "launch", "predict", "export", "cache", "audit", "compare"}
    for command in commands:
        if ">" in command:
            assert subprocess.run(command, shell=True, check=False).returncode == 0, command
            continue
        words = as_run(command)
        if words[0] == "compare":
            for name in ("run_a", "run_b"):
                shutil.copytree("run", name)
        if words[:2] == ["cache", "import"]:
            assert main(["cache", "export", "cache", "--single", "features.npz"]) == 0
        if "--init run" in command:
            assert main(as_run("probe fit-linear cache --out run")) == 0
        assert main(words) == 0, command
    assert "fit-linear" in next(tmp_path.glob(".local/share/*/*/probe")).read_text()


def test_the_guide_shown_is_the_guide_that_runs() -> None:
    """Its steps, put together, but for empty lines."""
    shown = "".join(blocks("from-the-guides.md", "python")).split("\n")
    runs = (ROOT / "tests" / "guide_script.py").read_text().split("\n")
    assert [line for line in shown if line] == [line for line in runs if line]


def test_each_step_of_the_guides_stands_beside_ours() -> None:
    """Theirs in `py` and `julia`, ours in `python` and `bash`."""
    steps = (DOCS / "from-the-guides.md").read_text().split("\n### ")[1:]
    numbered = [step for step in steps if step[0].isdigit()]
    assert [step[0] for step in numbered] == [*"12345", *"123456"]
    assert all("```py\n" in step and "```python\n" in step for step in numbered[:5])
    assert all("```julia\n" in step and "Here" in step for step in numbered[5:])


def test_every_public_name_stands_on_the_python_page() -> None:
    table = (DOCS / "python.md").read_text().partition("## All names")[2]
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", table))))
    assert set(probe._HOMES) <= named


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
