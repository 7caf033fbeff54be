"""`probe demo`: the whole program on sample images that this package carries, one command after the other.

Each step is the command that is printed, run as a process of its own: what the demo shows can be repeated by hand.
Nothing is downloaded: images and backbone are files of this package.
"""

import json
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from probe.config import DemoConfig
from probe.errors import CorruptError, InputError, ProbeError
from probe.storage import atomic_folder

_PACKAGE = Path(__file__).parent
_PLACES = (_PACKAGE / "samples", _PACKAGE.parent / "data" / "samples")  # of the wheel, and of a checkout
_SAMPLES = "emoji.zip"
_BACKBONE = "probe-tiny"
_SHOWN = (
    "test/animals & nature/t-rex.png",
    "test/food & drink/banana.png",
    "test/activities/kite.png",
)


def demo(config: DemoConfig) -> dict[str, Any]:
    """Runs the verbs on the samples, in `config.out`, and says what came of it.

    Returns: {"out", "steps": [{"command", "seconds"}], "accuracy": {row: {"accuracy", "interval_95", "n"}}, "files":
      {folder: {"files", "bytes"}}, "seconds"}; accuracies are those of the test split.
    Raises: InputError if `config.out` is there already; ProbeError with a step's exit code if that step fails.
    """
    out = config.out
    if out.exists():
        raise InputError(f"{out} exists: give another --out, or delete it")
    started = time.monotonic()
    unpack(samples(), out / "emoji")
    images, cache, backbone = str(out / "emoji"), str(out / "cache"), ["--backbone", _BACKBONE]
    linear, tuned, words = (str(out / name) for name in ("linear", "finetuned", "zero-shot"))
    few = [str(out / "emoji" / name) for name in _SHOWN]
    commands = [
        ["embed", images, *backbone, "--out", cache],
        ["fit-linear", cache, "--out", linear],
        ["zero-shot", images, *backbone, "--prompts", "{}", "a picture of {}", "--out", words],
        ["finetune", images, *backbone, "--cache", cache, *_FINETUNE, "--out", tuned],
        ["predict", linear, *few],
    ]
    steps = [_run(command) for command in commands]
    of = {name: json.loads((out / name / "metrics.json").read_text()) for name in ("zero-shot", "linear", "finetuned")}
    baseline = of["linear"]["baseline"]
    figures = {
        "zero-shot, no labels": of["zero-shot"]["splits"]["test"],
        "linear probe": of["linear"]["splits"]["test"],
        "  scikit-learn beside it": baseline,
        f"fine-tuned (kept: the {of['finetuned']['verdict']['kept']})": of["finetuned"]["splits"]["test"],
    }
    return {
        "out": str(out),
        "steps": steps,
        "accuracy": {
            row: {"accuracy": f["accuracy"], "interval_95": f["accuracy_interval_95"], "n": f["n"]}
            for row, f in figures.items()
        },
        "files": {path.name: _content(path) for path in sorted(out.iterdir())},
        "seconds": time.monotonic() - started,
    }


_FINETUNE = ["--unfreeze-last", "1", "--epochs", "3", "--batch-size", "32", "--backbone-lr", "3e-4"]


def describe(result: dict[str, Any]) -> str:
    """The table at the end."""
    lines = ["", f"{'on the test split':34}  accuracy  95 % interval        images"]
    for row, figures in result["accuracy"].items():
        low, high = figures["interval_95"]
        lines.append(f"{row:34}  {figures['accuracy']:.4f}    {low:.4f} to {high:.4f}  {figures['n']:8,}")
    lines += ["", f"{'step':34}  seconds"]
    lines += [f"{'probe ' + step['command'].split()[1]:34}  {step['seconds']:7.1f}" for step in result["steps"]]
    lines.append(f"{'all':34}  {result['seconds']:7.1f}")
    lines += ["", f"{'written':34}  files        kB"]
    for name, content in result["files"].items():
        path = str(Path(result["out"]) / name)
        lines.append(f"{path:34}  {content['files']:5,}  {content['bytes'] / 1000:8,.0f}")
    return "\n".join(lines)


def samples() -> Path:
    """The file of sample images. Raises: CorruptError if the installation lacks it."""
    for place in _PLACES:
        if (place / _SAMPLES).is_file():
            return place / _SAMPLES
    raise CorruptError(f"{_PLACES[0] / _SAMPLES} is missing: install this package again")


def unpack(archive: Path, folder: Path) -> None:
    """Writes the files of a zip file of class folders into a new folder, which appears only once it is whole."""
    with zipfile.ZipFile(archive) as file, atomic_folder(folder) as partial:
        file.extractall(partial)


def _run(arguments: list[str]) -> dict[str, Any]:
    """Runs one command, shown first; its output goes where ours goes."""
    command = shlex.join(["probe", *arguments])
    print(f"\n$ {command}", flush=True)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "probe.cli", *arguments], check=False)  # noqa: S603
    if done.returncode:
        raise _StepFailedError(command, done.returncode)
    return {"command": command, "seconds": round(time.monotonic() - started, 1)}


class _StepFailedError(ProbeError):
    """A command of the demo ended with an error, which it has told itself."""

    def __init__(self, command: str, exit_code: int) -> None:
        super().__init__(f"the demo ends here, since this failed: {command}")
        self.exit_code = exit_code if exit_code > 0 else 128 - exit_code


def _content(path: Path) -> dict[str, int]:
    files = [file for file in path.rglob("*") if file.is_file()]
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
