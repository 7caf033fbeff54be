"""`--distributed` and `probe launch`: several processes on loopback give what one gives, whatever becomes of them.

The long ones: pytest -m cluster tests/test_distributed.py
"""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from probe.config import FinetuneConfig, LaunchConfig
from probe.errors import ConfigError

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",  # the processes share two cores
}
LEARNING = ["--init", "zeros", "--optimizer", "sgd", "--backbone-lr", "1e-2", "--head-lr", "0.1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that no few epochs tell apart, in numbers that no number of processes divides, one of them unreadable."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, num in (("train", 13), ("val", 5), ("test", 3)):
        for channel, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for index in range(num):
                pixels = rng.integers(0, 200, (18, 18, 3), np.uint8)
                pixels[..., channel] += 15
                Image.fromarray(pixels).save(root / split / name / f"{index:02d}.png")
    (root / "train" / "blue" / "03.png").write_bytes(b"no picture")
    return root


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "probe.cli", *map(str, words)]


def finetune(photos: Path, backbone: Path, out: Path, *more: str) -> list[str]:
    options = ["--batch-size", "8", "--epochs", "2", "--num-workers", "1", "--keep", "finetuned", *LEARNING, *more]
    return ["finetune", str(photos), "--backbone", str(backbone), "--out", str(out), *options]


def run(words: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*words), cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@contextlib.contextmanager
def free_port() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{free.getsockname()[1]}"


def all_done(commands: Sequence[Sequence[str]], **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """What becomes of commands that run side by side."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT | environment, **pipes) for words in commands]
    outputs = [process.communicate() for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


def together(words: Sequence[str], num: int, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """The same command in so many processes, as a scheduler would start them."""
    with free_port() as coordinator:
        place = ["--distributed", "--coordinator", coordinator, "--num-processes", str(num), "--process-id"]
    return all_done([command(*words, *place, index) for index in range(num)], **environment)


def losses(run_folder: Path) -> np.ndarray:
    """[E, 4]: losses and accuracies of training and validation."""
    with open(run_folder / "history.csv") as file:
        lines = list(csv.DictReader(file))
    fields = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
    return np.array([[float(line[field]) for field in fields] for line in lines])


def weights(run_folder: Path) -> dict[str, np.ndarray]:
    files = (run_folder / "head.safetensors", run_folder / "backbone" / "model.safetensors")
    return {name: array for file in files for name, array in safetensors.numpy.load_file(file).items()}


def assert_same_run(ours: Path, theirs: Path, *, atol: float = 1e-5) -> None:
    """The losses of every epoch, the final figures and the saved weights, to float error."""
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-5, atol=1e-6)  # logits are float32
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (ours, theirs))
    assert [a["chosen_epoch"], a["chosen_alpha"]] == [b["chosen_epoch"], b["chosen_alpha"]]
    assert a["failures"] == b["failures"]
    for split in ("train", "test"):
        assert a["splits"][split]["n"] == b["splits"][split]["n"]
        assert a["splits"][split]["nll"] == pytest.approx(b["splits"][split]["nll"], rel=1e-5)
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=atol, err_msg=name)


def test_two_processes_with_parameters_divided_give_the_losses_of_one(tiny_clip: Path) -> None:
    script = [sys.executable, str(ROOT / "tests" / "sharded_run.py"), str(tiny_clip)]
    one = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout.splitlines()
    with free_port() as coordinator:
        started = [[*script, "--fsdp", "--processes", coordinator, "2", str(index)] for index in range(2)]
    first, second = all_done(started)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    two = first.stdout.splitlines()
    assert (one[0], two[0]) == ("1 devices", "2 devices")
    np.testing.assert_allclose(np.array(two[2:], float), np.array(one[2:], float), rtol=1e-5)
    assert int(two[1]) < 0.6 * int(one[1])


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    options = {"images": tmp_path, "backbone": "b", "out": tmp_path / "run"}
    with pytest.raises(ConfigError, match="--process-id must be left out without --distributed, got 1"):
        FinetuneConfig(**options, process_id=1)
    with pytest.raises(ConfigError, match="--coordinator needs --num-processes, --process-id as well"):
        FinetuneConfig(**options, distributed=True, coordinator="a:1")
    with pytest.raises(ConfigError, match="--process-id must be from 0 to 1, got 2"):
        FinetuneConfig(**options, distributed=True, coordinator="a:1", num_processes=2, process_id=2)
    with pytest.raises(ConfigError, match="--- must be followed by finetune or fit-linear, got embed"):
        LaunchConfig(n=2, command=("embed", "photos"))
    with pytest.raises(ConfigError, match="--process-id is what `probe launch` gives to each process: leave it out"):
        LaunchConfig(n=2, command=("finetune", "photos", "--process-id=1"))


@pytest.mark.cluster
def test_without_a_scheduler_somebody_has_to_say_who_the_others_are(
    photos: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    words = [*finetune(photos, tiny_clip, tmp_path / "run"), "--distributed"]
    done = subprocess.run(command(*words), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no Slurm, Open MPI or Kubernetes has started this process" in done.stderr
    assert "use `probe launch`" in done.stderr.splitlines()[-1]


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num", "options"),
    [
        (2, ["--fsdp", "--unfreeze-last", "1"]),
        (4, []),
        (2, ["--init", "probe", "--flip", "0.5", "--mixup", "0.2", "--accumulate", "2"]),
    ],
    ids=["divided", "four", "augmented"],
)
def test_several_processes_make_the_run_of_one(
    num: int, options: list[str], photos: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    done = together([*finetune(photos, tiny_clip, tmp_path / "several", *options), "--json"], num)
    assert [process.returncode for process in done] == [0] * num, done
    assert json.loads(done[0].stdout).items() >= json.loads((tmp_path / "several" / "metrics.json").read_text()).items()
    assert [(process.stdout, process.stderr) for process in done[1:]] == [("", "")] * (num - 1)
    run(finetune(photos, tiny_clip, tmp_path / "one", *options, "--cache-prefix", "off"))
    assert_same_run(tmp_path / "several", tmp_path / "one")
    cached = json.loads(done[0].stdout)["cached_prefix"]
    assert (cached is not None) == ("--unfreeze-last" in options)
    assert not list(tmp_path.glob("*.checkpoints"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 1,501 rows of 5 overlapping classes, with splits."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    labels = rng.integers(0, 5, 1501)
    embeddings = rng.normal(size=(1501, 12)) + 0.6 * rng.normal(size=(5, 12))[labels] + 3
    splits = np.where(np.arange(1501) % 5 == 0, "test", np.where(np.arange(1501) % 7 == 0, "val", "train"))
    np.savez(folder / "all.npz", embeddings=embeddings.astype(np.float32), labels=labels.astype(str), splits=splits)
    np.savez(folder / "train.npz", embeddings=embeddings.astype(np.float32), labels=labels.astype(str))
    for name in ("all", "train"):
        run(["cache", "import", str(folder / f"{name}.npz"), "--out", str(folder / name)])
    return folder


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ("all", ["--scalings", "standard", "l2"]),
        ("train", []),
        ("train", ["--max-memory", "0.0001", "--criterion", "nll"]),
    ],
    ids=["validation", "folds", "streamed"],
)
def test_several_processes_find_the_optimum_of_one(rows: str, options: list[str], cache: Path, tmp_path: Path) -> None:
    words = ["fit-linear", str(cache / rows), *options, "--no-report", "--out"]
    run([*words, str(tmp_path / "one")])
    done = together([*words, str(tmp_path / "two"), "--json"], 2)
    assert [process.returncode for process in done] == [0, 0], done
    assert (done[1].stdout, done[1].stderr) == ("", "")
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert json.loads(done[0].stdout).items() >= two.items()
    assert two["penalty"] == pytest.approx(one["penalty"], rel=1e-7)  # of the mean variance, summed in another order
    assert two["solution"]["converged"]
    assert two["solution"]["objective"] == pytest.approx(one["solution"]["objective"], rel=1e-8)
    assert two["temperature"] == pytest.approx(one["temperature"], rel=1e-3)  # of heads at the path's float32 tolerance
    for split in one["splits"]:
        for figure in ("n", "accuracy", "nll"):
            assert two["splits"][split][figure] == pytest.approx(one["splits"][split][figure], rel=1e-3), split
    heads = [safetensors.numpy.load_file(tmp_path / name / "head.safetensors") for name in ("one", "two")]
    scale = one["temperature"], two["temperature"]
    for leaf in ("kernel", "bias"):  # what was solved, before the temperature
        np.testing.assert_allclose(heads[1][leaf] * scale[1], heads[0][leaf] * scale[0], atol=1e-4)
    assert any("2 processes divide the rows" in warning for warning in two["warnings"])


def start_launch(words: Sequence[str], num: int, *options: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command("launch", "--n", num, *options, "--", *words), cwd=ROOT, env=ENVIRONMENT, **pipes)


def children(process: subprocess.Popen[str]) -> dict[int, int]:
    """The processes that a launcher has started: their number → pid."""
    found = {}
    for line in Path(f"/proc/{process.pid}/task").glob("*/children"):
        for pid in line.read_text().split():
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "--process-id" in words:
                found[int(words[words.index("--process-id") + 1])] = int(pid)
    return found


def wait_for(process: subprocess.Popen[str], is_there: Callable[[], bool]) -> None:
    while not is_there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[2]) for path in folder.glob("0*-step-*"))


LONG = ["--epochs", "30", "--checkpoint-every", "5", "--backbone-lr", "1e-3", "--head-lr", "0.01"]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_process_that_is_killed_costs_the_steps_since_the_last_checkpoint(
    photos: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    whole = run(["launch", "--n", "2", "--", *finetune(photos, tiny_clip, tmp_path / "whole", *LONG, "--no-report")])
    assert whole.stdout.endswith(f"saved in {tmp_path}/whole: classify with `probe predict {tmp_path}/whole IMAGES`\n")
    process = start_launch([*finetune(photos, tiny_clip, tmp_path / "killed", *LONG), "--no-report"], 2, "--json")
    checkpoints = tmp_path / "killed.checkpoints"
    for victim in (1, 0):
        before = max(saved_steps(checkpoints), default=0)
        wait_for(process, lambda before=before: max(saved_steps(checkpoints), default=0) > before)
        os.kill(children(process)[victim], signal.SIGKILL)
        time.sleep(2)
    out, err = process.communicate()
    assert process.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["restarts"] == ["process 1 was killed by SIGKILL", "process 0 was killed by SIGKILL"]
    assert "probe launch: process 1 was killed by SIGKILL: from the last checkpoint, restart 1 of 3\n" in err
    assert_same_run(tmp_path / "killed", tmp_path / "whole", atol=0)
    assert not checkpoints.exists()


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize("verb", ["finetune", "fit-linear"])
def test_a_process_that_is_killed_once_the_run_is_saved_spoils_nothing(
    verb: str, photos: Path, cache: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    fit_linear = ["fit-linear", str(cache / "all"), "--out", str(out)]
    words = finetune(photos, tiny_clip, out) if verb == "finetune" else fit_linear
    process = start_launch(words, 2, "--json")
    wait_for(process, lambda: (out / "metrics.json").exists())
    saved = (out / "metrics.json").read_bytes()
    os.kill(children(process)[1], signal.SIGKILL)  # while the first one writes the report, for which it waits
    told, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(told.splitlines()[-1])["restarts"] == ["process 1 was killed by SIGKILL"]
    assert (out / "report.html").exists()
    if verb == "finetune":
        assert (out / "metrics.json").read_bytes() == saved
        assert "this run has ended; there is nothing to go on with" in err
        assert not (tmp_path / "run.checkpoints").exists()
    assert json.loads((out / "metrics.json").read_bytes())["splits"] == json.loads(saved)["splits"]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_any_number_of_processes_goes_on_with_what_others_saved(photos: Path, tiny_clip: Path, tmp_path: Path) -> None:
    run(finetune(photos, tiny_clip, tmp_path / "one", *LONG, "--cache-prefix", "off", "--no-report"))
    words = finetune(photos, tiny_clip, tmp_path / "moved", *LONG, "--cache-prefix", "off", "--no-report")
    process = start_launch([*words, "--fsdp"], 2)
    checkpoints = tmp_path / "moved.checkpoints"
    wait_for(process, lambda: len(saved_steps(checkpoints)) > 0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143, err
    assert err.endswith("probe: error: stopped by SIGTERM\n")
    assert "is kept; go on with --resume" in err
    (tmp_path / "kept").mkdir()
    subprocess.run(["cp", "-r", checkpoints, tmp_path / "kept"], check=True)
    assert saved_steps(checkpoints)[-1] < 150
    run([*words, "--resume"])
    assert_same_run(tmp_path / "moved", tmp_path / "one")
    subprocess.run(["cp", "-r", tmp_path / "kept" / "moved.checkpoints", checkpoints], check=True)
    done = together([*words, "--resume", "--overwrite"], 4)
    assert [one.returncode for one in done] == [0] * 4, done
    assert_same_run(tmp_path / "moved", tmp_path / "one")


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_an_error_that_would_come_again_ends_it_with_its_exit_code(
    photos: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    words = finetune(photos, tiny_clip, tmp_path / "run", "--on-error", "fail")
    process = start_launch(words, 2)
    _, err = process.communicate()
    assert process.returncode == 3
    assert "train/blue/03.png: " in err
    assert "Mend it, or pass --on-error skip" in err
    assert "ended with exit code 3, which ended all 2" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_no_process_outlives_its_launcher(photos: Path, tiny_clip: Path, tmp_path: Path) -> None:
    process = start_launch(finetune(photos, tiny_clip, tmp_path / "run", *LONG), 2)
    wait_for(process, lambda: len(saved_steps(tmp_path / "run.checkpoints")) > 0)
    pids = children(process).values()
    assert len(pids) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_without_a_launcher_the_others_say_that_one_is_lost(photos: Path, tiny_clip: Path, tmp_path: Path) -> None:
    words = finetune(photos, tiny_clip, tmp_path / "run", *LONG)
    with free_port() as coordinator:
        place = ["--distributed", "--coordinator", coordinator, "--num-processes", "2", "--process-id"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first, second = (
        subprocess.Popen(command(*words, *place, index), cwd=ROOT, env=ENVIRONMENT, **pipes) for index in range(2)
    )
    wait_for(first, lambda: len(saved_steps(tmp_path / "run.checkpoints")) > 0)
    second.kill()
    second.communicate()
    out, err = first.communicate()
    assert (first.returncode, out) == (10, ""), err
    assert err.splitlines()[-1].startswith("probe: error: process 0 of 2 lost contact with another, which has ended")
